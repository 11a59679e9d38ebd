// What the kernels need of the compiler: inlining, restrict, bit casts, and the fused multiply-add. Conditionals on the
// compiler stand here only.
//
// Everything here is `always_inline` on purpose. The kernel source is compiled once per instruction set. If an inline
// function became a symbol of one of those objects, the linker could keep that copy for the whole library, and code for
// AVX-512 would run on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define SGDCORE_INLINE inline __attribute__((always_inline))
#define SGDCORE_INLINE_LAMBDA __attribute__((always_inline))
#define SGDCORE_NO_INLINE __attribute__((noinline))
#define SGDCORE_RESTRICT __restrict__
#else
#error "sgdcore needs GCC or Clang: the kernels rely on __builtin_fma, __builtin_bit_cast and always_inline"
#endif

// The build takes back every flag that changes the values of arithmetic (cmake/numerics.cmake). A flag that was missed
// stops the build here, if the compiler tells.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ != 0) ||                          \
    (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__)
#error "sgdcore: a flag such as -ffast-math lets the compiler change the values that arithmetic gives"
#endif
// 16: float16 has its own precision, too; nothing is computed in float16.
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "sgdcore: float and double must be computed in their own precision (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif

#if defined(__SANITIZE_THREAD__)
#define SGDCORE_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SGDCORE_THREAD_SANITIZER
#endif
#endif

/// Lets the compiler use 64-byte vectors in a function of a file that is compiled for 32-byte ones.
#if defined(__AVX512F__) && !defined(__clang__)
#define SGDCORE_WIDE_VECTORS __attribute__((target("prefer-vector-width=512")))
#define SGDCORE_HAS_WIDE_VECTORS true
#else
#define SGDCORE_WIDE_VECTORS
#define SGDCORE_HAS_WIDE_VECTORS false
#endif

#if defined(__CUDACC__)
#define SGDCORE_HOST_DEVICE __host__ __device__
#else
#define SGDCORE_HOST_DEVICE
#endif

namespace sgdcore {

/// True where a file is compiled for the first level of x86-64, which has neither FMA nor conversions of 16 bits.
#if defined(__x86_64__) && !defined(__AVX2__)
inline constexpr bool is_x86_64_baseline = true;
#else
inline constexpr bool is_x86_64_baseline = false;
#endif

inline constexpr std::int64_t cache_line = 64;  // bytes
inline constexpr bool has_wide_vectors = SGDCORE_HAS_WIDE_VECTORS;

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

/// Masks and selections without a branch: a ternary would stop the vectorisation of the kernels' loops.
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t all_ones_if(bool condition) {
    return 0u - static_cast<std::uint32_t>(condition);
}
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t select(bool condition, std::uint32_t yes, std::uint32_t no) {
#if defined(__AVX512F__)
    return condition ? yes : no;  // one instruction with a mask register
#else
    const std::uint32_t mask = all_ones_if(condition);
    return (yes & mask) | (no & ~mask);
#endif
}

/// a * b + c with a single rounding (nearest, ties to even). On a target without the instruction this calls
/// libm's correctly rounded function: slow, and the same bits.
SGDCORE_HOST_DEVICE SGDCORE_INLINE float fused_multiply_add(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
SGDCORE_HOST_DEVICE SGDCORE_INLINE double fused_multiply_add(double a, double b, double c) {
    return __builtin_fma(a, b, c);
}

/// Whether the target has that instruction.
#if defined(__FMA__) || defined(__aarch64__)
inline constexpr bool has_fused_multiply_add = true;
#else
inline constexpr bool has_fused_multiply_add = false;
#endif

/// Conversions of `float16_lanes` float16 to float32 and back, rounding to nearest even, where the machine has them:
/// the bits of storage::Float16, in a fraction of the instructions.
#if defined(__AVX512F__)
inline constexpr bool converts_float16 = true;
inline constexpr std::int64_t float16_lanes = 16;
SGDCORE_INLINE void float16_to_float32(const std::byte* from, float* to) {
    _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
SGDCORE_INLINE void float32_to_float16(const float* from, std::byte* to) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to),
        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline constexpr bool converts_float16 = true;
inline constexpr std::int64_t float16_lanes = 8;
SGDCORE_INLINE void float16_to_float32(const std::byte* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
SGDCORE_INLINE void float32_to_float16(const float* from, std::byte* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline constexpr bool converts_float16 = false;
inline constexpr std::int64_t float16_lanes = 8;
SGDCORE_INLINE void float16_to_float32(const std::byte*, float*) {}
SGDCORE_INLINE void float32_to_float16(const float*, std::byte*) {}
#endif

/// Writes the upper halves of `halves_lanes` 32-bit words, where the machine has an instruction for it.
#if defined(__AVX512BW__)
inline constexpr bool joins_halves = true;
inline constexpr std::int64_t halves_lanes = 32;
SGDCORE_INLINE void store_upper_halves(const std::uint32_t* words, std::byte* to) {
    alignas(cache_line) static constexpr std::uint16_t odd[halves_lanes] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                                            23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                                            45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i first = _mm512_loadu_si512(words), second = _mm512_loadu_si512(words + halves_lanes / 2);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, _mm512_load_si512(odd), second));
}
#else
inline constexpr bool joins_halves = false;
inline constexpr std::int64_t halves_lanes = 32;
SGDCORE_INLINE void store_upper_halves(const std::uint32_t*, std::byte*) {}
#endif

}  // namespace sgdcore
