// Which of the x86-64 levels this machine runs, asked of the processor itself: compilers differ in the names that
// __builtin_cpu_supports knows. GCC 11 lacks the levels, clang before 19 some of the features.
#pragma once

#include <cpuid.h>

namespace sgdcore::cpu {

/// The registers that the operating system saves for a program (XCR0). Needs OSXSAVE.
inline unsigned saved_registers() {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/// AVX2, FMA and what else comes with them, in the processor and in the operating system.
inline bool runs_x86_64_v3() {
    constexpr unsigned first = bit_FMA | bit_MOVBE | bit_POPCNT | bit_OSXSAVE | bit_AVX | bit_F16C;
    constexpr unsigned seventh = bit_BMI | bit_AVX2 | bit_BMI2;
    constexpr unsigned extended = bit_LZCNT;
    constexpr unsigned saved = 0x6;  // vectors of 16 and of 32 bytes
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & first) == first && (saved_registers() & saved) == saved &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & seventh) == seventh &&
           __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & extended) == extended;
}

/// AVX-512 as servers have it, on top of the third level.
inline bool runs_x86_64_v4() {
    constexpr unsigned seventh = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    constexpr unsigned saved = 0xe6;  // vectors of up to 64 bytes, and masks
    unsigned a, b, c, d;
    return runs_x86_64_v3() && (saved_registers() & saved) == saved && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (b & seventh) == seventh;
}

}  // namespace sgdcore::cpu
