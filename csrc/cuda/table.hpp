// The tables of one launch, plain data in device memory: tensors, their chunks, and hyperparameters.
//
// One launch updates all tensors of all groups on a device. Tensors are cut into chunks of a fixed number of elements,
// so a chunk's index in its tensor tells its elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtypes.hpp"
#include "../rules/all.hpp"
#include "../work.hpp"

namespace sgdcore::cuda {

inline constexpr int block_threads = 256;
/// The blocks that share a multiprocessor. Together their loads in flight cover the latency of its memory.
inline constexpr int resident_blocks = 3;
/// The widest access of a thread, in bytes.
inline constexpr int vector_bytes = 16;

/// The loop that updates a tensor: over vectors, for the usual storage types of parameter, gradient and states, or over
/// elements.
enum class Path : std::uint8_t {
    elements,
    float64,
    float32,
    float16,
    bfloat16,
    float16_float16_float32,
    bfloat16_bfloat16_float32,
    float32_float16_float32,
    float32_bfloat16_float32,
};

struct Chunk {
    std::uint32_t tensor, index;
};

/// A TensorRef for the device. The structs have no padding: tables are compared as bytes.
struct alignas(16) DeviceTensor {
    std::byte *param, *grad, *states[max_states];  // a state is null if it takes no part; see TensorRef for a null grad
    std::byte* average;                            // null without one
    std::uint8_t* pending;                         // see TensorRef
    std::int64_t size;
    std::uint32_t hyper;
    std::uint32_t axes;  // of a strided gradient: the first of `axis_count`
    std::uint8_t axis_count;
    std::uint8_t head;  // elements of every chunk before the first vector
    Path path;
    bool grad_in_vectors;  // the gradient is aligned as the parameter is
    bool first_step;
    bool average_is_new;      // it becomes a copy of the parameter
    bool average_in_vectors;  // it has the parameter's type and is aligned as the parameter is
    DType param_dtype, grad_dtype, average_dtype, state_dtypes[max_states];
    std::uint8_t unused[11];
};
static_assert(sizeof(DeviceTensor) == 96 && max_states == 3);

/// A Hyper for the device. A scalar that is there takes the place of the value.
struct alignas(16) DeviceHyper {
    Values values;
    DeviceScalars scalars;
};
static_assert(sizeof(DeviceHyper) == 128 && max_hypers == 12 && max_device_hypers == 2);

/// What the pass over all gradients found. Four numbers of one type, which a library can share as an array.
struct NormResult {
    double norm;      // of the gradients
    double factor;    // multiplies them, so that their norm is limited
    double left_out;  // 1 if the step is left out, else 0
    double skipped;   // the number of steps that were left out
};

/// A sum, as two numbers of which the second is small.
struct NormPartial {
    double high, low;
    std::uint64_t not_finite;  // 1 if an element is infinite or NaN, else 0

    SGDCORE_HOST_DEVICE SGDCORE_INLINE void add(double value, double rest) {
        const double sum = high + value, back = sum - high;
        low += ((high - (sum - back)) + (value - back)) + rest;
        high = sum;
    }
};

/// The kernel's argument.
struct Launch {
    int rule;  // its number
    const DeviceHyper* hypers;
    const DeviceTensor* tensors;
    const Axis* axes;
    const Chunk* chunks;
    std::int64_t chunk_count;
    const float* found_inf;   // null, or: nothing happens unless it is zero
    const float* grad_scale;  // null, or: every gradient is multiplied by its reciprocal
    double grad_factor;       // multiplies every gradient, without grad_scale
    double clip_value;        // limits every element of a gradient, if `clips`
    double average_weight;    // of the parameters after the step, in their averages
    const NormResult* norm;   // null, or: its factor multiplies every gradient, and the step may be left out
    bool zero_grad, clips;
};

/// The argument of the kernels that find the norm.
struct NormLaunch {
    Launch step;
    NormPartial* partials;  // of each block
    std::int64_t partial_count;
    NormResult* result;
    double max_norm;
    bool limits_norm, skip_nonfinite;
};

/// The three arrays of a step with a state, of `quads` vectors each, for the benchmarks.
struct MemoryPassArrays {
    std::byte *param, *state;
    const std::byte* grad;
    std::int64_t quads;
};

}  // namespace sgdcore::cuda
