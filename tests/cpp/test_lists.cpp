// Work lists: many tensors of different kinds in one step, any number of threads, and lists that are refused.
#include <climits>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/threads.hpp"
#include "data.hpp"
#include "step.hpp"

namespace sgdcore::test {
namespace {

const std::vector<SgdHyper> hypers{
    {.lr = 0.1},
    {.lr = 0.01, .momentum = 0.9, .weight_decay = 1e-4, .nesterov = true},
    {.lr = 0.3, .momentum = 0.5, .dampening = 0.5, .maximize = true},
    {.lr = 1e-3, .weight_decay = 0.1},
};

/// Tensors of all triples of storage types, sizes from nothing to several slices, all groups, some at their first step.
std::vector<TestTensor> many_tensors() {
    Random random(6);
    const std::vector<DTypes> triples = all_triples();
    const std::int64_t sizes[] = {1, 0, 3, 64, 1000, 17, 4096, 5, 33, 129};
    std::vector<TestTensor> tensors;
    for (std::size_t i = 0; i < 4 * triples.size(); ++i) {
        const std::int64_t size = i % 50 == 0 ? 40'000 : sizes[i % std::size(sizes)];
        tensors.emplace_back(triples[i * 7 % triples.size()], size, static_cast<std::uint32_t>(i % hypers.size()),
                             i % 3 == 0, random, i % 5);
    }
    return tensors;
}

}  // namespace

TEST(lists, every_thread_count_gives_the_reference_bits) {
    constexpr int steps = 6;
    // Of the gradients. 1 and infinity leave them out of the arithmetic.
    constexpr double factors[steps] = {1, 1, 0.3, 0x1p-16, 1, 0.3};
    constexpr double infinity = std::numeric_limits<double>::infinity();
    constexpr double limits[steps] = {infinity, infinity, infinity, infinity, 0.7, 0.1};
    std::vector<TestTensor> last;
    for (const int threads : {1, 2, 3, 7}) {
        cpu::set_num_threads(threads);
        std::vector<TestTensor> tensors = many_tensors();
        for (int i = 0; i < steps; ++i) {
            // The gradient is cleared at the last step, so that the earlier ones have something to add.
            const StepOptions options{.zero_grad = i + 1 == steps, .grad_factor = factors[i], .clip_value = limits[i]};
            step_all(tensors, hypers, options);
            for (TestTensor& tensor : tensors) {
                tensor.expect_step(hypers, options);
                tensor.initialized();
            }
        }
        const std::string context = std::to_string(threads) + " threads";
        for (const TestTensor& tensor : tensors) tensor.check(context);
        for (std::size_t i = 0; i < last.size(); ++i) {
            CHECK(tensors[i].same_bytes(last[i]), context + ": tensor " + std::to_string(i) + " differs");
        }
        last = std::move(tensors);
    }
    cpu::set_num_threads(0);
}

TEST(lists, slices_of_one_large_tensor) {
    Random random(7);
    const DTypes float32{DType::float32, DType::float32, DType::float32};
    for (const std::size_t offset : {0, 2, 4, 60}) {
        for (const int threads : {2, 7}) {
            cpu::set_num_threads(threads);
            std::vector<TestTensor> tensors{{float32, 7 * 32768 + 11, 1, false, random, offset}};
            step_all(tensors, hypers, {.zero_grad = threads == 2});
            tensors[0].expect_step(hypers, {.zero_grad = threads == 2});
            tensors[0].check(std::to_string(threads) + " threads, offset " + std::to_string(offset));
        }
    }
    cpu::set_num_threads(0);
}

TEST(lists, slices_of_many_tiny_tensors) {
    Random random(8);
    const DTypes bfloat16{DType::bfloat16, DType::bfloat16, DType::float32};
    std::vector<TestTensor> tensors;
    for (int i = 0; i < 3000; ++i) tensors.emplace_back(bfloat16, random.below(60), i % 4, i % 2 == 0, random, i % 3);
    cpu::set_num_threads(3);
    step_all(tensors, hypers);
    for (TestTensor& tensor : tensors) {
        tensor.expect_step(hypers);
        tensor.check("tiny tensors");
    }
    cpu::set_num_threads(0);
}

TEST(lists, malformed_entries_change_nothing) {
    Random random(9);
    const DTypes float32{DType::float32, DType::float32, DType::float32};
    std::vector<TestTensor> tensors{{float32, 100, 0, false, random}, {float32, 60, 1, false, random}};
    struct Defect {
        const char* message;
        void (*apply)(TensorRef&);
        std::vector<Axis> axes = {};
    };
    constexpr std::int64_t huge = std::numeric_limits<std::int64_t>::max();
    const Defect defects[] = {
        {"hyperparameter index", [](TensorRef& t) { t.hyper = 4; }},
        {"hyperparameter index", [](TensorRef& t) { t.hyper = UINT_MAX; }},
        {"size", [](TensorRef& t) { t.size = -1; }},
        {"size", [](TensorRef& t) { t.size = std::numeric_limits<std::int64_t>::min(); }},
        {"null pointer", [](TensorRef& t) { t.param = nullptr; }},
        {"null pointer", [](TensorRef& t) { t.grad = nullptr; }},
        {"null pointer", [](TensorRef& t) { t.states[0] = nullptr; }},
        {"storage type", [](TensorRef& t) { t.param_dtype = static_cast<DType>(4); }},
        {"storage type", [](TensorRef& t) { t.grad_dtype = static_cast<DType>(7); }},
        {"storage type", [](TensorRef& t) { t.state_dtypes[0] = static_cast<DType>(255); }},
        {"axes", [](TensorRef&) {}, {{59, 4}}},
        {"axes", [](TensorRef&) {}, {{61, 4}}},
        {"axes", [](TensorRef&) {}, {{6, 4}, {11, 4}}},
        {"axes", [](TensorRef&) {}, {{60, 4}, {0, 4}}},
        {"axes", [](TensorRef&) {}, {{0, 4}, {60, 4}}},
        {"axes", [](TensorRef&) {}, {{-6, 4}, {-10, 4}}},
        {"axes", [](TensorRef&) {}, {{huge, 4}, {huge, 4}}},
        {"axes", [](TensorRef&) {}, {{4, 4}, {huge / 4 + 16, 4}}},  // the product is 60 modulo 2^64
        {"axes", [](TensorRef&) {}, std::vector<Axis>(max_dimensions + 1, Axis{1, 4})},
    };
    for (const Defect& defect : defects) {
        // The first entry is fine and must not be updated either.
        TensorRef refs[] = {tensors[0].ref(), tensors[1].ref()};
        refs[1].grad_axes = defect.axes;
        defect.apply(refs[1]);
        CHECK_THROWS(std::invalid_argument, defect.message, step(refs, hypers, {.zero_grad = true}));
        for (const TestTensor& tensor : tensors) tensor.check(defect.message);
    }
    TensorRef no_hypers = tensors[0].ref();
    CHECK_THROWS(std::invalid_argument, "hyperparameter index", step({&no_hypers, 1}, {}, {}));
    tensors[0].check("no hyperparameters");
}

}  // namespace sgdcore::test
