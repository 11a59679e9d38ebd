// Aggregated momentum: the mean of three momentum buffers. A rule that is not in the product; see test_new_rule.py.
//
// With RT(x) = x rounded to the compute type C: -lr / 3 and the betas are formed in float64 and rounded to C, and then
//
//     g = -g                                              if maximize
//     b1 = g                                              on the first step of a tensor; b2 and b3 likewise
//     b1 = RT(RT(beta_1 * b1) + g)                        afterwards; b2 and b3 likewise
//     p = fma(-lr / 3, RT(RT(b1 + b2) + b3), p)
//
// where g stands for b1 if beta_1 is zero.
//
// Source: Lucas, Sun, Zemel & Grosse, "Aggregated Momentum" (arXiv 1804.00325), equation 4.
#pragma once

#include "rule.hpp"

namespace sgdcore {

struct AggMo {
    static constexpr const char* name = "aggmo";
    enum : int { lr, beta_1, beta_2, beta_3, maximize };
    static constexpr HyperSpec hypers[] = {
        {HyperSpec::number, "lr", true}, {HyperSpec::number, "beta_1"}, {HyperSpec::number, "beta_2"},
        {HyperSpec::number, "beta_3"},   {HyperSpec::flag, "maximize"},
    };
    static constexpr StateSpec states[] = {
        {"exp_avg", "momentum_dtype"}, {"momentum_2", "momentum_dtype"}, {"momentum_3", "momentum_dtype"}};

    struct Variant {
        Use first_buffer, others;
    };
    static constexpr Variant variants[] = {
        {Use::none, Use::write}, {Use::none, Use::update}, {Use::write, Use::write}, {Use::update, Use::update}};
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static int variant(const Values& values, bool first_step) {
        return (values[beta_1] == 0 ? 0 : 2) + (first_step ? 0 : 1);
    }
    SGDCORE_HOST_DEVICE static constexpr Use use(Variant variant, int state) {
        return state == 0 ? variant.first_buffer : variant.others;
    }
    static bool skips_zero_grads(const Values&) { return false; }

    template <class C>
    struct Coefficients {
        C negative_lr, beta[3];
        SignMask<C> flip;

        Coefficients() = default;
        SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit Coefficients(const Values& values)
            : negative_lr(static_cast<C>(-values[lr] / 3)),
              beta{static_cast<C>(values[beta_1]), static_cast<C>(values[beta_2]), static_cast<C>(values[beta_3])},
              flip(values[maximize] != 0 ? sign_bit<C> : 0) {}

        SGDCORE_HOST_DEVICE SGDCORE_INLINE bool has_nan() const {
            const C sum = negative_lr + beta[0] + beta[1] + beta[2];
            return sum != sum;
        }
    };

    template <class C, Variant variant>
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static void update(const Coefficients<C>& k, C& p, C g, C (&b)[3]) {
        g = bits_as<C>(bits_as<SignMask<C>>(g) ^ k.flip);
        b[0] = variant.first_buffer == Use::update ? k.beta[0] * b[0] + g : g;
        b[1] = variant.others == Use::update ? k.beta[1] * b[1] + g : g;
        b[2] = variant.others == Use::update ? k.beta[2] * b[2] + g : g;
        p = fused_multiply_add(k.negative_lr, b[0] + b[1] + b[2], p);
    }
};
static_assert(Rule<AggMo>);

}  // namespace sgdcore
