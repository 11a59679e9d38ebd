// See catalog.hpp.
#include "catalog.hpp"

#include <stdexcept>
#include <string>

namespace sgdcore {
namespace {

template <class R>
Hyper hyper(const Values& values) {
    Hyper result{values};
    if constexpr (requires { R::schedule(result.values); }) R::schedule(result.values);
    for (const bool first_step : {false, true}) {
        result.variants[first_step] = static_cast<std::uint8_t>(R::variant(result.values, first_step));
    }
    result.skips_zero_grads = R::skips_zero_grads(values);
    for (int state = 0; state < state_count<R>; ++state) {
        if (R::use(R::variants[result.variant(false)], state) != Use::none) result.states |= 1u << state;
    }
    return result;
}

template <class R>
constexpr auto refusal_of() -> const char* (*)(const Values&) {
    if constexpr (requires(const Values& values) { R::refusal(values); }) {
        return R::refusal;
    } else {
        return nullptr;
    }
}

template <class R>
constexpr bool counts() {
    for (const HyperSpec& spec : R::hypers) {
        if (spec.kind == HyperSpec::count || spec.kind == HyperSpec::sum) return true;
    }
    return false;
}

template <class... R>
std::span<const RuleInfo> list(RuleList<R...>) {
    static constexpr RuleInfo infos[] = {{R::name, R::hypers, R::states, hyper<R>, refusal_of<R>(), counts<R>()}...};
    return infos;
}

}  // namespace

std::span<const RuleInfo> rules() { return list(Rules{}); }

int rule_number(std::string_view name) {
    for (int number = 0; number < Rules::size; ++number) {
        if (rules()[static_cast<std::size_t>(number)].name == name) return number;
    }
    std::string known;
    for (const RuleInfo& rule : rules()) known += (known.empty() ? "" : ", ") + std::string(rule.name);
    throw std::invalid_argument("rule: expected one of " + known + ", got '" + std::string(name) + "'");
}

}  // namespace sgdcore
