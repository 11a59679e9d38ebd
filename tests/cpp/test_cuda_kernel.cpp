// The device's kernel over a simulated grid: the cases of the CPU's kernels, and the walk over chunks.
#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

#include "cases.hpp"
#include "check.hpp"
#include "cuda/stepper.hpp"
#include "data.hpp"
#include "reference.hpp"
#include "simulated.hpp"

namespace sgdcore::test {
namespace {

/// A device whose blocks and threads come in a random order.
cuda::SimulatedRuntime& device() {
    static cuda::SimulatedRuntime runtime;
    runtime.shuffled = true;
    return runtime;
}

void step_on_device(std::span<const TensorRef> tensors, std::span<const SgdHyper> hypers, const StepOptions& options) {
    static cuda::Stepper stepper(device(), 0);
    stepper.step(tensors, hypers_of(hypers), {}, options, {});
}

}  // namespace

TEST(cuda_kernel, every_instance_and_vector_boundary) {
    // Around whole vectors of 2, 4 and 8 elements, and several of them.
    const std::vector<std::int64_t> sizes = reduced
                                                ? std::vector<std::int64_t>{0, 1, 8, 17}
                                                : std::vector<std::int64_t>{0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33};
    Bench bench(step_on_device, 33, true);
    Random random(5);
    for (const DTypes& dtypes : all_triples()) {
        for (const Step& taken : all_steps()) {
            if (reduced && random.below(4) != 0) continue;
            for (const std::int64_t size : sizes) {
                for (const Placement placement : all_placements) {
                    bench.run({dtypes, taken.hyper, taken.first, random.below(2) == 0, size, placement});
                }
            }
        }
    }
}

TEST(cuda_kernel, turns_of_a_block_and_chunk_boundary) {
    // Around one and two vectors for each thread of a block, around chunks, and more chunks than blocks at once.
    const std::int64_t turn = 8 * cuda::block_threads;
    const std::int64_t sizes[] = {turn / 4 - 1,   turn / 2 + 1,   turn - 1,          turn,
                                  turn + 1,       2 * turn + 7,   chunk_size - 1,    chunk_size,
                                  chunk_size + 1, 2 * chunk_size, 7 * chunk_size + 3};
    Bench bench(step_on_device, 7 * chunk_size + 3, true);
    Random random(6);
    int skipped = 0;
    for (const DTypes& dtypes : all_triples()) {
        if (reduced && ++skipped % 8 != 0) continue;
        for (int i = 0; i < 4; ++i) {
            const Placement placement = all_placements[random.below(std::ssize(all_placements))];
            const std::int64_t size = sizes[random.below(std::ssize(sizes))];
            bench.run({dtypes, nesterov_step.hyper, random.below(4) == 0, random.below(2) == 0, size, placement});
        }
    }
    for (const std::int64_t size : sizes) {
        for (const DType dtype : all_dtypes) {
            bench.run({{dtype, dtype, dtype}, nesterov_step.hyper, false, true, size, Placement::odd});
            if (!reduced) bench.run({{dtype, dtype, dtype}, {.lr = 0.1}, false, false, size, Placement::aligned});
        }
    }
}

TEST(cuda_kernel, unusual_hyperparameters) {
    const double values[] = {0, -0.0, 1, -0.5, 1e-3, 1e-60, 5e-324, 1e30, 1e300, INFINITY, NAN};
    Bench bench(step_on_device, 65, true);
    Random random(4);
    const auto pick = [&] { return values[random.below(std::ssize(values))]; };
    for (int i = 0; i < (reduced ? 400 : 10000); ++i) {
        const SgdHyper hyper{pick(), pick(), pick(), pick(), random.below(2) == 0, random.below(2) == 0};
        const auto dtype = [&] { return all_dtypes[random.below(std::ssize(all_dtypes))]; };
        const DTypes dtypes{dtype(), dtype(), dtype()};
        bench.run({dtypes, hyper, random.below(2) == 0, random.below(2) == 0, random.below(66), Placement::odd});
    }
}

TEST(cuda_kernel, memory_pass_exchanges_parameter_and_momentum) {
    cuda::SimulatedRuntime& runtime = device();
    for (const std::int64_t quads : {0, 1, 255, 256, 257, 5000}) {
        Random random(9);
        const auto make = [&] {
            std::vector<float> array(static_cast<std::size_t>(4 * quads + 4));
            fill(DType::float32, reinterpret_cast<std::byte*>(array.data()), std::ssize(array), random);
            return array;
        };
        alignas(16) static float memory[3][4 * 5000 + 4];
        const auto bits = [](const float& value) { return std::bit_cast<std::uint32_t>(value); };
        std::vector<float> before[3];
        for (int i = 0; i < 3; ++i) {
            before[i] = make();
            std::ranges::copy(before[i], memory[i]);
        }
        const auto bytes = [](float* array) { return reinterpret_cast<std::byte*>(array); };
        runtime.memory_pass(0, 3, {bytes(memory[0]), bytes(memory[1]), bytes(memory[2]), quads}, nullptr);
        for (std::size_t i = 0; i < before[0].size(); ++i) {
            const bool inside = i < static_cast<std::size_t>(4 * quads);
            const std::uint32_t p = bits(before[0][i]), b = bits(before[1][i]), g = bits(before[2][i]);
            CHECK(bits(memory[0][i]) == (inside ? b ^ g : p), std::to_string(quads));
            CHECK(bits(memory[1][i]) == (inside ? p : b), std::to_string(quads));
            CHECK(bits(memory[2][i]) == g, std::to_string(quads));
        }
    }
}

}  // namespace sgdcore::test
