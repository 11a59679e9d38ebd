// What the rules share that step by a sign.
#pragma once

#include "rule.hpp"

namespace sgdcore {

/// p + negative_lr * sign, where `sign` is 1 or -1 with the sign of `direction`. If `direction` is a zero, the result
/// is p; if it is a NaN, a NaN. On the bits, as `clamped`: the product has the bits of `negative_lr` with another sign,
/// and is -0, which changes no bit of p, where the direction is a zero.
template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE C step_by_sign(C p, C negative_lr, C direction) {
    using Bits = SignMask<C>;
    constexpr Bits infinity = sizeof(C) == 8 ? static_cast<Bits>(0x7ff0000000000000u) : static_cast<Bits>(0x7f800000u);
    const Bits bits = bits_as<Bits>(direction), twice = bits + bits;  // the sign is shifted out
    const Bits is_nan = Bits{0} - static_cast<Bits>(twice > 2 * infinity);
    const Bits is_zero = Bits{0} - static_cast<Bits>(twice == 0);
    const Bits product = bits_as<Bits>(negative_lr) ^ (bits & sign_bit<C>);
    return p + bits_as<C>((product & ~is_zero) | (sign_bit<C> & is_zero) | (bits & is_nan));
}

}  // namespace sgdcore
