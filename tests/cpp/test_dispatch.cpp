// Instruction sets: how one is chosen, and what is refused.
#include <algorithm>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

#include "check.hpp"
#include "cpu/dispatch.hpp"
#include "data.hpp"
#include "step.hpp"

namespace sgdcore::test {
namespace {

const cpu::InstructionSet* first_supported() {
    for (const cpu::InstructionSet& isa : cpu::instruction_sets()) {
        if (isa.supported()) return &isa;
    }
    return nullptr;
}

const char* const unknown = "no-such-set";

}  // namespace

TEST(dispatch, names_are_unique_and_one_is_supported) {
    std::set<std::string_view> names;
    for (const cpu::InstructionSet& isa : cpu::instruction_sets()) names.insert(isa.name);
    CHECK(!names.empty() && names.size() == cpu::instruction_sets().size());
    CHECK(first_supported() != nullptr);
    CHECK(cpu::instruction_sets().back().supported(), "the least demanding one is the build's baseline");
}

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
TEST(dispatch, levels_are_those_that_the_compiler_finds) {
    for (const cpu::InstructionSet& isa : cpu::instruction_sets()) {
        const bool expected = isa.name == "x86-64-v4"   ? __builtin_cpu_supports("x86-64-v4")
                              : isa.name == "x86-64-v3" ? __builtin_cpu_supports("x86-64-v3")
                                                        : true;
        CHECK(isa.supported() == expected, std::string(isa.name));
    }
}
#endif

/// All kernels of a rule are there, but those of first steps over 16-bit storage, and on the x86-64 baseline all of
/// 16-bit storage.
template <class R>
void check_kernels(const cpu::RuleKernels& kernels, const std::string& isa) {
    for (int direct = 0; direct < cpu::direct_count; ++direct) {
        const auto [param, grad, state] = cpu::direct_storage[direct];
        const bool converts = std::min({item_size(param), item_size(grad), item_size(state)}) == 2;
        for (int variant = 0; variant < variant_count<R>; ++variant) {
            bool first = false;
            for (int s = 0; s < state_count<R>; ++s) first = first || R::use(R::variants[variant], s) == Use::write;
            const bool left_out = converts && (first || isa == "x86-64");
            CHECK((kernels.find(direct, variant) == nullptr) == left_out, std::string(R::name) + " " + isa);
        }
    }
}

TEST(dispatch, tables_are_complete) {
    for (const cpu::InstructionSet& isa : cpu::instruction_sets()) {
        for (int number = 0; number < Rules::size; ++number) {
            with_rule(number,
                      [&]<class R>(RuleTag<R>) { check_kernels<R>(isa.table->rules[number], std::string(isa.name)); });
        }
        for (const DType dtype : all_dtypes) {
            for (const bool wide : {false, true}) {
                if (dtype == DType::float64 && !wide) continue;  // never converted
                CHECK(isa.table->decode[static_cast<int>(dtype)][wide] != nullptr, dtype_name(dtype));
                CHECK(isa.table->encode[static_cast<int>(dtype)][wide] != nullptr, dtype_name(dtype));
            }
        }
    }
}

TEST(dispatch, combinations_have_their_places) {
    int found = 0;
    for (const DTypes& dtypes : all_triples()) {
        const int place = cpu::direct_index.find({dtypes.param, dtypes.grad, dtypes.momentum});
        if (place < 0) continue;
        ++found;
        const cpu::Storage& storage = cpu::direct_storage[place];
        CHECK(storage.param == dtypes.param && storage.grad == dtypes.grad && storage.state == dtypes.momentum,
              describe(dtypes));
    }
    CHECK(found == cpu::direct_count);
}

TEST(dispatch, the_default_is_the_first_supported) {
    unsetenv("SGDCORE_ISA");
    cpu::use_instruction_set("");
    CHECK(&cpu::instruction_set() == first_supported(), std::string(cpu::instruction_set().name));
    setenv("SGDCORE_ISA", "", 1);
    cpu::use_instruction_set("");
    CHECK(&cpu::instruction_set() == first_supported(), std::string(cpu::instruction_set().name));
    unsetenv("SGDCORE_ISA");
}

TEST(dispatch, one_can_be_chosen_by_name_and_by_environment) {
    for (const cpu::InstructionSet& isa : cpu::instruction_sets()) {
        const std::string name(isa.name);
        if (!isa.supported()) {
            CHECK_THROWS(std::invalid_argument, name, cpu::use_instruction_set(name));
            continue;
        }
        cpu::use_instruction_set(name);
        CHECK(&cpu::instruction_set() == &isa, name);
        cpu::use_instruction_set(cpu::instruction_sets().back().name);
        setenv("SGDCORE_ISA", name.c_str(), 1);
        cpu::use_instruction_set("");
        CHECK(&cpu::instruction_set() == &isa, name);
        unsetenv("SGDCORE_ISA");
    }
    cpu::use_instruction_set("");
}

TEST(dispatch, an_unknown_name_is_refused_and_changes_nothing) {
    const cpu::InstructionSet& last = cpu::instruction_sets().back();
    cpu::use_instruction_set(last.name);
    CHECK_THROWS(std::invalid_argument, unknown, cpu::use_instruction_set(unknown));
    // The message lists what there is.
    CHECK_THROWS(std::invalid_argument, std::string(last.name), cpu::use_instruction_set(unknown));
    setenv("SGDCORE_ISA", unknown, 1);
    CHECK_THROWS(std::invalid_argument, "SGDCORE_ISA", cpu::use_instruction_set(""));
    unsetenv("SGDCORE_ISA");
    CHECK(&cpu::instruction_set() == &last);
    cpu::use_instruction_set("");
}

// A group of its own: the environment is read at the first use.
TEST(unknown_isa, the_first_step_throws_and_changes_nothing) {
    const char* forced = std::getenv("SGDCORE_ISA");
    if (forced == nullptr || std::string(forced) != unknown) throw Skip{std::string("needs SGDCORE_ISA=") + unknown};
    Random random(10);
    const SgdHyper hypers[] = {{.lr = 0.1, .momentum = 0.9}};
    std::vector<TestTensor> tensors{{{DType::float32, DType::float32, DType::float32}, 100, 0, true, random}};
    for (int i = 0; i < 2; ++i)
        CHECK_THROWS(std::invalid_argument, unknown, step_all(tensors, hypers, {.zero_grad = true}));
    tensors[0].check("unknown instruction set");
}

}  // namespace sgdcore::test
