// DLPack: sharing an array's memory with other libraries, bfloat16 included (NumPy's own export stops at float64).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>

namespace sgdcore::bindings {

/// A capsule as `__dlpack__` returns it. `versioned`: the consumer understands DLPack 1.0.
/// Raises BufferError for a read-only array if it cannot be marked as such.
/// `device` is where the memory is: a CUDA device's number, or `cpu_device`.
pybind11::capsule to_dlpack(const pybind11::array& array, bool versioned, int device);

/// An ndarray over the memory that `object.__dlpack__()` shares, read-only unless the capsule says that the memory may
/// be written. A capsule older than DLPack 1.0 cannot say so: its memory is read-only, as numpy.from_dlpack decides,
/// except for libraries whose arrays are always writable.
///
/// Raises ValueError if the memory is not on the CPU, and TypeError if its data type is not one of the storage types.
pybind11::array from_dlpack(pybind11::handle object);

/// `from_dlpack` for memory of a CUDA device: an ndarray that only describes the array, and the device. Nothing is
/// synchronized.
std::pair<pybind11::array, int> from_device_dlpack(pybind11::handle object);

}  // namespace sgdcore::bindings
