// Hyperparameters as users keep them, in the dicts of param_groups, read anew by every step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <vector>

#include "../dtypes.hpp"
#include "../work.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// The key "params" of a parameter group, interned.
PyObject* params_key();

/// param_groups[index], borrowed. Raises TypeError if it is no dict.
PyObject* group_at(const py::list& param_groups, std::size_t index);

/// group[key], borrowed. Raises KeyError that names the group by its index.
PyObject* group_item(PyObject* group, PyObject* key, std::size_t index);

/// A number in a device's memory; `address` is null where there is none.
struct DeviceNumber {
    const std::byte* address = nullptr;
    DType dtype = DType::float32;
    int device = -1;
};

/// A group's numbers on devices: the i-th is that of the i-th hyperparameter that the rule lets a device read.
struct GroupScalars {
    DeviceNumber numbers[max_device_hypers];
};

/// What is to be done before Python code runs; nothing where `function` is null.
struct BeforeCode {
    void (*function)(void* context) = nullptr;
    void* context = nullptr;

    void operator()() const {
        if (function != nullptr) function(context);
    }
};

/// Makes `hypers` the hyperparameters of the groups, in order, as the rule declares them. A number may be a float,
/// whatever converts to one, or an array of one element. Raises TypeError or KeyError naming group and key.
///
/// Numbers on devices are waited for if `on_device` is null. Else they stay there, NaN standing for them, and it lists
/// them: empty if there are none, else one entry per group.
///
/// `before_code` is called before anything that may run Python code, if it is not empty; possibly more than once.
void read_hypers(int rule, const py::list& param_groups, std::vector<Hyper>& hypers,
                 std::vector<GroupScalars>* on_device, BeforeCode before_code = {});

}  // namespace sgdcore::bindings
