// Forks: which process this is, and who is still there.
#pragma once

#include <atomic>
#include <cstdint>

namespace sgdcore {

namespace detail {
extern std::atomic<std::uint32_t> fork_count;
}

/// How many forks lie between the process that loaded the library and this one.
inline std::uint32_t forks() { return detail::fork_count.load(std::memory_order_relaxed); }

/// What tells the threads of a process apart, in one instruction where std::this_thread::get_id() calls libc. A thread
/// that forks keeps it in the child.
inline const void* this_thread() { return __builtin_thread_pointer(); }

/// The mark of a thread that is in a place where there must be one only. A fork leaves in the child the thread that
/// forked and no other, so a mark of another thread means nothing there.
///
/// Guarded by what guards the place, which has to be held by whoever forks, as Python holds the GIL.
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
