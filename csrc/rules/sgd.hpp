// Stochastic gradient descent: the update of one element, the only place where it is written.
//
// Every path (scalar tail, vector body, any instruction set, any dtype, host and device) inlines this function.
// With RT(x) = x rounded to the compute type C: -lr, momentum, 1 - dampening and weight_decay are formed in float64 and
// rounded to C, and then
//
//     g = -g                                              if maximize
//     g = fma(weight_decay, p, g)                         if weight_decay != 0
//     b = g                                               on the first step of a tensor
//     b = fma(1 - dampening, g, RT(momentum * b))         afterwards
//     g = fma(momentum, b, g)  if nesterov,  else  b      both only if momentum != 0
//     p = fma(-lr, g, p)
//
// which is what torch.optim.SGD(foreach=False) computes for float32 and float64, bit for bit. A term whose
// coefficient is zero is left out, not multiplied by zero: 0 * inf would be NaN. Build with -ffp-contract=off: the
// product in `RT` must not be fused.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../platform.hpp"

namespace sgdcore {

/// The hyperparameters of one parameter group, as the user gave them.
struct SgdHyper {
    double lr = 1e-3;
    double momentum = 0;
    double dampening = 0;
    double weight_decay = 0;
    bool nesterov = false;
    bool maximize = false;
};

/// How the momentum buffer takes part. `first`: it is written, its old content never read.
enum class Momentum : std::uint8_t { none, first, running };

/// What is decided before the loop, at compile time.
struct SgdVariant {
    Momentum momentum = Momentum::none;
    bool nesterov = false;
    bool weight_decay = false;

    /// The bound of `index`, for tables. Not every number below it is a variant's: nesterov needs momentum.
    static constexpr int count = 12;
    SGDCORE_HOST_DEVICE constexpr int index() const {
        return static_cast<int>(momentum) * 4 + (nesterov ? 2 : 0) + (weight_decay ? 1 : 0);
    }
    SGDCORE_HOST_DEVICE static constexpr SgdVariant at(int index) {
        return {static_cast<Momentum>(index / 4), (index & 2) != 0, (index & 1) != 0};
    }
};

SGDCORE_HOST_DEVICE inline SgdVariant sgd_variant(const SgdHyper& hyper, bool first) {
    const bool momentum = hyper.momentum != 0;
    return {!momentum ? Momentum::none
            : first   ? Momentum::first
                      : Momentum::running,
            momentum && hyper.nesterov, hyper.weight_decay != 0};
}

template <class C>
using SignMask = std::conditional_t<sizeof(C) == 8, std::uint64_t, std::uint32_t>;
template <class C>
inline constexpr SignMask<C> sign_bit = SignMask<C>{1} << (8 * sizeof(C) - 1);

/// The coefficients in the compute type.
template <class C>
struct SgdCoefficients {
    C negative_lr, momentum, one_minus_dampening, weight_decay;
    SignMask<C> flip;  // the sign bit if maximize, else zero: an xor vectorises where a branch would not

    SgdCoefficients() = default;
    SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit SgdCoefficients(const SgdHyper& hyper)
        : negative_lr(static_cast<C>(-hyper.lr)),
          momentum(static_cast<C>(hyper.momentum)),
          one_minus_dampening(static_cast<C>(1 - hyper.dampening)),
          weight_decay(static_cast<C>(hyper.weight_decay)),
          flip(hyper.maximize ? sign_bit<C> : 0) {}
};

/// The update of one element.
template <class C, SgdVariant variant>
struct SgdRule : SgdCoefficients<C> {
    using Coefficients = SgdCoefficients<C>;
    using Coefficients::negative_lr, Coefficients::momentum, Coefficients::one_minus_dampening,
        Coefficients::weight_decay, Coefficients::flip;

    SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit SgdRule(const SgdHyper& hyper) : Coefficients(hyper) {}
    SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit SgdRule(const Coefficients& coefficients)
        : Coefficients(coefficients) {}

    /// Updates the parameter `p` and the momentum `b` of one element, given its gradient `g`.
    SGDCORE_HOST_DEVICE SGDCORE_INLINE void operator()(C& p, C g, C& b) const {
        g = bits_as<C>(bits_as<SignMask<C>>(g) ^ flip);
        if constexpr (variant.weight_decay) g = fused_multiply_add(weight_decay, p, g);
        if constexpr (variant.momentum != Momentum::none) {
            if constexpr (variant.momentum == Momentum::first) {
                b = g;
            } else {
                b = fused_multiply_add(one_minus_dampening, g, momentum * b);
            }
            g = variant.nesterov ? fused_multiply_add(momentum, b, g) : b;
        }
        p = fused_multiply_add(negative_lr, g, p);
    }
};

}  // namespace sgdcore
