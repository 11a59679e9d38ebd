// The floating-point mode of a thread: how it rounds, whether it flushes subnormal numbers, which exceptions trap.
//
// A thread's mode is in a register (MXCSR on x86, FPCR on 64-bit ARM), and a new thread inherits the mode of the thread
// that started it. A thread pool therefore computes in the mode of the thread that made the pool.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#else
#include <cfenv>
#endif

namespace sgdcore {

/// A floating-point mode, without the flags that say which exceptions have happened.
class FloatMode {
  public:
    /// The calling thread's mode.
    static FloatMode current() {
#if defined(__SSE__)
        return FloatMode(_mm_getcsr() & ~happened);
#elif defined(__aarch64__)
        Word word;
        asm volatile("mrs %0, fpcr" : "=r"(word));
        return FloatMode(word);
#else
        return FloatMode(std::fegetround());  // no known processor of this kind flushes subnormal numbers
#endif
    }

    /// The mode that C programs start in, IEEE 754's default: to nearest, subnormal numbers kept, no traps.
    static FloatMode standard() {
#if defined(__SSE__)
        return FloatMode(0x1f80);
#elif defined(__aarch64__)
        return FloatMode(0);
#else
        return FloatMode(FE_TONEAREST);
#endif
    }

    /// Puts the calling thread into this mode.
    void apply() const {
#if defined(__SSE__)
        _mm_setcsr(word_ | (_mm_getcsr() & happened));
#elif defined(__aarch64__)
        asm volatile("msr fpcr, %0" : : "r"(word_));
#else
        std::fesetround(word_);
#endif
    }

    bool operator==(const FloatMode&) const = default;

  private:
#if defined(__SSE__)
    using Word = unsigned;
    static constexpr Word happened = 0x3f;
#elif defined(__aarch64__)
    using Word = std::uint64_t;
#else
    using Word = int;
#endif
    explicit FloatMode(Word word) : word_(word) {}
    Word word_;
};

/// Puts the calling thread into a mode, and back into its own at the end of the scope.
class FloatModeScope {
  public:
    explicit FloatModeScope(FloatMode mode) : own_(FloatMode::current()), differs_(own_ != mode) {
        if (differs_) mode.apply();
    }
    ~FloatModeScope() {
        if (differs_) own_.apply();
    }
    FloatModeScope(const FloatModeScope&) = delete;
    FloatModeScope& operator=(const FloatModeScope&) = delete;

  private:
    FloatMode own_;
    bool differs_;  // writing the register costs more than reading it
};

}  // namespace sgdcore
