// What an optimizer does to the gradients of all its steps, as its user set it, and what the steps found.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>

#include "../cpu/squares.hpp"
#include "../work.hpp"
#include "devices.hpp"
#include "gil.hpp"

namespace sgdcore::bindings {

/// The plans of an optimizer share one, whose settings the user may change between steps.
struct Clipping {
    std::optional<double> clip_value;  // see StepOptions
    std::optional<double> max_norm;
    bool skip_nonfinite = false;

    std::optional<double> norm;  // of the last step's gradients; nothing where it was not asked for
    std::int64_t skipped = 0;    // steps, since a gradient was not finite
    double factor = 1;           // of the last step's gradients, StepOptions::clip_factor

    /// new_result(device) -> an array of a library's, of the four numbers of NormResult on the device, all 0, and its
    /// address.
    py::object new_result = py::none();
    /// left_out(result) -> whether the last step was left out. Waits for the device.
    py::object left_out = py::none();
    /// What the last step on a device wrote, or None. A step on another device gets a new one.
    py::object result = py::none();
    std::uintptr_t result_address = 0;
    int result_device = cpu_device;
    bool on_device = false;  // the last step was, so that the norm is there

    bool asks_for_norm() const { return max_norm || skip_nonfinite; }

    cuda::NormOptions norm_options() const { return {max_norm.has_value(), max_norm.value_or(0), skip_nonfinite}; }

    /// The memory of the result on a device.
    cuda::NormResult* result_on(int device) {
        if (result.is_none() || result_device != device) {
            std::tie(result, result_address) =
                py::cast<std::pair<py::object, std::uintptr_t>>(call(new_result, py::make_tuple(device)));
            result_device = device;
        }
        on_device = true;
        return pointer_of<cuda::NormResult>(result_address);
    }

    /// The device of all tensors. Raises ValueError if there are several.
    static int device_of(std::span<const TensorRef> tensors) {
        const int device = tensors.empty() ? cpu_device : tensors.front().device;
        for (const TensorRef& tensor : tensors) {
            if (tensor.device == device) continue;
            const auto name = [](int of) { return of == cpu_device ? "the CPU" : "CUDA device " + std::to_string(of); };
            throw py::value_error("max_grad_norm, skip_nonfinite: expected all gradients on one device, got some on " +
                                  name(device) + " and some on " + name(tensor.device));
        }
        return device;
    }

    /// Raises ValueError if a device may leave a step out, and the step is counted: by averages, or by the rule.
    void require_uncounted(bool counted) const {
        if (!skip_nonfinite || !counted) return;
        throw py::value_error(
            "skip_nonfinite: averages, and rules that count steps, cannot wait for a device's decision to leave one "
            "out");
    }

    void apply_to(StepOptions& options) const {
        if (clip_value) options.clip_value = *clip_value;
    }

    /// The coefficient of torch.nn.utils.clip_grads_with_norm_ for a norm in float64: torch divides a number by a
    /// tensor by multiplying it with the reciprocal. A NaN stays a NaN.
    static double coefficient(double max_norm, double norm) {
        const double quotient = 1 / (norm + 1e-6) * max_norm;
        return quotient > 1 ? 1 : quotient;
    }

    /// Finds the norm of a step's gradients on the CPU, and with it the options' clip_factor. Returns false if the step
    /// is to be left out.
    bool measure(std::span<const TensorRef> tensors, std::int64_t elements, std::span<const Hyper> hypers,
                 StepOptions& options) {
        cpu::Squares squares;
        if (releases_gil(elements)) {
            const GilRelease release;
            squares = cpu::squares_of(tensors, hypers, options);
        } else {
            squares = cpu::squares_of(tensors, hypers, options);
        }
        on_device = false;
        norm = std::sqrt(squares.sum);
        factor = max_norm ? coefficient(*max_norm, *norm) : 1;
        options.clip_factor = factor;
        if (!skip_nonfinite || squares.all_finite) return true;
        ++skipped;
        return false;
    }
};

}  // namespace sgdcore::bindings
