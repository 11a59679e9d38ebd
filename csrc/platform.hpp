// The only compiler conditionals of the core: inlining, restrict, bit casts, and the fused multiply-add.
//
// Everything here is `always_inline` on purpose. The kernel source is compiled once per instruction set, and an
// inline function that survived as a symbol in one of those objects could be the copy the linker keeps for the
// whole library: code for AVX-512 would then run on a machine without it.
#pragma once

#include <cstdint>

#if defined(__GNUC__) || defined(__clang__)
#define SGDCORE_INLINE inline __attribute__((always_inline))
#define SGDCORE_RESTRICT __restrict__
#else
#error "sgdcore needs GCC or Clang: the kernels rely on __builtin_fma, __builtin_bit_cast and always_inline"
#endif

#if defined(__CUDACC__)
#define SGDCORE_HOST_DEVICE __host__ __device__
#else
#define SGDCORE_HOST_DEVICE
#endif

namespace sgdcore {

/// The bits of `from`, read as a `To`. (`std::bit_cast` is not always_inline.)
template <class To, class From>
SGDCORE_HOST_DEVICE SGDCORE_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return __builtin_bit_cast(To, from);
}

/// A `T` at any address, also one shared with other types. (Copying through memcpy instead stops GCC 12 from
/// vectorising some of the loops.)
template <class T>
struct __attribute__((packed, may_alias)) Unaligned {
    T value;
};

/// Masks and selections without a branch; a ternary in the kernels' loops would stop their vectorisation.
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t all_ones_if(bool condition) {
    return 0u - static_cast<std::uint32_t>(condition);
}
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t select(bool condition, std::uint32_t yes, std::uint32_t no) {
    const std::uint32_t mask = all_ones_if(condition);
    return (yes & mask) | (no & ~mask);
}

/// a * b + c with a single rounding (nearest, ties to even). On a target without the instruction this calls
/// libm's correctly rounded function: slow, and the same bits.
SGDCORE_HOST_DEVICE SGDCORE_INLINE float fused_multiply_add(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
SGDCORE_HOST_DEVICE SGDCORE_INLINE double fused_multiply_add(double a, double b, double c) {
    return __builtin_fma(a, b, c);
}

}  // namespace sgdcore
