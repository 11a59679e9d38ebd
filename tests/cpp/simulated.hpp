// Devices that are simulated on the CPU: the kernel's body over a grid of blocks and threads, streams that lag behind,
// events and graphs. For tests, which thereby need no GPU.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/runtime.hpp"

namespace sgdcore::cuda {

/// Devices whose memory is the host's. What a stream gets is done only when it has to be: by `synchronize`, by an event
/// that is waited for, or when the stream holds more than `lag` operations. Memory that is copied or filled and is not
/// the device's is refused, where CUDA might take it: a mistake of whoever describes it.
class SimulatedRuntime final : public Runtime {
  public:
    struct Counts {
        std::int64_t launches = 0, copies = 0, copied_bytes = 0, allocations = 0;
    };
    using Operation = std::function<void()>;
    using Graph = std::vector<Operation>;

    explicit SimulatedRuntime(int devices = 1, std::size_t lag = 0) : devices_(devices), lag_(lag) {}

    int device_count() override { return devices_; }
    std::string device_name(int) override { return "simulated on the CPU"; }
    int device_of(const void* address) override;
    std::int64_t blocks_at_once(int) override { return blocks; }

    std::byte* allocate(int device, std::size_t size) override;
    void free(int device, std::byte* memory) noexcept override;
    std::byte* allocate_pinned(int device, std::size_t size) override;
    void free_pinned(int device, std::byte* memory) noexcept override;
    Event create_event(int device) override;
    void destroy_event(int device, Event event) noexcept override;
    void record(int device, Event event, Stream stream) override;
    bool finished(int device, Event event) override;
    void wait(int device, Stream stream, Event event) override;
    bool capturing(int device, Stream stream) override;
    void copy(int device, void* to, const void* from, std::size_t size, Stream stream) override;
    void fill(int device, void* to, int byte, std::size_t size, Stream stream) override;
    void launch(int device, std::int64_t blocks, const Launch& launch, Stream stream) override;
    void find_norm(int device, const NormLaunch& launch, Stream stream) override;
    void synchronize(int device, Stream stream) override;
    void memory_pass(int device, std::int64_t blocks, const MemoryPassArrays& arrays, Stream stream) override;

    /// Does everything that any stream holds.
    void synchronize_all();
    /// From now on the stream only notes what it gets.
    void begin_capture(Stream stream);
    Graph end_capture(Stream stream);

    Counts counts;
    std::int64_t blocks = 3;  // at once
    bool shuffled = false;    // blocks and threads in a random order
    std::string failing;      // the call that fails; none if empty
    int failing_device = -1;  // where it does; -1: everywhere

  private:
    struct Queue {
        std::vector<Operation> operations;
        std::size_t done = 0;
        bool capturing = false;
    };
    struct Mark {
        Stream stream = nullptr;
        std::size_t position = 0;  // behind the operation recorded last
    };

    std::byte* new_memory(int device, std::size_t size, const char* call);
    void add(Stream stream, Operation operation);
    void advance(Stream stream, std::size_t position);
    void fail_if_told(int device, const char* call) const;
    [[noreturn]] static void refuse_memory(int device, const char* call);

    const int devices_;
    const std::size_t lag_;
    std::map<Stream, Queue> queues_;
    std::map<Event, Mark> marks_;
    std::map<const std::byte*, std::pair<std::size_t, int>> memory_;  // start: size and device
    std::uintptr_t last_event_ = 0;
};

}  // namespace sgdcore::cuda
