// Reading and checking NumPy arrays. Reads ndarray's fields directly: this runs for every gradient a user assigns.
#include "arrays.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "devices.hpp"
#include "dlpack.hpp"
#include "dlpack_abi.hpp"

namespace sgdcore::bindings {
namespace {

constexpr int numpy_float32 = 11, numpy_float64 = 12, numpy_float16 = 23, numpy_first_user_type = 256;

/// ml_dtypes registers bfloat16 when it is imported; from then on its type number stands for it in this process.
bool is_bfloat16(const py::dtype& dtype) {
    static int type_number = -1;  // guarded by the GIL
    if (dtype.num() < numpy_first_user_type) return false;
    if (type_number < 0 && py::cast<std::string>(dtype.attr("name")) == "bfloat16") type_number = dtype.num();
    return dtype.num() == type_number;
}

std::string type_name(py::handle object) { return py::cast<std::string>(py::type::of(object).attr("__name__")); }

[[noreturn]] void refuse_dtype(const py::dtype& dtype, const Argument& argument) {
    throw py::type_error(argument.text() + ": expected dtype float64, float32, float16 or bfloat16 in native " +
                         "byte order, got " + py::cast<std::string>(py::repr(dtype)));
}

/// Positions of axes, kept without allocation: steps with given gradients come here.
class AxisOrder {
  public:
    /// The axes longer than 1, slowest first by their absolute stride, in the given order among equals.
    explicit AxisOrder(const py::array& array) {
        for (int axis = 0; axis < array.ndim(); ++axis) {
            if (array.shape(axis) == 1) continue;
            int* place = positions_.data() + count_++;
            for (; place != begin() && std::abs(array.strides(place[-1])) < std::abs(array.strides(axis)); --place) {
                *place = place[-1];
            }
            *place = axis;
        }
    }
    const int* begin() const { return positions_.data(); }
    const int* end() const { return begin() + count_; }

  private:
    std::array<int, max_dimensions> positions_;
    int count_ = 0;
};

DType dtype_of(const py::dtype& dtype, const Argument& argument) {
    // NumPy spells the native order '=', so either of these is the other one.
    if (dtype.byteorder() == '>' || dtype.byteorder() == '<') refuse_dtype(dtype, argument);
    switch (dtype.num()) {
        case numpy_float64:
            return DType::float64;
        case numpy_float32:
            return DType::float32;
        case numpy_float16:
            return DType::float16;
        default:
            if (!is_bfloat16(dtype)) refuse_dtype(dtype, argument);
            return DType::bfloat16;
    }
}

void require_device_runtime(const Argument& argument) {
    try {
        device_runtime();
    } catch (const std::runtime_error& error) {
        throw py::value_error(argument.text() + ": an array on a CUDA device cannot be used: " + error.what());
    }
}

/// An ndarray with the address, shape and strides that __cuda_array_interface__ tells, and the device.
std::pair<py::array, int> from_cuda_array_interface(py::handle object, const Argument& argument) {
    const py::dict interface = object.attr("__cuda_array_interface__");
    const auto [address, read_only] = py::cast<std::pair<std::uintptr_t, bool>>(interface["data"]);
    const auto shape = py::cast<std::vector<py::ssize_t>>(interface["shape"]);
    const auto dtype = py::dtype::from_args(interface["typestr"]);
    py::object strides = interface.contains("strides") ? py::object(interface["strides"]) : py::none();
    dtype_of(dtype, argument);
    const py::object owner = py::reinterpret_borrow<py::object>(object);
    const auto* data = reinterpret_cast<const std::byte*>(address);
    py::array array = strides.is_none()
                          ? py::array(dtype, shape, data, owner)
                          : py::array(dtype, shape, py::cast<std::vector<py::ssize_t>>(strides), data, owner);
    if (read_only) array.attr("setflags")(py::arg("write") = false);
    int device = array.size() == 0 ? 0 : device_runtime().device_of(data);
    if (device < 0) {
        throw py::value_error(argument.text() + ": expected memory of a CUDA device behind __cuda_array_interface__");
    }
    return {array, device};
}

bool is_dense(const py::array& array) {
    if (array.flags() & (py::array::c_style | py::array::f_style)) return true;
    if (array.size() <= 1) return true;
    py::ssize_t expected = array.itemsize();
    const AxisOrder order(array);
    for (const int* axis = order.end(); axis-- != order.begin();) {
        if (array.strides(*axis) != expected) return false;
        expected *= array.shape(*axis);
    }
    return true;
}

}  // namespace

py::array as_array(py::handle object, const Argument& argument) {
    if (py::isinstance<py::array>(object)) return py::reinterpret_borrow<py::array>(object);
    if (PyObject_CheckBuffer(object.ptr()) && !PyBytes_Check(object.ptr())) {
        return py::module_::import("numpy").attr("asarray")(object);
    }
    if (py::hasattr(object, "__dlpack__")) return from_dlpack(object);
    throw py::type_error(argument.text() + ": expected a NumPy array, got " + type_name(object) + " " +
                         py::cast<std::string>(py::repr(object)).substr(0, 80));
}

bool is_on_device(py::handle object) {
    if (py::isinstance<py::array>(object) || PyObject_CheckBuffer(object.ptr())) return false;
    if (!py::hasattr(object, "__dlpack_device__")) return py::hasattr(object, "__cuda_array_interface__");
    const int type = py::cast<std::pair<int, int>>(object.attr("__dlpack_device__")()).first;
    return type == device_cuda || type == device_cuda_managed;
}

ArrayRef read_array(py::handle object, const Argument& argument) {
    ArrayRef ref;
    if (py::isinstance<py::array>(object) || !is_on_device(object)) {
        ref.array = as_array(object, argument);
    } else {
        require_device_runtime(argument);
        std::tie(ref.array, ref.device) = py::hasattr(object, "__dlpack__")
                                              ? from_device_dlpack(object)
                                              : from_cuda_array_interface(object, argument);
        ref.on_device = py::reinterpret_borrow<py::object>(object);
    }
    const py::dtype dtype = ref.array.dtype();
    ref.dtype = dtype_of(dtype, argument);
    ref.data = static_cast<std::byte*>(const_cast<void*>(ref.array.data()));
    ref.size = ref.array.size();
    ref.writable = ref.array.writeable();
    return ref;
}

void require_same_device(const ArrayRef& ref, const ArrayRef& like, const Argument& argument) {
    if (ref.device == like.device) return;
    const auto name = [](int device) {
        return device == cpu_device ? std::string("the CPU") : "CUDA device " + std::to_string(device);
    };
    throw py::value_error(argument.text() + ": expected an array on " + name(like.device) +
                          ", where the parameter is, got one on " + name(ref.device));
}

void require_updatable(const ArrayRef& ref, const Argument& argument) {
    if (!ref.writable) {
        throw py::value_error(argument.text() + ": the array of shape " + shape_text(ref.array) +
                              " is read-only and cannot be updated in place");
    }
    if (!is_dense(ref.array)) {
        throw py::value_error(argument.text() + ": the array of shape " + shape_text(ref.array) + " and strides " +
                              py::cast<std::string>(py::str(ref.array.attr("strides"))) +
                              " is not contiguous; update a contiguous array and copy, or pass its parts one by one");
    }
}

void require_same_shape(const ArrayRef& ref, const ArrayRef& like, const Argument& argument) {
    const py::array &a = ref.array, &b = like.array;
    if (a.ndim() != b.ndim() || !std::equal(a.shape(), a.shape() + a.ndim(), b.shape())) {
        throw py::value_error(argument.text() + ": expected shape " + shape_text(b) + ", the parameter's, got " +
                              shape_text(a));
    }
}

void append_axis(std::vector<Axis>& axes, std::size_t start, Axis axis) {
    if (axes.size() > start && axes.back().stride == axis.stride * axis.length) {
        axes.back() = {axes.back().length * axis.length, axis.stride};
    } else {
        axes.push_back(axis);
    }
}

void axes_in_order_of(const ArrayRef& ref, const ArrayRef& like, std::vector<Axis>& axes) {
    constexpr int c_order = py::array::c_style;
    axes.clear();
    if (ref.size <= 1 || ((ref.array.flags() & c_order) && (like.array.flags() & c_order))) return;
    for (const int position : AxisOrder(like.array)) {
        append_axis(axes, 0, {ref.array.shape(position), ref.array.strides(position)});
    }
    if (axes.size() == 1 && axes[0].stride == static_cast<std::int64_t>(item_size(ref.dtype))) axes.clear();
}

Extent extent_of(const ArrayRef& ref) {
    const auto start = reinterpret_cast<std::uintptr_t>(ref.data);
    if (ref.size == 0) return {start, start};
    Extent extent{start, start + item_size(ref.dtype)};
    for (int axis = 0; axis < ref.array.ndim(); ++axis) {
        const auto reach = (ref.array.shape(axis) - 1) * ref.array.strides(axis);
        if (reach < 0) {
            extent.begin -= static_cast<std::uintptr_t>(-reach);
        } else {
            extent.end += static_cast<std::uintptr_t>(reach);
        }
    }
    return extent;
}

Spacing spacing_of(const py::array& array) {
    Spacing spacing{static_cast<std::uintptr_t>(array.itemsize()), 0};
    const AxisOrder order(array);
    for (const int* axis = order.end(); axis-- != order.begin();) {
        const auto stride = static_cast<std::uintptr_t>(std::abs(array.strides(*axis)));
        if (spacing.period == 0 && stride == spacing.run) {
            spacing.run *= static_cast<std::uintptr_t>(array.shape(*axis));
        } else {
            spacing.period = std::gcd(spacing.period, stride);
        }
    }
    return spacing;
}

bool repeats_elements(const ArrayRef& ref) {
    std::array<Axis, max_dimensions> axes;
    const auto count = static_cast<std::size_t>(ref.array.ndim());
    for (std::size_t i = 0; i < count; ++i) axes[i] = {ref.array.shape()[i], ref.array.strides()[i]};
    return may_overlap({axes.data(), count}, item_size(ref.dtype));
}

std::string shape_text(const py::array& array) { return py::cast<std::string>(py::str(array.attr("shape"))); }

py::dtype numpy_dtype(DType dtype) {
    if (dtype != DType::bfloat16) return py::dtype(std::string(dtype_name(dtype)));
    try {
        return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_ImportError)) throw;
        throw py::import_error("bfloat16 arrays need the ml_dtypes package: pip install 'sgdcore[bfloat16]'");
    }
}

}  // namespace sgdcore::bindings
