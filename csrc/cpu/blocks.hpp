// Updates tensors block by block where no kernel takes the arrays as they are.
#pragma once

#include "../work.hpp"
#include "kernel.hpp"

namespace sgdcore::cpu {

/// How a tensor is updated.
struct Choice {
    Kernel kernel;
    /// The kernel reads and writes the tensor's arrays as they are stored, not blocks of the compute type. A parameter
    /// in a precision of its own goes by blocks in any case.
    bool direct;
    bool wide;            // the compute type is float64
    const Use* uses;      // what the kernel does with each of the `max_states` states
    const Start* starts;  // null, or what each state starts with: it is put there before the kernel runs
};

constexpr std::int64_t staging_bytes = 4096;  // of each array

/// A thread's staging buffers: a block of each array in the compute type, and `gathered` in the gradient's own type.
/// They are on the heap, since OpenMP's threads may have stacks of 16 KiB (OMP_STACKSIZE).
struct Staging {
    alignas(cache_line) std::byte gathered[staging_bytes];
    alignas(cache_line) std::byte param[staging_bytes];
    alignas(cache_line) std::byte grad[staging_bytes];
    alignas(cache_line) std::byte states[max_states][staging_bytes];
    alignas(cache_line) std::byte narrow[staging_bytes];  // the parameter in float32, if the compute type is float64
};

/// Staging buffers for `count` threads of a step of the calling thread, which keeps them for its next steps.
Staging* staging_for(int count);

/// Updates the elements [begin, end) of a tensor whose gradient is strided, to be scaled or to be cleared, whose
/// storage types no kernel has, or whose parameter has a precision of its own, or which has an average.
void update_blocks(const KernelTable& table, const Choice& choice, const TensorRef& tensor, const Hyper& hyper,
                   const StepOptions& options, Staging& staging, std::int64_t begin, std::int64_t end);

}  // namespace sgdcore::cpu
