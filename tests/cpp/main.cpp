// Runs the groups of tests named on the command line, all of them if none is.
//
// Exit status: 0 passed, 1 failed, 77 not run: all tests were skipped, or SGDCORE_ISA names an instruction set of this
// build that this machine cannot run.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "check.hpp"
#include "cpu/dispatch.hpp"

namespace sgdcore::test {
namespace {

constexpr int exit_skipped = 77;
constexpr int printed_failures = 10;  // per test

struct Test {
    std::string_view group;
    const char* name;
    void (*body)();
};

/// Built by the registrations, in whatever order the files are initialised.
std::vector<Test>& tests() {
    static std::vector<Test> list;
    return list;
}

std::atomic<long> failures = 0;  // of the running test
std::mutex printing;

enum class Outcome { passed, failed, skipped };

Outcome run(const Test& test) {
    failures = 0;
    std::string skipped;
    const auto start = std::chrono::steady_clock::now();
    try {
        test.body();
    } catch (const Skip& skip) {
        skipped = skip.reason;
    } catch (const std::exception& error) {
        fail(__FILE__, __LINE__, std::string("the test threw ") + error.what());
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const Outcome outcome = failures > 0 ? Outcome::failed : skipped.empty() ? Outcome::passed : Outcome::skipped;
    std::printf("%-7s %6.2f s  %s.%s",
                outcome == Outcome::failed ? "FAILED"
                : skipped.empty()          ? "ok"
                                           : "skipped",
                seconds, std::string(test.group).c_str(), test.name);
    if (failures > 0) std::printf(": %ld failed checks", failures.load());
    if (!skipped.empty()) std::printf(": %s", skipped.c_str());
    std::printf("\n");
    std::fflush(stdout);
    return outcome;
}

bool forced_but_unsupported() {
    const char* forced = std::getenv("SGDCORE_ISA");
    if (forced == nullptr) return false;
    return std::ranges::any_of(cpu::instruction_sets(),
                               [&](const cpu::InstructionSet& isa) { return isa.name == forced && !isa.supported(); });
}

int run_groups(const std::vector<std::string_view>& groups) {
    int passed = 0, failed = 0;
    for (const std::string_view group : groups) {
        if (std::ranges::none_of(tests(), [&](const Test& test) { return test.group == group; })) {
            std::printf("there is no group of tests '%s'\n", std::string(group).c_str());
            return 1;
        }
    }
    if (forced_but_unsupported()) {
        std::printf("skipped: this machine does not run the instruction set %s\n", std::getenv("SGDCORE_ISA"));
        return exit_skipped;
    }
    for (const Test& test : tests()) {
        if (!groups.empty() && std::ranges::find(groups, test.group) == groups.end()) continue;
        const Outcome outcome = run(test);
        passed += outcome == Outcome::passed;
        failed += outcome == Outcome::failed;
    }
    if (failed > 0) return 1;
    return passed > 0 ? 0 : exit_skipped;
}

}  // namespace

Registration::Registration(const char* group, const char* name, void (*body)()) {
    tests().push_back({group, name, body});
}

void fail(const char* file, int line, const std::string& what) {
    if (++failures > printed_failures) return;
    const std::lock_guard lock(printing);
    std::printf("%s:%d: %s\n", file, line, what.c_str());
}

}  // namespace sgdcore::test

int main(int argc, char** argv) { return sgdcore::test::run_groups({argv + 1, argv + argc}); }
