// One step over one tensor, compared with the reference in every byte: the cases that all backends share.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "check.hpp"
#include "data.hpp"
#include "reference.hpp"
#include "work.hpp"

namespace sgdcore::test {

/// Takes a step: on the CPU, or on a device.
using StepFunction = void (*)(std::span<const TensorRef>, std::span<const SgdHyper>, const StepOptions&);

struct Case {
    DTypes dtypes;
    SgdHyper hyper;
    bool first;
    bool zero_grad;
    std::int64_t size;
    Placement placement;

    std::string text() const {
        static constexpr const char* placements[] = {"aligned", "at a page's end", "at odd addresses"};
        return describe(dtypes) + "; " + describe(hyper, first) + (zero_grad ? " zero_grad" : "") + "; " +
               std::to_string(size) + " elements " + placements[static_cast<int>(placement)];
    }
};

/// Memory for one case after the other.
class Bench {
  public:
    /// Where addresses are odd, they are so by bytes, or by `whole_elements`.
    Bench(StepFunction step, std::int64_t largest, bool whole_elements = false)
        : step_(step),
          whole_elements_(whole_elements),
          param_(bytes(largest)),
          grad_(bytes(largest)),
          momentum_(bytes(largest)) {}

    /// Takes one step over fresh arrays and compares every byte of them with the reference.
    void run(const Case& test) {
        const auto size = static_cast<std::size_t>(test.size);
        const auto [param_dtype, grad_dtype, momentum_dtype] = test.dtypes;
        std::byte* param = param_.place(size * item_size(param_dtype), test.placement, 1 * unit(param_dtype));
        std::byte* grad = grad_.place(size * item_size(grad_dtype), test.placement, 3 * unit(grad_dtype));
        std::byte* momentum =
            momentum_.place(size * item_size(momentum_dtype), test.placement, 5 * unit(momentum_dtype));
        fill(param_dtype, param, test.size, random_);
        fill(grad_dtype, grad, test.size, random_);
        fill(momentum_dtype, momentum, test.size, random_);
        if (test.first) {
            // What a buffer that was never written may hold.
            for (std::int64_t i = 0; i < test.size; ++i) {
                write_word(momentum_dtype, momentum, i, signalling_nan(momentum_dtype));
            }
        }
        expected_param_.clear(), expected_grad_.clear(), expected_momentum_.clear();
        for (std::int64_t i = 0; i < test.size; ++i) {
            Word p = read_word(param_dtype, param, i), b = read_word(momentum_dtype, momentum, i);
            const Word g = read_word(grad_dtype, grad, i);
            update_word(test.dtypes, test.hyper, test.first, p, g, b);
            expected_param_.push_back(p);
            expected_grad_.push_back(test.zero_grad ? 0 : g);
            expected_momentum_.push_back(b);
        }

        TensorRef tensor{.param = param, .grad = grad, .states = {momentum}, .size = test.size};
        // Without momentum the buffer must not even be read.
        if (test.hyper.momentum == 0) tensor.states[0] = momentum_.forbidden();
        tensor.param_dtype = param_dtype;
        tensor.grad_dtype = grad_dtype;
        tensor.state_dtypes[0] = momentum_dtype;
        tensor.first_step = test.first;
        step_({&tensor, 1}, {&test.hyper, 1}, {.rule = test.hyper.rule(), .zero_grad = test.zero_grad});

        compare(test, "param", param_dtype, param, expected_param_, false);
        // What is not computed has to be the same to the bit, NaNs too.
        compare(test, "grad", grad_dtype, grad, expected_grad_, true);
        compare(test, "momentum", momentum_dtype, momentum, expected_momentum_, test.hyper.momentum == 0);
        CHECK(param_.intact(), "written outside param: " + test.text());
        CHECK(grad_.intact(), "written outside grad: " + test.text());
        CHECK(momentum_.intact(), "written outside momentum: " + test.text());
    }

  private:
    std::size_t unit(DType dtype) const { return whole_elements_ ? item_size(dtype) : 1; }
    static std::size_t bytes(std::int64_t largest) { return static_cast<std::size_t>(largest) * sizeof(double); }

    static void compare(const Case& test, const char* name, DType dtype, const std::byte* actual,
                        const std::vector<Word>& expected, bool also_nans) {
        for (std::size_t i = 0; i < expected.size(); ++i) {
            const Word word = read_word(dtype, actual, static_cast<std::int64_t>(i));
            const bool same = also_nans ? word == expected[i] : same_word(dtype, word, expected[i]);
            CHECK(same, std::string(name) + "[" + std::to_string(i) + "] is " + hex(word) + ", not " +
                            hex(expected[i]) + ": " + test.text());
        }
    }

    StepFunction step_;
    bool whole_elements_;
    GuardedArray param_, grad_, momentum_;
    std::vector<Word> expected_param_, expected_grad_, expected_momentum_;
    Random random_{2};
};

struct Step {
    SgdHyper hyper;
    bool first;
};

/// Every variant the kernels distinguish, times everything they read at run time. None of the coefficients is exact in
/// any of the formats.
inline std::vector<Step> all_steps() {
    std::vector<Step> steps;
    for (int choice = 0; choice < 3 * 16; ++choice) {
        SgdHyper hyper{.lr = 0.1};
        hyper.momentum = choice / 16 == 0 ? 0 : 0.9;
        hyper.dampening = choice & 1 ? 0.3 : 0;
        hyper.weight_decay = choice & 2 ? 0.01 : 0;
        hyper.nesterov = (choice & 4) != 0;
        hyper.maximize = (choice & 8) != 0;
        steps.push_back({hyper, choice / 16 == 1});
        if (hyper.weight_decay == 0) continue;
        hyper.decoupled = true;
        hyper.scale_decay_by_lr = hyper.dampening == 0;
        steps.push_back({hyper, choice / 16 == 1});
    }
    return steps;
}

inline const Step nesterov_step{{.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.01, .nesterov = true},
                                false};

}  // namespace sgdcore::test
