// The rules at run time: each rule's declaration, for code that has a rule's number and not its type.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "../rules/all.hpp"
#include "../work.hpp"

namespace sgdcore {

struct RuleInfo {
    const char* name;
    std::span<const HyperSpec> hypers;
    std::span<const StateSpec> states;
    /// Makes a group's Hyper of its values. Counts and sums in it are those after the step.
    Hyper (*hyper)(const Values& values);
    /// Why a group's values allow no step: null if they do. The function is null if they always do.
    const char* (*refusal)(const Values& values);
    bool counts;  // the rule has counts or sums
};

/// The states that options add to any rule's own, numbered from `max_states` on.
inline constexpr StateSpec extra_states[] = {{"average", "average_dtype"}, {"master_low", ""}, {"compensation", ""}};
static_assert(sizeof extra_states / sizeof *extra_states <= max_extras && average_slot == max_states);

/// All rules; the position is a rule's number.
std::span<const RuleInfo> rules();

/// The number of the rule of that name. Throws std::invalid_argument, listing the names, if there is none.
int rule_number(std::string_view name);

}  // namespace sgdcore
