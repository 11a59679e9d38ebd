// Reading torch's tensors.
#include "torch_reader.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "devices.hpp"
#include "gil.hpp"

namespace sgdcore::bindings {
namespace {

const PyGetSetDef* getter_of(const py::object& descriptor) {
    if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type)) return nullptr;
    return reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
}

TensorAccess access_of(const py::object& description) {
    const auto [offset, addresses, codes] =
        py::cast<std::tuple<std::size_t, std::array<std::uintptr_t, 12>, std::array<std::int32_t, dtype_count + 4>>>(
            description);
    TensorAccess access;
    access.offset = offset;
    std::size_t next = 0;
    const auto take = [&]<class F>(F& function) { function = reinterpret_cast<F>(addresses[next++]); };
    take(access.data_ptr);
    take(access.sizes);
    take(access.strides);
    take(access.dim);
    take(access.dtype);
    take(access.device_type);
    take(access.device_index);
    take(access.layout);
    take(access.bump_version);
    take(access.grad);
    take(access.wrap);
    take(access.profiler_is_enabled);
    std::copy_n(codes.begin(), dtype_count, access.dtypes.begin());
    access.cpu = codes[dtype_count];
    access.cuda = codes[dtype_count + 1];
    access.strided = codes[dtype_count + 2];
    access.sparse_coo = codes[dtype_count + 3];
    return access;
}

}  // namespace

bool in_c_order(const TorchView& view) {
    std::int64_t expected = 1;
    for (int axis = view.dimensions; axis-- > 0;) {
        if (view.shape[axis] != 1 && view.strides[axis] != expected) return false;
        expected *= view.shape[axis];
    }
    return true;
}

TorchReader::TorchReader(TorchInterface interface) : interface_(std::move(interface)) {
    if (!interface_.exchange_api.is_none()) {
        auto* api = static_cast<const DLPackExchangeAPI*>(
            PyCapsule_GetPointer(interface_.exchange_api.ptr(), DLPackExchangeAPI::capsule_name));
        if (api == nullptr) throw py::error_already_set();
        if (api->version.major == 1) exchange_ = api;
    }
    if (exchange_ != nullptr && !interface_.access.is_none()) access_ = access_of(interface_.access);
    tensor_type_ = reinterpret_cast<PyTypeObject*>(interface_.tensor_type.ptr());
    parameter_type_ = reinterpret_cast<PyTypeObject*>(interface_.parameter_type.ptr());
    grad_getter_ = getter_of(interface_.grad_descriptor);
    requires_grad_getter_ = getter_of(interface_.requires_grad_descriptor);
}

bool TorchReader::exchange(PyObject* tensor, DLTensor& dl) const {
    if (exchange_->dltensor_from_py_object_no_sync(tensor, &dl) == 0) return true;
    // A quantized tensor, say. This is no error: the tensor is left to Python code.
    if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
    PyErr_Clear();
    return false;
}

bool TorchReader::view(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const {
    if (exchange_ == nullptr) return described(tensor, view, layout);
    if (access_ && !has_usual_elements(tensor)) return false;
    return exchanged_view(tensor, view);
}

bool TorchReader::view_integers(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const {
    DLTensor dl;
    if (exchange_ != nullptr) {
        if ((access_ && !is_strided(tensor)) || !exchange(tensor, dl)) return false;
        if (dl.dtype.code != code_int || dl.dtype.bits != 16 || dl.dtype.lanes != 1) return false;
        dl.dtype = {code_float, 16, 1};
        return fill_view(dl, view);
    }
    const py::object torch = py::module_::import("torch"), object = py::reinterpret_borrow<py::object>(tensor);
    if (!object.attr("dtype").equal(torch.attr("int16"))) return false;
    return described(object.attr("view")(torch.attr("float16")).ptr(), view, layout);
}

bool TorchReader::view_grad(PyObject* grad, TensorIdentity& last, TorchView& view,
                            std::vector<std::int64_t>& layout) const {
    if (!access_) return this->view(grad, view, layout);
    if (!is_strided(grad)) return false;
    const TensorIdentity identity = this->identity(grad);
    if (identity == last) return view_again(grad, view, layout);
    if (!view_again(grad, view, layout)) return false;
    last = identity;
    return true;
}

bool TorchReader::exchanged_view(PyObject* tensor, TorchView& view) const {
    DLTensor dl;
    return exchange(tensor, dl) && fill_view(dl, view);
}

bool TorchReader::fill_view(const DLTensor& dl, TorchView& view) const {
    if (dl.ndim > max_dimensions || (dl.strides == nullptr && dl.ndim > 0)) return false;
    view.device = cpu_device;
    if (dl.device.type != device_cpu) {
        const bool cuda = dl.device.type == device_cuda || dl.device.type == device_cuda_managed;
        if (!cuda || !device_is_usable()) return false;
        view.device = dl.device.id;
    }
    view.data = static_cast<std::byte*>(dl.data) + dl.byte_offset;
    view.dimensions = dl.ndim;
    view.shape = dl.shape;
    view.strides = dl.strides;
    const std::optional<DType> dtype = storage_type(dl.dtype);
    view.dtype = dtype.value_or(DType::float32);
    return dtype.has_value();
}

/// True if the tensor is strided and of a storage type. The exchange function throws a C++ exception for sparse and
/// conjugate complex tensors, which costs as much as a thousand tensors: torch records the stack each time.
bool TorchReader::has_usual_elements(PyObject* tensor) const {
    void* const handle = reinterpret_cast<std::byte*>(tensor) + access_->offset;
    std::int32_t dtype;
    return is_strided(tensor) && access_->dtype(handle, &dtype) == 0 &&
           std::ranges::find(access_->dtypes, dtype) != access_->dtypes.end();
}

bool TorchReader::is_strided(PyObject* tensor) const {
    std::int32_t layout;
    return access_->layout(reinterpret_cast<std::byte*>(tensor) + access_->offset, &layout) == 0 &&
           layout == access_->strided;
}

bool TorchReader::is_sparse_coo(PyObject* tensor) const {
    if (!access_) return false;
    std::int32_t layout;
    return access_->layout(reinterpret_cast<std::byte*>(tensor) + access_->offset, &layout) == 0 &&
           layout == access_->sparse_coo;
}

bool TorchReader::sparse_view(PyObject* tensor, IndexView& indices, TorchView& values,
                              std::array<py::object, 2>& parts) const {
    const auto part = [&](const py::object& method) {
        PyObject* result = unless_python_ends([&] { return PyObject_CallOneArg(method.ptr(), tensor); });
        if (result == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    };
    parts = {part(interface_.sparse_indices), part(interface_.sparse_values)};
    DLTensor dl;
    std::vector<std::int64_t> unused;  // torch lends shapes and strides
    if (!is_tensor(parts[0].ptr()) || !is_tensor(parts[1].ptr()) || !exchange(parts[0].ptr(), dl) ||
        dl.device.type != device_cpu || dl.dtype.code != code_int || dl.dtype.bits != 64 || dl.ndim != 2 ||
        dl.strides == nullptr || !view(parts[1].ptr(), values, unused) || values.device != cpu_device ||
        values.dimensions < 1 || values.shape[0] != dl.shape[1]) {
        return false;
    }
    indices.data = reinterpret_cast<const std::int64_t*>(static_cast<const std::byte*>(dl.data) + dl.byte_offset);
    indices.dimensions = dl.shape[0];
    indices.entries = dl.shape[1];
    indices.dimension_stride = dl.strides[0];
    indices.entry_stride = dl.strides[1];
    if (is_negated(parts[1].ptr())) return false;
    if (in_c_order(values)) return true;
    PyObject* copy = unless_python_ends([&] { return PyObject_CallMethod(parts[1].ptr(), "contiguous", nullptr); });
    if (copy == nullptr) throw py::error_already_set();
    parts[1] = py::reinterpret_steal<py::object>(copy);
    return is_tensor(copy) && view(copy, values, unused);
}

TensorKind TorchReader::kind_of_other(PyObject* object) const {
    PyTypeObject* const type = Py_TYPE(object);
    for (const auto& [seen, kind] : kinds_) {
        if (seen.ptr() == reinterpret_cast<PyObject*>(type)) return kind;
    }
    auto held = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
    const auto kind = static_cast<TensorKind>(py::cast<int>(call(interface_.kind_of, py::make_tuple(held))));
    kinds_.emplace_back(std::move(held), kind);
    return kind;
}

PyObject* TorchReader::local_part(PyObject* tensor) const {
    static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
    PyObject* const local = PyObject_GetAttr(tensor, name);
    if (local == nullptr) throw py::error_already_set();
    if (is_tensor(local)) return local;
    Py_DECREF(local);
    return nullptr;
}

bool TorchReader::placed_alike(PyObject* a, PyObject* b) const {
    static PyObject* const spec = PyUnicode_InternFromString("_spec");
    static PyObject* const parts[] = {PyUnicode_InternFromString("mesh"), PyUnicode_InternFromString("placements")};
    const auto get = [](PyObject* object, PyObject* name) {
        PyObject* const value = PyObject_GetAttr(object, name);
        if (value == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(value);
    };
    const py::object one = get(a, spec), other = get(b, spec);
    if (one.is(other)) return true;
    for (PyObject* part : parts) {
        const py::object x = get(one.ptr(), part), y = get(other.ptr(), part);
        const int equal = unless_python_ends([&] { return PyObject_RichCompareBool(x.ptr(), y.ptr(), Py_EQ); });
        if (equal < 0) throw py::error_already_set();
        if (equal == 0) return false;
    }
    return true;
}

int TorchReader::traverse(visitproc visit, void* arg) const {
    for (const auto& [type, kind] : kinds_) Py_VISIT(type.ptr());
    return 0;
}

void TorchReader::clear() { const auto kinds = std::move(kinds_); }

TensorIdentity TorchReader::identity(PyObject* tensor) const {
    if (!access_) return {.object = tensor};
    const void* implementation;
    std::memcpy(&implementation, reinterpret_cast<const std::byte*>(tensor) + access_->offset, sizeof implementation);
    return {.object = tensor, .implementation = implementation};
}

bool TorchReader::view_again(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const {
    if (!access_) return this->view(tensor, view, layout);
    const TensorAccess& get = *access_;
    void* const handle = reinterpret_cast<std::byte*>(tensor) + get.offset;
    std::int32_t type, device, dtype;
    std::int64_t dimensions, *shape, *strides;
    void* data;
    // The type of the device comes first: for a tensor without memory the other functions would write to stderr.
    if (get.device_type(handle, &type) != 0 || (type != get.cpu && type != get.cuda)) return false;
    if (get.dtype(handle, &dtype) != 0 || get.dim(handle, &dimensions) != 0 || get.sizes(handle, &shape) != 0 ||
        get.strides(handle, &strides) != 0 || get.data_ptr(handle, &data) != 0) {
        return false;
    }
    view.device = cpu_device;
    if (type == get.cuda) {
        if (get.device_index(handle, &device) != 0) return false;
        view.device = device;
    }
    const auto* const found = std::ranges::find(get.dtypes, dtype);
    if (found == get.dtypes.end() || dimensions > max_dimensions) return false;
    view.dtype = static_cast<DType>(found - get.dtypes.begin());
    view.data = static_cast<std::byte*>(data);
    view.dimensions = static_cast<int>(dimensions);
    view.shape = shape;
    view.strides = strides;
    return true;
}

bool TorchReader::described(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const {
    const py::object description = call(interface_.describe, py::make_tuple(py::handle(tensor)));
    if (description.is_none()) return false;
    const auto [address, shape, strides, dtype, device] =
        py::cast<std::tuple<std::uintptr_t, std::vector<std::int64_t>, std::vector<std::int64_t>, std::string, int>>(
            description);
    if (device != cpu_device && !device_is_usable()) return false;
    view.device = device;
    int index = 0;
    while (index < dtype_count && dtype != dtype_name(static_cast<DType>(index))) ++index;
    if (index == dtype_count || shape.size() > max_dimensions) return false;
    view.data = reinterpret_cast<std::byte*>(address);
    view.dtype = static_cast<DType>(index);
    view.dimensions = static_cast<int>(shape.size());
    layout = shape;
    layout.insert(layout.end(), strides.begin(), strides.end());
    view.shape = layout.data();
    view.strides = layout.data() + shape.size();
    return true;
}

PyObject* TorchReader::get(const PyGetSetDef* getter, PyObject* tensor, const char* name) {
    PyObject* value = getter != nullptr ? getter->get(tensor, getter->closure) : PyObject_GetAttrString(tensor, name);
    if (value == nullptr) throw py::error_already_set();
    return value;
}

PyObject* TorchReader::grad(PyObject* parameter, TensorKind kind) const {
    if (kind == TensorKind::plain && access_ && access_->grad != nullptr && access_->wrap != nullptr) {
        try {
            PyObject* const grad = access_->wrap(access_->grad(identity(parameter).implementation));
            if (grad != nullptr) return grad;
        } catch (const std::exception&) {
            // The getter below raises it as a Python exception.
        }
        PyErr_Clear();
    }
    return get(grad_getter_, parameter, "grad");
}

bool TorchReader::profiler_is_enabled() const {
    if (access_ && access_->profiler_is_enabled != nullptr) return access_->profiler_is_enabled();
    return call(interface_.profiler_enabled).ptr() != Py_False;
}

bool TorchReader::requires_grad(PyObject* tensor) const {
    return py::reinterpret_steal<py::object>(get(requires_grad_getter_, tensor, "requires_grad")).ptr() == Py_True;
}

bool TorchReader::is_negated(PyObject* tensor) const {
    return py::cast<bool>(call(interface_.is_negated, py::make_tuple(py::handle(tensor))));
}

bool TorchReader::bump_versions(std::span<PyObject* const> tensors) const noexcept {
    if (!access_ || access_->bump_version == nullptr) return false;
    try {
        for (PyObject* tensor : tensors) {
            access_->bump_version(reinterpret_cast<const std::byte*>(tensor) + access_->offset);
        }
    } catch (const std::exception&) {
        return false;
    }
    return true;
}

void TorchReader::increment_versions(const py::list& tensors) const {
    const auto tell = [&](const py::object& increment) {
        return unless_python_ends([&] { return PyObject_CallOneArg(increment.ptr(), tensors.ptr()); });
    };
    PyObject* result = tell(interface_.increment_version);
    if (result == nullptr && PyErr_ExceptionMatches(PyExc_RuntimeError)) {  // inference tensors have no version
        PyErr_Clear();
        result = tell(interface_.increment_version_where_possible);
    }
    if (result == nullptr) throw py::error_already_set();
    Py_DECREF(result);
}

}  // namespace sgdcore::bindings
