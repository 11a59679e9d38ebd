// Precisions: what is kept of a parameter that a step computes in more digits than the 16 bits that the model sees.
//
// - split: the parameter is an exact float32, the master, in two halves: the visible bfloat16 and 16 bits more.
// - kahan: beside the parameter stands what its last rounding lost, in the parameter's own type.
// - stochastic: the parameter is rounded up or down by chance, so that roundings cancel on average.
//
// Invariants. Conversions have no branches, so that loops over them vectorise, and they are the same for every
// instruction set and device. Like storage::, they round to 16 bits to nearest in any rounding mode. What they convert
// is a float32: where the compute type is float64, the parameter is rounded to float32 before.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtypes.hpp"
#include "platform.hpp"
#include "rules/rule.hpp"

namespace sgdcore {

/// How the parameters of a group are kept. The values index the kernel tables.
enum class Precision : std::uint8_t { plain, split, kahan, stochastic };
inline constexpr int precision_count = 4;

constexpr const char* precision_name(Precision precision) {
    switch (precision) {
        case Precision::plain:
            return "plain";
        case Precision::split:
            return "split";
        case Precision::kahan:
            return "kahan";
        case Precision::stochastic:
            return "stochastic";
    }
    return "?";
}

/// True if parameters of that storage type can be kept in that precision.
constexpr bool fits(Precision precision, DType dtype) {
    if (precision == Precision::plain) return true;
    return dtype == DType::bfloat16 || (dtype == DType::float16 && precision != Precision::split);
}

/// The number of the state that holds the second half of a parameter; -1 where there is none.
constexpr int rest_slot(Precision precision) {
    return precision == Precision::split ? master_low_slot : precision == Precision::kahan ? compensation_slot : -1;
}

namespace storage {

/// The bits of a float32 whose upper half, rounded to 16 bits by an addition, is a NaN if the value is a NaN from
/// arithmetic. Such NaNs are quiet, so the addition carries into the sign only where the upper half is all ones.
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t bits_to_round(float value) {
    const std::uint32_t bits = bits_as<std::uint32_t>(value);
    return select((bits & 0x7fff8000u) == 0x7fff8000u, bits & ~0x8000u, bits);
}

/// The master's bits are (visible << 16) + low, where low is an int16. The visible half is the master rounded to
/// nearest, ties away from zero, as a bfloat16.
///
/// Every master comes back bit for bit, but for a NaN whose payload begins with seven ones and an eighth: that bit is
/// cleared, since rounding would make a zero of it. The pairs have no room for more NaNs that are NaNs in the visible
/// half, too. A quiet NaN, as all arithmetic makes, is one.
struct Split {
    struct Words {
        std::uint16_t visible, low;
    };
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE float decode(std::uint16_t visible, std::uint16_t low) {
        // The xor and the subtraction extend the sign of an int16.
        return bits_as<float>((static_cast<std::uint32_t>(visible) << 16) + ((low ^ 0x8000u) - 0x8000u));
    }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Words encode(float master) {
        const std::uint32_t bits = bits_to_round(master);
        return {static_cast<std::uint16_t>((bits + 0x8000u) >> 16), static_cast<std::uint16_t>(bits)};
    }
};

/// The parameter is the sum of two words of one storage type, rounded to float32: what the model sees, and what its
/// rounding lost, itself rounded. Nothing is kept beside an infinity or a NaN. Ties go to even in float16, away from
/// zero in bfloat16, as in `Split`: that takes a quarter of the instructions.
template <class Storage>
struct Kahan {
    using Word = typename Storage::Word;
    struct Words {
        Word visible, lost;
    };
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE float decode(Word visible, Word lost) {
        return Storage::decode(visible) + Storage::decode(lost);
    }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Words encode(float value) {
        if constexpr (Storage::dtype == DType::bfloat16) {
            const std::uint32_t visible = (bits_to_round(value) + 0x8000u) & 0xffff0000u;
            const std::uint32_t lost = bits_as<std::uint32_t>(value - bits_as<float>(visible)) + 0x8000u;
            const bool is_finite = (visible & 0x7f800000u) != 0x7f800000u;
            return {static_cast<Word>(visible >> 16), static_cast<Word>(select(is_finite, lost, 0u) >> 16)};
        } else {
            const Word visible = Storage::encode(value);
            return {visible, Storage::encode(lost_of(value, Storage::decode(visible)))};
        }
    }
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE float lost_of(float value, float visible) {
        const float lost = value - visible, zero = lost - lost;  // a NaN where one of them is not finite
        return bits_as<float>(bits_as<std::uint32_t>(lost) & all_ones_if(zero == zero));
    }
};

/// 64 bits of which each depends on every bit of `x`. (The finaliser of SplitMix64: Steele, Lea and Flood 2014.)
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint64_t mixed(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/// The random bits of one parameter in one step: a function of the seed, the parameter's position in the optimizer, the
/// steps it has taken, and an element's index in logical order. Two neighbours, an even index and the next, share one
/// 32-bit number.
struct RandomBits {
    std::uint64_t key;

    RandomBits() = default;
    SGDCORE_HOST_DEVICE SGDCORE_INLINE RandomBits(std::uint64_t seed, std::uint64_t position, std::uint64_t steps) {
        constexpr std::uint64_t golden = 0x9e3779b97f4a7c15u;
        key = mixed(mixed(mixed(seed + golden) + position + golden) + steps + golden);
    }
    /// The numbers of the pairs whose index has one upper half.
    struct Pairs {
        std::uint32_t first, second;

        /// The distance of the counters of two neighbours.
        static constexpr std::uint32_t step = 0x9e3779b9u;
        /// The counter of a pair, of whose index the lower half is given.
        SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t counter(std::uint32_t pair) const {
            return pair * step + first;
        }
        /// The number of a pair. Multiplications and shifts of 32 bits, which every instruction set has in vectors. The
        /// second half of the key comes in between them, so that two keys' numbers are no shifted copies of each other.
        SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t number(std::uint32_t counter) const {
            std::uint32_t x = (counter ^ (counter >> 16)) * 0x7feb352du;
            x = ((x ^ (x >> 15)) + second) * 0x846ca68bu;
            return x ^ (x >> 16);
        }
        SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t of(std::uint32_t pair) const { return number(counter(pair)); }
    };
    SGDCORE_HOST_DEVICE SGDCORE_INLINE Pairs pairs(std::uint32_t upper) const {
        const std::uint64_t both = upper == 0 ? key : mixed(key + upper);
        return {static_cast<std::uint32_t>(both), static_cast<std::uint32_t>(both >> 32)};
    }
    /// The 16 bits of one element.
    SGDCORE_HOST_DEVICE SGDCORE_INLINE std::uint32_t of(std::uint64_t element) const {
        const std::uint64_t pair = element / 2;
        const std::uint32_t number = pairs(static_cast<std::uint32_t>(pair >> 32)).of(static_cast<std::uint32_t>(pair));
        return element % 2 == 0 ? number & 0xffffu : number >> 16;
    }
};

/// Rounds to the neighbour below or above in magnitude: above with a probability of the distance from the one below in
/// units of theirs, in multiples of 2^-16. `random` has 16 bits. A value beyond the largest finite number may become
/// infinite.
template <class Storage>
struct Stochastic;

template <>
struct Stochastic<BFloat16> {
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE BFloat16::Word encode(float value, std::uint32_t random) {
        const std::uint32_t bits = bits_as<std::uint32_t>(value);
        // An infinity's lower bits are zero, so nothing carries. A NaN from arithmetic is one in its upper half.
        return static_cast<BFloat16::Word>((bits + (random & all_ones_if(value == value))) >> 16);
    }
};

template <>
struct Stochastic<Float16> {
    static SGDCORE_HOST_DEVICE SGDCORE_INLINE Float16::Word encode(float value, std::uint32_t random) {
        const std::uint32_t bits = bits_as<std::uint32_t>(value);
        const std::uint32_t sign = (bits >> 16) & 0x8000u;
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + (random >> 3)) >> 13;
        // Below 2^-14: an integer times 2^-24. 2^-40 is the unit in which the random number is added.
        const bool small = magnitude < 0x38800000u;
        const auto units = static_cast<std::int32_t>(bits_as<float>(select(small, magnitude, 0u)) * 0x1p40f);
        const std::uint32_t subnormal = (static_cast<std::uint32_t>(units) + random) >> 16;
        const std::uint32_t quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
        std::uint32_t result = select(small, subnormal, normal);
        // From 2^16 on, and where the addition carried that far.
        result = select((magnitude >= 0x47800000u) | (result > 0x7c00u), 0x7c00u, result);
        result = select(magnitude > 0x7f800000u, quiet_nan, result);
        return static_cast<Float16::Word>(result | sign);
    }
};

}  // namespace storage
}  // namespace sgdcore
