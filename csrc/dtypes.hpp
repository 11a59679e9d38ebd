// Storage types: reading an element from memory into the compute type, and writing it back.
//
// Invariants. Reading is exact: float64 is never read into float32 (see ComputeType). Writing rounds once, to nearest,
// ties to even; to 16 bits also where the thread rounds otherwise. Memory is only touched through `Unaligned`, so a
// pointer may have any alignment. Conversions have no branches, so that loops over them vectorise, and no arithmetic on
// subnormal numbers, so that they are exact where subnormal numbers are flushed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "platform.hpp"

namespace sgdcore {

/// The storage types. The values index the kernel tables.
enum class DType : std::uint8_t { float64, float32, float16, bfloat16 };
inline constexpr int dtype_count = 4;

SGDCORE_HOST_DEVICE constexpr std::size_t item_size(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

constexpr const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::float64:
            return "float64";
        case DType::float32:
            return "float32";
        case DType::float16:
            return "float16";
        case DType::bfloat16:
            return "bfloat16";
    }
    return "?";
}

namespace storage {

struct Float64 {
    using Word = double;
    static constexpr DType dtype = DType::float64;
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE double decode(Word word) { return word; }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Word encode(double value) { return value; }
};

struct Float32 {
    using Word = float;
    static constexpr DType dtype = DType::float32;
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE float decode(Word word) { return word; }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Word encode(float value) { return value; }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Word encode(double value) { return static_cast<float>(value); }
};

/// The upper half of a float32: 1 sign, 8 exponent, 7 fraction bits.
struct BFloat16 {
    using Word = std::uint16_t;
    static constexpr DType dtype = DType::bfloat16;

    static SGDCORE_HOST_DEVICE SGDCORE_INLINE float decode(Word word) {
        return bits_as<float>(static_cast<std::uint32_t>(word) << 16);
    }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Word encode(float value) {
        // The shift comes last: compilers would otherwise select in 16-bit lanes, with 1.5 times the instructions.
        return static_cast<Word>(upper_half(value) >> 16);
    }
    /// The rounded value in the upper half; the lower half is not cleared.
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t upper_half(float value) {
        const std::uint32_t quiet_nan = bits_as<std::uint32_t>(value) | 0x00400000u;
        return select(value != value, quiet_nan, rounded_bits(value));
    }
    /// `upper_half` of a value that is no NaN. A NaN stays a NaN if its lower half is zero, as it is for NaNs from
    /// bfloat16 and from arithmetic on them.
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t rounded_bits(float value) {
        const std::uint32_t bits = bits_as<std::uint32_t>(value);
        // Adding just under half of the dropped part, plus the kept part's last bit, carries exactly when
        // nearest-even rounds up; overflow carries into the exponent and gives infinity.
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Word encode(double value);
};

/// IEEE binary16: 1 sign, 5 exponent, 10 fraction bits.
struct Float16 {
    using Word = std::uint16_t;
    static constexpr DType dtype = DType::float16;

    static SGDCORE_HOST_DEVICE SGDCORE_INLINE float decode(Word word) {
        const std::uint32_t magnitude = word & 0x7fffu;
        const std::uint32_t sign = static_cast<std::uint32_t>(word & 0x8000u) << 16;
        // Rebias the exponent from 15 to 127; an all-ones exponent has to become all ones again.
        const std::uint32_t rebias = select(magnitude >= 0x7c00u, (255u - 31u) << 23, (127u - 15u) << 23);
        const std::uint32_t normal = (magnitude << 13) + rebias;
        // Subnormals are integers times 2^-24, which float32 holds exactly.
        const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
        const std::uint32_t quiet = select(magnitude > 0x7c00u, 0x00400000u, 0u);  // as the hardware's conversion
        const std::uint32_t bits = select(magnitude < 0x0400u, bits_as<std::uint32_t>(subnormal), normal | quiet);
        return bits_as<float>(bits | sign);
    }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Word encode(float value) {
        const std::uint32_t bits = bits_as<std::uint32_t>(value);
        const std::uint32_t sign = (bits >> 16) & 0x8000u;
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        // Normal results: rebias, then round the 13 dropped bits to nearest even as in bfloat16.
        const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
        // Results below 2^-14 are integers times 2^-24. Twice the integer, truncated: its last bit and whether anything
        // was cut off round to nearest even, whatever the thread's rounding mode.
        const float scaled = bits_as<float>(select(magnitude < 0x38800000u, magnitude, 0u)) * 0x1p25f;
        const auto doubled = static_cast<std::int32_t>(scaled);
        const std::uint32_t rest = all_ones_if(static_cast<float>(doubled) != scaled);
        const std::uint32_t whole = static_cast<std::uint32_t>(doubled) >> 1;
        const std::uint32_t subnormal = whole + (static_cast<std::uint32_t>(doubled) & (rest | whole) & 1u);
        const std::uint32_t quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
        std::uint32_t result = select(magnitude < 0x38800000u, subnormal, normal);
        result = select(magnitude >= 0x477ff000u, 0x7c00u, result);  // 65520 and above round to infinity
        result = select(magnitude > 0x7f800000u, quiet_nan, result);
        return static_cast<Word>(result | sign);
    }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Word encode(double value);
};

/// `value` rounded to odd: a float32 that rounds to any shorter format as `value` itself would. The nearest float32
/// would be rounded twice.
SGDCORE_HOST_DEVICE SGDCORE_INLINE float round_to_odd(double value) {
    const float nearest = static_cast<float>(value);
    const double back = static_cast<double>(nearest);
    const std::uint32_t bits = bits_as<std::uint32_t>(nearest);
    // An even neighbour steps towards the value; magnitudes order like their bits. Infinity is even and steps back to
    // the largest finite number, which every shorter format rounds up again. NaN compares false.
    const bool too_large = (back < 0 ? -back : back) > (value < 0 ? -value : value);
    const bool inexact = (back < value) | (back > value);
    const std::uint32_t odd = select(too_large, bits - 1u, bits + 1u);
    return bits_as<float>(select(inexact & ((bits & 1u) == 0), odd, bits));
}

SGDCORE_HOST_DEVICE SGDCORE_INLINE BFloat16::Word BFloat16::encode(double value) { return encode(round_to_odd(value)); }
SGDCORE_HOST_DEVICE SGDCORE_INLINE Float16::Word Float16::encode(double value) { return encode(round_to_odd(value)); }

/// float64 if one of the arrays is stored as float64, else float32.
template <class... Storage>
using ComputeType = std::conditional_t<((Storage::dtype == DType::float64) || ...), double, float>;

/// The struct of a storage type that is known at compile time.
template <DType dtype>
using Of = std::conditional_t<dtype == DType::float64, Float64,
                              std::conditional_t<dtype == DType::float32, Float32,
                                                 std::conditional_t<dtype == DType::float16, Float16, BFloat16>>>;

/// Calls `function` with an object of the storage type's struct, and returns what that returns.
template <class Function>
SGDCORE_HOST_DEVICE SGDCORE_INLINE decltype(auto) with_storage(DType dtype, Function&& function) {
    switch (dtype) {
        case DType::float64:
            return function(Float64{});
        case DType::float32:
            return function(Float32{});
        case DType::float16:
            return function(Float16{});
        default:
            return function(BFloat16{});
    }
}

template <class Storage, class Compute>
SGDCORE_HOST_DEVICE SGDCORE_INLINE Compute load(const std::byte* base, std::int64_t index) {
    using Words = Unaligned<typename Storage::Word>;
    return static_cast<Compute>(Storage::decode(reinterpret_cast<const Words*>(base)[index].value));
}

template <class Storage, class Compute>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void store(std::byte* base, std::int64_t index, Compute value) {
    using Words = Unaligned<typename Storage::Word>;
    reinterpret_cast<Words*>(base)[index].value = Storage::encode(value);
}

}  // namespace storage
}  // namespace sgdcore
