// The norm of all gradients of a step, on the device: the sum of their squares, in two launches, and what follows of
// it. The step's launch behind them reads the result from the device's memory, so the host does not wait.
//
// Every sum is kept as two numbers, of which the second is small, so that the result is the sum of exact arithmetic,
// rounded once, in practice for every number of blocks.
#pragma once

#include <cmath>
#include <cstdint>

#include "update.hpp"

namespace sgdcore::cuda {

/// A chunk's gradient, as a thread sees it.
struct NormWork {
    std::byte* grad;  // at the chunk's first element, or at the tensor's if it is strided
    const Axis* axes;
    std::int64_t start;
    std::int32_t count, axis_count;
    DType grad_dtype;
    bool in_float64;
};

SGDCORE_HOST_DEVICE SGDCORE_INLINE NormWork norm_work(const Launch& launch, std::int64_t number) {
    const Chunk chunk = launch.chunks[number];
    const DeviceTensor& tensor = launch.tensors[chunk.tensor];
    NormWork work{};
    work.start = chunk.index * chunk_size;
    if (tensor.grad == nullptr) return work;  // only its average moves
    const std::int64_t rest = tensor.size - work.start;
    work.count = static_cast<std::int32_t>(rest < chunk_size ? rest : chunk_size);
    work.axes = launch.axes + tensor.axes;
    work.axis_count = tensor.axis_count;
    work.grad_dtype = tensor.grad_dtype;
    work.grad = tensor.grad;
    if (tensor.axis_count == 0) work.grad += work.start * static_cast<std::int64_t>(item_size(tensor.grad_dtype));
    work.in_float64 = tensor.param_dtype == DType::float64 || tensor.grad_dtype == DType::float64;
    for (int state = 0; state < max_states; ++state) {
        work.in_float64 =
            work.in_float64 || (tensor.states[state] != nullptr && tensor.state_dtypes[state] == DType::float64);
    }
    return work;
}

template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void add_square(const Launch& launch, const NormWork& work, double factor, int index,
                                                   NormPartial& sum) {
    C g = load_as<C>(work.grad_dtype, grad_of(work, index), 0);
    if (factor != 1) g = static_cast<C>(factor) * g;
    if (!is_finite(g)) sum.not_finite = 1;
    if (launch.clips) g = clamped(g, static_cast<C>(launch.clip_value));
    const double value = static_cast<double>(g), square = value * value;
    // Exact for float32, whose squares float64 has.
    sum.add(square, sizeof(C) == sizeof(double) ? fused_multiply_add(value, value, -square) : 0.0);
}

/// Adds up the sums of a block's threads in a fixed order; the first one is the result.
template <class Block>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void reduce(Block& block, NormPartial (&sums)[block_threads]) {
    for (int half = block_threads / 2; half > 0; half /= 2) {
        block.barrier();
        block.each_thread([&](int thread) SGDCORE_INLINE_LAMBDA {
            if (thread >= half) return;
            const NormPartial other = sums[thread + half];
            sums[thread].add(other.high, other.low);
            sums[thread].not_finite |= other.not_finite;
        });
    }
    block.barrier();
}

/// Adds the squares of every `block.count()`-th chunk, from `block.index()` on. See `run_block` for Block.
template <class Block>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void sum_squares(const NormLaunch& launch, Block& block,
                                                    NormPartial (&sums)[block_threads]) {
    block.each_thread([&](int thread) SGDCORE_INLINE_LAMBDA {
        NormPartial sum{};
        const double factor = factor_of(launch.step);
        for (std::int64_t chunk = block.index(); chunk < launch.step.chunk_count; chunk += block.count()) {
            const NormWork work = norm_work(launch.step, chunk);
            if (work.in_float64) {
                for (int i = thread; i < work.count; i += block_threads) {
                    add_square<double>(launch.step, work, factor, i, sum);
                }
            } else {
                for (int i = thread; i < work.count; i += block_threads) {
                    add_square<float>(launch.step, work, factor, i, sum);
                }
            }
        }
        sums[thread] = sum;
    });
    reduce(block, sums);
    block.leader([&] { launch.partials[block.index()] = sums[0]; });
}

/// Adds up the blocks' sums, in one block, and writes the result. A step that found_inf leaves out changes nothing of
/// it.
template <class Block>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void finish_norm(const NormLaunch& launch, Block& block,
                                                    NormPartial (&sums)[block_threads]) {
    block.each_thread([&](int thread) SGDCORE_INLINE_LAMBDA {
        NormPartial sum{};
        for (std::int64_t i = thread; i < launch.partial_count; i += block_threads) {
            const NormPartial other = launch.partials[i];
            sum.add(other.high, other.low);
            sum.not_finite |= other.not_finite;
        }
        sums[thread] = sum;
    });
    reduce(block, sums);
    block.leader([&] {
        if (launch.step.found_inf != nullptr && *launch.step.found_inf != 0) return;
        const NormPartial& sum = sums[0];
        const double total = is_finite(sum.high) ? sum.high + sum.low : sum.high;
        const double norm = sqrt(total);
        // As Clipping::coefficient computes it; a NaN stays a NaN.
        const double quotient = 1 / (norm + 1e-6) * launch.max_norm;
        const bool left_out = launch.skip_nonfinite && sum.not_finite != 0;
        launch.result->norm = norm;
        launch.result->factor = !launch.limits_norm ? 1.0 : quotient > 1 ? 1.0 : quotient;
        launch.result->left_out = left_out ? 1.0 : 0.0;
        if (left_out) launch.result->skipped += 1;
    });
}

}  // namespace sgdcore::cuda
