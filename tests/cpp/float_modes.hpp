// Floating-point modes for the tests: what a thread may be told about rounding and subnormal numbers.
#pragma once

#include <cfenv>
#include <cstdint>
#include <string>

#include "check.hpp"
#include "float_mode.hpp"

namespace sgdcore::test {

/// A mode that a caller may be in.
struct CallersMode {
    int rounding = FE_TONEAREST;
    bool flush = false;  // subnormal results, and operands where the processor tells them apart

    std::string text() const {
        return "rounding mode " + std::to_string(rounding) + (flush ? ", subnormal numbers flushed" : "");
    }
};

inline constexpr CallersMode all_modes[] = {
    {}, {FE_TONEAREST, true}, {FE_UPWARD, false}, {FE_DOWNWARD, true}, {FE_TOWARDZERO, false}, {FE_TOWARDZERO, true}};

/// Puts the calling thread into a mode. Throws Skip where that is not written for the processor.
inline void enter(const CallersMode& mode) {
    FloatMode::standard().apply();
    std::fesetround(mode.rounding);
    if (!mode.flush) return;
#if defined(__SSE__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#elif defined(__aarch64__)
    std::uint64_t word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    asm volatile("msr fpcr, %0" : : "r"(word | std::uint64_t{1} << 24));
#else
    throw Skip{"not written for this architecture"};
#endif
}

/// A mode of the calling thread for the length of a scope.
class ModeForScope {
  public:
    explicit ModeForScope(const CallersMode& mode) : before_(FloatMode::current()) { enter(mode); }
    ~ModeForScope() { before_.apply(); }
    ModeForScope(const ModeForScope&) = delete;
    ModeForScope& operator=(const ModeForScope&) = delete;

  private:
    FloatMode before_;
};

}  // namespace sgdcore::test
