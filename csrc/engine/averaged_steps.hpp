// How the steps of an optimizer enter the averages of its parameters.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../work.hpp"

namespace sgdcore {

/// The averages of one optimizer: of the steps from the `start`-th on. All parameters have the same number of steps.
struct AveragedSteps {
    /// The part of an average that a step leaves. Without it (`is_mean`) an average is the mean over all its steps.
    double decay = 0;
    bool is_mean = false;
    std::int64_t start = 0;
    std::int64_t taken = 0;  // by the optimizer, before `start` too
    bool in_place = false;   // the averages are where the parameters belong

    /// The options' states that take part in the next step: bit s is state s.
    std::uint32_t extras() const { return taken >= start ? 1u << average_slot : 0; }
    /// Throws std::runtime_error while the averages are where the parameters belong.
    void require_parameters() const {
        if (in_place) throw std::runtime_error("step: the parameters hold their averages inside of averaged()");
    }
    void apply_to(StepOptions& options) const {
        options.average_weight = weight();
        options.average_weight_changes = is_mean;
    }
    /// StepOptions::average_weight of the next step.
    double weight() const { return is_mean ? 1 / static_cast<double>(taken - start + 1) : 1 - decay; }
};

}  // namespace sgdcore
