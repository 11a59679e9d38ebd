// Every kernel against the reference: all storage types, all variants, sizes and addresses around every boundary.
#include <bit>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "cases.hpp"
#include "check.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/threads.hpp"
#include "data.hpp"
#include "reference.hpp"
#include "step.hpp"

namespace sgdcore::test {

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
    Bench bench(step, 129);
    for (const DTypes& dtypes : all_triples()) {
        for (const Step& taken : all_steps()) {
            for (const std::int64_t size : sizes) {
                for (const Placement placement : all_placements) {
                    for (const bool zero_grad : {false, true}) {
                        bench.run({dtypes, taken.hyper, taken.first, zero_grad, size, placement});
                    }
                }
            }
        }
    }
}

TEST(kernels, block_boundary) {
    // A gradient that is cleared goes through in blocks of 1024 elements.
    Bench bench(step, 2049);
    Random random(3);
    const std::vector<Step> steps = all_steps();
    for (const DTypes& dtypes : all_triples()) {
        for (const Step& taken : steps) {
            if (reduced && random.below(16) != 0) continue;
            const std::int64_t size = 1023 + random.below(3);
            bench.run({dtypes, taken.hyper, taken.first, true, size, Placement::odd});
        }
        bench.run({dtypes, nesterov_step.hyper, false, true, 2049, Placement::aligned});
    }
}

TEST(kernels, thread_boundary) {
    // From 2 * 32 Ki elements on the work is cut, at cache lines of the parameter if its address allows that.
    const std::int64_t sizes[] = {65535, 65536, 65537, 3 * 32768 - 1, 3 * 32768, 3 * 32768 + 1, 65536 + 63, 65536 + 65};
    Bench bench(step, 3 * 32768 + 1);
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
    Bench bench(step, 65);
    Random random(4);
    const auto pick = [&] { return values[random.below(std::ssize(values))]; };
    for (int i = 0; i < (reduced ? 400 : 20000); ++i) {
        const SgdHyper hyper{pick(),
                             pick(),
                             pick(),
                             pick(),
                             random.below(2) == 0,
                             random.below(2) == 0,
                             random.below(3) == 0,
                             random.below(2) == 0};
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
