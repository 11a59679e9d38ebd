// See catalog.hpp.
#include "catalog.hpp"

namespace sgdcore {
namespace {

template <class R>
std::uint32_t states_in_use(const Values& values) {
    std::uint32_t states = 0;
    const int variant = R::variant(values, false);
    for (int state = 0; state < state_count<R>; ++state) {
        if (R::use(R::variants[variant], state) != Use::none) states |= 1u << state;
    }
    return states;
}

template <class... R>
std::span<const RuleInfo> list(RuleList<R...>) {
    static constexpr RuleInfo infos[] = {{R::name, R::hypers, R::states, states_in_use<R>}...};
    return infos;
}

}  // namespace

std::span<const RuleInfo> rules() { return list(Rules{}); }

}  // namespace sgdcore
