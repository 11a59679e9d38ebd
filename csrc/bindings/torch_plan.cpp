// The way of a step from torch tensors to the core: read everything, check it, and only then write.
#include "torch_plan.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <iterator>
#include <string>
#include <tuple>
#include <utility>

#include "../engine/catalog.hpp"
#include "gil.hpp"
#include "hypers.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

/// Whether something else than CPython evaluates the frames of Python code, as torch.compile's compiler does.
bool frames_are_intercepted() {
    return _PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) != _PyEval_EvalFrameDefault;
}

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

std::vector<PyObject*> state_keys(int rule) {
    std::vector<PyObject*> keys;
    for (const StateSpec& spec : rules()[static_cast<std::size_t>(rule)].states) keys.push_back(interned(spec.key));
    return keys;
}

/// The position, among all, of each group's first parameter; of so many groups as have lists of parameters.
std::vector<std::size_t> starts_of(const py::list& param_groups) {
    std::vector<std::size_t> starts;
    std::size_t position = 0;
    for (std::size_t index = 0; index < param_groups.size(); ++index) {
        starts.push_back(position);
        PyObject* const params = group_item(group_at(param_groups, index), params_key(), index);
        if (!PyList_Check(params)) break;
        position += static_cast<std::size_t>(PyList_GET_SIZE(params));
    }
    return starts;
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

TorchPlan::TorchPlan(int rule, TorchInterface interface)
    : rule_(rule), state_keys_(state_keys(rule)), reader_(std::move(interface)) {}

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
    for (std::vector<PyObject*>* references : {&params, &grads, &states, &parts}) {
        while (!references->empty()) {
            PyObject* const reference = references->back();
            references->pop_back();
            Py_DECREF(reference);
        }
    }
}

/// Finds each parameter's states in the optimizer's state.
class TorchPlan::States {
  public:
    explicit States(PyObject* state) : state_(state) {}

    /// Finds state[parameter], whose items `item` gives then; false if it is no dict. Looks first at what follows the
    /// last one found: the state mostly has the parameters' order.
    bool find(PyObject* parameter, Py_hash_t hash) {
        PyObject* key;
        Py_ssize_t next = position_;
        if (PyDict_Next(state_, &next, &key, &values_) && key == parameter) {
            position_ = next;
        } else {
            values_ = lookup_hashed(state_, parameter, hash);
        }
        next_item_ = 0;
        return values_ == nullptr || PyDict_Check(values_);
    }

    /// state[parameter][key], borrowed; null if it is not there. Looks first at what follows the last one.
    PyObject* item(PyObject* key) {
        if (values_ == nullptr) return nullptr;
        PyObject *next_key, *value;
        if (PyDict_Next(values_, &next_item_, &next_key, &value) && next_key == key) return value;
        return lookup(values_, key);
    }

  private:
    PyObject* state_;
    PyObject* values_ = nullptr;
    Py_ssize_t position_ = 0, next_item_ = 0;
};

namespace {

/// Shapes and strides of a parameter, its gradient and its states.
using Layouts = std::array<std::vector<std::int64_t>, 2 + max_states>;

/// Reads what an item of `run_beside` and `run_items` has; false if a tensor cannot be read.
bool view_item(const TorchReader& reader, const py::object& parameter, const py::object& grad, const py::tuple& states,
               TorchViews& views, Layouts& layouts) {
    views.states_are_read = true;
    if (!reader.view(parameter.ptr(), views.param, layouts[0]) || !reader.view(grad.ptr(), views.grad, layouts[1])) {
        return false;
    }
    for (std::size_t state = 0; state < states.size(); ++state) {
        const py::object tensor = states[state];
        if (tensor.is_none()) continue;
        views.in_use |= 1u << state;
        if (!reader.view(tensor.ptr(), views.states[state], layouts[2 + state])) return false;
    }
    return true;
}

}  // namespace

/// What a step does beside the parameters that are as usual: see `run_beside`.
struct TorchPlan::Beside {
    std::vector<std::size_t> left_out;                          // positions, sorted
    bool everything_left_out = false;                           // whatever the groups are
    std::vector<std::pair<std::size_t, py::tuple>> new_states;  // by position, sorted

    // The items.
    TorchListing listing, apart;  // of those that step, and of the others; the position of each is its index
    std::vector<std::uint8_t*> pending;
    std::vector<bool> is_apart, overlaps;
    std::vector<Claim> claims;  // by index

    // Where the pass has come to.
    std::size_t next_left_out = 0, next_new = 0;

    /// True if the parameter at this position is left out; asked in order.
    bool leaves_out(std::size_t position) {
        if (next_left_out >= left_out.size() || left_out[next_left_out] != position) return false;
        ++next_left_out;
        return true;
    }
    /// The new states of the parameter at this position, borrowed, or null; asked in order.
    PyObject* new_states_at(std::size_t position) {
        while (next_new < new_states.size() && new_states[next_new].first < position) ++next_new;
        const bool found = next_new < new_states.size() && new_states[next_new].first == position;
        return found ? new_states[next_new].second.ptr() : nullptr;
    }
    void read_items(const TorchReader& reader, const py::list& items);
};

void TorchPlan::Beside::read_items(const TorchReader& reader, const py::list& items) {
    overlaps.resize(items.size());
    Layouts layouts;
    listing.start();
    apart.start();
    for (std::size_t i = 0; i < items.size(); ++i) {
        const auto [parameter, grad, states, group, first, flags, memory, stands_apart] = py::cast<
            std::tuple<py::object, py::object, py::tuple, std::uint32_t, bool, std::uintptr_t, py::object, bool>>(
            items[i]);
        is_apart.push_back(stands_apart);
        TorchViews views;
        const bool listed = view_item(reader, parameter, grad, states, views, layouts) &&
                            (stands_apart ? apart : listing).add(reader, i, grad.ptr(), views, group, first) ==
                                TorchListing::Answer::listed;
        if (!listed) {
            overlaps[i] = !stands_apart;  // to be refused by its name
            continue;
        }
        if (!stands_apart) pending.push_back(pointer_of<std::uint8_t>(flags));
        if (memory.is_none()) continue;
        for (const py::handle range : memory) {
            const auto [address, bytes, written] = py::cast<std::tuple<std::uintptr_t, std::uintptr_t, bool>>(range);
            claims.push_back({{address, address + bytes}, i, written});
        }
    }
    // What has no list of its memory shows it.
    std::vector<bool> is_given(items.size());
    for (const Claim& claim : claims) is_given[claim.owner] = true;
    listing.finish();
    apart.finish();
    for (const TorchListing* each : {&listing, &apart}) {
        for (Claim claim : each->claims()) {
            claim.owner = each->position(claim.owner);
            if (!is_given[claim.owner]) claims.push_back(claim);
        }
    }
}

/// What listing the parameters one after the other works with.
struct TorchPlan::Pass {
    Memory& memory;
    States states;
    const bool zero_grad;
    Beside* const beside;
    bool only_looks = false;   // lists nothing
    std::size_t position = 0;  // of the parameter among all
    std::uint32_t group = 0;
    TorchViews views = {};
    Layouts layouts = {};         // of the views, where torch does not lend them
    std::size_t group_start = 0;  // the position of the group's first parameter
    /// What most passes have none of.
    struct Unusual {
        std::vector<Place> odd, missing, overlapping, left_out;
        TorchRows rows;
        std::vector<Place> rows_of;  // of the parameters in `rows`
    };
    std::unique_ptr<Unusual> made = {};

    Unusual& unusual() {
        if (!made) made = std::make_unique<Unusual>();
        return *made;
    }
    Place place() const { return {position, group, position - group_start}; }
    bool is_complete() const {
        return !made || (made->odd.empty() && made->missing.empty() && made->overlapping.empty());
    }
    void add_overlapping(const py::list& param_groups, const std::vector<std::size_t>& indices) {
        const std::vector<std::size_t> starts = starts_of(param_groups);
        for (const std::size_t index : indices) {
            const std::size_t of = memory.listing.position(index), in_group = memory.listing.tensors()[index].hyper;
            unusual().overlapping.push_back({of, in_group, of - starts[in_group]});
        }
    }
    py::object report(bool clearable) {
        const auto places = [](std::vector<Place> all) {
            std::ranges::sort(all, {}, &Place::position);
            py::list list;
            for (const Place& each : all) list.append(py::make_tuple(each.position, each.group, each.index));
            return list;
        };
        py::list items;
        for (std::size_t i = 0; beside != nullptr && i < beside->overlaps.size(); ++i) {
            if (beside->overlaps[i]) items.append(i);
        }
        Unusual& found = unusual();
        return py::make_tuple(places(found.odd), places(found.missing), places(found.overlapping), items, clearable);
    }
};

py::object TorchPlan::run(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                          const py::object& scaling) {
    return attempt(groups, state, zero_grad, grad_factor, scaling, nullptr);
}

py::object TorchPlan::run_unobserved(const py::object& groups, const py::object& state, bool zero_grad) {
    if (in_backward || observers.any()) return py::none();
    return attempt(groups, state, zero_grad, 1.0, py::none(), nullptr);
}

py::object TorchPlan::run_beside(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                                 const py::object& scaling, const py::object& left_out, const py::list& new_states,
                                 const py::list& items) {
    Beside beside;
    beside.everything_left_out = left_out.is_none();
    if (!left_out.is_none()) {
        for (const py::handle position : left_out) beside.left_out.push_back(py::cast<std::size_t>(position));
    }
    for (const py::handle each : new_states) {
        beside.new_states.push_back(py::cast<std::pair<std::size_t, py::tuple>>(each));
    }
    beside.read_items(reader_, items);
    return attempt(groups, state, zero_grad, grad_factor, scaling, &beside);
}

py::object TorchPlan::attempt(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                              const py::object& scaling, Beside* beside) {
    if (frames_are_intercepted()) call(reader_.refuse_fullgraph());
    const py::list param_groups = list_of(groups);
    const Lease lease(*this);
    Memory& memory = *lease;
    const bool complete = std::exchange(memory.complete, false);
    memory.hypers.read(rule_, param_groups);
    const bool everything_left_out = beside != nullptr && beside->everything_left_out;
    if (!everything_left_out && !PyDict_Check(state.ptr())) return py::bool_(false);
    Pass pass{memory, States(state.ptr()), zero_grad, beside};
    if (beside == nullptr && complete && finds_as_expected(pass, param_groups)) {
        memory.complete = true;
        return pass.report(true);
    }
    memory.listing.start();
    // A step that was left to Python may have given parameters other states.
    if (!complete) std::ranges::fill(memory.states, Known());
    if (!everything_left_out && !list(pass, param_groups)) return py::bool_(false);
    TorchListing& listing = memory.listing;
    listing.finish();
    memory.complete = true;
    const std::vector<std::size_t>& entangled = listing.entangled();
    const bool takes_turns = !entangled.empty() && !zero_grad && scaling.is_none() &&
                             memory.hypers.on_device().empty() && listing.can_take_turns();
    if (find_overlaps(pass, param_groups) || !pass.is_complete() || (!entangled.empty() && !takes_turns)) {
        pass.add_overlapping(param_groups, entangled);
        return pass.report(true);
    }
    if (zero_grad && !listing.can_clear()) return pass.report(false);

    const StepOptions options{.rule = rule_, .grad_factor = grad_factor};
    if (beside != nullptr && !beside->listing.tensors().empty()) {
        update(memory, beside->listing.tensors(), beside->listing.elements(), beside->listing.on_device(), param_groups,
               options, scaling, beside->pending);
    }
    if (pass.made && !pass.made->rows.tensors().empty()) {
        update(memory, pass.made->rows.tensors(), pass.made->rows.elements(), false, param_groups, options, scaling,
               {});
    }
    if (takes_turns) {
        take_turns(memory, options);
    } else {
        // Last, since it may clear gradients that others read.
        update(memory, listing.tensors(), listing.elements(), listing.on_device(), param_groups,
               {.rule = rule_, .zero_grad = zero_grad, .grad_factor = grad_factor}, scaling, pending_of(memory));
    }
    increment_versions(memory.held, state_exposed, zero_grad);
    const bool any_apart = beside != nullptr && std::ranges::find(beside->is_apart, true) != beside->is_apart.end();
    memory.expected.clear();
    if (pass.made && !any_apart && !everything_left_out) {
        std::swap(memory.expected, pass.made->left_out);
        memory.group_starts = starts_of(param_groups);
    }
    return py::bool_(true);
}

bool TorchPlan::finds_as_expected(Pass& pass, const py::list& param_groups) {
    Memory& memory = pass.memory;
    if (memory.expected.empty() || memory.group_starts.size() != memory.hypers.size()) return false;
    if (memory.group_starts != starts_of(param_groups)) return false;
    pass.only_looks = true;
    bool found = true;
    for (const Place& place : memory.expected) {
        const py::object group = py::reinterpret_borrow<py::object>(group_at(param_groups, place.group));
        const py::object params =
            py::reinterpret_borrow<py::object>(group_item(group.ptr(), params_key(), place.group));
        if (!PyList_Check(params.ptr()) || static_cast<std::size_t>(PyList_GET_SIZE(params.ptr())) <= place.index) {
            found = false;
            break;
        }
        pass.position = place.position;
        pass.group = static_cast<std::uint32_t>(place.group);
        pass.group_start = place.position - place.index;
        pass.views.in_use = memory.hypers[place.group].states;
        const std::size_t counts[] = {memory.held.params.size(), memory.held.grads.size(), memory.held.states.size()};
        PyObject* const parameter = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(place.index));
        found = list_parameter(pass, parameter, group.ptr()) == Outcome::odd;
        leave_out(pass, Outcome::odd, counts);
        if (!found) break;
    }
    pass.only_looks = false;
    pass.position = 0;
    if (!found) pass.made.reset();
    return found;
}

void TorchPlan::take_turns(const Memory& memory, const StepOptions& options) const {
    const std::span<const TensorRef> tensors = memory.listing.tensors();
    const std::vector<std::size_t>& entangled = memory.listing.entangled();
    std::vector<TensorRef> others;
    std::int64_t elements = 0;
    auto next = entangled.begin();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (next != entangled.end() && *next == i) {
            ++next;
            continue;
        }
        others.push_back(tensors[i]);
        elements += tensors[i].size;
    }
    step_on_cpu(others, elements, memory.hypers.all(), options);
    for (const std::size_t index : entangled) {
        TensorRef tensor = tensors[index];
        std::vector<std::byte> copy;
        if (memory.listing.is_own_gradient(index)) {
            copy.assign(tensor.grad,
                        tensor.grad + tensor.size * static_cast<std::int64_t>(item_size(tensor.grad_dtype)));
            tensor.grad = copy.data();
        }
        step_on_cpu({&tensor, 1}, tensor.size, memory.hypers.all(), options);
    }
}

bool TorchPlan::find_overlaps(Pass& pass, const py::list& param_groups) const {
    Beside* const beside = pass.beside;
    const std::size_t row_count = pass.made ? pass.made->rows.count() : 0;
    if (beside == nullptr && row_count == 0) return false;
    const TorchListing& listing = pass.memory.listing;
    std::vector<Claim> claims = pass.unusual().rows.claims();
    std::vector<bool> marked(row_count + (beside == nullptr ? 0 : beside->overlaps.size()));
    if (beside != nullptr) {
        for (Claim claim : beside->claims) {
            claim.owner += row_count;
            claims.push_back(claim);
        }
    }
    bool found = false;
    if (!claims.empty()) {
        std::vector<bool> marked_tensors(listing.tensors().size());
        mark_conflicts(claims, marked);
        mark_conflicts_between(claims, listing.claims(), marked, marked_tensors);
        std::vector<std::size_t> indices;
        for (std::size_t i = 0; i < marked_tensors.size(); ++i) {
            if (marked_tensors[i]) indices.push_back(i);
        }
        pass.add_overlapping(param_groups, indices);
        found = !indices.empty();
    }
    for (std::size_t i = 0; i < row_count; ++i) {
        if (!marked[i]) continue;
        pass.unusual().odd.push_back(pass.unusual().rows_of[i]);
        found = true;
    }
    for (std::size_t i = row_count; i < marked.size(); ++i) {
        const std::size_t item = i - row_count;
        if (marked[i] && !beside->is_apart[item]) beside->overlaps[item] = true;
        found |= beside->overlaps[item];
    }
    return found;
}

void TorchPlan::increment_versions(const References& held, bool with_states, bool with_grads) const {
    const std::pair<const std::vector<PyObject*>&, bool> parts[] = {
        {held.params, true}, {held.states, with_states}, {held.grads, with_grads}};
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
        pass.views.in_use = pass.memory.hypers[index].states;
        pass.group = static_cast<std::uint32_t>(index);
        pass.group_start = pass.position;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i, ++pass.position) {
            if (pass.beside != nullptr && pass.beside->leaves_out(pass.position)) {
                pass.unusual().left_out.push_back(pass.place());
                continue;
            }
            const std::size_t counts[] = {pass.memory.held.params.size(), pass.memory.held.grads.size(),
                                          pass.memory.held.states.size()};
            const Outcome outcome = list_parameter(pass, PyList_GET_ITEM(params.ptr(), i), group.ptr());
            if (outcome != Outcome::done) leave_out(pass, outcome, counts);
        }
    }
    return true;
}

void TorchPlan::leave_out(Pass& pass, Outcome outcome, const std::size_t (&counts)[3]) {
    if (pass.position < pass.memory.entries.size()) {
        std::fill_n(known_states(pass.memory, pass.position), state_count(), Known());
    }
    Pass::Unusual& unusual = pass.unusual();
    (outcome == Outcome::odd ? unusual.odd : unusual.missing).push_back(pass.place());
    std::vector<PyObject*>* const all[] = {&pass.memory.held.params, &pass.memory.held.grads, &pass.memory.held.states};
    for (std::size_t i = 0; i < std::size(all); ++i) {
        while (all[i]->size() > counts[i]) {
            PyObject* const reference = all[i]->back();
            all[i]->pop_back();
            Py_DECREF(reference);
        }
    }
}

TorchPlan::Outcome TorchPlan::list_parameter(Pass& pass, PyObject* parameter, PyObject* group) {
    Memory& memory = pass.memory;
    memory.listing.prefetch();
    const TensorKind kind = reader_.kind(parameter);
    if (kind == TensorKind::other) return Outcome::odd;
    memory.held.params.push_back(Py_NewRef(parameter));
    PyObject* const grad = reader_.grad(parameter);
    if (grad == Py_None) {
        memory.held.params.pop_back();
        Py_DECREF(parameter);
        Py_DECREF(grad);
        return Outcome::done;
    }
    memory.held.grads.push_back(grad);
    // Clearing also takes a gradient out of the graph that computed it, which Python code does.
    if (pass.zero_grad && reader_.requires_grad(grad)) return Outcome::odd;
    if (pass.position >= memory.entries.size()) {
        memory.entries.resize(pass.position + 1);
        memory.states.resize(memory.entries.size() * state_count());
    }
    Entry& entry = memory.entries[pass.position];
    if (entry.object != parameter) {
        entry = Entry();
        std::fill_n(known_states(memory, pass.position), state_count(), Known());
        entry.object = parameter;
        entry.hash = unless_python_ends([&] { return PyObject_Hash(parameter); });
        if (entry.hash == -1) throw py::error_already_set();
    }
    if (!read(parameter, kind, memory.held, entry.parameter, pass.views.param, pass.layouts[0])) return Outcome::odd;
    if (kind == TensorKind::plain && reader_.is_tensor(grad)) {
        if (reader_.view_grad(grad, entry.grad, pass.views.grad, pass.layouts[1]))
            return list_dense(pass, parameter, grad, kind);
        return reader_.is_sparse_coo(grad) ? list_rows(pass, parameter, grad, group) : Outcome::odd;
    }
    if (kind != TensorKind::distributed || Py_TYPE(grad) != Py_TYPE(parameter) || !pending_.empty()) {
        return Outcome::odd;
    }
    PyObject* const part = reader_.local_part(grad);
    if (part == nullptr) return Outcome::odd;
    memory.held.parts.push_back(part);
    if (!reader_.placed_alike(parameter, grad) ||
        !reader_.view_grad(part, entry.grad, pass.views.grad, pass.layouts[1])) {
        return Outcome::odd;
    }
    return list_dense(pass, parameter, part, kind);
}

TorchPlan::Outcome TorchPlan::list_dense(Pass& pass, PyObject* parameter, PyObject* grad, TensorKind kind) {
    Memory& memory = pass.memory;
    TorchViews& views = pass.views;
    views.states_are_read = false;
    bool first = false;
    Outcome states = Outcome::done;
    if (views.in_use != 0) {
        PyObject* const fresh = pass.beside == nullptr ? nullptr : pass.beside->new_states_at(pass.position);
        if (fresh != nullptr) {
            first = true;
            states = read_new_states(pass, fresh, kind);
        } else if (state_exposed || !hold_known_states(pass)) {
            states = read_states(pass, parameter, kind);
        }
    }
    if (states == Outcome::odd) return Outcome::odd;
    if (states == Outcome::missing) return memory.listing.takes(reader_, grad, views) ? Outcome::missing : Outcome::odd;
    if (pass.only_looks) return memory.listing.takes(reader_, grad, views) ? Outcome::done : Outcome::odd;
    using Answer = TorchListing::Answer;
    const auto add = [&] { return memory.listing.add(reader_, pass.position, grad, views, pass.group, first); };
    Answer answer = add();
    if (answer == Answer::read_states) {
        answer = read_states(pass, parameter, kind) == Outcome::done ? add() : Answer::refused;
    }
    return answer == Answer::listed ? Outcome::done : Outcome::odd;
}

TorchPlan::Outcome TorchPlan::list_rows(Pass& pass, PyObject* parameter, PyObject* grad, PyObject* group) {
    static PyObject* const mode_key = interned("sparse_mode");
    Memory& memory = pass.memory;
    if (pass.zero_grad || !memory.hypers.on_device().empty()) return Outcome::odd;
    PyObject* const mode = lookup(group, mode_key);
    const bool lazy = mode != nullptr && PyUnicode_Check(mode) && PyUnicode_CompareWithASCIIString(mode, "lazy") == 0;
    const bool rows_only = lazy || memory.hypers[pass.group].skips_zero_grads;
    bool first = false;
    Outcome found = Outcome::done;
    if (pass.views.in_use != 0) {
        PyObject* const fresh = pass.beside == nullptr ? nullptr : pass.beside->new_states_at(pass.position);
        found = fresh == nullptr ? read_states(pass, parameter, TensorKind::plain)
                                 : read_new_states(pass, fresh, TensorKind::plain);
        first = fresh != nullptr;
    }
    if (found == Outcome::odd) return Outcome::odd;
    IndexView indices;
    std::array<py::object, 2> parts;
    const bool is_read = reader_.sparse_view(grad, indices, pass.views.grad, parts);
    for (py::object& part : parts) {
        if (part) memory.held.parts.push_back(part.release().ptr());
    }
    TorchViews views = pass.views;
    if (found == Outcome::missing) views.in_use = 0;
    if (!is_read || !pass.unusual().rows.add(views, indices, pass.group, first,
                                             rows_only ? TorchRows::Others::stay : TorchRows::Others::have_zeros)) {
        return Outcome::odd;
    }
    pass.unusual().rows_of.push_back(pass.place());
    return found;
}

bool TorchPlan::hold_known_states(Pass& pass) {
    // They live: the optimizer's state refers to them, and nobody can have changed that.
    const Known* const known = known_states(pass.memory, pass.position);
    bool all = true;
    pass.views.for_each_state([&](int state) { all = all && known[state].identity.object != nullptr; });
    if (!all) return false;
    pass.views.for_each_state(
        [&](int state) { pass.memory.held.states.push_back(Py_NewRef(known[state].identity.object)); });
    return true;
}

TorchPlan::Outcome TorchPlan::read_new_states(Pass& pass, PyObject* tuple, TensorKind kind) {
    pass.views.states_are_read = true;
    bool is_read = true;
    pass.views.for_each_state([&](int state) {
        if (!is_read) return;
        Known unknown;  // nor is it known to the next step, which finds it in the state if this one comes to its end
        PyObject* const tensor = PyTuple_GET_ITEM(tuple, state);
        pass.memory.held.states.push_back(Py_NewRef(tensor));
        is_read = read(tensor, kind, pass.memory.held, unknown, pass.views.states[state],
                       pass.layouts[2 + static_cast<std::size_t>(state)]);
    });
    return is_read ? Outcome::done : Outcome::odd;
}

TorchPlan::Outcome TorchPlan::read_states(Pass& pass, PyObject* parameter, TensorKind kind) {
    Known* const known = known_states(pass.memory, pass.position);
    Outcome outcome = Outcome::done;
    if (!pass.states.find(parameter, pass.memory.entries[pass.position].hash)) outcome = Outcome::odd;
    pass.views.states_are_read = true;
    pass.views.for_each_state([&](int state) {
        if (outcome == Outcome::odd) return;
        PyObject* const tensor = pass.states.item(state_keys_[static_cast<std::size_t>(state)]);
        if (tensor == nullptr || tensor == Py_None) {
            outcome = Outcome::missing;
            return;
        }
        const bool is_usual =
            kind == TensorKind::plain ? reader_.is_tensor(tensor) : Py_TYPE(tensor) == Py_TYPE(parameter);
        if (is_usual) pass.memory.held.states.push_back(Py_NewRef(tensor));
        if (!is_usual || !read(tensor, kind, pass.memory.held, known[state], pass.views.states[state],
                               pass.layouts[2 + static_cast<std::size_t>(state)])) {
            outcome = Outcome::odd;
        }
    });
    if (outcome != Outcome::done) std::fill_n(known, state_count(), Known());
    return outcome;
}

bool TorchPlan::read(PyObject* tensor, TensorKind kind, References& held, Known& known, TorchView& view,
                     std::vector<std::int64_t>& layout) const {
    if (kind == TensorKind::distributed) {
        tensor = reader_.local_part(tensor);
        if (tensor == nullptr) return false;
        held.parts.push_back(tensor);
    }
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
        const std::uint32_t in_use = memory.hypers[memory.listing.tensors()[i].hyper].states;
        const std::size_t first = memory.listing.position(i) * state_count() + std::countr_zero(in_use);
        const auto found = in_use == 0 ? pending_.end() : pending_.find(memory.states[first].identity.object);
        pending.push_back(found == pending_.end() ? nullptr : found->second.second);
    }
    return pending;
}

void TorchPlan::set_pending(const py::list& flags) {
    std::map<PyObject*, std::pair<py::object, std::uint8_t*>> pending;
    for (const py::handle each : flags) {
        const auto [state, address] = py::cast<std::pair<py::object, std::uintptr_t>>(each);
        pending[state.ptr()] = {state, pointer_of<std::uint8_t>(address)};
    }
    std::swap(pending_, pending);
}

void TorchPlan::update(const Memory& memory, std::span<const TensorRef> work, std::int64_t elements, bool on_device,
                       const py::list& param_groups, const StepOptions& options, const py::object& scaling,
                       const std::vector<std::uint8_t*>& pending) {
    // Numbers on a device make a step on the CPU wait for them.
    if (on_device || !memory.hypers.on_device().empty() || !scaling.is_none()) {
        std::vector<TensorRef> tensors(work.begin(), work.end());
        for (std::size_t i = 0; i < pending.size(); ++i) tensors[i].pending = pending[i];
        const DeviceInterface interface{.stream = reader_.current_stream(), .scaling = scaling};
        device_steps_.step(tensors, param_groups, memory.hypers, options, interface);
    } else {
        step_on_cpu(work, elements, memory.hypers.all(), options);
    }
}

bool TorchPlan::run_items(const py::object& groups, const py::list& items, double grad_factor, bool dry_run,
                          const py::object& scaling) {
    const py::list param_groups = list_of(groups);
    Memory memory;
    std::vector<std::uint8_t*> pending;
    memory.hypers.read(rule_, param_groups);
    Layouts layouts;
    memory.listing.start();
    std::size_t position = 0;
    for (const py::handle item : items) {
        const auto [parameter, grad, states, group, first, flags] =
            py::cast<std::tuple<py::object, py::object, py::tuple, std::uint32_t, bool, std::uintptr_t>>(item);
        pending.push_back(pointer_of<std::uint8_t>(flags));
        TorchViews views;
        if (!view_item(reader_, parameter, grad, states, views, layouts) ||
            memory.listing.add(reader_, position++, grad.ptr(), views, group, first) != TorchListing::Answer::listed) {
            return false;
        }
    }
    memory.listing.finish();
    if (!memory.listing.entangled().empty()) return false;
    if (!dry_run) {
        update(memory, memory.listing.tensors(), memory.listing.elements(), memory.listing.on_device(), param_groups,
               {.rule = rule_, .grad_factor = grad_factor}, scaling, pending);
    }
    return true;
}

bool TorchPlan::is_dense(const py::object& tensor) {
    TorchView view;
    std::vector<std::int64_t> layout;
    int order[max_dimensions];
    return reader_.view(tensor.ptr(), view, layout) && (size_of(view) == 0 || memory_order(view, order));
}

int TorchPlan::traverse(visitproc visit, void* arg) const {
    for (const auto& [state, flags] : pending_) Py_VISIT(state);
    if (const int result = observers.traverse(visit, arg); result != 0) return result;
    return reader_.traverse(visit, arg);
}

void TorchPlan::clear() {
    reader_.clear();
    // Whose deallocation may run Python code.
    const auto pending = std::move(pending_);
    const auto observed_by = std::exchange(observers, Observers());
}

}  // namespace sgdcore::bindings
