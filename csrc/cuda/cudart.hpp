// The Runtime that is CUDA's own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "runtime.hpp"

namespace sgdcore::cuda {

/// Lives until the process ends. Works without a driver as far as `device_count`, which then says what is missing.
Runtime& cuda_runtime();

// The kernels' starts, and how many blocks of a step's a multiprocessor holds; on the current device.
cudaError_t start_kernel(std::int64_t blocks, const Launch& launch, cudaStream_t stream);
cudaError_t start_memory_pass(std::int64_t blocks, const MemoryPassArrays& arrays, cudaStream_t stream);
cudaError_t kernel_occupancy(int* blocks);

}  // namespace sgdcore::cuda
