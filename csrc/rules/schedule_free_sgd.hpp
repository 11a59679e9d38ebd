// Schedule-free SGD: gradients are taken at an interpolation y of SGD's iterate z and of the average x of all iterates.
// The parameter is y, the state is z, and x is never stored.
//
// Once a step, for each group, in float64 on the host, with k the number of steps before this one:
//
//     lr = lr * (k + 1) / warmup_steps                    if k + 1 < warmup_steps
//     lr_max = max(lr_max, lr)
//     weight = (k + 1)^r * lr_max^weight_lr_power
//     weight_sum = weight_sum + weight
//     c = weight / weight_sum                             0 if both are 0
//
// Then, with RT(x) = x rounded to the compute type C, and the coefficients formed in float64 and rounded to C:
//
//     g = -g                                              if maximize
//     g = fma(weight_decay, y, g)                         if weight_decay != 0
//     d = RT(z - y)                                       z starts as y
//     y = fma(c, d, y)                                    if c < 0.5
//     y = fma(c - 1, d, z)                                else
//     y = fma(lr * (momentum * (1 - c) - 1), g, y)
//     z = fma(-lr, g, z)
//
// Source: Defazio et al., "The Road Less Scheduled" (arXiv 2405.15682); the form without x, the warm-up and the weights
// are those of the package schedulefree.
#pragma once

#include <cmath>

#include "rule.hpp"

namespace sgdcore {

struct ScheduleFreeSgd {
    static constexpr const char* name = "schedule_free_sgd";
    enum : int {
        lr,
        momentum,
        weight_decay,
        warmup_steps,
        r,
        weight_lr_power,
        maximize,
        train_mode,
        k,
        weight_sum,
        lr_max,
        // Once the values are scheduled, from c: the coefficients of z - y and of g in y.
        toward = warmup_steps,
        along = r,
        from_z = weight_lr_power,  // whether y is found from z on
    };
    static constexpr HyperSpec hypers[] = {
        {HyperSpec::number, "lr"},           {HyperSpec::number, "momentum"}, {HyperSpec::number, "weight_decay", true},
        {HyperSpec::number, "warmup_steps"}, {HyperSpec::number, "r"},        {HyperSpec::number, "weight_lr_power"},
        {HyperSpec::flag, "maximize"},       {HyperSpec::mode, "train_mode"}, {HyperSpec::count, "k"},
        {HyperSpec::sum, "weight_sum"},      {HyperSpec::sum, "lr_max"},
    };
    static constexpr StateSpec states[] = {{"z", "z_dtype", Start::parameter}};

    struct Variant {
        bool weight_decay, from_z;
    };
    static constexpr Variant variants[] = {{false, false}, {true, false}, {false, true}, {true, true}};
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static int variant(const Values& values, bool) {
        return (values[weight_decay] != 0 ? 1 : 0) + (values[from_z] != 0 ? 2 : 0);
    }
    SGDCORE_HOST_DEVICE static constexpr Use use(Variant, int) { return Use::update; }
    static bool skips_zero_grads(const Values&) { return false; }

    static const char* refusal(const Values& values) {
        if (values[train_mode] != 0) return nullptr;
        return "the optimizer is in eval mode, in which the parameters hold the average: call its train() before a "
               "step";
    }

    static void schedule(Values& values) {
        const double step = values[k] + 1;
        if (step < values[warmup_steps]) values[lr] *= step / values[warmup_steps];
        if (values[lr] > values[lr_max]) values[lr_max] = values[lr];
        const double weight = power(step, values[r]) * power(values[lr_max], values[weight_lr_power]);
        values[weight_sum] += weight;
        values[k] = step;
        const double c = values[weight_sum] == 0 ? 0 : weight / values[weight_sum];
        values[toward] = c < 0.5 ? c : c - 1;
        values[along] = values[lr] * (values[momentum] * (1 - c) - 1);
        values[from_z] = c < 0.5 ? 0 : 1;
    }

    template <class C>
    struct Coefficients {
        C weight_decay, toward, along, negative_lr;
        SignMask<C> flip;

        Coefficients() = default;
        SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit Coefficients(const Values& values)
            : weight_decay(static_cast<C>(values[ScheduleFreeSgd::weight_decay])),
              toward(static_cast<C>(values[ScheduleFreeSgd::toward])),
              along(static_cast<C>(values[ScheduleFreeSgd::along])),
              negative_lr(static_cast<C>(-values[lr])),
              flip(values[maximize] != 0 ? sign_bit<C> : 0) {}

        SGDCORE_HOST_DEVICE SGDCORE_INLINE bool has_nan() const {
            const C sum = weight_decay + toward + along + negative_lr;
            return sum != sum;
        }
    };

    /// Updates the parameter `y` and the iterate of one element, given its gradient `g`.
    template <class C, Variant variant>
    SGDCORE_HOST_DEVICE SGDCORE_INLINE static void update(const Coefficients<C>& k, C& y, C g, C (&state)[1]) {
        C& z = state[0];
        g = bits_as<C>(bits_as<SignMask<C>>(g) ^ k.flip);
        if constexpr (variant.weight_decay) g = fused_multiply_add(k.weight_decay, y, g);
        y = fused_multiply_add(k.along, g, fused_multiply_add(k.toward, z - y, variant.from_z ? z : y));
        z = fused_multiply_add(k.negative_lr, g, z);
    }

  private:
    /// Exact for the usual exponents, whatever the library's pow gives.
    static double power(double base, double exponent) {
        if (exponent == 0) return 1;
        return exponent == 2 ? base * base : std::pow(base, exponent);
    }
};
static_assert(Rule<ScheduleFreeSgd>);

}  // namespace sgdcore
