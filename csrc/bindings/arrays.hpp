// NumPy arrays for the core: pointer, size, storage type, and the reference that keeps the array alive.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../extents.hpp"
#include "../work.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// An array as the core takes it. `array` holds a reference, so NumPy refuses to resize the array meanwhile.
///
/// For an array on a device, `array` only describes it: its shape, strides, type and address. The host cannot touch the
/// elements. `on_device` is the user's object.
struct ArrayRef {
    // Null where there is no array; py::array's own default would be an empty array.
    py::array array = py::reinterpret_steal<py::array>(py::handle());
    std::byte* data = nullptr;
    std::int64_t size = 0;
    DType dtype = DType::float32;
    bool writable = false;
    bool copied = false;  // the elements are a copy: writes do not reach the user's object
    int device = cpu_device;
    py::object on_device = py::reinterpret_steal<py::object>(py::handle());

    /// The user's object.
    py::object object() const { return device == cpu_device ? py::object(array) : on_device; }
    bool empty() const { return array.ptr() == nullptr; }
};

/// The argument that an error message blames: "grad", or "grads[3]".
struct Argument {
    const char* name;
    std::ptrdiff_t index = -1;

    Argument(const char* name_, std::ptrdiff_t index_ = -1) : name(name_), index(index_) {}
    std::string text() const { return index < 0 ? name : name + ("[" + std::to_string(index) + "]"); }
};

/// Raises TypeError for an array that means more than its numbers: a masked array, one with a unit, or an instance of
/// an ndarray subclass with arithmetic of its own.
void require_plain(py::handle object, const Argument& argument);

/// How to make an array of this dtype usable, for the end of a message; begins with "; " unless it is empty.
std::string dtype_hint(const py::dtype& dtype);

/// True if an object shares memory of a CUDA device, through DLPack or __cuda_array_interface__.
bool is_on_device(py::handle object);

/// Reads an array of one of the storage types in native byte order: an ndarray, or an object that exports the buffer
/// protocol, DLPack, or, on a CUDA device, __cuda_array_interface__. The memory is the object's own.
///
/// Raises TypeError for any other object or dtype, and as `require_plain` does. Raises ValueError for an array on a
/// CUDA device if no runtime can be loaded; the message says what is missing.
ArrayRef read_array(py::handle object, const Argument& argument);

/// True if the elements fill one range of memory. The axes may be in any order.
bool is_dense(const py::array& array);

/// Raises ValueError unless the array can be updated in place, which takes a writable and dense one.
void require_updatable(const ArrayRef& ref, const Argument& argument);

/// Raises ValueError unless the two have the same shape.
void require_same_shape(const ArrayRef& ref, const ArrayRef& like, const Argument& argument);

/// Raises ValueError unless both are on the CPU, or on the same device.
void require_same_device(const ArrayRef& ref, const ArrayRef& like, const Argument& argument);

/// Makes `axes` the axes of `ref` in the memory order of the dense array `like`, adjacent ones merged; empty where
/// `ref` has the same memory order, so that both can be read as flat arrays. The shapes must be equal.
void axes_in_order_of(const ArrayRef& ref, const ArrayRef& like, std::vector<Axis>& axes);

/// Makes `axes` those of a dense array in memory order, slowest first, with distances of indices in logical order (C
/// order) as strides; empty where the two orders are the same.
void index_axes(const ArrayRef& ref, std::vector<Axis>& axes);

/// Raises ValueError unless the two have the same shape, device and memory order.
void require_same_layout(const ArrayRef& ref, const ArrayRef& like, const Argument& argument);

/// Adds an axis to those from index `start` on, the next faster one. It is merged with the last one if both form one
/// run.
void append_axis(std::vector<Axis>& axes, std::size_t start, Axis axis);

/// The range of memory from the first to the last element.
Extent extent_of(const ArrayRef& ref);

/// How an array's elements lie in memory: in runs of `run` bytes without a gap, which begin at multiples of `period`
/// bytes from the first one. `period` is 0 if there is one run.
struct Spacing {
    std::uintptr_t run = 0, period = 0;
};
Spacing spacing_of(const py::array& array);

/// True if two indices may reach one element, as in a broadcast array.
bool repeats_elements(const ArrayRef& ref);

/// "(3, 4)"
std::string shape_text(const py::array& array);

/// NumPy's dtype of a storage type. Raises ImportError for bfloat16 without ml_dtypes.
py::dtype numpy_dtype(DType dtype);

}  // namespace sgdcore::bindings
