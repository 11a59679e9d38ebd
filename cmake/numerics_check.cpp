// Checks that arithmetic gives what it should under the build's flags; prints what does not. Run by numerics.cmake.
#include <cfloat>
#include <cmath>
#include <cstdio>

#include "float_mode.hpp"
#include "platform.hpp"

namespace {

int failures = 0;

void check(bool right, const char* what) {
    if (right) return;
    std::printf("  %s\n", what);
    ++failures;
}

/// A value that the compiler knows nothing about.
template <class T>
T opaque(T value) {
    volatile T hidden = value;
    return hidden;
}

template <class T>
void check_type(T tiny, T huge) {
    const T zero = opaque(T(0)), one = opaque(T(1)), nan = opaque(T(NAN)), infinity = opaque(T(INFINITY));
    check((opaque(huge) + one) - opaque(huge) == 0, "sums are taken in another order");
    check(std::signbit(opaque(T(-0.0)) + T(-0.0)) && !std::signbit(opaque(T(-0.0)) + T(0.0)),
          "the sign of zeros is lost");
    check(!std::signbit(zero - one + one), "zeros get a sign");
    check(nan != nan && !(nan == nan), "NaN is taken for a number");
    check(std::isinf(infinity) && infinity - infinity != zero && std::isnan(infinity * zero),
          "infinity is taken for a number");
    check(opaque(tiny) * one != 0 && opaque(tiny) + opaque(tiny) != opaque(tiny),
          "subnormal numbers are flushed to zero");
    bool exact = true;
    // A quotient by the reciprocal of the divisor is another number for one of these.
    for (int i = 1; i < 50; ++i) exact &= opaque(T(i)) / T(49) == opaque(T(i)) / opaque(T(49));
    check(exact, "quotients are products with a reciprocal");
    // (1 + e)^2 = 1 + 2 e + e^2, and e^2 is lost in the product's own rounding.
    const T e = sizeof(T) == 4 ? T(FLT_EPSILON) : T(DBL_EPSILON);
    check(opaque(one + e) * opaque(one + e) - opaque(one + 2 * e) == 0, "a product and a sum are contracted");
}

}  // namespace

int main() {
    using sgdcore::FloatMode;
    check(FloatMode::current() == FloatMode::standard(), "the process starts in another floating-point mode");
    check_type<float>(FLT_TRUE_MIN, 1e30f);
    check_type<double>(DBL_TRUE_MIN, 1e300);
    check(0.1 != 0.1f, "constants are taken in single precision");
    check(opaque(1.0L) + LDBL_EPSILON != 1.0L, "long double has been shortened");
    return failures == 0 ? 0 : 1;
}
