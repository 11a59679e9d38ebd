// What observes the steps of an optimizer of torch tensors. An observed step has to go through Python code.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "gil.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

class Observers {
  public:
    /// `dicts` hold hooks, or attributes of one step. `profiler_enabled` is torch's function of that name.
    Observers(std::vector<py::dict> dicts, py::object profiler_enabled)
        : dicts_(std::move(dicts)), profiler_enabled_(std::move(profiler_enabled)) {}
    Observers() = default;

    /// True if one of the dicts is not empty, or the profiler is on.
    bool any() const {
        for (const py::dict& dict : dicts_) {
            if (PyDict_GET_SIZE(dict.ptr()) != 0) return true;
        }
        if (!profiler_enabled_) return false;
        PyObject* const enabled = unless_python_ends([&] { return PyObject_CallNoArgs(profiler_enabled_.ptr()); });
        if (enabled == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(enabled).ptr() != Py_False;
    }

    int traverse(visitproc visit, void* arg) const {
        for (const py::dict& dict : dicts_) Py_VISIT(dict.ptr());
        Py_VISIT(profiler_enabled_.ptr());
        return 0;
    }

  private:
    std::vector<py::dict> dicts_;
    py::object profiler_enabled_;
};

}  // namespace sgdcore::bindings
