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
        py::cast<std::tuple<std::size_t, std::array<std::uintptr_t, 8>, std::array<std::int32_t, dtype_count + 2>>>(
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
    take(access.bump_version);
    std::copy_n(codes.begin(), dtype_count, access.dtypes.begin());
    access.cpu = codes[dtype_count];
    access.cuda = codes[dtype_count + 1];
    return access;
}

}  // namespace

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

bool TorchReader::view(PyObject* tensor, TorchView& view, std::vector<std::int64_t>& layout) const {
    if (exchange_ == nullptr) return described(tensor, view, layout);
    DLTensor dl;
    if (exchange_->dltensor_from_py_object_no_sync(tensor, &dl) != 0) {
        // Sparse, conjugated or such: not an error, only not for this path.
        if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
        PyErr_Clear();
        return false;
    }
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
    // The first one refuses what has no memory, which later ones would write to stderr about.
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
    if (result == nullptr && PyErr_ExceptionMatches(PyExc_RuntimeError)) {  // such as inference tensors have none
        PyErr_Clear();
        result = tell(interface_.increment_version_where_possible);
    }
    if (result == nullptr) throw py::error_already_set();
    Py_DECREF(result);
}

}  // namespace sgdcore::bindings
