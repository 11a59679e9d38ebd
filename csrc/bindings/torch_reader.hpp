// How torch's tensors are read: their memory, their gradients, and what else the step has to know of them.
//
// torch's C++ library is not linked. Memory is read through the DLPack C exchange API, or through a Python function
// where torch does not have it.
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

/// What to know of torch, from the Python side.
struct TorchInterface {
    py::object exchange_api;  // capsule, or None
    /// describe(tensor) -> (address, shape, strides, dtype's name, number of the CUDA device or -1), or None for what
    /// is not plain memory; used without exchange_api.
    py::object describe;
    /// (offset, addresses, codes) of TensorAccess, or None where torch does not have them.
    py::object access;
    py::object increment_version;  // of a list of tensors; fails where one has no version
    py::object increment_version_where_possible;
    py::object is_negated;  // of a tensor: the elements in memory have the opposite sign
    py::object tensor_type, parameter_type, grad_descriptor, requires_grad_descriptor;
    py::object kind_of;  // of a type: TensorKind
    /// Methods of a sparse COO tensor: its indices and its values, as they are.
    py::object sparse_indices, sparse_values;
    py::object current_stream;  // of a CUDA device: its address
    /// refuse_fullgraph(): raises RuntimeError if torch.compile was given the step itself with fullgraph=True.
    py::object refuse_fullgraph;
};

/// What a type of torch's is to a step.
enum class TensorKind : std::uint8_t {
    other,        // for Python code
    plain,        // memory that is what it seems to be: torch's own types and subclasses that change nothing about it
    distributed,  // a DTensor, of which this process has a part that is plain memory or not
};

/// A tensor's memory. Shape and strides, in elements, are lent by the tensor.
struct TorchView {
    std::byte* data = nullptr;
    DType dtype = DType::float32;
    int device = cpu_device;
    int dimensions = 0;
    const std::int64_t *shape = nullptr, *strides = nullptr;
};

/// True if the elements lie in memory one after the other, the last axis being the fastest.
bool in_c_order(const TorchView& view);

/// The indices of a sparse tensor. Strides count elements.
struct IndexView {
    const std::int64_t* data = nullptr;
    std::int64_t dimensions = 0, entries = 0, dimension_stride = 0, entry_stride = 0;
};

/// Functions of torch's stable C ABI (aoti_torch/c/shim.h) that tell where a tensor's elements are, and one that counts
/// its changes. They take no reference to the tensor. DLPack's exchange function does, and torch (>= 2.10) then also
/// takes one to the Python object and gives it back: 30 ns for a tensor that only Python refers to.
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
    /// torch::autograd::impl::bump_version, which no C ABI has; throws for tensors without a version.
    void (*bump_version)(const void* handle) = nullptr;
};

/// What tells a tensor from others while both live. It does not refer to the tensor.
struct TensorIdentity {
    PyObject* object = nullptr;
    const void* implementation = nullptr;  // which swap_tensors exchanges; null without TensorAccess

    bool operator==(const TensorIdentity&) const = default;
};

class TorchReader {
  public:
    explicit TorchReader(TorchInterface interface);

    /// Reads where a tensor's elements are; false unless they lie in the memory of the CPU, or of a CUDA device that
    /// can be used, as one of the storage types. `layout` keeps shape and strides where torch does not lend them.
    bool view(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const;
    /// The same, faster, for a tensor that was viewed before, as its identity says.
    bool view_again(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const;
    /// The same for a gradient of a parameter whose elements are as usual. `known` is the last one's identity.
    bool view_grad(PyObject* grad, TensorIdentity& known, TorchView& view, std::vector<std::int64_t>& layout) const;
    TensorIdentity identity(PyObject* tensor) const;

    /// True for a sparse COO tensor; false, too, where torch does not tell.
    bool is_sparse_coo(PyObject* tensor) const;
    /// Reads a sparse COO tensor on the CPU: indices, of shape (sparse dimensions, entries), which may be repeated, and
    /// values, in C order. `parts` keeps the two tensors. False if the memory is not as a step takes it.
    bool sparse_view(PyObject* tensor, IndexView& indices, TorchView& values, std::array<py::object, 2>& parts) const;

    /// The gradient or None; a new reference.
    PyObject* grad(PyObject* parameter) const { return get(grad_getter_, parameter, "grad"); }
    bool requires_grad(PyObject* tensor) const;

    /// True for torch's own type, whose memory is what it seems to be.
    bool is_tensor(PyObject* object) const { return Py_TYPE(object) == tensor_type_; }
    TensorKind kind(PyObject* object) const {
        return Py_TYPE(object) == parameter_type_ || is_tensor(object) ? TensorKind::plain : kind_of_other(object);
    }
    /// This process's part of a DTensor, a new reference; null if it is not memory of torch's own type.
    PyObject* local_part(PyObject* tensor) const;
    /// True if two DTensors are placed alike.
    bool placed_alike(PyObject* a, PyObject* b) const;

    // These run Python code.
    bool is_negated(PyObject* tensor) const;
    const py::object& current_stream() const { return interface_.current_stream; }
    const py::object& refuse_fullgraph() const { return interface_.refuse_fullgraph; }
    void increment_versions(const py::list& tensors) const;
    /// The same without a list. Returns false, maybe after some of them, if that is not possible.
    bool bump_versions(std::span<PyObject* const> tensors) const noexcept;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    TensorKind kind_of_other(PyObject* object) const;
    bool exchange(PyObject* tensor, DLTensor& dl) const;
    bool exchanged_view(PyObject* tensor, TorchView& view) const;
    bool is_strided(PyObject* tensor) const;
    bool has_usual_elements(PyObject* tensor) const;
    static PyObject* get(const PyGetSetDef* getter, PyObject* tensor, const char* name);
    bool described(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const;

    TorchInterface interface_;
    const DLPackExchangeAPI* exchange_ = nullptr;
    std::optional<TensorAccess> access_;
    // The getters themselves, past the lookup of the attribute, which costs as much; null where torch has others.
    const PyGetSetDef *grad_getter_ = nullptr, *requires_grad_getter_ = nullptr;
    PyTypeObject *tensor_type_, *parameter_type_;
    mutable std::vector<std::pair<py::object, TensorKind>> kinds_;  // of types that were met
};

}  // namespace sgdcore::bindings
