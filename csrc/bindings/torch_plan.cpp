// The way of a step from torch tensors to the core: read everything, check it, and only then write.
#include "torch_plan.hpp"

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "gil.hpp"
#include "hypers.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

/// mapping[key], borrowed; null if it is not there.
PyObject* lookup(PyObject* mapping, PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(mapping, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

/// The same where the key's hash is known.
PyObject* lookup_hashed(PyObject* mapping, PyObject* key, [[maybe_unused]] Py_hash_t hash) {
#if PY_VERSION_HEX < 0x030E0000
    PyObject* value = _PyDict_GetItem_KnownHash(mapping, key, hash);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
#else
    return lookup(mapping, key);
#endif
}

/// The groups as a list; torch takes whatever can be iterated more than once.
py::list list_of(const py::object& param_groups) {
    if (PyList_Check(param_groups.ptr())) return py::reinterpret_borrow<py::list>(param_groups);
    if (!PySequence_Check(param_groups.ptr())) {
        throw py::type_error("param_groups: expected a list or another sequence of dicts, got " +
                             repr_text(py::type::of(param_groups)));
    }
    PyObject* list = unless_python_ends([&] { return PySequence_List(param_groups.ptr()); });
    if (list == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::list>(list);
}

}  // namespace

/// Takes the plan's memory and gives it back.
class TorchPlan::Lease {
  public:
    explicit Lease(TorchPlan& plan) : plan_(plan), memory_(std::move(plan.memory_)) {
        if (!memory_) memory_ = std::make_unique<Memory>();
    }
    ~Lease() {
        memory_->held.release();
        plan_.memory_ = std::move(memory_);
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    Memory& operator*() const { return *memory_; }

  private:
    TorchPlan& plan_;
    std::unique_ptr<Memory> memory_;
};

void TorchPlan::References::release() {
    // Deallocation may run Python code, so nothing of ours may be in an intermediate state.
    for (std::vector<PyObject*>* references : {&params, &grads, &momenta}) {
        while (!references->empty()) {
            PyObject* const reference = references->back();
            references->pop_back();
            Py_DECREF(reference);
        }
    }
}

/// Finds each parameter's momentum buffer in the optimizer's state.
class TorchPlan::Momenta {
  public:
    explicit Momenta(PyObject* state) : state_(state) {}

    /// state[parameter]["momentum_buffer"], borrowed; null if it is not there. Looks first at what follows the last one
    /// found: the state mostly has the parameters' order.
    PyObject* find(PyObject* parameter, Py_hash_t hash) {
        static PyObject* const key = interned("momentum_buffer");
        PyObject *next_key, *values;
        Py_ssize_t next = position_;
        if (PyDict_Next(state_, &next, &next_key, &values) && next_key == parameter) {
            position_ = next;
        } else {
            values = lookup_hashed(state_, parameter, hash);
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

/// What listing the parameters one after the other works with.
struct TorchPlan::Pass {
    Memory& memory;
    Momenta momenta;
    const bool zero_grad;
    std::size_t position = 0;  // of the parameter among all
    TorchViews views = {};
    std::vector<std::int64_t> layouts[3] = {};  // of the views, where torch does not lend them
};

bool TorchPlan::run(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                    const py::object& scaling) {
    const py::list param_groups = list_of(groups);
    const Lease lease(*this);
    Memory& memory = *lease;
    const bool complete = std::exchange(memory.complete, false);
    read_hypers(rule_, param_groups, memory.hypers, &memory.scalars);
    if (!PyDict_Check(state.ptr())) return false;
    memory.listing.start();
    // A step that was left to Python may have given parameters other momentum buffers.
    if (!complete) {
        for (Entry& entry : memory.entries) entry.momentum = Known();
    }
    Pass pass{memory, Momenta(state.ptr()), zero_grad};
    const bool listed = list(pass, param_groups);
    if (!listed || !memory.listing.finish(zero_grad)) return false;
    memory.complete = true;

    update(memory, param_groups, {.rule = rule_, .zero_grad = zero_grad, .grad_factor = grad_factor}, scaling,
           pending_of(memory));
    increment_versions(memory.held, state_exposed, zero_grad);
    return true;
}

void TorchPlan::increment_versions(const References& held, bool with_momenta, bool with_grads) const {
    const std::pair<const std::vector<PyObject*>&, bool> parts[] = {
        {held.params, true}, {held.momenta, with_momenta}, {held.grads, with_grads}};
    const auto bump = [&](const auto& part) { return !part.second || reader_.bump_versions(part.first); };
    if (std::ranges::all_of(parts, bump)) return;
    py::list tensors;
    for (const auto& [references, is_changed] : parts) {
        if (!is_changed) continue;
        for (PyObject* tensor : references) tensors.append(py::handle(tensor));
    }
    if (!tensors.empty()) reader_.increment_versions(tensors);
}

bool TorchPlan::list(Pass& pass, const py::list& param_groups) {
    static PyObject* const differentiable_key = interned("differentiable");
    for (std::size_t index = 0; index < pass.memory.hypers.size(); ++index) {
        // Hyperparameters and new tensors run Python code, after which the lists may be other ones.
        if (static_cast<Py_ssize_t>(index) >= PyList_GET_SIZE(param_groups.ptr())) return false;
        const auto group =
            py::reinterpret_borrow<py::object>(PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(index)));
        if (!PyDict_Check(group.ptr())) return false;
        if (PyObject* differentiable = lookup(group.ptr(), differentiable_key);
            differentiable != nullptr && differentiable != Py_False) {
            return false;
        }
        const auto params = py::reinterpret_borrow<py::object>(group_item(group.ptr(), params_key(), index));
        if (!PyList_Check(params.ptr())) return false;
        pass.views.has_momentum = pass.memory.hypers[index].has_state(0);
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i, ++pass.position) {
            PyObject* const parameter = PyList_GET_ITEM(params.ptr(), i);
            if (!list_parameter(pass, parameter, static_cast<std::uint32_t>(index))) return false;
        }
    }
    return true;
}

bool TorchPlan::list_parameter(Pass& pass, PyObject* parameter, std::uint32_t group) {
    Memory& memory = pass.memory;
    TorchViews& views = pass.views;
    const std::size_t position = pass.position;
    memory.listing.prefetch();
    if (!reader_.is_tensor_or_parameter(parameter)) return false;
    memory.held.params.push_back(Py_NewRef(parameter));
    PyObject* const grad = reader_.grad(parameter);
    if (grad == Py_None) {
        memory.held.params.pop_back();
        Py_DECREF(parameter);
        Py_DECREF(grad);
        return true;
    }
    memory.held.grads.push_back(grad);
    if (!reader_.is_tensor(grad)) return false;
    // Clearing also takes a gradient out of the graph that computed it, which Python code does.
    if (pass.zero_grad && reader_.requires_grad(grad)) return false;
    if (position >= memory.entries.size()) memory.entries.resize(position + 1);
    Entry& entry = memory.entries[position];
    if (entry.parameter.identity.object != parameter) {
        entry = Entry();
        entry.hash = unless_python_ends([&] { return PyObject_Hash(parameter); });
        if (entry.hash == -1) throw py::error_already_set();
    }
    views.momentum_is_read = false;
    if (views.has_momentum && !state_exposed && entry.momentum.identity.object != nullptr) {
        // It lives: the state refers to it, and nobody can have changed that.
        memory.held.momenta.push_back(Py_NewRef(entry.momentum.identity.object));
    } else if (views.has_momentum && !read_momentum(pass, parameter)) {
        return false;
    }
    if (!read(parameter, entry.parameter, views.param, pass.layouts[0]) ||
        !reader_.view(grad, views.grad, pass.layouts[1])) {
        return false;
    }
    using Answer = TorchListing::Answer;
    const auto add = [&] { return memory.listing.add(reader_, position, grad, views, group, false); };
    Answer answer = add();
    if (answer == Answer::read_momentum) answer = read_momentum(pass, parameter) ? add() : Answer::refused;
    return answer == Answer::listed;
}

bool TorchPlan::read_momentum(Pass& pass, PyObject* parameter) {
    Entry& entry = pass.memory.entries[pass.position];
    PyObject* const momentum = pass.momenta.find(parameter, entry.hash);
    if (momentum == nullptr || !reader_.is_tensor(momentum)) {
        entry.momentum = Known();
        return false;
    }
    pass.memory.held.momenta.push_back(Py_NewRef(momentum));
    pass.views.momentum_is_read = true;
    return read(momentum, entry.momentum, pass.views.momentum, pass.layouts[2]);
}

bool TorchPlan::read(PyObject* tensor, Known& known, TorchView& view, std::vector<std::int64_t>& layout) const {
    const TensorIdentity identity = reader_.identity(tensor);
    const bool again = known.identity == identity;
    if (!(again ? reader_.view_again(tensor, view, layout) : reader_.view(tensor, view, layout))) {
        known = Known();
        return false;
    }
    // Where a negation leaves no gaps it cannot be told from the strides (see TorchListing::append).
    if (again && known.data == view.data && size_of(view) != 1) return true;
    known = {identity, view.data};
    return !reader_.is_negated(tensor);
}

std::vector<std::uint8_t*> TorchPlan::pending_of(const Memory& memory) const {
    std::vector<std::uint8_t*> pending;
    if (pending_.empty()) return pending;
    for (std::size_t i = 0; i < memory.listing.tensors().size(); ++i) {
        const auto found = pending_.find(memory.entries[memory.listing.position(i)].momentum.identity.object);
        pending.push_back(found == pending_.end() ? nullptr : found->second.second);
    }
    return pending;
}

void TorchPlan::set_pending(const py::list& flags) {
    std::map<PyObject*, std::pair<py::object, std::uint8_t*>> pending;
    for (const py::handle each : flags) {
        const auto [momentum, address] = py::cast<std::pair<py::object, std::uintptr_t>>(each);
        pending[momentum.ptr()] = {momentum, pointer_of<std::uint8_t>(address)};
    }
    std::swap(pending_, pending);
}

void TorchPlan::update(const Memory& memory, const py::list& param_groups, const StepOptions& options,
                       const py::object& scaling, const std::vector<std::uint8_t*>& pending) {
    // Numbers on a device make a step on the CPU wait for them.
    if (memory.listing.on_device() || !memory.scalars.empty() || !scaling.is_none()) {
        std::vector<TensorRef> tensors(memory.listing.tensors().begin(), memory.listing.tensors().end());
        for (std::size_t i = 0; i < pending.size(); ++i) tensors[i].pending = pending[i];
        const DeviceInterface interface{.stream = reader_.current_stream(), .scaling = scaling};
        device_steps_.step(tensors, param_groups, memory.hypers, memory.scalars, options, interface);
    } else {
        step_on_cpu(memory.listing.tensors(), memory.listing.elements(), memory.hypers, options);
    }
}

bool TorchPlan::run_items(const py::object& groups, const py::list& items, double grad_factor, bool dry_run,
                          const py::object& scaling) {
    const py::list param_groups = list_of(groups);
    Memory memory;
    std::vector<std::uint8_t*> pending;
    read_hypers(rule_, param_groups, memory.hypers, &memory.scalars);
    std::vector<std::int64_t> layouts[3];
    memory.listing.start();
    std::size_t position = 0;
    for (const py::handle item : items) {
        const auto [parameter, grad, momentum, group, first, flags] =
            py::cast<std::tuple<py::object, py::object, py::object, std::uint32_t, bool, std::uintptr_t>>(item);
        pending.push_back(pointer_of<std::uint8_t>(flags));
        TorchViews views;
        views.has_momentum = views.momentum_is_read = !momentum.is_none();
        if (!reader_.view(parameter.ptr(), views.param, layouts[0]) ||
            !reader_.view(grad.ptr(), views.grad, layouts[1]) ||
            (views.has_momentum && !reader_.view(momentum.ptr(), views.momentum, layouts[2])) ||
            memory.listing.add(reader_, position++, grad.ptr(), views, group, first) != TorchListing::Answer::listed) {
            return false;
        }
    }
    if (!memory.listing.finish(false)) return false;
    if (!dry_run) update(memory, param_groups, {.rule = rule_, .grad_factor = grad_factor}, scaling, pending);
    return true;
}

bool TorchPlan::is_dense(const py::object& tensor) {
    TorchView view;
    std::vector<std::int64_t> layout;
    int order[max_dimensions];
    return reader_.view(tensor.ptr(), view, layout) && (size_of(view) == 0 || memory_order(view, order));
}

int TorchPlan::traverse(visitproc visit, void* arg) const {
    for (const auto& [momentum, flags] : pending_) Py_VISIT(momentum);
    return 0;
}

void TorchPlan::clear() {
    const auto pending = std::move(pending_);  // whose deallocation may run Python code
}

}  // namespace sgdcore::bindings
