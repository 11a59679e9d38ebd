// What an optimizer does to the gradients of all its steps, as its user set it.
#pragma once

#include <optional>

#include "../work.hpp"

namespace sgdcore::bindings {

/// The plans of an optimizer share one, which the user may change between steps.
struct Clipping {
    std::optional<double> clip_value;  // see StepOptions

    void apply_to(StepOptions& options) const {
        if (clip_value) options.clip_value = *clip_value;
    }
};

}  // namespace sgdcore::bindings
