// Instruction sets: those that are compiled in, those that this machine runs, and the one in use.
#pragma once

#include <span>
#include <string_view>

#include "kernel.hpp"

namespace sgdcore::cpu {

/// One compiled copy of the kernels.
struct InstructionSet {
    std::string_view name;  // as SGDCORE_ISA spells it: a psABI level such as "x86-64-v3"
    bool (*supported)();    // by this machine
    const KernelTable* table;
};

/// All that are compiled in, the most demanding first.
std::span<const InstructionSet> instruction_sets();

/// The one in use: that of `use_instruction_set`, else that of the environment variable SGDCORE_ISA, else the first one
/// that the machine runs. Chosen at the first call.
/// Throws std::invalid_argument if SGDCORE_ISA names one that is unknown or that this machine cannot run.
const InstructionSet& instruction_set();

/// Uses the named one from now on; an empty name returns to the default. Throws as `instruction_set` does.
void use_instruction_set(std::string_view name);

}  // namespace sgdcore::cpu
