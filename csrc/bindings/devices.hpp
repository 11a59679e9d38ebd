// CUDA devices as the bindings see them: the runtime that sgdcore._cuda brings, and one optimizer's steps on all of
// them.
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

/// An address as Python tells it, an integer.
template <class T>
T* pointer_of(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

/// The runtime. Imports sgdcore._cuda when it is first asked for; a std::runtime_error says what is missing: the
/// module, the driver, or a device.
cuda::Runtime& device_runtime();
bool has_device_runtime();
/// True if `device_runtime` would return.
bool device_is_usable();
/// Makes it the runtime from now on. It lives as long as the process.
void use_device_runtime(cuda::Runtime* runtime);

/// What a step on devices needs of the library that the arrays are from, as functions of Python.
struct DeviceInterface {
    /// stream(device) -> the address of the stream to use, an integer.
    py::object stream;
    /// scaling(device) -> (found_inf, grad_scale), each the address of a float32 on the device, or 0. For the CPU, -1:
    /// whether the step is to be left out, and the factor of the gradients. None: there is nothing of this kind.
    py::object scaling = py::none();
};

class DeviceSteps {
  public:
    /// Steps all tensors: those of the devices first, which go on by themselves meanwhile. Throws
    /// std::invalid_argument before anything is changed. A CudaError says which devices were stepped before the one
    /// that failed.
    ///
    /// Nothing waits for a device, unless tensors that are not on it need a number that is.
    void step(std::span<const TensorRef> tensors, const py::list& param_groups, const GroupHypers& hypers,
              StepOptions options, const DeviceInterface& interface);

  private:
    /// Leaves a stepper that a fork brought here as it is: a thread that is not here may have been changing it.
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
