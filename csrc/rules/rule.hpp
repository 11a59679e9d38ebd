// What the engine asks of an update rule, and what rules are made of.
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

inline constexpr int max_hypers = 8;         // of a rule
inline constexpr int max_device_hypers = 2;  // of these, numbers that a device may read from its own memory
inline constexpr int max_states = 3;         // of a rule: arrays of the parameter's shape that the optimizer keeps
inline constexpr int max_variants = 16;      // of a rule

/// A hyperparameter: its key in a parameter group, and what values it takes.
struct HyperSpec {
    enum Kind : std::uint8_t { number, flag } kind;
    const char* key;
    bool on_device = false;  // a device may read the number from its own memory
};

/// A state: its key in the state of a parameter, and the key of a parameter group that names its storage type. Where a
/// group lacks that key, or it is None, new states have the parameter's type.
struct StateSpec {
    const char* key;
    const char* dtype_key;
};

/// What a variant does with a state. `write`: the state's old content is never read, as on a tensor's first step.
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

/// How many a rule declares. (std::size is a host function, which device code may not call.)
template <class R>
inline constexpr int hyper_count = sizeof R::hypers / sizeof *R::hypers;
template <class R>
inline constexpr int state_count = sizeof R::states / sizeof *R::states;
template <class R>
inline constexpr int variant_count = sizeof R::variants / sizeof *R::variants;

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

/// The requirements.
///
/// A variant is what is decided before the loop, at compile time; `variant` gives its index for a group's values and a
/// tensor at its first step or later. Whether a state takes part at all (`use` is not none) depends on the values
/// alone. `skips_zero_grads` is true if a step leaves an element whose gradient is zero as it is, and its states.
/// `Coefficients<C>` are the hyperparameters as the update of one element uses them, in the compute type C. The
/// mask `flip` among them is the sign bit where the gradient's sign is turned, else zero; `has_nan` is true where any
/// of them is a NaN.
template <class R>
concept Rule = requires(const Values& values, const typename R::template Coefficients<float>& k, bool first) {
    { R::name } -> std::convertible_to<const char*>;
    requires hyper_count<R> <= max_hypers;
    requires(device_hyper<R, max_device_hypers> < 0);
    requires state_count<R> <= max_states;
    requires variant_count<R> <= max_variants;
    { R::variants[R::variant(values, first)] } -> std::convertible_to<typename R::Variant>;
    { R::use(R::variants[0], 0) } -> std::same_as<Use>;
    { R::skips_zero_grads(values) } -> std::same_as<bool>;
    requires std::constructible_from<typename R::template Coefficients<float>, const Values&>;
    { k.flip } -> std::convertible_to<SignMask<float>>;
    { k.has_nan() } -> std::same_as<bool>;
};

}  // namespace sgdcore
