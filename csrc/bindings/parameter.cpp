// Assigning arrays to parameters, and the checks of the arrays.
#include "parameter.hpp"

#include <algorithm>
#include <cstring>

#include "devices.hpp"
#include "gil.hpp"
#include "python_functions.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

/// Reads the array of a parameter. Raises TypeError for an object whose elements can only be copied, such as a NumPy
/// scalar: a step would not update the object.
ArrayRef read_data(const py::object& data) {
    ArrayRef ref = read_array(data, "data");
    if (ref.copied) {
        throw py::type_error("data: expected a NumPy array, got " + type_name(data) + " " + repr_text(data, 80));
    }
    require_updatable(ref, "data");
    return ref;
}

/// Copies an array of the same shape into a buffer's gradient. An array on the CPU may be copied to a device.
void copy_to_buffer(const ArrayRef& ref, const ArrayRef& buffer_grad) {
    if (buffer_grad.device != cpu_device) {
        call(python_functions().assign, py::make_tuple(buffer_grad.object(), ref.object()));
    } else {
        require_same_device(ref, buffer_grad, "grad");
        call(attribute_of("numpy", "copyto"), py::make_tuple(buffer_grad.array, ref.array),
             py::dict(py::arg("casting") = "unsafe"));
    }
}

}  // namespace

void Dependents::remove(Dependent* dependent) {
    const auto found = std::ranges::find(all_, dependent);
    if (found != all_.end()) all_.erase(found);
}

void Dependents::tell(void (Dependent::*function)()) {
    // One at a time: a dependent's function may end another dependent, which then removes itself.
    while (!all_.empty()) {
        Dependent* const dependent = all_.back();
        all_.pop_back();
        (dependent->*function)();
    }
}

Parameter::Parameter(const py::object& data, std::string name, py::object buffer, const py::object& buffer_grad)
    : data_(read_data(data)), name_(std::move(name)), buffer_(std::move(buffer)) {
    if (!buffer_grad.is_none()) {
        buffer_grad_ = read_array(buffer_grad, "grad");
        require_updatable(buffer_grad_, "grad");
        require_same_layout(buffer_grad_, data_, "grad");
        grad_ = buffer_grad_;
    }
}

void Parameter::set_data(const py::object& array) {
    if (array.is(data_.object())) return;
    if (!buffer_grad_.empty()) {
        throw py::value_error("data: parameter '" + name_ +
                              "' lives in a ParameterBuffer; assign into its array with data[...] = value");
    }
    ArrayRef ref = read_data(array);
    if (ref.dtype != data_.dtype) {
        throw py::type_error(std::string("data: expected dtype ") + dtype_name(data_.dtype) + ", got " +
                             dtype_name(ref.dtype));
    }
    require_same_layout(ref, data_, "data");
    std::swap(data_, ref);  // the old array is released last: that may run Python code, which must see the new array
    ++data_version;
}

void Parameter::set_grad(const py::object& array) {
    if (array.is_none()) {
        ArrayRef old;
        std::swap(grad_, old);  // `old` is released last, as in set_data
        grad_axes_.clear();
        ++grad_version;
        return;
    }
    if (!grad_.empty() && array.is(grad_.object())) return;  // `w.grad += x` ends with this assignment
    ArrayRef ref = read_array(array, "grad");
    require_same_shape(ref, data_, "grad");
    if (buffer_grad_.empty()) {
        require_same_device(ref, data_, "grad");
    } else {
        if (!array.is(buffer_grad_.object())) copy_to_buffer(ref, buffer_grad_);
        ref = buffer_grad_;
    }
    axes_in_order_of(ref, data_, grad_axes_);
    std::swap(grad_, ref);
    ++grad_version;
}

void Parameter::require_clearable(bool set_to_none) const {
    if (grad_.empty() || (set_to_none && buffer_grad_.empty())) return;
    const bool reordered = grad_.device != cpu_device && !grad_axes_.empty();
    if (grad_.writable && !reordered) return;
    throw py::value_error("grad: the gradient of " + label("a parameter of shape " + shape_text(data_.array)) +
                          (reordered ? " on a CUDA device does not lie as its parameter does and cannot be zeroed in "
                                       "place; use set_to_none=True"
                                     : " is read-only and cannot be zeroed"));
}

void Parameter::zero_grad(bool set_to_none) {
    if (grad_.empty()) return;
    if (set_to_none && buffer_grad_.empty()) {
        set_grad(py::none());
        return;
    }
    if (grad_.device != cpu_device) {
        const auto stream = call(python_functions().current_stream, py::make_tuple(data_.object(), grad_.device));
        device_runtime().fill(grad_.device, grad_.data, 0,
                              static_cast<std::size_t>(grad_.size) * item_size(grad_.dtype),
                              pointer_of<void>(py::cast<std::uintptr_t>(stream)));
    } else if (grad_axes_.empty()) {
        std::memset(grad_.data, 0, static_cast<std::size_t>(grad_.size) * item_size(grad_.dtype));
    } else {
        call(grad_.array.attr("fill"), py::make_tuple(0));
    }
}

int Parameter::traverse(visitproc visit, void* arg) const {
    for (const ArrayRef* ref : {&data_, &grad_, &buffer_grad_}) {
        Py_VISIT(ref->array.ptr());
        Py_VISIT(ref->on_device.ptr());
    }
    Py_VISIT(buffer_.ptr());
    return 0;
}

void Parameter::clear() {
    // The arrays stay, since `data` must exist. Every cycle through them also goes through the buffer.
    buffer_ = py::none();
}

}  // namespace sgdcore::bindings
