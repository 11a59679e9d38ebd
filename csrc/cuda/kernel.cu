// The kernels, with the bodies that kernel.hpp has for host and device, and their starts.
#include "kernel.hpp"

#include "cudart.hpp"

namespace sgdcore::cuda {
namespace {

/// A block of the device, seen from one of its threads.
struct DeviceBlock {
    __device__ std::int64_t index() const { return blockIdx.x; }
    __device__ std::int64_t count() const { return gridDim.x; }
    template <class Function>
    __device__ void leader(Function function) const {
        if (threadIdx.x == 0) function();
    }
    template <class Function>
    __device__ void each_thread(Function function) const {
        function(static_cast<int>(threadIdx.x));
    }
    __device__ void barrier() const { __syncthreads(); }
};

__global__ void __launch_bounds__(block_threads, resident_blocks) sgd_step(const __grid_constant__ Launch launch) {
    __shared__ Work works[2];
    DeviceBlock block;
    run_block(launch, block, works);
}

__global__ void __launch_bounds__(block_threads, resident_blocks) memory_pass_kernel(const MemoryPassArrays arrays) {
    memory_pass(arrays, std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x, std::int64_t{gridDim.x} * blockDim.x);
}

}  // namespace

cudaError_t start_memory_pass(std::int64_t blocks, const MemoryPassArrays& arrays, cudaStream_t stream) {
    MemoryPassArrays argument = arrays;
    void* arguments[] = {&argument};
    return cudaLaunchKernel(reinterpret_cast<const void*>(memory_pass_kernel), dim3(static_cast<unsigned>(blocks)),
                            dim3(block_threads), arguments, 0, stream);
}

cudaError_t start_kernel(std::int64_t blocks, const Launch& launch, cudaStream_t stream) {
    Launch argument = launch;
    void* arguments[] = {&argument};
    return cudaLaunchKernel(reinterpret_cast<const void*>(sgd_step), dim3(static_cast<unsigned>(blocks)),
                            dim3(block_threads), arguments, 0, stream);
}

cudaError_t kernel_occupancy(int* blocks) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, sgd_step, block_threads, 0);
}

}  // namespace sgdcore::cuda
