// See process.hpp.
#include "process.hpp"

#include <pthread.h>

namespace sgdcore {

std::atomic<std::uint32_t> detail::fork_count = 0;

namespace {

const void* forking = nullptr;  // the thread that made this process

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
    detail::fork_count.fetch_add(1, std::memory_order_relaxed);
    forking = this_thread();
});

}  // namespace

bool Occupant::is_inside() const {
    if (!inside_) return false;
    const std::uint32_t since = forks() - forks_;
    // After several forks another thread may have the same address.
    return since == 0 || (since == 1 && thread_ == forking);
}

}  // namespace sgdcore
