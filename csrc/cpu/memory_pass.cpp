// Reads and writes as many arrays as a step does, as fast as memory allows.
#include "memory_pass.hpp"

#include <atomic>

#include "dispatch.hpp"
#include "threads.hpp"

namespace sgdcore::cpu {
namespace {

struct Arrays {
    std::byte* param;
    std::byte* grad;
    std::byte* state;
    std::int64_t size;
    bool clear;
    MemoryPass pass;
    std::atomic<std::uint64_t> check = 0;
};

void run_slice(void* context, int thread, int count) {
    Arrays& arrays = *static_cast<Arrays*>(context);
    const std::int64_t share = arrays.size / count / cache_line * cache_line, begin = share * thread;
    const std::int64_t size = thread + 1 == count ? arrays.size - begin : share;
    std::byte* const state = arrays.state == nullptr ? nullptr : arrays.state + begin;
    arrays.check ^= arrays.pass(arrays.param + begin, arrays.grad + begin, state, size, arrays.clear);
}

}  // namespace

std::uint64_t memory_pass(std::byte* param, std::byte* grad, std::byte* state, std::int64_t size, bool clear) {
    Arrays arrays{param, grad, state, size, clear, instruction_set().table->memory_pass};
    run_parallel(num_threads(), run_slice, &arrays);
    return arrays.check;
}

}  // namespace sgdcore::cpu
