// Stochastic gradient descent: the update of one element. This is the only place that has it.
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
// torch.optim.SGD(foreach=False) computes the same for float32 and float64, bit for bit. A term whose coefficient is
// zero is left out: 0 * inf would be NaN. The build needs -ffp-contract=off, since the product in `RT` must not be
// fused.
#pragma once

#include "rule.hpp"

namespace sgdcore {

struct Sgd {
    static constexpr const char* name = "sgd";
    enum : int { lr, momentum, dampening, weight_decay, nesterov, maximize };
    static constexpr HyperSpec hypers[] = {
        {HyperSpec::number, "lr", true},           {HyperSpec::number, "momentum"}, {HyperSpec::number, "dampening"},
        {HyperSpec::number, "weight_decay", true}, {HyperSpec::flag, "nesterov"},   {HyperSpec::flag, "maximize"},
    };
    static constexpr StateSpec states[] = {{"momentum_buffer", "momentum_dtype"}};

    struct Variant {
        Use buffer;
        bool nesterov, weight_decay;
    };
    static constexpr Variant variants[] = {
        {Use::none, false, false},   {Use::none, false, true},  //
        {Use::write, false, false},  {Use::write, false, true},  {Use::write, true, false},  {Use::write, true, true},
        {Use::update, false, false}, {Use::update, false, true}, {Use::update, true, false}, {Use::update, true, true},
    };
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static int variant(const Values& values, bool first_step) {
        const int decayed = values[weight_decay] != 0 ? 1 : 0;
        if (values[momentum] == 0) return decayed;
        return (first_step ? 2 : 6) + (values[nesterov] != 0 ? 2 : 0) + decayed;
    }
    SGDCORE_HOST_DEVICE static constexpr Use use(Variant variant, int) { return variant.buffer; }
    /// p - lr * 0 is p. If maximize, the zero would become negative.
    static bool skips_zero_grads(const Values& values) {
        return values[momentum] == 0 && values[weight_decay] == 0 && values[maximize] == 0;
    }

    template <class C>
    struct Coefficients {
        C negative_lr, momentum, one_minus_dampening, weight_decay;
        SignMask<C> flip;  // the sign bit if maximize, else zero: an xor vectorises where a branch would not

        Coefficients() = default;
        SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit Coefficients(const Values& values)
            : negative_lr(static_cast<C>(-values[Sgd::lr])),
              momentum(static_cast<C>(values[Sgd::momentum])),
              one_minus_dampening(static_cast<C>(1 - values[Sgd::dampening])),
              weight_decay(static_cast<C>(values[Sgd::weight_decay])),
              flip(values[Sgd::maximize] != 0 ? sign_bit<C> : 0) {}

        SGDCORE_HOST_DEVICE SGDCORE_INLINE bool has_nan() const {
            const C sum = negative_lr + momentum + one_minus_dampening + weight_decay;
            return sum != sum;
        }
    };

    /// Updates the parameter `p` and the momentum `b` of one element, given its gradient `g`.
    template <class C, Variant variant>
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static void update(const Coefficients<C>& k, C& p, C g, C (&state)[1]) {
        C& b = state[0];
        g = bits_as<C>(bits_as<SignMask<C>>(g) ^ k.flip);
        if constexpr (variant.weight_decay) g = fused_multiply_add(k.weight_decay, p, g);
        if constexpr (variant.buffer == Use::write) b = g;
        if constexpr (variant.buffer == Use::update) {
            b = fused_multiply_add(k.one_minus_dampening, g, k.momentum * b);
        }
        if constexpr (variant.buffer != Use::none) g = variant.nesterov ? fused_multiply_add(k.momentum, b, g) : b;
        p = fused_multiply_add(k.negative_lr, g, p);
    }
};
static_assert(Rule<Sgd>);

}  // namespace sgdcore
