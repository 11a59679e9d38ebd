// What the engine asks of an update rule, and what rules are made of.
//
// A rule is a struct of static members: the number of its states, its variants, its coefficients in a compute type, and
// the update of one element. The engine brings the loop, the storage types, the instruction sets and the devices.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "../platform.hpp"

namespace sgdcore {

inline constexpr int max_states = 3;     // of a rule: arrays of the parameter's shape that the optimizer keeps
inline constexpr int max_variants = 16;  // of a rule

/// What a variant does with a state. `write`: the state's old content is never read, as on a tensor's first step.
enum class Use : std::uint8_t { none, write, update };

template <class C>
using SignMask = std::conditional_t<sizeof(C) == 8, std::uint64_t, std::uint32_t>;
template <class C>
inline constexpr SignMask<C> sign_bit = SignMask<C>{1} << (8 * sizeof(C) - 1);

/// How many variants a rule has. (std::size is a host function, which device code may not call.)
template <class R>
inline constexpr int variant_count = sizeof R::variants / sizeof *R::variants;

/// The requirements. A variant is what is decided before the loop, at compile time; `variant` gives its index.
/// `Coefficients<C>` are the hyperparameters as the update of one element uses them, in the compute type C. The mask
/// `flip` among them is the sign bit where the gradient's sign is turned, else zero; `has_nan` is true where any of
/// them is a NaN.
template <class R>
concept Rule = requires(const typename R::Hyper& hyper, const typename R::template Coefficients<float>& k, bool first) {
    requires R::states >= 0 && R::states <= max_states;
    requires variant_count<R> <= max_variants;
    { R::variants[R::variant(hyper, first)] } -> std::convertible_to<typename R::Variant>;
    { R::use(R::variants[0], 0) } -> std::same_as<Use>;
    requires std::constructible_from<typename R::template Coefficients<float>, const typename R::Hyper&>;
    { k.flip } -> std::convertible_to<SignMask<float>>;
    { k.has_nan() } -> std::same_as<bool>;
};

}  // namespace sgdcore
