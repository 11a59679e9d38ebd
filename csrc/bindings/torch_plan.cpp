// The way of a step from torch tensors to the core: read everything, check it, and only then write.
#include "torch_plan.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "../step.hpp"
#include "hypers.hpp"

namespace sgdcore::bindings {
namespace {

// As in plan.cpp: below this the GIL costs more than the update.
constexpr std::int64_t gil_release_elements = 16 * 1024;

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

/// mapping[key] where the key's hash is known, borrowed; null if it is not there.
PyObject* lookup(PyObject* mapping, PyObject* key, [[maybe_unused]] Py_hash_t hash) {
#if PY_VERSION_HEX < 0x030E0000
    PyObject* value = _PyDict_GetItem_KnownHash(mapping, key, hash);
#else
    PyObject* value = PyDict_GetItemWithError(mapping, key);
#endif
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

PyObject* lookup(PyObject* mapping, PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(mapping, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

/// Finds each parameter's momentum buffer in the optimizer's state.
class MomentumReader {
  public:
    explicit MomentumReader(PyObject* state) : state_(state) {}

    /// state[parameter]["momentum_buffer"], borrowed; null if it is not there. Looks first at what follows the last
    /// one found: the state mostly has the parameters' order.
    PyObject* find(PyObject* parameter, Py_hash_t hash) {
        static PyObject* const key = interned("momentum_buffer");
        PyObject *next_key, *values;
        Py_ssize_t next = position_;
        if (PyDict_Next(state_, &next, &next_key, &values) && next_key == parameter) {
            position_ = next;
        } else {
            values = lookup(state_, parameter, hash);
        }
        if (values == nullptr || !PyDict_Check(values)) return nullptr;
        PyObject* buffer;
        Py_ssize_t first = 0;
        if (PyDict_Next(values, &first, &next_key, &buffer) && next_key == key) return buffer;
        return lookup(values, key);
    }

  private:
    PyObject* state_;
    Py_ssize_t position_ = 0;
};

template <class View>
bool same_shape(const View& a, const View& b) {
    return a.dimensions == b.dimensions && std::equal(a.shape, a.shape + a.dimensions, b.shape);
}

/// True if both, of one shape, have their elements in the same order and distance.
template <class View>
bool same_strides(const View& a, const View& b) {
    for (int axis = 0; axis < a.dimensions; ++axis) {
        if (a.strides[axis] != b.strides[axis] && a.shape[axis] != 1) return false;
    }
    return true;
}

template <class View>
bool is_c_contiguous(const View& view) {
    std::int64_t expected = 1;
    for (int axis = view.dimensions; axis-- > 0;) {
        if (view.shape[axis] == 1) continue;
        if (view.strides[axis] != expected) return false;
        expected *= view.shape[axis];
    }
    return true;
}

/// Lists the axes, slowest first. Returns false unless the elements fill one range of memory.
template <class View>
bool memory_order(const View& view, int* order) {
    for (int axis = 0; axis < view.dimensions; ++axis) order[axis] = axis;
    std::stable_sort(order, order + view.dimensions, [&](int a, int b) {
        // An axis of length 1 may have any stride; it goes first, where it does no harm.
        const auto rank = [&](int axis) { return view.shape[axis] == 1 ? INT64_MAX : view.strides[axis]; };
        return rank(a) > rank(b);
    });
    std::int64_t expected = 1;
    for (int i = view.dimensions; i-- > 0;) {
        if (view.shape[order[i]] == 1) continue;
        if (view.strides[order[i]] != expected) return false;
        expected *= view.shape[order[i]];
    }
    return true;
}

std::uintptr_t address_of(const std::byte* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

/// The address behind the last element.
template <class View>
std::uintptr_t end_of(const View& view) {
    std::int64_t reach = 1;
    for (int axis = 0; axis < view.dimensions; ++axis) reach += (view.shape[axis] - 1) * view.strides[axis];
    return address_of(view.data) + static_cast<std::uintptr_t>(reach) * item_size(view.dtype);
}

}  // namespace

void TorchPlan::Scratch::clear() {
    tensors.clear();
    axes.clear();
    axes_end.clear();
    ranges.clear();
    grads.clear();
    changed.clear();
    numbers.clear();
    total = 0;
}

TorchPlan::TorchPlan(TorchInterface interface) : interface_(std::move(interface)) {
    if (!interface_.exchange_api.is_none()) {
        auto* api = static_cast<const DLPackExchangeAPI*>(
            PyCapsule_GetPointer(interface_.exchange_api.ptr(), DLPackExchangeAPI::capsule_name));
        if (api == nullptr) throw py::error_already_set();
        if (api->version.major == 1) exchange_ = api;
    }
    tensor_type_ = reinterpret_cast<PyTypeObject*>(interface_.tensor_type.ptr());
    parameter_type_ = reinterpret_cast<PyTypeObject*>(interface_.parameter_type.ptr());
    // The getter itself, past the lookup of the attribute, which costs as much as the getter.
    PyObject* descriptor = interface_.grad_descriptor.ptr();
    if (Py_IS_TYPE(descriptor, &PyGetSetDescr_Type)) {
        grad_getter_ = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
    }
}

std::unique_ptr<TorchPlan::Scratch> TorchPlan::take_scratch() {
    // A step that runs in another thread meanwhile has taken ours.
    return scratch_ ? std::move(scratch_) : std::make_unique<Scratch>();
}

bool TorchPlan::described(Scratch& scratch, PyObject* tensor, View& view) const {
    const py::object description = interface_.describe(py::handle(tensor));
    if (description.is_none()) return false;
    const auto [address, shape, strides, dtype] =
        py::cast<std::tuple<std::uintptr_t, std::vector<std::int64_t>, std::vector<std::int64_t>, std::string>>(
            description);
    int index = 0;
    while (index < dtype_count && dtype != dtype_name(static_cast<DType>(index))) ++index;
    if (index == dtype_count || shape.size() > max_dimensions) return false;
    view.data = reinterpret_cast<std::byte*>(address);
    view.dtype = static_cast<DType>(index);
    view.dimensions = static_cast<int>(shape.size());
    scratch.numbers.push_back(shape);
    view.shape = scratch.numbers.back().data();
    scratch.numbers.push_back(strides);
    view.strides = scratch.numbers.back().data();
    return true;
}

bool TorchPlan::view(Scratch& scratch, PyObject* tensor, View& view) const {
    if (exchange_ == nullptr) {
        if (!described(scratch, tensor, view)) return false;
    } else {
        DLTensor dl;
        if (exchange_->dltensor_from_py_object_no_sync(tensor, &dl) != 0) {
            // Sparse, conjugated or such: not an error, only not for this path.
            if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
            PyErr_Clear();
            return false;
        }
        if (dl.device.type != device_cpu || dl.ndim > max_dimensions || dl.dtype.lanes != 1 ||
            (dl.strides == nullptr && dl.ndim > 0)) {
            return false;
        }
        if (dl.dtype.code == code_float && dl.dtype.bits == 32) {
            view.dtype = DType::float32;
        } else if (dl.dtype.code == code_float && dl.dtype.bits == 64) {
            view.dtype = DType::float64;
        } else if (dl.dtype.code == code_float && dl.dtype.bits == 16) {
            view.dtype = DType::float16;
        } else if (dl.dtype.code == code_bfloat && dl.dtype.bits == 16) {
            view.dtype = DType::bfloat16;
        } else {
            return false;
        }
        view.data = static_cast<std::byte*>(dl.data) + dl.byte_offset;
        view.dimensions = dl.ndim;
        view.shape = dl.shape;
        view.strides = dl.strides;
    }
    view.size = 1;
    for (int axis = 0; axis < view.dimensions; ++axis) view.size *= view.shape[axis];
    return true;
}

bool TorchPlan::add(Scratch& scratch, PyObject* parameter, PyObject* grad, PyObject* momentum, std::uint32_t group,
                    bool first) {
    View p, g, m;
    if (!view(scratch, parameter, p) || !view(scratch, grad, g) || !same_shape(p, g)) return false;
    TensorRef tensor;
    tensor.momentum_dtype = p.dtype;
    if (momentum != nullptr) {
        if (!view(scratch, momentum, m) || !same_shape(p, m) || !same_strides(p, m)) return false;
        tensor.momentum = m.data;
        tensor.momentum_dtype = m.dtype;
    }
    if (p.size == 0) return true;
    if (p.data == nullptr || g.data == nullptr) return false;
    // A tensor may stand for its memory with the opposite sign: the imaginary part of a conjugate, which DLPack does
    // not tell. It has gaps between its elements, if it has several, so only such gradients are asked; parameters and
    // momentum buffers were, once.
    if ((p.size == 1 || !same_strides(p, g)) && is_negated(grad)) return false;
    const std::size_t axes_start = scratch.axes.size();
    if (!is_c_contiguous(p) || !same_strides(p, g)) {
        int order[max_dimensions];
        if (!memory_order(p, order)) return false;
        if (!same_strides(p, g)) {
            const auto item = static_cast<std::int64_t>(item_size(g.dtype));
            for (int i = 0; i < p.dimensions; ++i) {
                if (g.shape[order[i]] == 1) continue;
                append_axis(scratch.axes, axes_start, {g.shape[order[i]], g.strides[order[i]] * item});
            }
        }
    }
    tensor.param = p.data;
    tensor.param_dtype = p.dtype;
    tensor.grad = g.data;
    tensor.grad_dtype = g.dtype;
    tensor.size = p.size;
    tensor.hyper = group;
    tensor.first = first;
    scratch.tensors.push_back(tensor);
    scratch.axes_end.push_back(scratch.axes.size());
    scratch.total += p.size;
    scratch.ranges.push_back({address_of(p.data), end_of(p), true});
    scratch.ranges.push_back({address_of(g.data), end_of(g), false});
    if (momentum != nullptr) scratch.ranges.push_back({address_of(m.data), end_of(m), true});
    return true;
}

bool TorchPlan::disjoint(const Scratch& scratch, bool zero_grad) {
    if (scratch.ranges == checked_ && (checked_zero_grad_ || !zero_grad)) return true;
    sorted_ = scratch.ranges;
    std::sort(sorted_.begin(), sorted_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    // Gradients may share memory with each other, unless they are cleared.
    std::uintptr_t written_end = 0, read_end = 0;
    for (const Range& range : sorted_) {
        const bool written = range.written || zero_grad;
        if (range.begin < written_end || (written && range.begin < read_end)) return false;
        std::uintptr_t& end = written ? written_end : read_end;
        end = std::max(end, range.end);
    }
    checked_ = scratch.ranges;
    checked_zero_grad_ = zero_grad;
    return true;
}

void TorchPlan::update(Scratch& scratch, const StepOptions& options) {
    std::size_t start = 0;
    for (std::size_t i = 0; i < scratch.tensors.size(); ++i) {
        scratch.tensors[i].grad_axes = {scratch.axes.data() + start, scratch.axes_end[i] - start};
        start = scratch.axes_end[i];
    }
    if (scratch.total >= gil_release_elements) {
        py::gil_scoped_release release;
        step(scratch.tensors, scratch.hypers, options);
    } else {
        step(scratch.tensors, scratch.hypers, options);
    }
}

bool TorchPlan::is_negated(PyObject* tensor) const { return py::cast<bool>(interface_.is_negated(py::handle(tensor))); }

py::object TorchPlan::pin(PyObject* tensor) const {
    if (interface_.pin.is_none()) return py::none();
    return interface_.pin(py::handle(tensor));
}

bool TorchPlan::remember(std::size_t position, PyObject* parameter) {
    if (position < entries_.size() && entries_[position].parameter.ptr() == parameter) return true;
    if (is_negated(parameter)) return false;
    Entry entry;
    entry.parameter = py::reinterpret_borrow<py::object>(parameter);
    entry.parameter_pin = pin(parameter);
    entry.hash = PyObject_Hash(parameter);
    if (entry.hash == -1) throw py::error_already_set();
    if (position >= entries_.size()) entries_.resize(position + 1);  // after the calls to Python above
    entries_[position] = std::move(entry);
    return true;
}

bool TorchPlan::remember_momentum(std::size_t position, PyObject* momentum) {
    if (is_negated(momentum)) return false;
    py::object pinned = pin(momentum);  // runs Python code, which may let another thread forget the entry
    if (position >= entries_.size()) return true;
    entries_[position].momentum = py::reinterpret_borrow<py::object>(momentum);
    entries_[position].momentum_pin = std::move(pinned);
    return true;
}

py::list TorchPlan::list_of(const std::vector<py::object>& tensors) {
    // Mostly the same as last time; nobody else has this list by then.
    const auto count = static_cast<Py_ssize_t>(tensors.size());
    if (!changed_ || PyList_GET_SIZE(changed_.ptr()) != count || Py_REFCNT(changed_.ptr()) != 1) {
        changed_ = py::list(tensors.size());
        for (Py_ssize_t i = 0; i < count; ++i) PyList_SET_ITEM(changed_.ptr(), i, Py_NewRef(Py_None));
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* tensor = tensors[static_cast<std::size_t>(i)].ptr();
        if (PyList_GET_ITEM(changed_.ptr(), i) != tensor) PyList_SetItem(changed_.ptr(), i, Py_NewRef(tensor));
    }
    return py::reinterpret_borrow<py::list>(changed_);
}

bool TorchPlan::run(const py::list& param_groups, const py::object& state, bool zero_grad, double grad_factor) {
    static PyObject* const differentiable_key = interned("differentiable");
    std::unique_ptr<Scratch> scratch = take_scratch();
    scratch->clear();
    read_hypers(param_groups, scratch->hypers);
    if (!PyDict_Check(state.ptr())) return false;
    if (unpinned_) entries_.clear();
    unpinned_ = false;
    const auto is_tensor = [&](PyObject* object) { return Py_TYPE(object) == tensor_type_; };

    std::size_t position = 0;
    MomentumReader momenta(state.ptr());
    for (std::size_t index = 0; index < scratch->hypers.size(); ++index) {
        const SgdHyper& hyper = scratch->hypers[index];
        // Pins and numbers run Python code, after which the lists may be other ones.
        if (static_cast<Py_ssize_t>(index) >= PyList_GET_SIZE(param_groups.ptr())) return false;
        const auto group =
            py::reinterpret_borrow<py::object>(PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(index)));
        if (!PyDict_Check(group.ptr())) return false;
        if (PyObject* differentiable = lookup(group.ptr(), differentiable_key);
            differentiable != nullptr && differentiable != Py_False) {
            return false;
        }
        const auto params = py::reinterpret_borrow<py::object>(group_item(group.ptr(), keys().params, index));
        if (!PyList_Check(params.ptr())) return false;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i, ++position) {
            PyObject* const parameter = PyList_GET_ITEM(params.ptr(), i);
            if (Py_TYPE(parameter) != parameter_type_ && !is_tensor(parameter)) return false;
            PyObject* grad = grad_getter_ != nullptr ? grad_getter_->get(parameter, grad_getter_->closure)
                                                     : PyObject_GetAttrString(parameter, "grad");
            if (grad == nullptr) throw py::error_already_set();
            if (grad == Py_None) {
                Py_DECREF(grad);
                continue;
            }
            scratch->grads.push_back(py::reinterpret_steal<py::object>(grad));
            scratch->changed.push_back(py::reinterpret_borrow<py::object>(parameter));
            if (!is_tensor(grad)) return false;
            if (!remember(position, parameter)) return false;
            PyObject* momentum = nullptr;
            if (hyper.momentum != 0) {
                momentum = momenta.find(parameter, entries_[position].hash);
                if (momentum == nullptr || !is_tensor(momentum)) return false;
                scratch->changed.push_back(py::reinterpret_borrow<py::object>(momentum));
                if (entries_[position].momentum.ptr() != momentum && !remember_momentum(position, momentum))
                    return false;
            }
            if (!add(*scratch, parameter, grad, momentum, static_cast<std::uint32_t>(index), false)) return false;
            if (zero_grad) scratch->changed.push_back(scratch->grads.back());
        }
    }
    if (entries_.size() > position) entries_.resize(position);
    if (!disjoint(*scratch, zero_grad)) return false;

    // Also holds all tensors while other threads run. Made before anything is written, since it may fail.
    const py::list changed = list_of(scratch->changed);
    update(*scratch, {.zero_grad = zero_grad, .grad_factor = grad_factor});
    if (!scratch->changed.empty()) interface_.increment_version(changed);
    scratch->grads.clear();
    scratch->changed.clear();
    if (zero_grad) changed_ = py::object();  // would keep the gradients alive
    scratch_ = std::move(scratch);
    return true;
}

bool TorchPlan::run_items(const py::list& param_groups, const py::list& items, double grad_factor, bool dry_run) {
    std::unique_ptr<Scratch> scratch = take_scratch();
    scratch->clear();
    read_hypers(param_groups, scratch->hypers);
    for (const py::handle item : items) {
        const auto [parameter, grad, momentum, group, first] =
            py::cast<std::tuple<py::object, py::object, py::object, std::uint32_t, bool>>(item);
        PyObject* momentum_tensor = momentum.is_none() ? nullptr : momentum.ptr();
        if (!add(*scratch, parameter.ptr(), grad.ptr(), momentum_tensor, group, first)) return false;
    }
    if (!disjoint(*scratch, false)) return false;
    if (!dry_run) update(*scratch, {.grad_factor = grad_factor});
    scratch_ = std::move(scratch);
    return true;
}

bool TorchPlan::is_dense(const py::object& tensor) {
    Scratch scratch;
    View tensor_view;
    int order[max_dimensions];
    return view(scratch, tensor.ptr(), tensor_view) && (tensor_view.size == 0 || memory_order(tensor_view, order));
}

void TorchPlan::unpin() {
    unpinned_ = true;
    for (Entry& entry : entries_) {
        entry.parameter_pin = py::object();
        entry.momentum_pin = py::object();
    }
}

int TorchPlan::traverse(visitproc visit, void* arg) const {
    for (const Entry& entry : entries_) {
        Py_VISIT(entry.parameter.ptr());
        Py_VISIT(entry.parameter_pin.ptr());
        Py_VISIT(entry.momentum.ptr());
        Py_VISIT(entry.momentum_pin.ptr());
    }
    Py_VISIT(changed_.ptr());
    return 0;
}

void TorchPlan::clear() {
    entries_.clear();
    changed_ = py::object();
}

}  // namespace sgdcore::bindings
