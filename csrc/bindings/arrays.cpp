// Reading and checking NumPy arrays. ndarray's fields are read directly, since this runs for every assigned gradient.
#include "arrays.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "devices.hpp"
#include "dlpack.hpp"
#include "dlpack_abi.hpp"
#include "gil.hpp"
#include "python_functions.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

constexpr int numpy_float32 = 11, numpy_float64 = 12, numpy_void = 20, numpy_float16 = 23, numpy_first_user_type = 256;

/// ml_dtypes registers bfloat16 when it is imported. The type number stays the same for the life of the process.
bool is_bfloat16(const py::dtype& dtype) {
    static int type_number = -1;  // guarded by the GIL
    if (dtype.num() < numpy_first_user_type) return false;
    if (type_number < 0 && py::cast<std::string>(attribute(dtype, "name")) == "bfloat16") type_number = dtype.num();
    return dtype.num() == type_number;
}

/// NumPy mostly writes the native order as '=', but keeps a '<' or '>' that was spelled out, as ctypes does.
bool is_native(char byteorder) { return byteorder != (std::endian::native == std::endian::little ? '>' : '<'); }

[[noreturn]] void refuse_dtype(const py::dtype& dtype, const Argument& argument) {
    throw py::type_error(argument.text() + ": expected dtype float64, float32, float16 or bfloat16 in native " +
                         "byte order, got " + repr_text(dtype) + dtype_hint(dtype));
}

/// Positions of axes. Nothing is allocated, since steps with given gradients use this.
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
    if (!is_native(dtype.byteorder())) refuse_dtype(dtype, argument);
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

constexpr const char* mask_lost = "whose mask would be ignored; pass its data, or filled(value)";
constexpr const char* unit_lost = "whose unit would be lost; pass the numbers alone";
constexpr const char* arithmetic_lost = "whose arithmetic is not NumPy's; pass numpy.asarray(array)";

[[noreturn]] void refuse_meaning(py::handle object, const char* what, const Argument& argument) {
    throw py::type_error(argument.text() + ": expected a plain array, got " + type_name(object) + ", " + what);
}

/// Astropy and yt say "unit", pint and unyt "units". None means that there is no unit.
bool has_unit(py::handle object) {
    for (const char* name : {"unit", "units"}) {
        if (!attribute_or(object, name, py::none()).is_none()) return true;
    }
    return false;
}

PyObject* ndarray_type() { return reinterpret_cast<PyObject*>(py::detail::npy_api::get().PyArray_Type_); }

bool is_masked(py::handle array) { return py::isinstance(array, attribute_of("numpy.ma", "MaskedArray")); }

bool has_own_arithmetic(py::handle array) {
    constexpr const char* hook = "__array_ufunc__";
    return !py::type::of(array).attr(hook).is(py::handle(ndarray_type()).attr(hook));
}

/// Makes `ref` an ndarray over the buffer that an object exports. Returns false if the object exports none.
bool read_buffer(py::handle object, ArrayRef& ref) {
    if (!PyObject_CheckBuffer(object.ptr()) || PyBytes_Check(object.ptr())) return false;
    const auto view =
        py::reinterpret_steal<py::object>(unless_python_ends([&] { return PyMemoryView_FromObject(object.ptr()); }));
    if (!view) {
        if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
        PyErr_Clear();  // the object may export DLPack
        return false;
    }
    ref.array = call(attribute_of("numpy", "asarray"), py::make_tuple(object));
    // NumPy copies its own scalars, and buffers of a format that it cannot read.
    ref.copied = ref.array.data() != PyMemoryView_GET_BUFFER(view.ptr())->buf;
    return true;
}

/// Makes `ref` an ndarray over the memory of the CPU that an object shares.
void read_shared(py::handle object, const Argument& argument, ArrayRef& ref) {
    if (!read_buffer(object, ref)) {
        if (!has_attribute(object, "__dlpack__")) {
            const char* hint = has_attribute(object, "to_numpy") ? "; pass its to_numpy()" : "";
            throw py::type_error(argument.text() + ": expected a NumPy array, got " + type_name(object) + " " +
                                 repr_text(object, 80) + hint);
        }
        ref.array = from_dlpack(object);
    }
    if (has_unit(object)) refuse_meaning(object, unit_lost, argument);
}

void require_device_runtime(const Argument& argument) {
    try {
        device_runtime();
    } catch (const std::runtime_error& error) {
        throw py::value_error(argument.text() + ": an array on a CUDA device cannot be used: " + error.what());
    }
}

/// The device of an object with __cuda_array_interface__, and an ndarray with its address, shape and strides.
std::pair<py::array, int> from_cuda_array_interface(py::handle object, const Argument& argument) {
    const py::dict interface = attribute(object, "__cuda_array_interface__");
    const auto [address, read_only] = py::cast<std::pair<std::uintptr_t, bool>>(interface["data"]);
    const auto shape = py::cast<std::vector<py::ssize_t>>(interface["shape"]);
    const auto dtype = py::dtype::from_args(interface["typestr"]);
    py::object strides = interface.contains("strides") ? py::object(interface["strides"]) : py::none();
    dtype_of(dtype, argument);
    if (interface.contains("mask") && !interface["mask"].is_none()) refuse_meaning(object, mask_lost, argument);
    const py::object owner = py::reinterpret_borrow<py::object>(object);
    const auto* data = reinterpret_cast<const std::byte*>(address);
    py::array array = strides.is_none()
                          ? py::array(dtype, shape, data, owner)
                          : py::array(dtype, shape, py::cast<std::vector<py::ssize_t>>(strides), data, owner);
    if (read_only) array.attr("setflags")(py::arg("write") = false);
    int device = array.size() == 0 ? 0 : device_runtime().device_of(data);
    if (device == cpu_device) {
        throw py::value_error(argument.text() + ": expected memory of a CUDA device behind __cuda_array_interface__");
    }
    return {array, device};
}

}  // namespace

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

void require_plain(py::handle object, const Argument& argument) {
    if (Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(ndarray_type())) return;
    if (has_unit(object)) refuse_meaning(object, unit_lost, argument);
    if (!py::isinstance<py::array>(object)) return;
    if (is_masked(object)) refuse_meaning(object, mask_lost, argument);
    if (has_own_arithmetic(object)) refuse_meaning(object, arithmetic_lost, argument);
}

std::string dtype_hint(const py::dtype& dtype) {
    if (dtype.num() != numpy_void || dtype.itemsize() != 2 || dtype.has_fields()) return "";
    return "; bfloat16 comes back like this from numpy.save and savez: restore it with array.view(ml_dtypes.bfloat16)";
}

bool is_on_device(py::handle object) {
    if (py::isinstance<py::array>(object) || PyObject_CheckBuffer(object.ptr())) return false;
    if (!has_attribute(object, "__dlpack_device__")) return has_attribute(object, "__cuda_array_interface__");
    const int type = py::cast<std::pair<int, int>>(call(attribute(object, "__dlpack_device__"))).first;
    return type == device_cuda || type == device_cuda_managed;
}

ArrayRef read_array(py::handle object, const Argument& argument) {
    ArrayRef ref;
    if (py::isinstance<py::array>(object)) {
        require_plain(object, argument);
        ref.array = py::reinterpret_borrow<py::array>(object);
    } else if (!is_on_device(object)) {
        read_shared(object, argument, ref);
    } else {
        require_plain(object, argument);
        require_device_runtime(argument);
        std::tie(ref.array, ref.device) = has_attribute(object, "__dlpack__")
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
                              utf8(py::str(ref.array.attr("strides"))) +
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

void require_same_layout(const ArrayRef& ref, const ArrayRef& like, const Argument& argument) {
    require_same_shape(ref, like, argument);
    require_same_device(ref, like, argument);
    std::vector<Axis> axes;
    axes_in_order_of(ref, like, axes);
    if (!axes.empty()) {
        throw py::value_error(argument.text() + ": expected strides in the order of the parameter's, " +
                              utf8(py::str(like.array.attr("strides"))) + ", got " +
                              utf8(py::str(ref.array.attr("strides"))));
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

void index_axes(const ArrayRef& ref, std::vector<Axis>& axes) {
    axes.clear();
    if (ref.size <= 1 || (ref.array.flags() & py::array::c_style) != 0) return;
    std::array<std::int64_t, max_dimensions> distances;
    std::int64_t distance = 1;
    for (auto axis = static_cast<int>(ref.array.ndim()); axis-- > 0; distance *= ref.array.shape(axis)) {
        distances[static_cast<std::size_t>(axis)] = distance;
    }
    for (const int axis : AxisOrder(ref.array)) {
        append_axis(axes, 0, {ref.array.shape(axis), distances[static_cast<std::size_t>(axis)]});
    }
    if (axes.size() == 1 && axes[0].stride == 1) axes.clear();
}

Extent extent_of(const ArrayRef& ref) {
    if (ref.size == 0) return extent_at(ref.data, 0);
    Extent extent = extent_at(ref.data, item_size(ref.dtype));
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

std::string shape_text(const py::array& array) { return utf8(py::str(array.attr("shape"))); }

py::dtype numpy_dtype(DType dtype) {
    if (dtype != DType::bfloat16) return py::dtype(std::string(dtype_name(dtype)));
    return call(python_functions().storage_dtype, py::make_tuple(dtype_name(dtype)));
}

}  // namespace sgdcore::bindings
