// CUDA's calls behind the Runtime interface, with errors that name the call and the device.
#include "cudart.hpp"

#include <string>

namespace sgdcore::cuda {
namespace {

void require(cudaError_t error, const char* call, int device = cpu_device) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // otherwise the next CUDA call in this thread would report the error again
    std::string text = call;
    if (device != cpu_device) text += " on device " + std::to_string(device);
    throw CudaError(text + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

/// Makes a device the thread's current one while it lives.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        require(cudaGetDevice(&before_), "cudaGetDevice", device);
        if (before_ == device) return;
        require(cudaSetDevice(device), "cudaSetDevice", device);
        changed_ = true;
    }
    ~CurrentDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

/// Lets the thread make calls that a capture in the default mode, of any thread, forbids because they might act on
/// captured memory. The calls here act on memory and events that are part of no capture.
class BesideCaptures {
  public:
    BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    BesideCaptures(const BesideCaptures&) = delete;
    BesideCaptures& operator=(const BesideCaptures&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(Event event) { return static_cast<cudaEvent_t>(event); }

class CudaRuntime final : public Runtime {
  public:
    int device_count() override {
        int count = 0;
        require(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
        return count;
    }

    std::string device_name(int device) override {
        cudaDeviceProp properties;
        require(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", device);
        return properties.name;
    }

    int device_of(const void* address) override {
        const BesideCaptures beside;
        cudaPointerAttributes attributes;
        require(cudaPointerGetAttributes(&attributes, address), "cudaPointerGetAttributes");
        const bool on_device = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
        return on_device ? attributes.device : cpu_device;
    }

    std::int64_t blocks_at_once(int device) override {
        const CurrentDevice current(device);
        int blocks = 0, processors = 0;
        require(kernel_occupancy(&blocks), "cudaOccupancyMaxActiveBlocksPerMultiprocessor", device);
        require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute",
                device);
        if (blocks < 1) {
            throw CudaError("device " + std::to_string(device) + ": the kernel does not fit on a multiprocessor");
        }
        return std::int64_t{blocks} * processors;
    }

    std::byte* allocate(int device, std::size_t size) override {
        const CurrentDevice current(device);
        const BesideCaptures beside;
        void* memory = nullptr;
        require(cudaMalloc(&memory, size), "cudaMalloc", device);
        return static_cast<std::byte*>(memory);
    }

    void free(int device, std::byte* memory) noexcept override {
        release(device, [&] { return cudaFree(memory); });
    }

    std::byte* allocate_pinned(int device, std::size_t size) override {
        const CurrentDevice current(device);
        const BesideCaptures beside;
        void* memory = nullptr;
        require(cudaHostAlloc(&memory, size, cudaHostAllocDefault), "cudaHostAlloc", device);
        return static_cast<std::byte*>(memory);
    }

    void free_pinned(int device, std::byte* memory) noexcept override {
        release(device, [&] { return cudaFreeHost(memory); });
    }

    Event create_event(int device) override {
        const CurrentDevice current(device);
        const BesideCaptures beside;
        cudaEvent_t event = nullptr;
        require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags", device);
        return event;
    }

    void destroy_event(int device, Event event) noexcept override {
        release(device, [&] { return cudaEventDestroy(event_of(event)); });
    }

    void record(int device, Event event, Stream stream) override {
        const CurrentDevice current(device);
        require(cudaEventRecord(event_of(event), stream_of(stream)), "cudaEventRecord", device);
    }

    bool finished(int device, Event event) override {
        const CurrentDevice current(device);
        const BesideCaptures beside;
        const cudaError_t state = cudaEventQuery(event_of(event));
        if (state == cudaErrorNotReady) {
            cudaGetLastError();
            return false;
        }
        require(state, "cudaEventQuery", device);
        return true;
    }

    void wait(int device, Stream stream, Event event) override {
        const CurrentDevice current(device);
        require(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "cudaStreamWaitEvent", device);
    }

    bool capturing(int device, Stream stream) override {
        const CurrentDevice current(device);
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        require(cudaStreamIsCapturing(stream_of(stream), &status), "cudaStreamIsCapturing", device);
        return status != cudaStreamCaptureStatusNone;
    }

    void copy(int device, void* to, const void* from, std::size_t size, Stream stream) override {
        const CurrentDevice current(device);
        require(cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream_of(stream)), "cudaMemcpyAsync", device);
    }

    void fill(int device, void* to, int byte, std::size_t size, Stream stream) override {
        const CurrentDevice current(device);
        require(cudaMemsetAsync(to, byte, size, stream_of(stream)), "cudaMemsetAsync", device);
    }

    void launch(int device, std::int64_t blocks, const Launch& launch, Stream stream) override {
        const CurrentDevice current(device);
        require(start_kernel(blocks, launch, stream_of(stream)), "cudaLaunchKernel", device);
    }

    void find_norm(int device, const NormLaunch& launch, Stream stream) override {
        const CurrentDevice current(device);
        require(start_norm(launch, stream_of(stream)), "cudaLaunchKernel", device);
    }

    void memory_pass(int device, std::int64_t blocks, const MemoryPassArrays& arrays, Stream stream) override {
        const CurrentDevice current(device);
        require(start_memory_pass(blocks, arrays, stream_of(stream)), "cudaLaunchKernel", device);
    }

    void synchronize(int device, Stream stream) override {
        const CurrentDevice current(device);
        require(cudaStreamSynchronize(stream_of(stream)), "cudaStreamSynchronize", device);
    }

  private:
    /// Ignores errors: the driver may have ended before.
    template <class Function>
    static void release(int device, Function function) noexcept {
        try {
            const CurrentDevice current(device);
            const BesideCaptures beside;
            function();
        } catch (const CudaError&) {
        }
        cudaGetLastError();
    }
};

}  // namespace

Runtime& cuda_runtime() {
    static auto& runtime = *new CudaRuntime;  // never destroyed: optimizers may end later than static objects
    return runtime;
}

}  // namespace sgdcore::cuda
