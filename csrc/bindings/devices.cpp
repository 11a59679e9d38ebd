// The way of a step to the devices: divide the work list, check every part, and only then start them.
#include "devices.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../step.hpp"
#include "gil.hpp"
#include "python_functions.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

// Guarded by the GIL, as far as they change; the runtime lives as long as the process.
cuda::Runtime* current_runtime = nullptr;
bool usable = false;  // it was seen to have a device

struct Part {
    std::vector<TensorRef> tensors;
    std::vector<cuda::DeviceScalars> scalars;
    cuda::DeviceOptions options;
};

/// True if a tensor's group has a number on a device that is not the tensor's.
bool needs_numbers_on_host(const TensorRef& tensor, const std::vector<GroupScalars>& scalars) {
    if (scalars.empty()) return false;
    const auto elsewhere = [&](const DeviceNumber& number) {
        return number.address != nullptr && number.device != tensor.device;
    };
    return std::ranges::any_of(scalars[tensor.hyper].numbers, elsewhere);
}

std::vector<cuda::DeviceScalars> scalars_of(int device, const std::vector<GroupScalars>& groups) {
    std::vector<cuda::DeviceScalars> scalars(groups.size());
    for (std::size_t i = 0; i < groups.size(); ++i) {
        for (int number = 0; number < max_device_hypers; ++number) {
            const DeviceNumber& source = groups[i].numbers[number];
            if (source.device != device) continue;
            scalars[i].addresses[number] = source.address;
            scalars[i].dtypes[number] = source.dtype;
        }
    }
    return scalars;
}

using DevicePart = std::pair<cuda::Stepper*, Part*>;

/// The error of one device, which also says which ones were stepped before it.
cuda::CudaError after_stepping(std::span<const DevicePart> stepped, const cuda::CudaError& error) {
    if (stepped.empty()) return error;
    std::string text = std::string(error.what()) + "; before that, the parameters were updated on CUDA device ";
    for (std::size_t i = 0; i < stepped.size(); ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(stepped[i].first->device());
    }
    return cuda::CudaError(text);
}

void load_runtime() {
    try {
        call(python_functions().load_runtime);
    } catch (const py::error_already_set& error) {  // which is no std::runtime_error, whatever Python's is
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
                       StepOptions options, const DeviceInterface& interface) {
    std::map<int, Part> parts;
    bool on_host = false;
    for (const TensorRef& tensor : tensors) {
        parts[tensor.device].tensors.push_back(tensor);
        on_host = on_host || needs_numbers_on_host(tensor, hypers.on_device());
    }
    const std::vector<Hyper> host_hypers = on_host ? read_hypers_on_host(options.rule, param_groups) : hypers.all();
    bool cpu_left_out = false;
    for (auto& [device, part] : parts) {
        if (device == cpu_device) {
            check(part.tensors, host_hypers);
            if (!interface.scaling.is_none()) {
                std::tie(cpu_left_out, options.grad_factor) =
                    py::cast<std::pair<bool, double>>(call(interface.scaling, py::make_tuple(device)));
            }
            continue;
        }
        cuda::check_for_device(part.tensors, host_hypers, options.zero_grad);
        part.scalars = scalars_of(device, hypers.on_device());
        part.options.stream =
            pointer_of<void>(py::cast<std::uintptr_t>(call(interface.stream, py::make_tuple(device))));
        if (!interface.scaling.is_none()) {
            const auto [found_inf, grad_scale] =
                py::cast<std::pair<std::uintptr_t, std::uintptr_t>>(call(interface.scaling, py::make_tuple(device)));
            part.options.found_inf = pointer_of<const float>(found_inf);
            part.options.grad_scale = pointer_of<const float>(grad_scale);
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
            stepper->step(part->tensors, host_hypers, part->scalars, options, part->options);
        } catch (const cuda::CudaError& error) {
            throw after_stepping(std::span(on_devices).first(i), error);
        }
    }
    const auto cpu = parts.find(cpu_device);
    if (cpu != parts.end() && !cpu_left_out) sgdcore::step(cpu->second.tensors, host_hypers, options);
}

}  // namespace sgdcore::bindings
