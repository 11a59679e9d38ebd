// Functions of the package that the core calls. The package hands them in, so the core knows none of its modules.
#pragma once

#include <pybind11/pybind11.h>

namespace sgdcore::bindings {

namespace py = pybind11;

struct PythonFunctions {
    py::object load_runtime;    // load_runtime(): calls use_runtime, or raises RuntimeError that says what is missing
    py::object current_stream;  // current_stream(array, device) -> the address of the stream that the library uses
    py::object assign;          // assign(target, values): copies values into an array on a device
    py::object storage_dtype;   // storage_dtype(name) -> NumPy's dtype of a storage type
};

/// The functions that were handed in. Throws std::runtime_error before that.
const PythonFunctions& python_functions();

}  // namespace sgdcore::bindings
