// Hyperparameters as users keep them, in the dicts of param_groups, read anew by every step.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../rules/sgd.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// The keys of a parameter group, interned once.
struct Keys {
    PyObject *params, *lr, *momentum, *dampening, *weight_decay, *nesterov, *maximize;
};
const Keys& keys();

/// group[key], borrowed. Raises KeyError that names the group by its index.
PyObject* group_item(PyObject* group, PyObject* key, std::size_t index);

/// Makes `hypers` the hyperparameters of the groups, in order. A number may be a float, whatever converts to one, or an
/// array of one element. Raises TypeError or KeyError naming group and key.
void read_hypers(const py::list& param_groups, std::vector<SgdHyper>& hypers);

}  // namespace sgdcore::bindings
