// See simulated.hpp.
#include "simulated.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <random>

#include "cuda/kernel.hpp"
#include "cuda/memory_pass.hpp"
#include "cuda/norm.hpp"
#include "float_mode.hpp"

namespace sgdcore::cuda {
namespace {

constexpr std::align_val_t memory_alignment{256};  // cudaMalloc's
constexpr int garbage = 0xc5;                      // in memory that was not written yet

/// Of all simulated devices. Held during a fork, so that the child finds every device in a whole state.
std::recursive_mutex& mutex() {
    static std::recursive_mutex mutex;
    return mutex;
}

[[maybe_unused]] const int fork_handlers = pthread_atfork([] { mutex().lock(); }, [] { mutex().unlock(); },
                                                          // The child's thread is not the one that locked it.
                                                          [] { new (&mutex()) std::recursive_mutex; });

/// One block; its threads come one after the other between barriers.
class SimulatedBlock {
  public:
    SimulatedBlock(std::int64_t index, std::int64_t count, const std::vector<int>& threads)
        : index_(index), count_(count), threads_(threads) {}
    std::int64_t index() const { return index_; }
    std::int64_t count() const { return count_; }
    template <class Function>
    void leader(Function function) const {
        function();
    }
    template <class Function>
    void each_thread(Function function) const {
        for (const int thread : threads_) function(thread);
    }
    void barrier() const {}

  private:
    std::int64_t index_, count_;
    const std::vector<int>& threads_;
};

/// Calls function(block) for each block.
template <class Function>
void run_blocks(std::int64_t count, bool shuffled, std::int64_t seed, Function function) {
    const FloatModeScope scope(FloatMode::standard());  // a device knows nothing of the host's mode
    std::vector<int> threads(block_threads);
    std::iota(threads.begin(), threads.end(), 0);
    std::vector<std::int64_t> blocks(static_cast<std::size_t>(count));
    std::iota(blocks.begin(), blocks.end(), 0);
    if (shuffled) {
        std::minstd_rand random(static_cast<std::uint32_t>(seed));
        std::shuffle(threads.begin(), threads.end(), random);
        std::shuffle(blocks.begin(), blocks.end(), random);
    }
    for (const std::int64_t index : blocks) {
        SimulatedBlock block(index, count, threads);
        function(block);
    }
}

void run_grid(const Launch& launch, std::int64_t count, bool shuffled) {
    run_blocks(count, shuffled, launch.chunk_count, [&](SimulatedBlock& block) {
        with_rule(launch.rule, [&]<class R>(RuleTag<R>) {
            Work<R> works[2];
            run_block(launch, block, works);
        });
    });
}

void run_norm(const NormLaunch& launch, bool shuffled) {
    std::vector<NormPartial> memory(block_threads);
    auto& sums = *reinterpret_cast<NormPartial(*)[block_threads]>(memory.data());
    run_blocks(launch.partial_count, shuffled, launch.step.chunk_count,
               [&](SimulatedBlock& block) { sum_squares(launch, block, sums); });
    run_blocks(1, shuffled, 1, [&](SimulatedBlock& block) { finish_norm(launch, block, sums); });
}

}  // namespace

void SimulatedRuntime::fail_if_told(int device, const char* call) const {
    if (failing == call && (failing_device < 0 || failing_device == device)) {
        throw CudaError(std::string(call) + " on device " + std::to_string(device) + ": failed as it was told to");
    }
}

void SimulatedRuntime::refuse_memory(int device, const char* call) {
    throw CudaError(std::string(call) + " on device " + std::to_string(device) + ": the memory is not the device's");
}

int SimulatedRuntime::device_of(const void* address) {
    const std::lock_guard lock(mutex());
    const auto* const byte = static_cast<const std::byte*>(address);
    auto next = memory_.upper_bound(byte);
    if (next == memory_.begin()) return -1;
    const auto& [start, size_and_device] = *--next;
    return byte < start + size_and_device.first ? size_and_device.second : -1;
}

std::byte* SimulatedRuntime::new_memory(int device, std::size_t size, const char* call) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, call);
    ++counts.allocations;
    auto* const memory = static_cast<std::byte*>(::operator new(size, memory_alignment));
    std::memset(memory, garbage, size);
    return memory;
}

std::byte* SimulatedRuntime::allocate(int device, std::size_t size) {
    const std::lock_guard lock(mutex());
    std::byte* const memory = new_memory(device, size, "allocate");
    memory_[memory] = {size, device};
    return memory;
}

void SimulatedRuntime::free(int, std::byte* memory) noexcept {
    const std::lock_guard lock(mutex());
    synchronize_all();  // as cudaFree does
    memory_.erase(memory);
    ::operator delete(memory, memory_alignment);
}

std::byte* SimulatedRuntime::allocate_pinned(int device, std::size_t size) {
    return new_memory(device, size, "allocate_pinned");
}

void SimulatedRuntime::free_pinned(int, std::byte* memory) noexcept {
    const std::lock_guard lock(mutex());
    synchronize_all();
    ::operator delete(memory, memory_alignment);
}

Event SimulatedRuntime::create_event(int device) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "create_event");
    const auto event = reinterpret_cast<Event>(++last_event_);
    marks_[event] = {};
    return event;
}

void SimulatedRuntime::destroy_event(int, Event event) noexcept {
    const std::lock_guard lock(mutex());
    marks_.erase(event);
}

void SimulatedRuntime::record(int device, Event event, Stream stream) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "record");
    marks_.at(event) = {stream, queues_[stream].operations.size()};
}

bool SimulatedRuntime::finished(int device, Event event) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "finished");
    const Mark& mark = marks_.at(event);
    return queues_[mark.stream].done >= mark.position;
}

void SimulatedRuntime::wait(int device, Stream stream, Event event) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "wait");
    const Mark mark = marks_.at(event);
    add(stream, [this, mark] { advance(mark.stream, mark.position); });
}

bool SimulatedRuntime::capturing(int device, Stream stream) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "capturing");
    return queues_[stream].capturing;
}

void SimulatedRuntime::copy(int device, void* to, const void* from, std::size_t size, Stream stream) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "copy");
    if (device_of(to) != device && device_of(from) != device) refuse_memory(device, "copy");
    ++counts.copies;
    counts.copied_bytes += static_cast<std::int64_t>(size);
    add(stream, [=] { std::memcpy(to, from, size); });
}

void SimulatedRuntime::fill(int device, void* to, int byte, std::size_t size, Stream stream) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "fill");
    if (device_of(to) != device) refuse_memory(device, "fill");
    add(stream, [=] { std::memset(to, byte, size); });
}

void SimulatedRuntime::launch(int device, std::int64_t count, const Launch& launch, Stream stream) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "launch");
    ++counts.launches;
    add(stream, [=, in_any_order = shuffled] { run_grid(launch, count, in_any_order); });
}

void SimulatedRuntime::find_norm(int device, const NormLaunch& launch, Stream stream) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "find_norm");
    counts.launches += 2;
    add(stream, [=, in_any_order = shuffled] { run_norm(launch, in_any_order); });
}

void SimulatedRuntime::synchronize(int device, Stream stream) {
    const std::lock_guard lock(mutex());
    fail_if_told(device, "synchronize");
    advance(stream, queues_[stream].operations.size());
}

void SimulatedRuntime::memory_pass(int, std::int64_t count, const MemoryPassArrays& arrays, Stream stream) {
    const std::lock_guard lock(mutex());
    add(stream, [=] {
        const std::int64_t threads = count * block_threads;
        for (std::int64_t thread = 0; thread < threads; ++thread) cuda::memory_pass(arrays, thread, threads);
    });
}

void SimulatedRuntime::synchronize_all() {
    const std::lock_guard lock(mutex());
    for (auto& [stream, queue] : queues_) {
        if (!queue.capturing) advance(stream, queue.operations.size());
    }
}

void SimulatedRuntime::begin_capture(Stream stream) {
    const std::lock_guard lock(mutex());
    advance(stream, queues_[stream].operations.size());
    queues_[stream].capturing = true;
}

SimulatedRuntime::Graph SimulatedRuntime::end_capture(Stream stream) {
    const std::lock_guard lock(mutex());
    Queue& queue = queues_[stream];
    const auto start = queue.operations.begin() + static_cast<std::ptrdiff_t>(queue.done);
    Graph graph(start, queue.operations.end());
    queue.operations.erase(start, queue.operations.end());
    queue.capturing = false;
    return graph;
}

void SimulatedRuntime::add(Stream stream, Operation operation) {
    Queue& queue = queues_[stream];
    queue.operations.push_back(std::move(operation));
    if (!queue.capturing && queue.operations.size() - queue.done > lag_) {
        advance(stream, queue.operations.size() - lag_);
    }
}

void SimulatedRuntime::advance(Stream stream, std::size_t position) {
    Queue& queue = queues_[stream];
    while (queue.done < position) {
        const Operation operation = std::move(queue.operations[queue.done]);
        ++queue.done;  // first: the operation may come back here, to wait for what is done by then
        operation();
    }
}

}  // namespace sgdcore::cuda
