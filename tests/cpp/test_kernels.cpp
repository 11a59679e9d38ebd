// Every kernel against the reference: all storage types, all variants, sizes and addresses around every boundary.
#include <bit>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/threads.hpp"
#include "data.hpp"
#include "reference.hpp"
#include "step.hpp"

namespace sgdcore::test {
namespace {

struct Case {
    DTypes dtypes;
    SgdHyper hyper;
    bool first;
    bool zero_grad;
    std::int64_t size;
    Placement placement;

    std::string text() const {
        static constexpr const char* placements[] = {"aligned", "at a page's end", "at odd addresses"};
        return describe(dtypes) + "; " + describe(hyper, first) + (zero_grad ? " zero_grad" : "") + "; " +
               std::to_string(size) + " elements " + placements[static_cast<int>(placement)];
    }
};

/// Memory for one case after the other.
class Bench {
  public:
    explicit Bench(std::int64_t largest) : param_(bytes(largest)), grad_(bytes(largest)), momentum_(bytes(largest)) {}

    /// Takes one step over fresh arrays and compares every byte of them with the reference.
    void run(const Case& test) {
        const auto size = static_cast<std::size_t>(test.size);
        const auto [param_dtype, grad_dtype, momentum_dtype] = test.dtypes;
        std::byte* param = param_.place(size * item_size(param_dtype), test.placement, 1);
        std::byte* grad = grad_.place(size * item_size(grad_dtype), test.placement, 3);
        std::byte* momentum = momentum_.place(size * item_size(momentum_dtype), test.placement, 5);
        fill(param_dtype, param, test.size, random_);
        fill(grad_dtype, grad, test.size, random_);
        fill(momentum_dtype, momentum, test.size, random_);
        if (test.first) {
            // What a buffer that was never written may hold.
            for (std::int64_t i = 0; i < test.size; ++i) {
                write_word(momentum_dtype, momentum, i, signalling_nan(momentum_dtype));
            }
        }
        expected_param_.clear(), expected_grad_.clear(), expected_momentum_.clear();
        for (std::int64_t i = 0; i < test.size; ++i) {
            Word p = read_word(param_dtype, param, i), b = read_word(momentum_dtype, momentum, i);
            const Word g = read_word(grad_dtype, grad, i);
            update_word(test.dtypes, test.hyper, test.first, p, g, b);
            expected_param_.push_back(p);
            expected_grad_.push_back(test.zero_grad ? 0 : g);
            expected_momentum_.push_back(b);
        }

        TensorRef tensor{.param = param, .grad = grad, .momentum = momentum, .size = test.size};
        // Without momentum the buffer must not even be read.
        if (test.hyper.momentum == 0) tensor.momentum = momentum_.forbidden();
        tensor.param_dtype = param_dtype;
        tensor.grad_dtype = grad_dtype;
        tensor.momentum_dtype = momentum_dtype;
        tensor.first = test.first;
        step({&tensor, 1}, {&test.hyper, 1}, {.zero_grad = test.zero_grad});

        compare(test, "param", param_dtype, param, expected_param_, false);
        // What is not computed has to be the same to the bit, NaNs too.
        compare(test, "grad", grad_dtype, grad, expected_grad_, true);
        compare(test, "momentum", momentum_dtype, momentum, expected_momentum_, test.hyper.momentum == 0);
        CHECK(param_.intact(), "written outside param: " + test.text());
        CHECK(grad_.intact(), "written outside grad: " + test.text());
        CHECK(momentum_.intact(), "written outside momentum: " + test.text());
    }

  private:
    static std::size_t bytes(std::int64_t largest) { return static_cast<std::size_t>(largest) * sizeof(double); }

    static void compare(const Case& test, const char* name, DType dtype, const std::byte* actual,
                        const std::vector<Word>& expected, bool also_nans) {
        for (std::size_t i = 0; i < expected.size(); ++i) {
            const Word word = read_word(dtype, actual, static_cast<std::int64_t>(i));
            const bool same = also_nans ? word == expected[i] : same_word(dtype, word, expected[i]);
            CHECK(same, std::string(name) + "[" + std::to_string(i) + "] is " + hex(word) + ", not " +
                            hex(expected[i]) + ": " + test.text());
        }
    }

    GuardedArray param_, grad_, momentum_;
    std::vector<Word> expected_param_, expected_grad_, expected_momentum_;
    Random random_{2};
};

struct Step {
    SgdHyper hyper;
    bool first;
};

/// Every variant the kernels distinguish, times everything they read at run time. None of the coefficients is exact in
/// any of the formats.
std::vector<Step> all_steps() {
    std::vector<Step> steps;
    for (int choice = 0; choice < 3 * 16; ++choice) {
        SgdHyper hyper{.lr = 0.1};
        hyper.momentum = choice / 16 == 0 ? 0 : 0.9;
        hyper.dampening = choice & 1 ? 0.3 : 0;
        hyper.weight_decay = choice & 2 ? 0.01 : 0;
        hyper.nesterov = (choice & 4) != 0;
        hyper.maximize = (choice & 8) != 0;
        steps.push_back({hyper, choice / 16 == 1});
    }
    return steps;
}

const Step nesterov_step{{.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.01, .nesterov = true}, false};

}  // namespace

TEST(kernels, the_forced_instruction_set_runs) {
    const char* forced = std::getenv("SGDCORE_ISA");
    if (forced == nullptr) throw Skip{"SGDCORE_ISA is not set"};
    CHECK(cpu::instruction_set().name == forced, std::string(cpu::instruction_set().name));
}

TEST(kernels, every_instance_and_vector_boundary) {
    // Around whole vectors of 4, 8, 16 and 32 elements, and of a few vectors for unrolled loops.
    const std::vector<std::int64_t> sizes =
        reduced ? std::vector<std::int64_t>{0, 1, 7, 16, 33}
                : std::vector<std::int64_t>{0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129};
    Bench bench(129);
    for (const DTypes& dtypes : all_triples()) {
        for (const Step& step : all_steps()) {
            for (const std::int64_t size : sizes) {
                for (const Placement placement : all_placements) {
                    for (const bool zero_grad : {false, true}) {
                        bench.run({dtypes, step.hyper, step.first, zero_grad, size, placement});
                    }
                }
            }
        }
    }
}

TEST(kernels, block_boundary) {
    // A gradient that is cleared goes through in blocks of 1024 elements.
    Bench bench(2049);
    Random random(3);
    const std::vector<Step> steps = all_steps();
    for (const DTypes& dtypes : all_triples()) {
        for (const Step& step : steps) {
            if (reduced && random.below(16) != 0) continue;
            const std::int64_t size = 1023 + random.below(3);
            bench.run({dtypes, step.hyper, step.first, true, size, Placement::odd});
        }
        bench.run({dtypes, nesterov_step.hyper, false, true, 2049, Placement::aligned});
    }
}

TEST(kernels, thread_boundary) {
    // From 2 * 32 Ki elements on the work is cut, at cache lines of the parameter if its address allows that.
    const std::int64_t sizes[] = {65535, 65536, 65537, 3 * 32768 - 1, 3 * 32768, 3 * 32768 + 1, 65536 + 63, 65536 + 65};
    Bench bench(3 * 32768 + 1);
    Random random(3);
    int skipped = 0;
    for (const DTypes& dtypes : all_triples()) {
        if (reduced && ++skipped % 5 != 0) continue;
        cpu::set_num_threads(2 + static_cast<int>(random.below(2)));
        const std::int64_t size = sizes[random.below(std::ssize(sizes))];
        const Placement placement = all_placements[random.below(std::ssize(all_placements))];
        bench.run({dtypes, nesterov_step.hyper, false, random.below(2) == 0, size, placement});
    }
    cpu::set_num_threads(0);
}

TEST(kernels, unusual_hyperparameters) {
    // Which terms exist is decided by the numbers as given, also where they vanish in float32.
    const double nan_with_all_bits = std::bit_cast<double>(0x7fffffffffffffff);
    const double values[] = {0, -0.0, 1, -0.5, 1e-3, 1e-60, 5e-324, 1e30, 1e300, INFINITY, NAN, nan_with_all_bits};
    Bench bench(65);
    Random random(4);
    const auto pick = [&] { return values[random.below(std::ssize(values))]; };
    for (int i = 0; i < (reduced ? 400 : 20000); ++i) {
        const SgdHyper hyper{pick(), pick(), pick(), pick(), random.below(2) == 0, random.below(2) == 0};
        const auto dtype = [&] { return all_dtypes[random.below(std::ssize(all_dtypes))]; };
        const DTypes dtypes{dtype(), dtype(), dtype()};
        bench.run({dtypes, hyper, random.below(2) == 0, random.below(2) == 0, random.below(66), Placement::odd});
    }
}

TEST(kernels, a_pointer_may_be_null_where_nothing_is_read) {
    const SgdHyper plain{.lr = 0.5}, with_momentum{.lr = 0.5, .momentum = 0.5};
    float param = 3, grad = 2;
    TensorRef tensor{
        .param = reinterpret_cast<std::byte*>(&param), .grad = reinterpret_cast<std::byte*>(&grad), .size = 1};
    step({&tensor, 1}, {&plain, 1}, {});
    CHECK(param == 2);
    tensor = TensorRef{};
    step({&tensor, 1}, {&with_momentum, 1}, {.zero_grad = true});
    step({}, {}, {});
}

}  // namespace sgdcore::test
