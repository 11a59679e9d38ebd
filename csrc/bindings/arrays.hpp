// NumPy arrays as the core sees them: pointer, size, storage type, and the reference that keeps them alive.
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

/// What the core needs to know of an ndarray. `array` holds a reference, so NumPy refuses to resize it meanwhile.
///
/// For an array on a device, `array` has its shape, strides, type and address, and its memory cannot be touched from
/// here; `on_device` is what the user has.
struct ArrayRef {
    // Null where there is none; py::array's own default would be an empty array.
    py::array array = py::reinterpret_steal<py::array>(py::handle());
    std::byte* data = nullptr;
    std::int64_t size = 0;
    DType dtype = DType::float32;
    bool writable = false;
    bool copied = false;  // the elements are a copy of the object's: what is written there never reaches the object
    int device = cpu_device;
    py::object on_device = py::reinterpret_steal<py::object>(py::handle());

    /// The array that the user knows.
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

/// Raises TypeError for an array whose numbers are not all it says: a masked array, one with a unit, or an instance of
/// an ndarray subclass with arithmetic of its own.
void require_plain(py::handle object, const Argument& argument);

/// What to do about an array of this dtype, if there is something; begins with "; ".
std::string dtype_hint(const py::dtype& dtype);

/// True for what shares memory of a CUDA device, through DLPack or __cuda_array_interface__.
bool is_on_device(py::handle object);

/// Reads a floating-point array of one of the storage types in native byte order: an ndarray, or what exports the
/// buffer protocol or DLPack, or, on a CUDA device, __cuda_array_interface__. The memory is the object's own.
///
/// TypeError for anything else, any other dtype, and what `require_plain` refuses. An array on a CUDA device gets a
/// ValueError that says what is missing, if there is no runtime for it.
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

/// Raises ValueError unless the two have the same shape, device and memory order.
void require_same_layout(const ArrayRef& ref, const ArrayRef& like, const Argument& argument);

/// Adds the next faster axis to those from index `start` on, merged with the last one where they form one run.
void append_axis(std::vector<Axis>& axes, std::size_t start, Axis axis);

/// Where the elements lie.
Extent extent_of(const ArrayRef& ref);

/// How an array's elements lie in memory: in runs of `run` bytes without a gap, at multiples of `period` bytes from the
/// first one; 0 if there is only one run.
struct Spacing {
    std::uintptr_t run = 0, period = 0;
};
Spacing spacing_of(const py::array& array);

/// True if the strides may reach one element by two indices, as those of a broadcast array do.
bool repeats_elements(const ArrayRef& ref);

/// "(3, 4)"
std::string shape_text(const py::array& array);

/// NumPy's dtype of a storage type. Raises ImportError for bfloat16 without ml_dtypes.
py::dtype numpy_dtype(DType dtype);

}  // namespace sgdcore::bindings
