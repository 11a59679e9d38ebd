// The Runtime that is CUDA's own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "runtime.hpp"

namespace sgdcore::cuda {

/// Lives until the process ends. Without a driver `device_count` throws CudaError that says what is missing.
Runtime& cuda_runtime();

// Launches of the kernels, and the number of a step's blocks that a multiprocessor holds, on the current device.
cudaError_t start_kernel(std::int64_t blocks, const Launch& launch, cudaStream_t stream);
cudaError_t start_norm(const NormLaunch& launch, cudaStream_t stream);
cudaError_t start_memory_pass(std::int64_t blocks, const MemoryPassArrays& arrays, cudaStream_t stream);
cudaError_t kernel_occupancy(int* blocks);

}  // namespace sgdcore::cuda
