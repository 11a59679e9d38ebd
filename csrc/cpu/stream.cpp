// As many streams in and out as a step has, as fast as memory allows.
#include "stream.hpp"

#include <atomic>

#include "dispatch.hpp"
#include "threads.hpp"

namespace sgdcore::cpu {
namespace {

constexpr std::int64_t cache_line = 64;

struct Streams {
    std::byte* param;
    std::byte* grad;
    std::byte* momentum;
    std::int64_t size;
    bool clear;
    Stream pass;
    std::atomic<std::uint64_t> check = 0;
};

void run_slice(void* context, int thread, int count) {
    Streams& streams = *static_cast<Streams*>(context);
    const std::int64_t share = streams.size / count / cache_line * cache_line, begin = share * thread;
    const std::int64_t size = thread + 1 == count ? streams.size - begin : share;
    std::byte* const momentum = streams.momentum == nullptr ? nullptr : streams.momentum + begin;
    streams.check ^= streams.pass(streams.param + begin, streams.grad + begin, momentum, size, streams.clear);
}

}  // namespace

std::uint64_t stream(std::byte* param, std::byte* grad, std::byte* momentum, std::int64_t size, bool clear) {
    Streams streams{param, grad, momentum, size, clear, instruction_set().table->stream};
    run_parallel(num_threads(), run_slice, &streams);
    return streams.check;
}

}  // namespace sgdcore::cpu
