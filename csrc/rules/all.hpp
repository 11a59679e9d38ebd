// The rules that the core is built with. The position in the list is a rule's number.
#pragma once

#include "lion.hpp"
#include "schedule_free_sgd.hpp"
#include "sgd.hpp"
#include "sgdw.hpp"
#include "signum.hpp"

namespace sgdcore {

template <class... R>
struct RuleList {
    static constexpr int size = sizeof...(R);
};

using Rules = RuleList<Sgd, SgdW, Signum, Lion, ScheduleFreeSgd>;

/// Names a rule in the argument of a function.
template <class R>
struct RuleTag {};

namespace detail {

template <class Function, class... R>
SGDCORE_INLINE void with_rule(int number, Function&& function, RuleList<R...>) {
    int candidate = 0;
    static_cast<void>(((candidate++ == number && (function(RuleTag<R>{}), true)) || ...));
}

}  // namespace detail

/// Calls `function(RuleTag<R>{})` for the rule of that number.
template <class Function>
SGDCORE_INLINE void with_rule(int number, Function&& function) {
    detail::with_rule(number, function, Rules{});
}

}  // namespace sgdcore
