// Texts are cut in Python's str, which counts characters: a cut in UTF-8's bytes could leave half a character.
#include "text.hpp"

#include <algorithm>

#include "gil.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

std::string utf8(py::handle text) {
    const auto bytes =
        py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace"));
    if (!bytes) throw py::error_already_set();
    return bytes;
}

std::string type_name(py::handle object) { return utf8(py::type::of(object).attr("__name__")); }

std::string repr_text(py::handle object, std::size_t limit) {
    const auto text =
        py::reinterpret_steal<py::object>(unless_python_ends([&] { return PyObject_Repr(object.ptr()); }));
    if (!text) {
        if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();  // such as KeyboardInterrupt
        PyErr_Clear();
        return "<" + type_name(object) + " object>";
    }
    const auto end = static_cast<Py_ssize_t>(std::min<std::size_t>(limit, PY_SSIZE_T_MAX));
    const auto start = py::reinterpret_steal<py::object>(PyUnicode_Substring(text.ptr(), 0, end));
    if (!start) throw py::error_already_set();
    return utf8(start);
}

}  // namespace sgdcore::bindings
