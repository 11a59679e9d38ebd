// The requirements of an update rule, and the types that rules are made of.
//
// A rule is a struct of static members. It declares its hyperparameters, its states, its variants and its coefficients
// in a compute type, and updates one element. The engine brings the loop, the storage types, the instruction sets and
// the devices; the bindings read the declarations.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "../platform.hpp"

namespace sgdcore {

inline constexpr int max_hypers = 12;        // of a rule
inline constexpr int max_device_hypers = 2;  // of these, numbers that a device may read from its own memory
inline constexpr int max_states = 3;         // of a rule: arrays of the parameter's shape that the optimizer keeps
inline constexpr int max_extras = 3;         // states that options add to any rule's own; engine/catalog.hpp lists them
inline constexpr int max_slots = max_states + max_extras;
inline constexpr int max_variants = 16;  // of a rule

/// The number of a tensor's average among its states.
inline constexpr int average_slot = max_states;
inline constexpr int master_low_slot = max_states + 1;
inline constexpr int compensation_slot = max_states + 2;

/// A hyperparameter: its key in a parameter group, and the kind of its values.
struct HyperSpec {
    /// `mode` is a flag that the optimizer's methods set. A `count` and a `sum` are numbers that each step changes: the
    /// engine writes them to the group after the step, a count as an integer.
    enum Kind : std::uint8_t { number, flag, mode, count, sum } kind;
    const char* key;
    bool on_device = false;  // a device may read the number from its own memory
};

/// What a state holds before a tensor's first step. `nothing`: the rule has variants for the first step, which write
/// the state without reading it. `zeros`, `parameter`: the engine puts zeros there, or the parameter's elements, so
/// that the rule needs no such variants.
enum class Start : std::uint8_t { nothing, zeros, parameter };

/// A state: its key in the state of a parameter, and the key of a parameter group that names the storage type of new
/// states. Where a group lacks that key, its value is None, or there is no such key, they have the parameter's type.
struct StateSpec {
    const char* key;
    const char* dtype_key;
    Start start = Start::nothing;
};

/// What a variant does with a state. `write`: it does not read the old content, as on a tensor's first step.
enum class Use : std::uint8_t { none, write, update };

/// The hyperparameters of a group as the user gave them, in the order of the rule's declaration. A flag is 0 or 1.
struct Values {
    double of[max_hypers] = {};

    SGDCORE_HOST_DEVICE SGDCORE_INLINE double operator[](int index) const { return of[index]; }
    SGDCORE_HOST_DEVICE SGDCORE_INLINE double& operator[](int index) { return of[index]; }
};

template <class C>
using SignMask = std::conditional_t<sizeof(C) == 8, std::uint64_t, std::uint32_t>;
template <class C>
inline constexpr SignMask<C> sign_bit = SignMask<C>{1} << (8 * sizeof(C) - 1);

/// True unless the value is infinite or NaN.
template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE bool is_finite(C value) {
    using Bits = SignMask<C>;
    constexpr Bits infinity = sizeof(C) == 8 ? static_cast<Bits>(0x7ff0000000000000u) : static_cast<Bits>(0x7f800000u);
    return (bits_as<Bits>(value) & ~sign_bit<C>) < infinity;
}

/// `value`, limited to [-limit, limit]. A NaN stays as it is. On the bits, since a loop over comparisons of
/// floating-point numbers would not vectorise.
template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE C clamped(C value, C limit) {
    using Bits = SignMask<C>;
    constexpr Bits infinity = sizeof(C) == 8 ? static_cast<Bits>(0x7ff0000000000000u) : static_cast<Bits>(0x7f800000u);
    const Bits bits = bits_as<Bits>(value), magnitude = bits & ~sign_bit<C>, most = bits_as<Bits>(limit);
    const Bits mask = Bits{0} - static_cast<Bits>((magnitude > most) & (magnitude <= infinity));
    return bits_as<C>(((most | (bits & sign_bit<C>)) & mask) | (bits & ~mask));
}

/// The numbers of hyperparameters, states and variants of a rule. (Device code may not call std::size.)
template <class R>
inline constexpr int hyper_count = sizeof R::hypers / sizeof *R::hypers;
template <class R>
inline constexpr int state_count = sizeof R::states / sizeof *R::states;
template <class R>
inline constexpr int variant_count = sizeof R::variants / sizeof *R::variants;
/// The states of a rule that start in this way: bit s is state s.
template <class R, Start start>
inline constexpr std::uint32_t starting = [] {
    std::uint32_t states = 0;
    for (int state = 0; state < state_count<R>; ++state) {
        if (R::states[state].start == start) states |= 1u << state;
    }
    return states;
}();

namespace detail {

template <class R>
constexpr int device_hyper(int number) {
    for (int hyper = 0; hyper < hyper_count<R>; ++hyper) {
        if (R::hypers[hyper].on_device && number-- == 0) return hyper;
    }
    return -1;
}

}  // namespace detail

/// The index of the hyperparameter that is the `number`-th of those that a device may read; -1 if there are fewer.
template <class R, int number>
inline constexpr int device_hyper = detail::device_hyper<R>(number);

/// The requirements of a rule:
///
/// - `variants` lists the rule's variants: the decisions that the loop's code is compiled for. `variant` gives the
/// index
///   of one for a group's values and for a tensor's first or later step.
/// - `use` tells what a variant does with a state. Whether a state takes part (not `none`) depends on the values alone.
/// - `skips_zero_grads` is true if a step leaves an element whose gradient is zero as it is, and so its states.
/// - A rule may have `schedule`, which computes on the host, once a step, what the step needs of a group's values: it
///   changes the values, among them each count and sum to what it is after the step. It may have `refusal`, which tells
///   why a group's values allow no step; null if they do.
/// - `Coefficients<C>` are the hyperparameters in the compute type C, as the update of one element uses them. `flip` is
///   the sign bit if the gradient's sign is flipped, else zero. `has_nan` is true if a coefficient is a NaN.
template <class R>
concept Rule = requires(const Values& values, const typename R::template Coefficients<float>& k, bool first_step) {
    { R::name } -> std::convertible_to<const char*>;
    requires hyper_count<R> <= max_hypers;
    requires(device_hyper<R, max_device_hypers> < 0);
    requires state_count<R> <= max_states;
    requires variant_count<R> <= max_variants;
    { R::variants[R::variant(values, first_step)] } -> std::convertible_to<typename R::Variant>;
    { R::use(R::variants[0], 0) } -> std::same_as<Use>;
    { R::skips_zero_grads(values) } -> std::same_as<bool>;
    requires std::constructible_from<typename R::template Coefficients<float>, const Values&>;
    { k.flip } -> std::convertible_to<SignMask<float>>;
    { k.has_nan() } -> std::same_as<bool>;
};

}  // namespace sgdcore
