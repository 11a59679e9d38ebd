// See process.hpp.
#include "process.hpp"

#include <pthread.h>

#include <atomic>

namespace sgdcore {
namespace {

std::atomic<std::uint32_t> count = 0;
std::thread::id forking;  // the thread that made this process

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
    count.fetch_add(1, std::memory_order_relaxed);
    forking = std::this_thread::get_id();
});

}  // namespace

std::uint32_t forks() { return count.load(std::memory_order_relaxed); }

bool Occupant::is_inside() const {
    if (!inside_) return false;
    const std::uint32_t since = forks() - forks_;
    // Further back, the id may be that of a later thread.
    return since == 0 || (since == 1 && thread_ == forking);
}

}  // namespace sgdcore
