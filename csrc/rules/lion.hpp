// Lion: steps of one length in the direction of the sign of an interpolation between momentum and gradient, with
// decoupled weight decay.
//
// With RT(x) = x rounded to the compute type C: -lr, the betas, 1 - beta1, 1 - beta2 and keep = 1 - lr * weight_decay
// are formed in float64 and rounded to C, and then
//
//     g = -g                                              if maximize
//     c = fma(1 - beta1, g, RT(beta1 * m))                m starts as zeros
//     m = fma(1 - beta2, g, RT(beta2 * m))
//     p = fma(-lr, sign(c), RT(keep * p))
//
// where the sign of a NaN is a NaN. A sign of 0 and a keep of 1 change no bit of p.
//
// Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2.
#pragma once

#include "signs.hpp"

namespace sgdcore {

struct Lion {
    static constexpr const char* name = "lion";
    enum : int { lr, beta1, beta2, weight_decay, maximize };
    static constexpr HyperSpec hypers[] = {
        {HyperSpec::number, "lr", true},           {HyperSpec::number, "beta1"},  {HyperSpec::number, "beta2"},
        {HyperSpec::number, "weight_decay", true}, {HyperSpec::flag, "maximize"},
    };
    static constexpr StateSpec states[] = {{"exp_avg", "exp_avg_dtype", Start::zeros}};

    struct Variant {};
    static constexpr Variant variants[] = {{}};
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static int variant(const Values&, bool) { return 0; }
    SGDCORE_HOST_DEVICE static constexpr Use use(Variant, int) { return Use::update; }
    static bool skips_zero_grads(const Values&) { return false; }

    template <class C>
    struct Coefficients {
        C negative_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, keep;
        SignMask<C> flip;

        Coefficients() = default;
        SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit Coefficients(const Values& values)
            : negative_lr(static_cast<C>(-values[Lion::lr])),
              beta1(static_cast<C>(values[Lion::beta1])),
              one_minus_beta1(static_cast<C>(1 - values[Lion::beta1])),
              beta2(static_cast<C>(values[Lion::beta2])),
              one_minus_beta2(static_cast<C>(1 - values[Lion::beta2])),
              keep(static_cast<C>(1 - values[Lion::lr] * values[Lion::weight_decay])),
              flip(values[Lion::maximize] != 0 ? sign_bit<C> : 0) {}

        SGDCORE_HOST_DEVICE SGDCORE_INLINE bool has_nan() const {
            const C sum = negative_lr + beta1 + one_minus_beta1 + beta2 + one_minus_beta2 + keep;
            return sum != sum;
        }
    };

    /// Updates the parameter `p` and the momentum of one element, given its gradient `g`.
    template <class C, Variant variant>
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static void update(const Coefficients<C>& k, C& p, C g, C (&state)[1]) {
        C& m = state[0];
        g = bits_as<C>(bits_as<SignMask<C>>(g) ^ k.flip);
        const C direction = fused_multiply_add(k.one_minus_beta1, g, k.beta1 * m);
        m = fused_multiply_add(k.one_minus_beta2, g, k.beta2 * m);
        p = step_by_sign(k.keep * p, k.negative_lr, direction);
    }
};
static_assert(Rule<Lion>);

}  // namespace sgdcore
