// CUDA devices in the bindings: the runtime that sgdcore._cuda brings, and one optimizer's steps on all devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "../cuda/stepper.hpp"
#include "../work.hpp"
#include "hypers.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// A pointer to an address that Python code gives as an integer.
template <class T>
T* pointer_of(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

/// The runtime, which the first call loads. Throws std::runtime_error that says what is missing: the module, the
/// driver, or a device.
cuda::Runtime& device_runtime();
bool has_device_runtime();
/// True if `device_runtime` would return.
bool device_is_usable();
/// Makes `runtime` the one in use. The runtime lives as long as the process.
void use_device_runtime(cuda::Runtime* runtime);

/// Functions in Python that a step on devices calls, for the library that the arrays are from.
struct DeviceCallbacks {
    /// stream(device) -> the address of the stream to use.
    py::object stream;
    /// scaling(device) -> (found_inf, grad_scale), each the address of a float32 on the device, or 0. For `cpu_device`:
    /// (whether the step is skipped, the factor of the gradients). None if gradients are not scaled.
    py::object scaling = py::none();
    /// On the tensors' device: where `find_norm` writes, and the step reads. Null where no norm is asked for.
    cuda::NormResult* norm = nullptr;
};

class DeviceSteps {
  public:
    /// Steps all tensors, those on devices first: the devices work while the CPU steps its own. Throws
    /// std::invalid_argument before anything is changed. A CudaError names the devices that were stepped before the one
    /// that failed.
    ///
    /// The step waits for a device only where tensors elsewhere need a hyperparameter that is on that device.
    void step(std::span<const TensorRef> tensors, const py::list& param_groups, const GroupHypers& hypers,
              StepOptions options, const DeviceCallbacks& callbacks);

    /// Finds the norm of the gradients of a step, whose tensors are on one device, before that step. Throws as `step`
    /// does.
    void find_norm(std::span<const TensorRef> tensors, const py::list& param_groups, const GroupHypers& hypers,
                   const StepOptions& options, const DeviceCallbacks& callbacks, const cuda::NormOptions& norm_options);

  private:
    /// Keeps a stepper that a fork copied: a thread of the parent may have been changing it.
    struct Discard {
        void operator()(cuda::Stepper* stepper) const {
            if (stepper->is_of_this_process()) delete stepper;
        }
    };
    using Steppers = std::map<int, std::unique_ptr<cuda::Stepper, Discard>>;

    cuda::Stepper& stepper(int device);

    Steppers steppers_;
};

}  // namespace sgdcore::bindings
