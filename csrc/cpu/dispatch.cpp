// Picks the kernels for the machine at run time. isa_list.hpp is generated from the table in CMakeLists.txt and defines
// SGDCORE_ISA_LIST, a sequence of SGDCORE_ISA_ENTRY(name, symbol suffix, condition at run time).
#include "dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa_list.hpp"

#if defined(__x86_64__)
#include "x86_levels.hpp"
#endif

namespace sgdcore::cpu {

#define SGDCORE_ISA_ENTRY(name, suffix, condition) extern const KernelTable kernels_##suffix;
SGDCORE_ISA_LIST
#undef SGDCORE_ISA_ENTRY

namespace {

constexpr InstructionSet compiled[] = {
#define SGDCORE_ISA_ENTRY(name, suffix, condition) \
    {name, [] { return static_cast<bool>(condition); }, &kernels_##suffix},
    SGDCORE_ISA_LIST
#undef SGDCORE_ISA_ENTRY
};

std::atomic<const InstructionSet*> chosen = nullptr;

const InstructionSet& find(std::string_view name, const char* source) {
    std::string known;
    for (const InstructionSet& isa : compiled) {
        if (isa.name == name && isa.supported()) return isa;
        if (isa.supported()) known += (known.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument(std::string(source) + ": this machine has no instruction set '" + std::string(name) +
                                "'; it has " + known);
}

const InstructionSet& default_instruction_set() {
    const char* forced = std::getenv("SGDCORE_ISA");
    if (forced != nullptr && *forced != '\0') return find(forced, "SGDCORE_ISA");
    for (const InstructionSet& isa : compiled) {
        if (isa.supported()) return isa;
    }
    throw std::runtime_error("none of the instruction sets sgdcore was built for runs on this machine");
}

}  // namespace

std::span<const InstructionSet> instruction_sets() { return compiled; }

const InstructionSet& instruction_set() {
    const InstructionSet* isa = chosen.load(std::memory_order_relaxed);
    if (isa == nullptr) {
        isa = &default_instruction_set();
        chosen.store(isa, std::memory_order_relaxed);
    }
    return *isa;
}

void use_instruction_set(std::string_view name) {
    chosen.store(name.empty() ? &default_instruction_set() : &find(name, "isa"), std::memory_order_relaxed);
}

}  // namespace sgdcore::cpu
