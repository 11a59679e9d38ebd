// Instruction sets: which ones this build holds, which this machine runs, and which one is used.
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

/// Everything compiled in, the most demanding first.
std::span<const InstructionSet> instruction_sets();

/// The one in use: what `use_instruction_set` chose, else what the environment variable SGDCORE_ISA names, else
/// the first one the machine supports. Chosen at the first call.
/// Throws std::invalid_argument if SGDCORE_ISA names one that is unknown or that this machine cannot run.
const InstructionSet& instruction_set();

/// Uses the named one from now on; an empty name means the default again. Throws like `instruction_set`.
void use_instruction_set(std::string_view name);

}  // namespace sgdcore::cpu
