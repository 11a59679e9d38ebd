// The whole test framework: named tests in groups, checks that count and go on, and skipping.
//
// A failed check is printed with a description that is only built then, so that tables of millions of checks stay
// cheap.
#pragma once

#include <string>

namespace sgdcore::test {

/// Registers a test; see TEST.
struct Registration {
    Registration(const char* group, const char* name, void (*body)());
};

/// Counts a failed check of the running test and prints it, unless the test has printed many already. Thread-safe.
void fail(const char* file, int line, const std::string& what);

/// Thrown by a test that cannot run here.
struct Skip {
    std::string reason;
};

/// Where the program runs many times slower, with sanitizers or emulated, it runs the same kernels over fewer sizes.
#if defined(SGDCORE_TEST_REDUCED)
inline constexpr bool reduced = true;
#else
inline constexpr bool reduced = false;
#endif

}  // namespace sgdcore::test

/// Defines a test: TEST(group, name) { ... }
#define TEST(group, name)                                                                                  \
    static void group##_##name();                                                                          \
    static const ::sgdcore::test::Registration registered_##group##_##name(#group, #name, group##_##name); \
    static void group##_##name()

/// Checks a condition; `...` is a std::string expression that says which case failed.
#define CHECK(condition, ...)                                                                                   \
    do {                                                                                                        \
        if (!(condition))                                                                                       \
            ::sgdcore::test::fail(__FILE__, __LINE__, std::string(#condition) __VA_OPT__(+": " +) __VA_ARGS__); \
    } while (false)

/// Checks that `expression` throws `Exception` with a message that contains `text`.
#define CHECK_THROWS(Exception, text, expression)                                                 \
    do {                                                                                          \
        std::string thrown = "nothing";                                                           \
        bool expected = false;                                                                    \
        try {                                                                                     \
            expression;                                                                           \
        } catch (const Exception& error) {                                                        \
            thrown = error.what();                                                                \
            expected = thrown.find(text) != std::string::npos;                                    \
        } catch (const std::exception& error) {                                                   \
            thrown = std::string("another exception: ") + error.what();                           \
        }                                                                                         \
        if (!expected) ::sgdcore::test::fail(__FILE__, __LINE__, #expression " threw " + thrown); \
    } while (false)
