// Methods bound by CPython's own calling convention, for calls that every step makes. pybind11's dispatcher would take
// 850 instructions, as many as the rest of the smallest step.
#pragma once

#include <pybind11/pybind11.h>

#include "gil.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// The C++ object of an instance. The type is not checked: CPython calls a method only with instances of its class.
template <class T>
T& value_of(PyObject* self) {
    void* const value = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr();
    if (value == nullptr) throw py::type_error("__init__ was not called");
    return *static_cast<T*>(value);
}

/// An argument with a reference of its own.
inline py::object object_of(PyObject* argument) { return py::reinterpret_borrow<py::object>(argument); }

/// Whether an argument is true, as Python decides.
inline bool truth_of(PyObject* argument) {
    if (argument == Py_True || argument == Py_False) return argument == Py_True;
    const int truth = unless_python_ends([&] { return PyObject_IsTrue(argument); });
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
}

/// An argument as a float.
inline double float_of(PyObject* argument) {
    if (PyFloat_CheckExact(argument)) return PyFloat_AS_DOUBLE(argument);
    const double number = unless_python_ends([&] { return PyFloat_AsDouble(argument); });
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

namespace detail {

template <class T, int count, py::object (*method)(T&, PyObject* const*)>
PyObject* called(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", count, given);
        return nullptr;
    }
    try {
        return method(value_of<T>(self), arguments).release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
#if defined(__GLIBCXX__)
    } catch (abi::__forced_unwind&) {
        throw;
#endif
    } catch (...) {
        py::detail::try_translate_exceptions();
    }
    return nullptr;
}

}  // namespace detail

/// Adds a method of `count` positional arguments, which are borrowed. Name and signature, the text "(self, a, b)" for
/// Python, are not copied.
template <class T, int count, py::object (*method)(T&, PyObject* const*)>
void def_fast(py::class_<T>& type, const char* name, const char* signature) {
    static PyMethodDef definition{name, nullptr, METH_FASTCALL, signature};
    definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&detail::called<T, count, method>));
    PyObject* const descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition);
    if (descriptor == nullptr) throw py::error_already_set();
    type.attr(name) = py::reinterpret_steal<py::object>(descriptor);
}

}  // namespace sgdcore::bindings
