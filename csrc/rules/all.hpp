// The rules that the core is built with. The position in the list is a rule's number.
#pragma once

#include "sgd.hpp"

namespace sgdcore {

template <class... R>
struct RuleList {
    static constexpr int size = sizeof...(R);
};

using Rules = RuleList<Sgd>;

}  // namespace sgdcore
