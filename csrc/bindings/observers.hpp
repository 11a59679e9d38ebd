// What observes the steps of an optimizer of torch tensors. An observed step has to go through Python code.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace sgdcore::bindings {

namespace py = pybind11;

class Observers {
  public:
    /// `dicts` hold hooks, or attributes of one step.
    explicit Observers(std::vector<py::dict> dicts) : dicts_(std::move(dicts)) {}
    Observers() = default;

    /// True if one of the dicts is not empty.
    bool any() const {
        return std::ranges::any_of(dicts_, [](const py::dict& dict) { return PyDict_GET_SIZE(dict.ptr()) != 0; });
    }

    int traverse(visitproc visit, void* arg) const {
        for (const py::dict& dict : dicts_) Py_VISIT(dict.ptr());
        return 0;
    }

  private:
    std::vector<py::dict> dicts_;
};

}  // namespace sgdcore::bindings
