// Reads torch's tensors: their memory, their gradients, and their kind.
//
// torch's C++ library is not linked. Memory is read through the DLPack C exchange API, or through a Python function
// where torch lacks the API.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../dtypes.hpp"
#include "../work.hpp"
#include "dlpack_abi.hpp"

namespace sgdcore::bindings {

namespace py = pybind11;

/// torch's types and functions, handed in by the package.
struct TorchInterface {
    py::object exchange_api;  // capsule, or None
    /// describe(tensor) -> (address, shape, strides, dtype's name, device), or None if the tensor is no plain memory.
    /// Used without exchange_api.
    py::object describe;
    /// (offset, addresses, codes) of TensorAccess, or None where torch lacks them.
    py::object access;
    py::object increment_version;  // of a list of tensors; raises RuntimeError if one has no version
    py::object increment_version_where_possible;
    py::object is_negated;  // of a tensor: its elements have the opposite sign of its memory
    py::object tensor_type, parameter_type, grad_descriptor, requires_grad_descriptor;
    py::object kind_of;  // of a type: TensorKind
    /// Methods of a sparse COO tensor that return its indices and values without coalescing them.
    py::object sparse_indices, sparse_values;
    py::object current_stream;    // of a CUDA device: its address
    py::object profiler_enabled;  // profiler_enabled() -> bool
    /// refuse_fullgraph(): raises RuntimeError if torch.compile was given the step itself with fullgraph=True.
    py::object refuse_fullgraph;
};

/// What a type of torch's is to a step.
enum class TensorKind : std::uint8_t {
    other,        // left to Python code
    plain,        // memory whose elements are the tensor's: torch's own types and subclasses without other operations
    distributed,  // a DTensor, of which this process has a part
};

/// A tensor's memory. The tensor lends shape and strides, which count elements.
struct TorchView {
    std::byte* data = nullptr;
    DType dtype = DType::float32;
    int device = cpu_device;
    int dimensions = 0;
    const std::int64_t *shape = nullptr, *strides = nullptr;
};

/// True if the elements lie in memory one after the other, and the last axis is the fastest.
bool in_c_order(const TorchView& view);

/// The indices of a sparse tensor. Strides count elements.
struct IndexView {
    const std::int64_t* data = nullptr;
    std::int64_t dimensions = 0, entries = 0, dimension_stride = 0, entry_stride = 0;
};

/// Functions of torch's stable C ABI (aoti_torch/c/shim.h) that tell where a tensor's elements are, and one that
/// increments its version. These functions take no reference to the tensor. DLPack's exchange function takes one, and
/// torch (>= 2.10) then another one to the Python object: 30 ns for a tensor that only Python refers to.
struct TensorAccess {
    template <class T>
    using Getter = std::int32_t (*)(void* handle, T* value);  // returns 0, or an error after it wrote to stderr

    std::size_t offset = 0;  // of the C++ tensor in the Python object; its address is the handle
    Getter<void*> data_ptr = nullptr;
    Getter<std::int64_t*> sizes = nullptr, strides = nullptr;
    Getter<std::int64_t> dim = nullptr;
    Getter<std::int32_t> dtype = nullptr, device_type = nullptr, device_index = nullptr, layout = nullptr;
    std::array<std::int32_t, dtype_count> dtypes{};  // torch's number of each DType
    std::int32_t cpu = 0, cuda = 0;                  // torch's numbers of these types of devices
    std::int32_t strided = 0, sparse_coo = 0;        // and of these layouts
    // C++ functions, which the C ABI lacks. Python's own ways to them take many more cache lines of code, which shows
    // in a step with cold caches. Each may be null.
    /// torch::autograd::impl::bump_version; throws for tensors without a version.
    void (*bump_version)(const void* handle) = nullptr;
    /// c10::TensorImpl::grad: returns the gradient's handle.
    void* (*grad)(const void* implementation) = nullptr;
    /// THPVariable_Wrap: returns a new reference to the Python object of a handle, or to None.
    PyObject* (*wrap)(void* handle) = nullptr;
    /// torch::profiler::impl::profilerEnabled.
    bool (*profiler_is_enabled)() = nullptr;
};

/// Distinguishes a tensor from others that live at the same time. Holds no reference.
struct TensorIdentity {
    PyObject* object = nullptr;
    const void* implementation = nullptr;  // which swap_tensors exchanges; null without TensorAccess

    bool operator==(const TensorIdentity&) const = default;
};

class TorchReader {
  public:
    explicit TorchReader(TorchInterface interface);

    /// Reads where a tensor's elements are. Returns false unless they have one of the storage types and lie in the
    /// memory of the CPU, or of a CUDA device that can be used. `layout` keeps shape and strides where torch does not
    /// lend them.
    bool view(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const;
    /// Reads a tensor of int16 as one of float16: words of the same size.
    bool view_integers(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const;
    /// `view` of a tensor that was viewed before, as its identity tells: not all is checked again, which saves time.
    bool view_again(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const;
    /// `view` of the gradient of a parameter that was viewed. `last` is the identity of the last such gradient.
    bool view_grad(PyObject* grad, TensorIdentity& last, TorchView& view, std::vector<std::int64_t>& layout) const;
    TensorIdentity identity(PyObject* tensor) const;

    /// True for a sparse COO tensor; false where the layout cannot be read.
    bool is_sparse_coo(PyObject* tensor) const;
    /// Reads a sparse COO tensor on the CPU: its indices, of shape (sparse dimensions, entries), and its values, in C
    /// order. Indices may be repeated. `parts` keeps the two tensors. Returns false if a step does not take such
    /// memory.
    bool sparse_view(PyObject* tensor, IndexView& indices, TorchView& values, std::array<py::object, 2>& parts) const;

    /// The gradient or None; a new reference.
    PyObject* grad(PyObject* parameter, TensorKind kind) const;
    bool requires_grad(PyObject* tensor) const;

    /// True for an instance of torch.Tensor itself.
    bool is_tensor(PyObject* object) const { return Py_TYPE(object) == tensor_type_; }
    TensorKind kind(PyObject* object) const {
        return Py_TYPE(object) == parameter_type_ || is_tensor(object) ? TensorKind::plain : kind_of_other(object);
    }
    /// This process's part of a DTensor, a new reference; null if the part is no instance of torch.Tensor itself.
    PyObject* local_part(PyObject* tensor) const;
    /// True if two DTensors have the same mesh and placements.
    bool placed_alike(PyObject* a, PyObject* b) const;

    bool profiler_is_enabled() const;

    // These run Python code.
    bool is_negated(PyObject* tensor) const;
    const py::object& current_stream() const { return interface_.current_stream; }
    const py::object& refuse_fullgraph() const { return interface_.refuse_fullgraph; }
    void increment_versions(const py::list& tensors) const;
    /// `increment_versions` without Python code. Returns false, maybe after some tensors, if that is not possible.
    bool bump_versions(std::span<PyObject* const> tensors) const noexcept;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    TensorKind kind_of_other(PyObject* object) const;
    bool exchange(PyObject* tensor, DLTensor& dl) const;
    bool exchanged_view(PyObject* tensor, TorchView& view) const;
    bool fill_view(const DLTensor& dl, TorchView& view) const;
    bool is_strided(PyObject* tensor) const;
    bool has_usual_elements(PyObject* tensor) const;
    static PyObject* get(const PyGetSetDef* getter, PyObject* tensor, const char* name);
    bool described(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const;

    TorchInterface interface_;
    const DLPackExchangeAPI* exchange_ = nullptr;
    std::optional<TensorAccess> access_;
    // The attributes' getters, called without a lookup, which costs as much; null where the attribute is of another
    // kind.
    const PyGetSetDef *grad_getter_ = nullptr, *requires_grad_getter_ = nullptr;
    PyTypeObject *tensor_type_, *parameter_type_;
    mutable std::vector<std::pair<py::object, TensorKind>> kinds_;  // the types' kinds, as far as they are known
};

}  // namespace sgdcore::bindings
