// A parameter: the array that a step updates, and the gradient that it reads.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "arrays.hpp"

namespace sgdcore::bindings {

/// An object that refers to parameters and their states without keeping the parameters alive.
class Dependent {
  public:
    /// A parameter ends: its address is no longer valid.
    virtual void parameter_goes() = 0;
    /// Slots were taken out of the optimizer's state.
    virtual void slots_are_detached() = 0;

  protected:
    ~Dependent() = default;
};

/// The dependents of one object, each as often as it was added.
class Dependents {
  public:
    void add(Dependent* dependent) { all_.push_back(dependent); }
    /// Does nothing if the dependent was not added.
    void remove(Dependent* dependent);
    /// Removes each dependent and then calls its function.
    void tell(void (Dependent::*function)());

  private:
    std::vector<Dependent*> all_;
};

/// `data` and `grad` are checked when they are assigned, so that a step only reads pointers.
///
/// A parameter of a ParameterBuffer has a fixed place for its gradient: assigning to `grad` copies into it.
class Parameter {
  public:
    /// Raises TypeError or ValueError if `data` cannot be updated in place. `buffer` and `buffer_grad` are None for a
    /// parameter outside of a ParameterBuffer.
    Parameter(const py::object& data, std::string name, py::object buffer, const py::object& buffer_grad);
    ~Parameter() { dependents.tell(&Dependent::parameter_goes); }
    Parameter(const Parameter&) = delete;
    Parameter& operator=(const Parameter&) = delete;

    /// Takes another array of the same shape, dtype and memory layout.
    void set_data(const py::object& array);
    /// Takes None, or an array of the parameter's shape. The dtype and the strides may differ.
    void set_grad(const py::object& array);
    /// Raises ValueError if `zero_grad` cannot clear the gradient: the gradient is read-only, or on a device in another
    /// memory order than its parameter.
    void require_clearable(bool set_to_none) const;
    /// Clears the gradient, which has to be clearable: drops it (`set_to_none`) or zeroes it in place. In a buffer it
    /// is always zeroed.
    void zero_grad(bool set_to_none);

    const ArrayRef& data() const { return data_; }
    const ArrayRef& grad() const { return grad_; }
    const std::vector<Axis>& grad_axes() const { return grad_axes_; }
    const std::string& name() const { return name_; }
    const py::object& buffer() const { return buffer_; }

    /// Counts of the assignments: a plan notices arrays that it has not checked for overlap.
    std::uint32_t data_version = 0;
    std::uint32_t grad_version = 0;

    Dependents dependents;

    /// "parameter 'w'", or `otherwise` if it has no name.
    std::string label(const std::string& otherwise) const {
        return name_.empty() ? otherwise : "parameter '" + name_ + "'";
    }

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    ArrayRef data_;
    ArrayRef grad_;
    std::vector<Axis> grad_axes_;
    std::string name_;
    py::object buffer_;
    ArrayRef buffer_grad_;
};

/// True once the object holds its C++ value. Python's collector may find the object before: pybind11 gives the first
/// object of a type its layout only after a call that may start a collection.
inline bool is_constructed(PyObject* object) {
    const auto* const instance = reinterpret_cast<const py::detail::instance*>(object);
    const bool has_layout = instance->simple_layout || instance->nonsimple.values_and_holders != nullptr;
    return has_layout && py::detail::is_holder_constructed(object);
}

/// Shows Python's garbage collector the references that a bound class holds, by the class's traverse() and clear().
template <class T>
py::custom_type_setup garbage_collected() {
    return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
        PyTypeObject* type = &heap_type->ht_type;
        type->tp_flags |= Py_TPFLAGS_HAVE_GC;
        type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
            Py_VISIT(Py_TYPE(self));
            if (!is_constructed(self)) return 0;
            return py::cast<T&>(py::handle(self)).traverse(visit, arg);
        };
        type->tp_clear = [](PyObject* self) {
            if (is_constructed(self)) py::cast<T&>(py::handle(self)).clear();
            return 0;
        };
    });
}

}  // namespace sgdcore::bindings
