// The x86-64 levels that this machine runs. The processor is asked directly, since compilers know different names in
// __builtin_cpu_supports: GCC 11 lacks the levels, clang before 19 some of the features.
#pragma once

#include <cpuid.h>

namespace sgdcore::cpu {

/// The registers that the operating system saves for a program (XCR0). Needs OSXSAVE.
inline unsigned saved_registers() {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/// AVX2, FMA and the rest of the third level, in the processor and in the operating system.
inline bool runs_x86_64_v3() {
    constexpr unsigned leaf_1 = bit_FMA | bit_MOVBE | bit_POPCNT | bit_OSXSAVE | bit_AVX | bit_F16C;
    constexpr unsigned leaf_7 = bit_BMI | bit_AVX2 | bit_BMI2;
    constexpr unsigned leaf_extended = bit_LZCNT;
    constexpr unsigned saved = 0x6;  // vectors of 16 and of 32 bytes
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & leaf_1) == leaf_1 && (saved_registers() & saved) == saved &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & leaf_7) == leaf_7 &&
           __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & leaf_extended) == leaf_extended;
}

/// The third level and AVX-512 as servers have it: the fourth level.
inline bool runs_x86_64_v4() {
    constexpr unsigned leaf_7 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    constexpr unsigned saved = 0xe6;  // vectors of up to 64 bytes, and masks
    unsigned a, b, c, d;
    return runs_x86_64_v3() && (saved_registers() & saved) == saved && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (b & leaf_7) == leaf_7;
}

}  // namespace sgdcore::cpu
