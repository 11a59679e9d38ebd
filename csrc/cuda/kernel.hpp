// The kernel's body: the walk over chunks. Compiled by nvcc for the device, and by the C++ compiler for the simulated
// one that the tests use.
//
// Invariants. A chunk belongs to one block, and an element to one thread, which alone reads and writes the element. So
// blocks and threads may run in any order, and the rule, compiled without contraction, gives the CPU's bits. One thread
// of a block does all float64 arithmetic that belongs to no element: many devices have 1/64 of float32's rate for it.
#pragma once

#include <cstdint>

#include "update.hpp"

namespace sgdcore::cuda {

/// Reads the `number`-th of the hyperparameters that a device may read into `values`, if it is on the device.
template <class R, int number>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void read_on_device(const DeviceHyper& group, Values& values) {
    if constexpr (device_hyper<R, number> >= 0) {
        const DeviceScalar& scalar = group.scalars.of[number];
        if (scalar.address != nullptr)
            values[device_hyper<R, number>] = load_as<double>(scalar.dtype, scalar.address, 0);
    }
}

/// True if the pass over all gradients found one that is not finite.
SGDCORE_HOST_DEVICE SGDCORE_INLINE bool left_out(const Launch& launch) {
    return launch.norm != nullptr && launch.norm->left_out != 0;
}

/// Puts together the work of one chunk.
template <class R>
SGDCORE_HOST_DEVICE inline void prepare(const Launch& launch, std::int64_t number, Work<R>& work) {
    const Chunk chunk = launch.chunks[number];
    const DeviceTensor tensor = launch.tensors[chunk.tensor];
    Values values = launch.hypers[tensor.hyper].values;
    static_assert(max_device_hypers == 2);
    read_on_device<R, 0>(launch.hypers[tensor.hyper], values);
    read_on_device<R, 1>(launch.hypers[tensor.hyper], values);
    bool first_step = tensor.first_step;
    if (tensor.pending != nullptr && !left_out(launch)) {
        // No other block has this chunk, and this block will fill the chunk's states.
        first_step = first_step || tensor.pending[chunk.index] != 0;
        tensor.pending[chunk.index] = 0;
    }
    const std::int64_t start = chunk.index * chunk_size;
    const std::int64_t rest = tensor.size - start;
    work.count = static_cast<std::int32_t>(rest < chunk_size ? rest : chunk_size);
    work.head = tensor.head < work.count ? tensor.head : work.count;
    work.start = start;
    work.axes = launch.axes + tensor.axes;
    work.axis_count = tensor.axis_count;
    work.param = tensor.param + start * static_cast<std::int64_t>(item_size(tensor.param_dtype));
    work.grad = tensor.grad;
    if (tensor.axis_count == 0 && work.grad != nullptr)
        work.grad += start * static_cast<std::int64_t>(item_size(tensor.grad_dtype));
    work.param_dtype = tensor.param_dtype;
    work.grad_dtype = tensor.grad_dtype;
    work.in_float64 = tensor.param_dtype == DType::float64 || tensor.grad_dtype == DType::float64;
    for (int state = 0; state < state_count<R>; ++state) {
        const DType dtype = tensor.state_dtypes[state];
        std::byte* const memory = tensor.states[state];
        work.states[state] = memory == nullptr ? nullptr : memory + start * static_cast<std::int64_t>(item_size(dtype));
        work.state_dtypes[state] = dtype;
        work.in_float64 = work.in_float64 || (memory != nullptr && dtype == DType::float64);
    }
    work.variant = R::variant(values, first_step);
    with_variant<R>(work.variant, [&](auto index) {
        for (int state = 0; state < state_count<R>; ++state) {
            Use use = R::use(R::variants[decltype(index)::value], state);
            // What is not read counts as zero.
            const bool is_zero = first_step && (starting<R, Start::zeros> >> state & 1) != 0;
            const bool is_param = first_step && (starting<R, Start::parameter> >> state & 1) != 0;
            if ((is_zero || is_param) && use == Use::update) use = Use::write;
            work.from_param[state] = is_param;
            work.uses[state] = use;
        }
    });
    work.path = tensor.path;
    work.grad_in_vectors = tensor.grad_in_vectors;
    work.zero_grad = launch.zero_grad;
    work.factor = factor_of(launch);
    work.scaled = work.factor != 1;
    work.clip_value = launch.clip_value;
    work.clipped = launch.clips;
    work.clip_factor = launch.norm == nullptr ? 1 : launch.norm->factor;
    work.limited = work.clip_factor != 1;
    work.left_out = left_out(launch);
    work.in_float = typename R::template Coefficients<float>(values);
    work.in_double = typename R::template Coefficients<double>(values);
    work.average.memory = nullptr;
    if (tensor.average == nullptr) return;
    const DType dtype = tensor.average_dtype;
    work.average.memory = tensor.average + start * static_cast<std::int64_t>(item_size(dtype));
    work.average.dtype = dtype;
    work.average.is_new = tensor.average_is_new;
    work.average.in_vectors = tensor.average_in_vectors;
    work.average.in_float64 = dtype == DType::float64 || tensor.param_dtype == DType::float64;
    work.average.in_float = AverageCoefficient<float>(launch.average_weight);
    work.average.in_double = AverageCoefficient<double>(launch.average_weight);
}

template <class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE int update_in_vectors(const Work<R>& work, int thread) {
    using namespace storage;
    switch (work.path) {
        case Path::float64:
            return update_vectors<Float64, Float64, Float64>(work, thread);
        case Path::float32:
            return update_vectors<Float32, Float32, Float32>(work, thread);
        case Path::float16:
            return update_vectors<Float16, Float16, Float16>(work, thread);
        case Path::bfloat16:
            return update_vectors<BFloat16, BFloat16, BFloat16>(work, thread);
        case Path::float16_float16_float32:
            return update_vectors<Float16, Float16, Float32>(work, thread);
        case Path::bfloat16_bfloat16_float32:
            return update_vectors<BFloat16, BFloat16, Float32>(work, thread);
        case Path::float32_float16_float32:
            return update_vectors<Float32, Float16, Float32>(work, thread);
        case Path::float32_bfloat16_float32:
            return update_vectors<Float32, BFloat16, Float32>(work, thread);
        case Path::elements:
            break;
    }
    return 0;
}

/// Moves the average of one thread's elements, the same that `update` has given the thread: `in_vectors` elements in
/// vectors, and the others.
template <class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void move_average(const Work<R>& work, int in_vectors, int thread) {
    const int smallest = item_size(work.grad_dtype) < item_size(work.param_dtype)
                             ? static_cast<int>(item_size(work.grad_dtype))
                             : static_cast<int>(item_size(work.param_dtype));
    const int lanes = vector_bytes / smallest;
    for (int vector = thread; vector < in_vectors / lanes; vector += block_threads) {
        const int first = work.head + vector * lanes;
        if (work.average.in_vectors) {
            storage::with_storage(work.param_dtype, [&]<class Storage>(Storage) SGDCORE_INLINE_LAMBDA {
                average_vectors<Storage>(work, first, lanes);
            });
        } else {
            for (int lane = 0; lane < lanes; ++lane) average_element(work, first + lane);
        }
    }
    for (int i = thread; i < work.count - in_vectors; i += block_threads) {
        average_element(work, i < work.head ? i : i + in_vectors);
    }
}

/// Updates one thread's elements of a chunk.
template <class R>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void update(const Work<R>& work, int thread) {
    if (work.left_out) {
        // The step was asked to clear the gradients all the same.
        for (int i = thread; work.grad != nullptr && i < work.count; i += block_threads) {
            const double zero = 0;
            store_as(work.grad_dtype, grad_of(work, i), 0, zero);
        }
        return;
    }
    int in_vectors = 0;
    if (work.grad != nullptr) {
        in_vectors = update_in_vectors(work, thread);
        // The elements before and behind the vectors: a few, or all.
        for (int i = thread; i < work.count - in_vectors; i += block_threads) {
            update_element(work, i < work.head ? i : i + in_vectors);
        }
    }
    if (work.average.memory != nullptr) move_average(work, in_vectors, thread);
}

/// Updates every `block.count()`-th chunk, from `block.index()` on.
///
/// `leader(f)` calls f() in one thread of the block, `each_thread(f)` calls f(thread) in all threads, and `barrier()`
/// waits for all. The leader prepares the next chunk while the other threads update.
template <class R, class Block>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void run_block(const Launch& launch, Block& block, Work<R> (&works)[2]) {
    if (launch.found_inf != nullptr && *launch.found_inf != 0) return;
    if (left_out(launch) && !launch.zero_grad) return;
    int current = 0;
    block.leader([&] {
        if (block.index() < launch.chunk_count) prepare(launch, block.index(), works[0]);
    });
    block.barrier();
    for (std::int64_t chunk = block.index(); chunk < launch.chunk_count; chunk += block.count()) {
        block.leader([&] {
            const std::int64_t next = chunk + block.count();
            if (next < launch.chunk_count) prepare(launch, next, works[current ^ 1]);
        });
        block.each_thread([&](int thread) SGDCORE_INLINE_LAMBDA { update(works[current], thread); });
        block.barrier();
        current ^= 1;
    }
}

}  // namespace sgdcore::cuda
