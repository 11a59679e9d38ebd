// The way of a step to the devices: the work list is divided, every part is checked, and only then are they started.
#include "devices.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../engine/catalog.hpp"
#include "../step.hpp"
#include "gil.hpp"
#include "python_functions.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

// Guarded by the GIL. The runtime lives as long as the process.
cuda::Runtime* current_runtime = nullptr;
bool usable = false;  // the runtime has a device

/// One device's part of a step.
struct Part {
    std::vector<TensorRef> tensors;
    cuda::LaunchOptions options;
};

/// True if a tensor's group has a scalar on a device that is not the tensor's.
bool needs_scalars_on_host(const TensorRef& tensor, const std::vector<DeviceScalars>& scalars) {
    if (scalars.empty()) return false;
    const auto elsewhere = [&](const DeviceScalar& scalar) {
        return scalar.address != nullptr && scalar.device != tensor.device;
    };
    return std::ranges::any_of(scalars[tensor.hyper].of, elsewhere);
}

using DevicePart = std::pair<cuda::Stepper*, Part*>;

/// A device's error, with the names of the devices that were stepped before it.
cuda::CudaError after_stepping(std::span<const DevicePart> stepped, const cuda::CudaError& error) {
    if (stepped.empty()) return error;
    std::string text = std::string(error.what()) + "; before that, the parameters were updated on CUDA device ";
    for (std::size_t i = 0; i < stepped.size(); ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(stepped[i].first->device());
    }
    return cuda::CudaError(text);
}

cuda::LaunchOptions launch_options(int device, const DeviceCallbacks& callbacks) {
    cuda::LaunchOptions options;
    options.stream = pointer_of<void>(py::cast<std::uintptr_t>(call(callbacks.stream, py::make_tuple(device))));
    options.norm = callbacks.norm;
    if (callbacks.scaling.is_none()) return options;
    const auto [found_inf, grad_scale] =
        py::cast<std::pair<std::uintptr_t, std::uintptr_t>>(call(callbacks.scaling, py::make_tuple(device)));
    options.found_inf = pointer_of<const float>(found_inf);
    options.grad_scale = pointer_of<const float>(grad_scale);
    return options;
}

void load_runtime() {
    try {
        call(python_functions().load_runtime);
    } catch (const py::error_already_set& error) {  // no std::runtime_error, even for a RuntimeError
        if (!error.matches(PyExc_RuntimeError)) throw;
        throw std::runtime_error(utf8(py::str(error.value())));
    }
}

}  // namespace

cuda::Runtime& device_runtime() {
    if (current_runtime == nullptr) load_runtime();
    if (current_runtime == nullptr) throw std::runtime_error("the CUDA runtime was not registered");
    if (!usable) {
        usable = current_runtime->device_count() > 0;
        if (!usable) throw std::runtime_error("there is no CUDA device");
    }
    return *current_runtime;
}

bool device_is_usable() {
    if (usable) return true;
    try {
        device_runtime();
    } catch (const std::runtime_error&) {
        return false;
    }
    return true;
}

bool has_device_runtime() { return current_runtime != nullptr; }

void use_device_runtime(cuda::Runtime* other) {
    current_runtime = other;
    usable = false;
}

cuda::Stepper& DeviceSteps::stepper(int device) {
    Steppers::mapped_type& stepper = steppers_[device];
    if (!stepper || !stepper->is_of_this_process()) stepper.reset(new cuda::Stepper(device_runtime(), device));
    return *stepper;
}

void DeviceSteps::step(std::span<const TensorRef> tensors, const py::list& param_groups, const GroupHypers& hypers,
                       StepOptions options, const DeviceCallbacks& callbacks) {
    std::map<int, Part> parts;
    bool on_host = false;
    for (const TensorRef& tensor : tensors) {
        parts[tensor.device].tensors.push_back(tensor);
        on_host = on_host || needs_scalars_on_host(tensor, hypers.on_device());
    }
    const std::vector<Hyper> host_hypers = on_host ? read_hypers_on_host(options.rule, param_groups) : hypers.all();
    bool cpu_left_out = false;
    for (auto& [device, part] : parts) {
        if (device == cpu_device) {
            check(part.tensors, host_hypers);
            if (!callbacks.scaling.is_none()) {
                std::tie(cpu_left_out, options.grad_factor) =
                    py::cast<std::pair<bool, double>>(call(callbacks.scaling, py::make_tuple(device)));
            }
            continue;
        }
        for (const TensorRef& tensor : part.tensors) {
            const Precision precision = host_hypers[tensor.hyper].precision;
            if (precision == Precision::plain) continue;
            throw py::value_error("precision: " + std::string(precision_name(precision)) +
                                  " is for parameters on the CPU, and param_groups[" + std::to_string(tensor.hyper) +
                                  "] has one on a CUDA device");
        }
        cuda::check_for_device(part.tensors, host_hypers, options.zero_grad);
        part.options = launch_options(device, callbacks);
        if (rules()[static_cast<std::size_t>(options.rule)].counts &&
            device_runtime().capturing(device, part.options.stream)) {
            throw std::runtime_error("a step of this rule cannot be captured: a graph would repeat one step's numbers");
        }
        stepper(device);
    }
    std::vector<DevicePart> on_devices;
    for (auto& [device, part] : parts) {
        if (device != cpu_device) on_devices.emplace_back(&stepper(device), &part);
    }

    const GilRelease release;
    for (std::size_t i = 0; i < on_devices.size(); ++i) {
        const auto& [stepper, part] = on_devices[i];
        try {
            stepper->step(part->tensors, host_hypers, hypers.on_device(), options, part->options);
        } catch (const cuda::CudaError& error) {
            throw after_stepping(std::span(on_devices).first(i), error);
        }
    }
    const auto cpu = parts.find(cpu_device);
    if (cpu != parts.end() && !cpu_left_out) sgdcore::step(cpu->second.tensors, host_hypers, options);
}

void DeviceSteps::find_norm(std::span<const TensorRef> tensors, const py::list& param_groups, const GroupHypers& hypers,
                            const StepOptions& options, const DeviceCallbacks& callbacks,
                            const cuda::NormOptions& norm_options) {
    const int device = tensors.front().device;
    const bool on_host = std::ranges::any_of(
        tensors, [&](const TensorRef& tensor) { return needs_scalars_on_host(tensor, hypers.on_device()); });
    const std::vector<Hyper> host_hypers = on_host ? read_hypers_on_host(options.rule, param_groups) : hypers.all();
    cuda::check_for_device(tensors, host_hypers, options.zero_grad);
    const cuda::LaunchOptions launch = launch_options(device, callbacks);
    cuda::Stepper& of_device = stepper(device);
    const GilRelease release;
    of_device.find_norm(tensors, host_hypers, hypers.on_device(), options, launch, norm_options);
}

}  // namespace sgdcore::bindings
