// Forks: telling a process from its parent, and the threads that a fork leaves behind.
#pragma once

#include <atomic>
#include <cstdint>

namespace sgdcore {

namespace detail {
extern std::atomic<std::uint32_t> fork_count;
}

/// How many forks lie between the process that loaded the library and this one.
inline std::uint32_t forks() { return detail::fork_count.load(std::memory_order_relaxed); }

/// An address that differs from thread to thread, in one instruction; std::this_thread::get_id() calls libc. The thread
/// that forks keeps its address in the child.
inline const void* this_thread() { return __builtin_thread_pointer(); }

/// Marks the thread that is in a place where only one may be. A fork leaves only the forking thread in the child, so
/// the mark of another thread is void there.
///
/// The lock that guards the place guards the mark, too. A thread that forks has to hold it, as Python holds the GIL.
class Occupant {
  public:
    /// True while the thread that came last is inside.
    bool is_inside() const;
    /// True if the thread that came last was inside when a fork lost it.
    bool is_lost() const { return inside_ && !is_inside(); }
    void enter() {
        inside_ = true;
        forks_ = forks();
        thread_ = this_thread();
    }
    void leave() { inside_ = false; }

  private:
    bool inside_ = false;
    std::uint32_t forks_ = 0;
    const void* thread_ = nullptr;
};

}  // namespace sgdcore
