// Reading arrays, and texts of values in messages, for the package's Python files.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "arrays.hpp"
#include "module.hpp"
#include "text.hpp"

namespace sgdcore::bindings {

void register_arrays(py::module_& module) {
    module.def(
        "read_array",
        [](const py::object& object, const std::string& argument) {
            const ArrayRef ref = read_array(object, argument.c_str());
            return std::pair(ref.array, ref.device);
        },
        py::arg("object"), py::arg("argument"));
    module.def(
        "require_plain",
        [](const py::object& object, const std::string& argument) { require_plain(object, argument.c_str()); },
        py::arg("object"), py::arg("argument"));
    module.def("is_dense", &is_dense, py::arg("array"));
    module.def("dtype_hint", &dtype_hint, py::arg("dtype"));
    module.def("repr_text", [](const py::object& object) { return repr_text(object, 80); }, py::arg("object"));
}

}  // namespace sgdcore::bindings
