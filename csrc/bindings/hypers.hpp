// Hyperparameters as users keep them, in the dicts of param_groups, read anew by every step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <vector>

#include "../dtypes.hpp"
#include "../rules/sgd.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// The keys of a parameter group, interned once.
struct Keys {
    PyObject *params, *lr, *momentum, *dampening, *weight_decay, *nesterov, *maximize;
};
const Keys& keys();

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

/// Those hyperparameters of a group that a device can read by itself.
struct GroupScalars {
    DeviceNumber lr, weight_decay;
};

/// Makes `hypers` the hyperparameters of the groups, in order. A number may be a float, whatever converts to one, or an
/// array of one element. Raises TypeError or KeyError naming group and key.
///
/// Numbers on devices are waited for if `on_device` is null. Else they stay there, NaN standing for them, and it lists
/// them: empty if there are none, else one entry per group.
void read_hypers(const py::list& param_groups, std::vector<SgdHyper>& hypers, std::vector<GroupScalars>* on_device);

}  // namespace sgdcore::bindings
