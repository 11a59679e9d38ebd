// What a step has to compute, written a second time: one element after the other, in the plainest way that is right.
//
// Nothing of the core's arithmetic is used. Words of every storage type are held as std::uint64_t. A conversion to a
// shorter format counts how many of the format's steps fit in the value, so its single rounding is that of
// std::nearbyint (to nearest, ties to even).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

#include "sgd.hpp"
#include "work.hpp"

namespace sgdcore::test {

using Word = std::uint64_t;

/// An IEEE 754 interchange format, or one shaped like it.
struct Format {
    int fraction_bits, exponent_bits;

    constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    constexpr Word infinity() const { return ((Word{1} << exponent_bits) - 1) << fraction_bits; }
    constexpr Word sign() const { return Word{1} << (exponent_bits + fraction_bits); }
};

constexpr Format format_of(DType dtype) {
    switch (dtype) {
        case DType::float64:
            return {52, 11};
        case DType::float32:
            return {23, 8};
        case DType::float16:
            return {10, 5};
        case DType::bfloat16:
            return {7, 8};
    }
    return {0, 0};
}

inline bool is_nan(DType dtype, Word word) {
    const Format format = format_of(dtype);
    return (word & ~format.sign()) > format.infinity();
}

/// The value of a word, exactly; a NaN without its payload.
inline double decode(DType dtype, Word word) {
    if (dtype == DType::float64) return std::bit_cast<double>(word);
    const Format format = format_of(dtype);
    const bool negative = (word & format.sign()) != 0;
    const Word magnitude = word & ~format.sign();
    const Word one = Word{1} << format.fraction_bits;
    const int exponent = static_cast<int>(magnitude / one);
    const double fraction = static_cast<double>(magnitude % one);
    double value;
    if (magnitude > format.infinity()) {
        value = std::numeric_limits<double>::quiet_NaN();
    } else if (magnitude == format.infinity()) {
        value = std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
        value = std::ldexp(fraction, 1 - format.bias() - format.fraction_bits);
    } else {
        value = std::ldexp(static_cast<double>(one) + fraction, exponent - format.bias() - format.fraction_bits);
    }
    return negative ? -value : value;
}

/// The word nearest to `value`, ties to even.
inline Word encode(DType dtype, double value) {
    if (dtype == DType::float64) return std::bit_cast<Word>(value);
    const Format format = format_of(dtype);
    const Word sign = std::signbit(value) ? format.sign() : 0;
    if (std::isnan(value)) return sign | format.infinity() | (Word{1} << (format.fraction_bits - 1));
    if (std::isinf(value)) return sign | format.infinity();
    if (value == 0) return sign;
    int exponent;
    std::frexp(value, &exponent);  // |value| lies in [2^(exponent-1), 2^exponent)
    exponent = std::max(exponent - 1, 1 - format.bias());
    // Scaling by a power of two is exact here. Below the normal range the steps no longer shrink with the value.
    const double steps = std::nearbyint(std::ldexp(std::abs(value), format.fraction_bits - exponent));
    // Normal values have 2^fraction_bits steps more than their fraction says: that is the exponent's lowest bit.
    // If rounding reached the next power of two, the sum carries into the exponent as it should.
    const Word magnitude =
        (static_cast<Word>(exponent + format.bias() - 1) << format.fraction_bits) + static_cast<Word>(steps);
    return sign | std::min(magnitude, format.infinity());
}

/// Equal bits; all NaNs are alike, because which operand's payload survives is the instruction's choice.
inline bool same_word(DType dtype, Word a, Word b) { return a == b || (is_nan(dtype, a) && is_nan(dtype, b)); }

inline Word read_word(DType dtype, const std::byte* base, std::int64_t index) {
    Word word = 0;
    const auto item = static_cast<std::int64_t>(item_size(dtype));
    // Little endian, as every platform the core is built for.
    std::memcpy(&word, base + index * item, static_cast<std::size_t>(item));
    return word;
}

inline void write_word(DType dtype, std::byte* base, std::int64_t index, Word word) {
    const auto item = static_cast<std::int64_t>(item_size(dtype));
    std::memcpy(base + index * item, &word, static_cast<std::size_t>(item));
}

/// The storage types of a tensor's three arrays.
struct DTypes {
    DType param, grad, momentum;
};

/// The rules of rules/sgd.hpp and rules/sgdw.hpp in the arithmetic of C, on words.
template <class C>
void update_word_in(const DTypes& dtypes, const SgdHyper& hyper, bool first, Word& param, Word grad, Word& momentum,
                    double grad_factor, double clip_value) {
    C p = static_cast<C>(decode(dtypes.param, param));
    C g = static_cast<C>(decode(dtypes.grad, grad));
    if (hyper.maximize) g = -g;
    if (grad_factor != 1) g *= static_cast<C>(grad_factor);
    if (const C limit = static_cast<C>(clip_value); g > limit || g < -limit) g = std::copysign(limit, g);
    if (hyper.weight_decay != 0 && hyper.decoupled) {
        const double decay = (hyper.scale_decay_by_lr ? hyper.lr : 1) * hyper.weight_decay;
        p = std::fma(static_cast<C>(1 - decay), p, static_cast<C>(-0.0));  // a product with a rounding of its own
    } else if (hyper.weight_decay != 0) {
        g = std::fma(static_cast<C>(hyper.weight_decay), p, g);
    }
    if (hyper.momentum != 0) {
        const C mu = static_cast<C>(hyper.momentum);
        C b = g;
        if (!first) {
            const C old = static_cast<C>(decode(dtypes.momentum, momentum));
            // The product has a rounding of its own. Adding -0 changes no value, not even a zero's sign, and leaves
            // the compiler nothing to contract.
            const C product = std::fma(mu, old, static_cast<C>(-0.0));
            b = std::fma(static_cast<C>(1 - hyper.dampening), g, product);
        }
        momentum = encode(dtypes.momentum, static_cast<double>(b));
        g = hyper.nesterov ? std::fma(mu, b, g) : b;
    }
    p = std::fma(static_cast<C>(-hyper.lr), g, p);
    param = encode(dtypes.param, static_cast<double>(p));
}

/// Updates one element. The arithmetic is float64 if an array that takes part is stored as float64, else float32.
inline void update_word(const DTypes& dtypes, const SgdHyper& hyper, bool first, Word& param, Word grad, Word& momentum,
                        double grad_factor = 1, double clip_value = std::numeric_limits<double>::infinity()) {
    if (dtypes.param == DType::float64 || dtypes.grad == DType::float64 ||
        (hyper.momentum != 0 && dtypes.momentum == DType::float64)) {
        update_word_in<double>(dtypes, hyper, first, param, grad, momentum, grad_factor, clip_value);
    } else {
        update_word_in<float>(dtypes, hyper, first, param, grad, momentum, grad_factor, clip_value);
    }
}

inline std::string describe(const SgdHyper& hyper, bool first) {
    return "lr=" + std::to_string(hyper.lr) + " momentum=" + std::to_string(hyper.momentum) +
           (first ? " (first)" : "") + " dampening=" + std::to_string(hyper.dampening) +
           " weight_decay=" + std::to_string(hyper.weight_decay) + (hyper.nesterov ? " nesterov" : "") +
           (hyper.maximize ? " maximize" : "") + (hyper.decoupled ? " decoupled" : "") +
           (hyper.scale_decay_by_lr ? " scale_decay_by_lr" : "");
}

inline std::string describe(const DTypes& dtypes) {
    return std::string("param ") + dtype_name(dtypes.param) + ", grad " + dtype_name(dtypes.grad) + ", momentum " +
           dtype_name(dtypes.momentum);
}

inline std::string hex(Word word) {
    char text[20];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(word));
    return text;
}

}  // namespace sgdcore::test
