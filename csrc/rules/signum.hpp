// Signum: steps of one length in the direction of the momentum's sign, with decoupled weight decay.
//
// With RT(x) = x rounded to the compute type C: -lr, momentum, 1 - momentum and keep = 1 - lr * weight_decay are
// formed in float64 and rounded to C, and then
//
//     g = -g                                              if maximize
//     b = fma(1 - momentum, g, RT(momentum * b))          if momentum != 0; b starts as zeros
//     g = b                                               if momentum != 0
//     p = fma(-lr, sign(g), RT(keep * p))
//
// where the sign of a NaN is a NaN. A sign of 0 and a keep of 1 change no bit of p.
//
// Source: Bernstein, Wang, Azizzadenesheli & Anandkumar, "signSGD: Compressed Optimisation for Non-Convex Problems"
// (arXiv 1802.04434), algorithms 1 and 2; the weight decay is that of algorithm 1 of their arXiv 1810.05291.
#pragma once

#include "signs.hpp"

namespace sgdcore {

struct Signum {
    static constexpr const char* name = "signum";
    enum : int { lr, momentum, weight_decay, maximize };
    static constexpr HyperSpec hypers[] = {
        {HyperSpec::number, "lr", true},
        {HyperSpec::number, "momentum"},
        {HyperSpec::number, "weight_decay", true},
        {HyperSpec::flag, "maximize"},
    };
    static constexpr StateSpec states[] = {{"momentum_buffer", "momentum_dtype", Start::zeros}};

    struct Variant {
        Use buffer;
    };
    static constexpr Variant variants[] = {{Use::none}, {Use::update}};
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static int variant(const Values& values, bool) {
        return values[momentum] == 0 ? 0 : 1;
    }
    SGDCORE_HOST_DEVICE static constexpr Use use(Variant variant, int) { return variant.buffer; }
    static bool skips_zero_grads(const Values& values) { return values[momentum] == 0 && values[weight_decay] == 0; }

    template <class C>
    struct Coefficients {
        C negative_lr, momentum, one_minus_momentum, keep;
        SignMask<C> flip;

        Coefficients() = default;
        SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit Coefficients(const Values& values)
            : negative_lr(static_cast<C>(-values[Signum::lr])),
              momentum(static_cast<C>(values[Signum::momentum])),
              one_minus_momentum(static_cast<C>(1 - values[Signum::momentum])),
              keep(static_cast<C>(1 - values[Signum::lr] * values[Signum::weight_decay])),
              flip(values[Signum::maximize] != 0 ? sign_bit<C> : 0) {}

        SGDCORE_HOST_DEVICE SGDCORE_INLINE bool has_nan() const {
            const C sum = negative_lr + momentum + one_minus_momentum + keep;
            return sum != sum;
        }
    };

    /// Updates the parameter `p` and the momentum of one element, given its gradient `g`.
    template <class C, Variant variant>
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static void update(const Coefficients<C>& k, C& p, C g, C (&state)[1]) {
        g = bits_as<C>(bits_as<SignMask<C>>(g) ^ k.flip);
        if constexpr (variant.buffer == Use::update) {
            g = fused_multiply_add(k.one_minus_momentum, g, k.momentum * state[0]);
            state[0] = g;
        }
        p = step_by_sign(k.keep * p, k.negative_lr, g);
    }
};
static_assert(Rule<Signum>);

}  // namespace sgdcore
