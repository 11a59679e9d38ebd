// The average of a parameter over steps: the arithmetic of one element. Every path inlines it, as it does the rules.
//
// With w = the weight of the new value, formed in float64 and rounded to the compute type C:
//
//     a = fma(w, p - a, a)         if |w| < 1/2
//     a = fma(w - 1, p - a, p)     otherwise: exact for w = 1
//
// The differences are rounded to C. This is torch's lerp, so averages equal those of
// torch.optim.swa_utils.AveragedModel with its multi_avg functions, bit for bit. The first average is a copy.
#pragma once

#include "../platform.hpp"

namespace sgdcore {

/// The weight of a step, as the update of an element uses it. `far`: an average moves at least half of the distance.
template <class C>
struct AverageCoefficient {
    C value;
    bool far;

    AverageCoefficient() = default;
    SGDCORE_HOST_DEVICE SGDCORE_INLINE explicit AverageCoefficient(double weight) : value(static_cast<C>(weight)) {
        far = !(value > C{-0.5} && value < C{0.5});
        if (far) value = value - C{1};
    }
};

/// The average `a` after a step that made the parameter `p`.
template <bool far, class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE C moved_average(C a, C p, C coefficient) {
    return fused_multiply_add(coefficient, p - a, far ? p : a);
}

}  // namespace sgdcore
