// The kernels and their launches. The bodies, for host and device, are in kernel.hpp and memory_pass.hpp.
#include "kernel.hpp"

#include <algorithm>
#include <limits>

#include "cudart.hpp"
#include "memory_pass.hpp"
#include "norm.hpp"

namespace sgdcore::cuda {
namespace {

/// A block of the device, as one of its threads uses it.
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

template <class R>
__global__ void __launch_bounds__(block_threads, resident_blocks) step_kernel(const __grid_constant__ Launch launch) {
    __shared__ Work<R> works[2];
    DeviceBlock block;
    run_block(launch, block, works);
}

template <class R>
const void* kernel_of(RuleTag<R>) {
    return reinterpret_cast<const void*>(step_kernel<R>);
}

__global__ void __launch_bounds__(block_threads, resident_blocks) memory_pass_kernel(const MemoryPassArrays arrays) {
    memory_pass(arrays, std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x, std::int64_t{gridDim.x} * blockDim.x);
}

__global__ void __launch_bounds__(block_threads, resident_blocks)
    norm_kernel(const __grid_constant__ NormLaunch launch) {
    __shared__ NormPartial sums[block_threads];
    DeviceBlock block;
    sum_squares(launch, block, sums);
}

__global__ void __launch_bounds__(block_threads) finish_norm_kernel(const __grid_constant__ NormLaunch launch) {
    __shared__ NormPartial sums[block_threads];
    DeviceBlock block;
    finish_norm(launch, block, sums);
}

}  // namespace

cudaError_t start_norm(const NormLaunch& launch, cudaStream_t stream) {
    NormLaunch argument = launch;
    void* arguments[] = {&argument};
    const cudaError_t status =
        cudaLaunchKernel(reinterpret_cast<const void*>(norm_kernel), dim3(static_cast<unsigned>(launch.partial_count)),
                         dim3(block_threads), arguments, 0, stream);
    if (status != cudaSuccess) return status;
    return cudaLaunchKernel(reinterpret_cast<const void*>(finish_norm_kernel), dim3(1), dim3(block_threads), arguments,
                            0, stream);
}

cudaError_t start_memory_pass(std::int64_t blocks, const MemoryPassArrays& arrays, cudaStream_t stream) {
    MemoryPassArrays argument = arrays;
    void* arguments[] = {&argument};
    return cudaLaunchKernel(reinterpret_cast<const void*>(memory_pass_kernel), dim3(static_cast<unsigned>(blocks)),
                            dim3(block_threads), arguments, 0, stream);
}

cudaError_t start_kernel(std::int64_t blocks, const Launch& launch, cudaStream_t stream) {
    Launch argument = launch;
    void* arguments[] = {&argument};
    const void* kernel = nullptr;
    with_rule(launch.rule, [&](auto rule) { kernel = kernel_of(rule); });
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(block_threads), arguments, 0, stream);
}

cudaError_t kernel_occupancy(int* blocks) {
    *blocks = std::numeric_limits<int>::max();
    for (int number = 0; number < Rules::size; ++number) {
        int of_this = 0;
        cudaError_t status = cudaSuccess;
        with_rule(number, [&](auto rule) {
            status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_this, kernel_of(rule), block_threads, 0);
        });
        if (status != cudaSuccess) return status;
        *blocks = std::min(*blocks, of_this);
    }
    return cudaSuccess;
}

}  // namespace sgdcore::cuda
