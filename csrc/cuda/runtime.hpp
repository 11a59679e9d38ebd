// The calls of CUDA that the backend makes, as an interface. The module with the CUDA runtime implements it, and so
// does the simulated device of the tests. The core links no CUDA.
//
// Every member may throw CudaError. Only `synchronize` waits for the device; allocating may wait inside the driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "table.hpp"

namespace sgdcore::cuda {

/// A failed call. The message has the call's name, the device, and CUDA's description.
class CudaError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Stream = void*;  // cudaStream_t; null is the default stream
using Event = void*;   // cudaEvent_t

class Runtime {
  public:
    /// Has to change whenever this class does: modules of different builds then refuse each other.
    static constexpr const char* capsule_name = "sgdcore.cuda.Runtime.2";

    virtual ~Runtime() = default;

    virtual int device_count() = 0;
    virtual std::string device_name(int device) = 0;
    /// The device whose memory an address belongs to; `cpu_device` if it is none's.
    virtual int device_of(const void* address) = 0;
    /// The number of the kernel's blocks that the device runs at the same time.
    virtual std::int64_t blocks_at_once(int device) = 0;

    /// Memory of the device, and pinned memory of the host. Both may be allocated while a stream is captured.
    virtual std::byte* allocate(int device, std::size_t size) = 0;
    virtual void free(int device, std::byte* memory) noexcept = 0;
    virtual std::byte* allocate_pinned(int device, std::size_t size) = 0;
    virtual void free_pinned(int device, std::byte* memory) noexcept = 0;

    virtual Event create_event(int device) = 0;
    virtual void destroy_event(int device, Event event) noexcept = 0;
    virtual void record(int device, Event event, Stream stream) = 0;
    /// True if the device has passed the event's last record, or the event was never recorded.
    virtual bool finished(int device, Event event) = 0;
    virtual void wait(int device, Stream stream, Event event) = 0;

    /// True if the stream is being captured in a CUDA graph.
    virtual bool capturing(int device, Stream stream) = 0;
    /// Copies in any direction.
    virtual void copy(int device, void* to, const void* from, std::size_t size, Stream stream) = 0;
    virtual void fill(int device, void* to, int byte, std::size_t size, Stream stream) = 0;
    virtual void launch(int device, std::int64_t blocks, const Launch& launch, Stream stream) = 0;
    /// Finds the norm of all gradients, by as many blocks as there are partial sums; see norm.hpp.
    virtual void find_norm(int device, const NormLaunch& launch, Stream stream) = 0;
    virtual void synchronize(int device, Stream stream) = 0;
    /// For the benchmarks; see memory_pass.hpp.
    virtual void memory_pass(int device, std::int64_t blocks, const MemoryPassArrays& arrays, Stream stream) = 0;
};

}  // namespace sgdcore::cuda
