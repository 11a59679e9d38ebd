// SGD with decoupled weight decay: the decay shrinks the parameter and takes no part in the momentum.
//
// With RT(x) = x rounded to the compute type C: the coefficients, among them decay = 1 - lr * weight_decay, or
// 1 - weight_decay without scale_decay_by_lr, are formed in float64 and rounded to C, and then
//
//     p = RT(decay * p)                                   if weight_decay != 0
//
// followed by SGD's update (sgd.hpp) without its weight decay.
//
// Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 1, whose schedule
// multiplier alone scales the decay; timm's SGDW scales it by the learning rate.
#pragma once

#include "sgd.hpp"

namespace sgdcore {

/// What is not declared here is SGD's.
struct SgdW : Sgd {
    static constexpr const char* name = "sgdw";
    enum : int { scale_decay_by_lr = maximize + 1 };
    static constexpr HyperSpec hypers[] = {
        {HyperSpec::number, "lr", true},           {HyperSpec::number, "momentum"}, {HyperSpec::number, "dampening"},
        {HyperSpec::number, "weight_decay", true}, {HyperSpec::flag, "nesterov"},   {HyperSpec::flag, "maximize"},
        {HyperSpec::flag, "scale_decay_by_lr"},
    };

    template <class C>
    struct Coefficients : Sgd::Coefficients<C> {
        C decay;

        Coefficients() = default;
        SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit Coefficients(const Values& values)
            : Sgd::Coefficients<C>(values),
              decay(static_cast<C>(1 - (values[SgdW::scale_decay_by_lr] != 0 ? values[SgdW::lr] : 1.0) *
                                           values[SgdW::weight_decay])) {}

        SGDCORE_HOST_DEVICE SGDCORE_INLINE bool has_nan() const {
            return Sgd::Coefficients<C>::has_nan() || decay != decay;
        }
    };

    /// Without decay a variant is SGD's, whose CPU kernels serve both rules.
    template <Variant variant>
    using Kernel = std::conditional_t<variant.weight_decay, SgdW, Sgd>;

    /// Updates the parameter `p` and the momentum of one element, given its gradient `g`.
    template <class C, Variant variant>
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static void update(const Coefficients<C>& k, C& p, C g, C (&state)[1]) {
        if constexpr (variant.weight_decay) p = k.decay * p;
        Sgd::update<C, Variant{variant.buffer, variant.nesterov, false}>(k, p, g, state);
    }
};
static_assert(Rule<SgdW>);

}  // namespace sgdcore
