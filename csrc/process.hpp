// Forks: which process this is, and who is still there.
#pragma once

#include <cstdint>
#include <thread>

namespace sgdcore {

/// How many forks lie between the process that loaded the library and this one.
std::uint32_t forks();

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
        thread_ = std::this_thread::get_id();
    }
    void leave() { inside_ = false; }

  private:
    bool inside_ = false;
    std::uint32_t forks_ = 0;
    std::thread::id thread_;
};

}  // namespace sgdcore
