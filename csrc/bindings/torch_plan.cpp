// The way of a step from torch tensors to the core. Every tensor is read and checked before the first write.
#include "torch_plan.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../engine/catalog.hpp"
#include "gil.hpp"
#include "hypers.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

constexpr const char* steps_taken_key = "steps_taken";

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

/// True if CPython's evaluation of frames is replaced, as torch.compile's compiler does.
bool frames_are_intercepted() {
    return _PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) != _PyEval_EvalFrameDefault;
}

/// mapping[key], borrowed; null if the key is not there.
PyObject* lookup(PyObject* mapping, PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(mapping, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

/// mapping[key] as `lookup` finds it, by the key's hash.
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

/// Adds those of the options' states.
void add_extras(std::vector<PyObject*>& keys) {
    keys.resize(max_states);
    for (const StateSpec& spec : extra_states) keys.push_back(interned(spec.key));
}

/// The position among all parameters of each group's first one, up to the first group without a list of parameters.
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

/// The groups as a list. torch takes any sequence.
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

void TorchPlan::set_averaged(std::shared_ptr<AveragedSteps> averaged) {
    averaged_ = std::move(averaged);
    state_keys_ = state_keys(rule_);
    if (averaged_) add_extras(state_keys_);
    cache_.reset();
}

void TorchPlan::name_extras(Cache& cache) {
    if (state_keys_.size() == max_slots) return;
    add_extras(state_keys_);
    cache.parameters.clear();
    cache.states.clear();
}

/// Takes the plan's cache and gives it back.
class TorchPlan::Lease {
  public:
    explicit Lease(TorchPlan& plan) : plan_(plan), cache_(std::move(plan.cache_)) {
        if (!cache_) cache_ = std::make_unique<Cache>();
    }
    ~Lease() {
        cache_->held.release();
        plan_.cache_ = std::move(cache_);
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    Cache& operator*() const { return *cache_; }

  private:
    TorchPlan& plan_;
    std::unique_ptr<Cache> cache_;
};

void TorchPlan::References::release() {
    // Deallocation may run Python code: the list is consistent before each one.
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

    /// Finds state[parameter], whose items `item` then gives. Returns false if state[parameter] is no dict. The entry
    /// behind the last one found is tried first, since the state mostly has the parameters' order.
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

    /// state[parameter][key], borrowed; null if the key is not there. The entry behind the last one is tried first.
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

/// Shapes and strides of a parameter, its gradient and its states, where torch does not lend them.
using Layouts = std::array<std::vector<std::int64_t>, 2 + max_slots>;

/// Reads the tensors of an item of `run_prepared` or `run_items`. Returns false if one cannot be read.
bool view_item(const TorchReader& reader, const py::object& parameter, const py::object& grad, const py::tuple& states,
               TorchOperands& operands, Layouts& layouts) {
    operands.states_are_read = true;
    if (!reader.view(parameter.ptr(), operands.param, layouts[0]) ||
        !reader.view(grad.ptr(), operands.grad, layouts[1])) {
        return false;
    }
    for (std::size_t state = 0; state < states.size(); ++state) {
        const py::object tensor = states[state];
        if (tensor.is_none()) continue;
        operands.in_use |= 1u << state;
        if (!reader.view(tensor.ptr(), operands.states[state], layouts[2 + state])) return false;
    }
    return true;
}

}  // namespace

/// What Python code has prepared: see `run_prepared`.
struct TorchPlan::Prepared {
    std::vector<std::size_t> left_out;  // positions, sorted
    bool everything_left_out = false;   // whatever the groups are
    /// By position, sorted: the states, and whether the step is the first one.
    std::vector<std::tuple<std::size_t, py::tuple, bool>> new_states;

    // Items that step, and items that are apart. An item's position is its index.
    TorchListing listing, apart;
    std::vector<std::uint8_t*> pending;
    std::vector<bool> is_apart, overlaps;
    std::vector<Claim> claims;  // by index

    // How far the scan has come in `left_out` and `new_states`.
    std::size_t next_left_out = 0, next_new = 0;

    /// True if the parameter at this position is left out. Positions must come in order.
    bool leaves_out(std::size_t position) {
        if (next_left_out >= left_out.size() || left_out[next_left_out] != position) return false;
        ++next_left_out;
        return true;
    }
    /// The new states of the parameter at this position, borrowed, or null. Positions must come in order.
    PyObject* new_states_at(std::size_t position) {
        while (next_new < new_states.size() && std::get<0>(new_states[next_new]) < position) ++next_new;
        const bool found = next_new < new_states.size() && std::get<0>(new_states[next_new]) == position;
        return found ? std::get<1>(new_states[next_new]).ptr() : nullptr;
    }
    /// Whether the step of the parameter that `new_states_at` has found is its first.
    bool is_first_step() const { return std::get<2>(new_states[next_new]); }
    void read_items(const TorchReader& reader, const py::list& items);
};

void TorchPlan::Prepared::read_items(const TorchReader& reader, const py::list& items) {
    overlaps.resize(items.size());
    Layouts layouts;
    listing.start();
    apart.start();
    for (std::size_t i = 0; i < items.size(); ++i) {
        const auto [parameter, grad, states, group, first_step, flags, memory, stands_apart] = py::cast<
            std::tuple<py::object, py::object, py::tuple, std::uint32_t, bool, std::uintptr_t, py::object, bool>>(
            items[i]);
        is_apart.push_back(stands_apart);
        TorchOperands operands;
        const bool listed = view_item(reader, parameter, grad, states, operands, layouts) &&
                            (stands_apart ? apart : listing).add(reader, i, grad.ptr(), operands, group, first_step) ==
                                TorchListing::Answer::listed;
        if (!listed) {
            overlaps[i] = !stands_apart;  // Python code refuses the item with a message that names it
            continue;
        }
        if (!stands_apart) pending.push_back(pointer_of<std::uint8_t>(flags));
        if (memory.is_none()) continue;
        for (const py::handle range : memory) {
            const auto [address, bytes, written] = py::cast<std::tuple<std::uintptr_t, std::uintptr_t, bool>>(range);
            claims.push_back({{address, address + bytes}, i, written});
        }
    }
    // An item without a list of its memory stands for the memory of its tensors.
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

/// One scan over the parameters, which lists them one after the other.
struct TorchPlan::Scan {
    Cache& cache;
    States states;
    const bool zero_grad;
    Prepared* const prepared;
    bool dry_run = false;      // lists nothing
    std::size_t position = 0;  // of the parameter among all
    std::uint32_t group = 0;
    std::uint32_t states_in_use = 0;  // of the group: bit s is state s
    TorchOperands operands = {};
    Layouts layouts = {};
    std::size_t group_start = 0;  // the position of the group's first parameter
    /// What is found beside dense regular parameters. Most scans find nothing, so it is made when first needed.
    struct Findings {
        std::vector<Place> irregular, lacking_states, overlapping, left_out;
        TorchRows rows;
        std::vector<Place> rows_of;  // of the parameters in `rows`
    };
    std::unique_ptr<Findings> found = {};

    Findings& findings() {
        if (!found) found = std::make_unique<Findings>();
        return *found;
    }
    Place place() const { return {position, group, position - group_start}; }
    bool is_complete() const {
        return !found || (found->irregular.empty() && found->lacking_states.empty() && found->overlapping.empty());
    }
    void add_overlapping(const py::list& param_groups, const std::vector<std::size_t>& indices) {
        const std::vector<std::size_t> starts = starts_of(param_groups);
        for (const std::size_t index : indices) {
            const std::size_t of = cache.listing.position(index), in_group = cache.listing.tensors()[index].hyper;
            findings().overlapping.push_back({of, in_group, of - starts[in_group]});
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
        for (std::size_t i = 0; prepared != nullptr && i < prepared->overlaps.size(); ++i) {
            if (prepared->overlaps[i]) items.append(i);
        }
        const Findings& all = findings();
        return py::make_tuple(places(all.irregular), places(all.lacking_states), places(all.overlapping), items,
                              clearable);
    }
};

py::object TorchPlan::run(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                          const py::object& scaling) {
    return attempt(groups, state, zero_grad, grad_factor, scaling, nullptr);
}

py::object TorchPlan::run_unobserved(const py::object& groups, const py::object& state, bool zero_grad) {
    if (in_backward || observers.any() || reader_.profiler_is_enabled()) return py::none();
    py::object result = attempt(groups, state, zero_grad, 1.0, py::none(), nullptr);
    return result.is_none() ? py::bool_(true) : result;
}

StepOptions TorchPlan::step_options(double grad_factor) const {
    StepOptions options{.rule = rule_, .grad_factor = grad_factor};
    if (clipping) clipping->apply_to(options);
    if (averaged_) averaged_->apply_to(options);
    return options;
}

DeviceCallbacks TorchPlan::callbacks(std::span<const TensorRef> tensors, const py::object& scaling) const {
    DeviceCallbacks callbacks{.stream = reader_.current_stream(), .scaling = scaling};
    if (asks_for_norm()) {
        if (const int device = Clipping::device_of(tensors); device != cpu_device) {
            callbacks.norm = clipping->result_on(device);
        }
    }
    return callbacks;
}

bool TorchPlan::measure(Scan& scan, const py::list& param_groups, StepOptions& options, const py::object& scaling) {
    const Cache& cache = scan.cache;
    const TorchListing& listing = cache.listing;
    std::int64_t elements = listing.elements();
    std::span<const TensorRef> tensors = listing.tensors();
    // Mostly all gradients are in the listing.
    std::vector<TensorRef> all;
    if (scan.prepared != nullptr || scan.found) {
        all.assign(tensors.begin(), tensors.end());
        const auto add = [&](std::span<const TensorRef> more, std::int64_t count) {
            all.insert(all.end(), more.begin(), more.end());
            elements += count;
        };
        if (scan.found) add(scan.found->rows.tensors(), scan.found->rows.elements());
        if (scan.prepared != nullptr) {
            for (const TorchListing* each : {&scan.prepared->listing, &scan.prepared->apart}) {
                add(each->tensors(), each->elements());
            }
        }
        tensors = all;
    }
    if (Clipping::device_of(tensors) != cpu_device) {
        clipping->require_uncounted(averaged_ != nullptr || rules()[static_cast<std::size_t>(rule_)].counts);
        // With the listing's flags the step's tables are those of the search for the norm.
        std::vector<TensorRef> listed(tensors.begin(), tensors.end());
        const std::vector<std::uint8_t*> pending = pending_of(cache);
        for (std::size_t i = 0; i < pending.size(); ++i) listed[i].pending = pending[i];
        const bool zero_grad = std::exchange(options.zero_grad, false);
        device_steps_.find_norm(listed, param_groups, cache.hypers, options, callbacks(listed, scaling),
                                clipping->norm_options());
        options.zero_grad = zero_grad;
        return true;
    }
    if (!scaling.is_none()) {  // the step waits for the numbers, too
        bool left_out = false;
        std::tie(left_out, options.grad_factor) =
            py::cast<std::pair<bool, double>>(call(scaling, py::make_tuple(cpu_device)));
        if (left_out) return true;  // by the step
    }
    if (clipping->measure(tensors, elements, cache.hypers.all(), options)) return true;
    if (options.zero_grad) cpu::clear_grads(listing.tensors());
    return false;
}

py::object TorchPlan::run_prepared(const py::object& groups, const py::object& state, bool zero_grad,
                                   double grad_factor, const py::object& scaling, const py::object& left_out,
                                   const py::list& new_states, const py::list& items) {
    Prepared prepared;
    prepared.everything_left_out = left_out.is_none();
    if (!left_out.is_none()) {
        for (const py::handle position : left_out) prepared.left_out.push_back(py::cast<std::size_t>(position));
    }
    for (const py::handle each : new_states) {
        prepared.new_states.push_back(py::cast<std::tuple<std::size_t, py::tuple, bool>>(each));
    }
    prepared.read_items(reader_, items);
    return attempt(groups, state, zero_grad, grad_factor, scaling, &prepared);
}

py::object TorchPlan::attempt(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                              const py::object& scaling, Prepared* prepared) {
    if (frames_are_intercepted()) call(reader_.refuse_fullgraph());
    const py::list param_groups = list_of(groups);
    const Lease lease(*this);
    Cache& cache = *lease;
    const bool complete = std::exchange(cache.complete, false);
    if (averaged_) averaged_->require_parameters();
    cache.extras = averaged_ ? averaged_->extras() : 0;
    cache.averages.clear();
    cache.hypers.read(rule_, param_groups);
    cache.hypers.require_steps(rule_);
    if (cache.hypers.may_have_precisions()) name_extras(cache);
    const bool everything_left_out = prepared != nullptr && prepared->everything_left_out;
    if (!everything_left_out && !PyDict_Check(state.ptr())) return py::bool_(false);
    Scan scan{cache, States(state.ptr()), zero_grad, prepared};
    if (prepared == nullptr && complete && is_still_irregular(scan, param_groups)) {
        cache.complete = true;
        return scan.report(true);
    }
    cache.listing.start();
    // If the last step was not completed here, Python code may have given parameters other states.
    if (!complete) std::ranges::fill(cache.states, CachedTensor());
    if (!everything_left_out && !list(scan, param_groups)) return py::bool_(false);
    TorchListing& listing = cache.listing;
    listing.finish();
    cache.complete = true;
    const std::vector<std::size_t>& overlapping = listing.overlapping();
    const bool in_sequence = !overlapping.empty() && !zero_grad && scaling.is_none() &&
                             cache.hypers.on_device().empty() && listing.can_step_in_sequence();
    if (find_overlaps(scan, param_groups) || !scan.is_complete() || (!overlapping.empty() && !in_sequence)) {
        scan.add_overlapping(param_groups, overlapping);
        return scan.report(true);
    }
    if (zero_grad && !listing.can_clear()) return scan.report(false);

    if (cache.hypers.may_have_precisions()) set_roundings(cache, state.ptr());
    StepOptions options = step_options(grad_factor);
    options.zero_grad = zero_grad;
    if (asks_for_norm() && !measure(scan, param_groups, options, scaling)) {
        if (zero_grad) increment_versions(cache.held, false, false, true);
        return py::none();
    }
    options.zero_grad = false;
    if (prepared != nullptr && !prepared->listing.tensors().empty()) {
        update(cache, prepared->listing.tensors(), prepared->listing.elements(), prepared->listing.on_device(),
               param_groups, options, scaling, prepared->pending);
    }
    if (scan.found && !scan.found->rows.tensors().empty()) {
        update(cache, scan.found->rows.tensors(), scan.found->rows.elements(), false, param_groups, options, scaling,
               {});
    }
    if (in_sequence) {
        step_in_sequence(cache, options);
    } else {
        // The last update: it may clear gradients that the others read.
        StepOptions last = options;
        last.zero_grad = zero_grad;
        update(cache, listing.tensors(), listing.elements(), listing.on_device(), param_groups, last, scaling,
               pending_of(cache));
    }
    if (!cache.averages.empty()) move_averages(cache, param_groups, options, scaling);
    if (averaged_) ++averaged_->taken;
    if (!cache.roundings.empty()) count_steps(cache, state.ptr());
    increment_versions(cache.held, true, state_exposed, zero_grad);
    const bool any_apart =
        prepared != nullptr && std::ranges::find(prepared->is_apart, true) != prepared->is_apart.end();
    cache.irregular.clear();
    if (scan.found && !any_apart && !everything_left_out) {
        std::swap(cache.irregular, scan.found->left_out);
        cache.group_starts = starts_of(param_groups);
    }
    if (prepared == nullptr) cache.hypers.finish_step(rule_, param_groups);
    return py::bool_(true);
}

void TorchPlan::finish_step(const py::object& groups) {
    const py::list param_groups = list_of(groups);
    const Lease lease(*this);
    (*lease).hypers.read(rule_, param_groups);
    (*lease).hypers.finish_step(rule_, param_groups);
}

bool TorchPlan::is_still_irregular(Scan& scan, const py::list& param_groups) {
    Cache& cache = scan.cache;
    if (cache.irregular.empty() || cache.group_starts.size() != cache.hypers.size()) return false;
    if (cache.group_starts != starts_of(param_groups)) return false;
    scan.dry_run = true;
    bool found = true;
    for (const Place& place : cache.irregular) {
        const py::object group = py::reinterpret_borrow<py::object>(group_at(param_groups, place.group));
        const py::object params =
            py::reinterpret_borrow<py::object>(group_item(group.ptr(), params_key(), place.group));
        if (!PyList_Check(params.ptr()) || static_cast<std::size_t>(PyList_GET_SIZE(params.ptr())) <= place.index) {
            found = false;
            break;
        }
        scan.position = place.position;
        scan.group = static_cast<std::uint32_t>(place.group);
        scan.group_start = place.position - place.index;
        scan.states_in_use = cache.hypers[place.group].states | cache.extras;
        const std::size_t counts[] = {cache.held.params.size(), cache.held.grads.size(), cache.held.states.size()};
        PyObject* const parameter = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(place.index));
        found = list_parameter(scan, parameter, group.ptr()) == Outcome::irregular;
        leave_out(scan, Outcome::irregular, counts);
        if (!found) break;
    }
    scan.dry_run = false;
    scan.position = 0;
    if (!found) scan.found.reset();
    return found;
}

void TorchPlan::step_in_sequence(Cache& cache, const StepOptions& options) const {
    const std::span<const TensorRef> tensors = cache.listing.tensors();
    const std::vector<std::size_t>& overlapping = cache.listing.overlapping();
    std::vector<TensorRef> others;
    std::int64_t elements = 0;
    auto next = overlapping.begin();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (next != overlapping.end() && *next == i) {
            ++next;
            continue;
        }
        others.push_back(tensors[i]);
        elements += tensors[i].size;
    }
    step_on_cpu(others, elements, cache.hypers.all(), options);
    for (const std::size_t index : overlapping) {
        TensorRef tensor = tensors[index];
        if (tensor.has_average()) {
            TensorRef& average = cache.averages.emplace_back(tensor);
            average.grad = nullptr;
            average.grad_axes = {};
            tensor.states[average_slot] = nullptr;
        }
        std::vector<std::byte> copy;
        if (cache.listing.is_own_gradient(index)) {
            copy.assign(tensor.grad,
                        tensor.grad + tensor.size * static_cast<std::int64_t>(item_size(tensor.grad_dtype)));
            tensor.grad = copy.data();
        }
        step_on_cpu({&tensor, 1}, tensor.size, cache.hypers.all(), options);
    }
}

bool TorchPlan::find_overlaps(Scan& scan, const py::list& param_groups) const {
    Prepared* const prepared = scan.prepared;
    const std::size_t row_count = scan.found ? scan.found->rows.count() : 0;
    if (prepared == nullptr && row_count == 0) return false;
    const TorchListing& listing = scan.cache.listing;
    std::vector<Claim> claims = scan.findings().rows.claims();
    std::vector<bool> marked(row_count + (prepared == nullptr ? 0 : prepared->overlaps.size()));
    if (prepared != nullptr) {
        for (Claim claim : prepared->claims) {
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
        scan.add_overlapping(param_groups, indices);
        found = !indices.empty();
    }
    for (std::size_t i = 0; i < row_count; ++i) {
        if (!marked[i]) continue;
        scan.findings().irregular.push_back(scan.findings().rows_of[i]);
        found = true;
    }
    for (std::size_t i = row_count; i < marked.size(); ++i) {
        const std::size_t item = i - row_count;
        if (marked[i] && !prepared->is_apart[item]) prepared->overlaps[item] = true;
        found |= prepared->overlaps[item];
    }
    return found;
}

void TorchPlan::increment_versions(const References& held, bool with_params, bool with_states, bool with_grads) const {
    const std::pair<const std::vector<PyObject*>&, bool> parts[] = {
        {held.params, with_params}, {held.states, with_states}, {held.grads, with_grads}};
    const auto bump = [&](const auto& part) { return !part.second || reader_.bump_versions(part.first); };
    if (std::ranges::all_of(parts, bump)) return;
    py::list tensors;
    for (const auto& [references, is_changed] : parts) {
        if (!is_changed) continue;
        for (PyObject* tensor : references) tensors.append(py::handle(tensor));
    }
    if (!tensors.empty()) reader_.increment_versions(tensors);
}

bool TorchPlan::list(Scan& scan, const py::list& param_groups) {
    static PyObject* const differentiable_key = interned("differentiable");
    for (std::size_t index = 0; index < scan.cache.hypers.size(); ++index) {
        // Reading hyperparameters and tensors may run Python code, which may change the lists.
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
        scan.states_in_use = scan.cache.hypers[index].states | scan.cache.extras;
        scan.group = static_cast<std::uint32_t>(index);
        scan.group_start = scan.position;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i, ++scan.position) {
            if (scan.prepared != nullptr && scan.prepared->leaves_out(scan.position)) {
                scan.findings().left_out.push_back(scan.place());
                continue;
            }
            const std::size_t counts[] = {scan.cache.held.params.size(), scan.cache.held.grads.size(),
                                          scan.cache.held.states.size()};
            const Outcome outcome = list_parameter(scan, PyList_GET_ITEM(params.ptr(), i), group.ptr());
            if (outcome != Outcome::done) leave_out(scan, outcome, counts);
        }
    }
    return true;
}

void TorchPlan::leave_out(Scan& scan, Outcome outcome, const std::size_t (&counts)[3]) {
    if (scan.position < scan.cache.parameters.size()) {
        std::fill_n(cached_states(scan.cache, scan.position), state_count(), CachedTensor());
    }
    Scan::Findings& findings = scan.findings();
    (outcome == Outcome::irregular ? findings.irregular : findings.lacking_states).push_back(scan.place());
    std::vector<PyObject*>* const all[] = {&scan.cache.held.params, &scan.cache.held.grads, &scan.cache.held.states};
    for (std::size_t i = 0; i < std::size(all); ++i) {
        while (all[i]->size() > counts[i]) {
            PyObject* const reference = all[i]->back();
            all[i]->pop_back();
            Py_DECREF(reference);
        }
    }
}

TorchPlan::Outcome TorchPlan::list_parameter(Scan& scan, PyObject* parameter, PyObject* group) {
    Cache& cache = scan.cache;
    cache.listing.prefetch();
    const TensorKind kind = reader_.kind(parameter);
    if (kind == TensorKind::other) return Outcome::irregular;
    cache.held.params.push_back(Py_NewRef(parameter));
    PyObject* const grad = reader_.grad(parameter, kind);
    scan.operands.in_use = scan.states_in_use;
    if (grad == Py_None && cache.extras != 0) {
        Py_DECREF(grad);
        return list_average(scan, parameter, kind);
    }
    if (grad == Py_None) {
        cache.held.params.pop_back();
        Py_DECREF(parameter);
        Py_DECREF(grad);
        return Outcome::done;
    }
    cache.held.grads.push_back(grad);
    // Clearing such a gradient also detaches it from the graph that computed it, which Python code does.
    if (scan.zero_grad && reader_.requires_grad(grad)) return Outcome::irregular;
    CachedParameter& cached = cached_parameter(cache, scan.position, parameter);
    if (!read(parameter, kind, cache.held, cached.tensor, scan.operands.param, scan.layouts[0]))
        return Outcome::irregular;
    if (kind == TensorKind::plain && reader_.is_tensor(grad)) {
        if (reader_.view_grad(grad, cached.grad, scan.operands.grad, scan.layouts[1]))
            return list_dense(scan, parameter, grad, kind);
        return reader_.is_sparse_coo(grad) ? list_rows(scan, parameter, grad, group) : Outcome::irregular;
    }
    // The norm of a DTensor needs all of its parts, which Python code says.
    if (kind != TensorKind::distributed || asks_for_norm() || Py_TYPE(grad) != Py_TYPE(parameter) ||
        !pending_.empty()) {
        return Outcome::irregular;
    }
    PyObject* const part = reader_.local_part(grad);
    if (part == nullptr) return Outcome::irregular;
    cache.held.parts.push_back(part);
    if (!reader_.placed_alike(parameter, grad) ||
        !reader_.view_grad(part, cached.grad, scan.operands.grad, scan.layouts[1])) {
        return Outcome::irregular;
    }
    return list_dense(scan, parameter, part, kind);
}

TorchPlan::CachedParameter& TorchPlan::cached_parameter(Cache& cache, std::size_t position, PyObject* parameter) {
    if (position >= cache.parameters.size()) {
        cache.parameters.resize(position + 1);
        cache.states.resize(cache.parameters.size() * state_count());
    }
    CachedParameter& cached = cache.parameters[position];
    if (cached.object != parameter) {
        cached = CachedParameter();
        std::fill_n(cached_states(cache, position), state_count(), CachedTensor());
        cached.object = parameter;
        cached.hash = unless_python_ends([&] { return PyObject_Hash(parameter); });
        if (cached.hash == -1) throw py::error_already_set();
    }
    return cached;
}

TorchPlan::Outcome TorchPlan::list_average(Scan& scan, PyObject* parameter, TensorKind kind) {
    Cache& cache = scan.cache;
    TorchOperands& operands = scan.operands;
    CachedParameter& cached = cached_parameter(cache, scan.position, parameter);
    operands.in_use = cache.extras;
    if (!read(parameter, kind, cache.held, cached.tensor, operands.param, scan.layouts[0]) ||
        read_states(scan, parameter, kind) != Outcome::done) {
        return Outcome::irregular;
    }
    const std::optional<TensorRef> average = average_of(operands, scan.group);
    if (!average) return Outcome::irregular;
    if (!scan.dry_run) cache.averages.push_back(*average);
    return Outcome::done;
}

void TorchPlan::require_fitting(const Scan& scan, TensorKind kind) const {
    const Precision precision = scan.cache.hypers[scan.group].precision;
    const DType dtype = scan.operands.param.dtype;
    const std::string start = "precision: " + std::string(precision_name(precision)) + " is ";
    const std::string label = "param_groups[" + std::to_string(scan.group) + "]['params'][" +
                              std::to_string(scan.position - scan.group_start) + "] is ";
    if (!fits(precision, dtype)) {
        throw py::type_error(start + "for " + (precision == Precision::split ? "bfloat16" : "bfloat16 and float16") +
                             ", and " + label + "of " + dtype_name(dtype));
    }
    if (precision == Precision::stochastic && kind == TensorKind::distributed) {
        throw py::type_error(start + "for whole tensors, and " + label + "a DTensor");
    }
}

void TorchPlan::set_roundings(Cache& cache, PyObject* state) const {
    const std::span<const TensorRef> tensors = cache.listing.tensors();
    const auto is_stochastic = [&](const TensorRef& tensor) {
        return cache.hypers[tensor.hyper].precision == Precision::stochastic;
    };
    cache.roundings.clear();
    if (std::ranges::none_of(tensors, is_stochastic)) return;
    cache.roundings.resize(tensors.size());
    cache.index_axes.resize(tensors.size());
    States states(state);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (!is_stochastic(tensors[i])) continue;
        const std::size_t position = cache.listing.position(i);
        const CachedParameter& parameter = cache.parameters[position];
        Rounding& rounding = cache.roundings[i];
        rounding.position = position;
        PyObject* const taken = states.find(static_cast<PyObject*>(parameter.object), parameter.hash)
                                    ? states.item(interned(steps_taken_key))
                                    : nullptr;
        if (taken != nullptr) {
            rounding.steps = PyLong_Check(taken) ? PyLong_AsUnsignedLongLong(taken) : 0;
            if (PyErr_Occurred() || !PyLong_Check(taken)) {
                PyErr_Clear();
                throw py::type_error("the " + std::string(steps_taken_key) + " of parameter " +
                                     std::to_string(position) + ": expected an integer from 0 on, got " +
                                     repr_text(taken));
            }
        }
        cache.listing.index_axes(i, cache.index_axes[i]);
        rounding.axes = cache.index_axes[i];
        cache.listing.set_rounding(i, &rounding);
    }
}

void TorchPlan::count_steps(const Cache& cache, PyObject* state) const {
    for (std::size_t i = 0; i < cache.roundings.size(); ++i) {
        const TensorRef& tensor = cache.listing.tensors()[i];
        if (cache.hypers[tensor.hyper].precision != Precision::stochastic) continue;
        const CachedParameter& parameter = cache.parameters[cache.listing.position(i)];
        auto* const key = static_cast<PyObject*>(parameter.object);
        PyObject* const found = lookup_hashed(state, key, parameter.hash);
        const py::object values = found == nullptr ? py::object(py::dict()) : py::reinterpret_borrow<py::object>(found);
        const py::int_ taken(cache.roundings[i].steps + 1);
        if ((found == nullptr && PyDict_SetItem(state, key, values.ptr()) != 0) ||
            PyDict_SetItem(values.ptr(), interned(steps_taken_key), taken.ptr()) != 0) {
            throw py::error_already_set();
        }
    }
}

TorchPlan::Outcome TorchPlan::list_dense(Scan& scan, PyObject* parameter, PyObject* grad, TensorKind kind) {
    Cache& cache = scan.cache;
    TorchOperands& operands = scan.operands;
    if (cache.hypers[scan.group].precision != Precision::plain) require_fitting(scan, kind);
    operands.states_are_read = false;
    bool first_step = false;
    Outcome states = Outcome::done;
    if (operands.in_use != 0) {
        PyObject* const fresh = scan.prepared == nullptr ? nullptr : scan.prepared->new_states_at(scan.position);
        if (fresh != nullptr) {
            first_step = scan.prepared->is_first_step();
            operands.in_use &= ~cache.extras;
            states = read_new_states(scan, fresh, kind);
        } else if (state_exposed || !hold_cached_states(scan)) {
            states = read_states(scan, parameter, kind);
        }
    }
    if (states == Outcome::irregular) return Outcome::irregular;
    if (states == Outcome::lacks_states)
        return cache.listing.takes(reader_, grad, operands) ? Outcome::lacks_states : Outcome::irregular;
    if (scan.dry_run) return cache.listing.takes(reader_, grad, operands) ? Outcome::done : Outcome::irregular;
    using Answer = TorchListing::Answer;
    const auto add = [&] { return cache.listing.add(reader_, scan.position, grad, operands, scan.group, first_step); };
    Answer answer = add();
    if (answer == Answer::read_states) {
        answer = read_states(scan, parameter, kind) == Outcome::done ? add() : Answer::refused;
    }
    return answer == Answer::listed ? Outcome::done : Outcome::irregular;
}

TorchPlan::Outcome TorchPlan::list_rows(Scan& scan, PyObject* parameter, PyObject* grad, PyObject* group) {
    static PyObject* const mode_key = interned("sparse_mode");
    Cache& cache = scan.cache;
    if (scan.zero_grad || !cache.hypers.on_device().empty()) return Outcome::irregular;
    if (cache.hypers[scan.group].precision != Precision::plain) return Outcome::irregular;
    PyObject* const mode = lookup(group, mode_key);
    const bool lazy = mode != nullptr && PyUnicode_Check(mode) && PyUnicode_CompareWithASCIIString(mode, "lazy") == 0;
    const bool rows_only = lazy || cache.hypers[scan.group].skips_zero_grads;
    bool first_step = false, averages = false;
    Outcome found = Outcome::done;
    if (scan.operands.in_use != 0) {
        PyObject* const fresh = scan.prepared == nullptr ? nullptr : scan.prepared->new_states_at(scan.position);
        if (fresh != nullptr) scan.operands.in_use &= ~cache.extras;
        found = fresh == nullptr ? read_states(scan, parameter, TensorKind::plain)
                                 : read_new_states(scan, fresh, TensorKind::plain);
        first_step = fresh != nullptr && scan.prepared->is_first_step();
        averages = fresh == nullptr && cache.extras != 0;
    }
    if (found == Outcome::irregular) return Outcome::irregular;
    IndexView indices;
    std::array<py::object, 2> parts;
    const bool is_read = reader_.sparse_view(grad, indices, scan.operands.grad, parts);
    for (py::object& part : parts) {
        if (part) cache.held.parts.push_back(part.release().ptr());
    }
    TorchOperands operands = scan.operands;
    operands.in_use = found == Outcome::lacks_states ? 0 : operands.in_use & ~cache.extras;
    if (!is_read || !scan.findings().rows.add(operands, indices, scan.group, first_step,
                                              rows_only ? TorchRows::Others::stay : TorchRows::Others::have_zeros)) {
        return Outcome::irregular;
    }
    scan.findings().rows_of.push_back(scan.place());
    if (averages && found == Outcome::done) {
        const std::optional<TensorRef> average = average_of(scan.operands, scan.group);
        if (!average) return Outcome::irregular;
        cache.averages.push_back(*average);
    }
    return found;
}

bool TorchPlan::hold_cached_states(Scan& scan) {
    // The cached states are alive: the optimizer's state refers to them, and nobody can have changed it.
    const CachedTensor* const cached = cached_states(scan.cache, scan.position);
    bool all = true;
    scan.operands.for_each_state([&](int state) { all = all && cached[state].identity.object != nullptr; });
    if (!all) return false;
    scan.operands.for_each_state(
        [&](int state) { scan.cache.held.states.push_back(Py_NewRef(cached[state].identity.object)); });
    return true;
}

TorchPlan::Outcome TorchPlan::read_new_states(Scan& scan, PyObject* new_states, TensorKind kind) {
    scan.operands.states_are_read = true;
    bool is_read = true;
    scan.operands.for_each_state([&](int state) {
        if (!is_read) return;
        // The next step finds the tensor in the state, if this step comes to its end.
        CachedTensor uncached;
        PyObject* const tensor = PyTuple_GET_ITEM(new_states, state);
        scan.cache.held.states.push_back(Py_NewRef(tensor));
        is_read = read(tensor, kind, scan.cache.held, uncached, scan.operands.states[state],
                       scan.layouts[2 + static_cast<std::size_t>(state)], state == master_low_slot);
    });
    return is_read ? Outcome::done : Outcome::irregular;
}

TorchPlan::Outcome TorchPlan::read_states(Scan& scan, PyObject* parameter, TensorKind kind) {
    CachedTensor* const cached = cached_states(scan.cache, scan.position);
    Outcome outcome = Outcome::done;
    if (!scan.states.find(parameter, scan.cache.parameters[scan.position].hash)) outcome = Outcome::irregular;
    scan.operands.states_are_read = true;
    scan.operands.for_each_state([&](int state) {
        if (outcome == Outcome::irregular) return;
        PyObject* const tensor = scan.states.item(state_keys_[static_cast<std::size_t>(state)]);
        if (tensor == nullptr || tensor == Py_None) {
            outcome = Outcome::lacks_states;
            return;
        }
        const bool is_usual =
            kind == TensorKind::plain ? reader_.is_tensor(tensor) : Py_TYPE(tensor) == Py_TYPE(parameter);
        if (is_usual) scan.cache.held.states.push_back(Py_NewRef(tensor));
        if (!is_usual || !read(tensor, kind, scan.cache.held, cached[state], scan.operands.states[state],
                               scan.layouts[2 + static_cast<std::size_t>(state)], state == master_low_slot)) {
            outcome = Outcome::irregular;
        }
    });
    if (outcome != Outcome::done) std::fill_n(cached, state_count(), CachedTensor());
    return outcome;
}

bool TorchPlan::read(PyObject* tensor, TensorKind kind, References& held, CachedTensor& cached, TorchView& view,
                     std::vector<std::int64_t>& layout, bool integers) const {
    if (kind == TensorKind::distributed) {
        tensor = reader_.local_part(tensor);
        if (tensor == nullptr) return false;
        held.parts.push_back(tensor);
    }
    const TensorIdentity identity = reader_.identity(tensor);
    if (integers) {
        cached = CachedTensor();
        if (!reader_.view_integers(tensor, view, layout)) return false;
        cached = {identity, view.data};
        return true;
    }
    const bool again = cached.identity == identity;
    if (!(again ? reader_.view_again(tensor, view, layout) : reader_.view(tensor, view, layout))) {
        cached = CachedTensor();
        return false;
    }
    // A negated tensor of one element has no gaps that its strides would show (see TorchListing::append).
    if (again && cached.data == view.data && size_of(view) != 1) return true;
    cached = {identity, view.data};
    return !reader_.is_negated(tensor);
}

std::vector<std::uint8_t*> TorchPlan::pending_of(const Cache& cache) const {
    std::vector<std::uint8_t*> pending;
    if (pending_.empty()) return pending;
    for (std::size_t i = 0; i < cache.listing.tensors().size(); ++i) {
        const std::uint32_t in_use = cache.hypers[cache.listing.tensors()[i].hyper].states;
        const std::size_t first = cache.listing.position(i) * state_count() + std::countr_zero(in_use);
        const auto found = in_use == 0 ? pending_.end() : pending_.find(cache.states[first].identity.object);
        pending.push_back(found == pending_.end() ? nullptr : found->second.second);
    }
    return pending;
}

void TorchPlan::move_averages(const Cache& cache, const py::list& param_groups, const StepOptions& options,
                              const py::object& scaling) {
    std::int64_t elements = 0;
    bool on_device = false;
    for (const TensorRef& tensor : cache.averages) {
        elements += tensor.size;
        on_device = on_device || tensor.device != cpu_device;
    }
    update(cache, cache.averages, elements, on_device, param_groups, options, scaling, {});
}

void TorchPlan::set_pending(const py::list& flags) {
    std::map<PyObject*, std::pair<py::object, std::uint8_t*>> pending;
    for (const py::handle each : flags) {
        const auto [state, address] = py::cast<std::pair<py::object, std::uintptr_t>>(each);
        pending[state.ptr()] = {state, pointer_of<std::uint8_t>(address)};
    }
    std::swap(pending_, pending);
}

void TorchPlan::update(const Cache& cache, std::span<const TensorRef> work, std::int64_t elements, bool on_device,
                       const py::list& param_groups, const StepOptions& options, const py::object& scaling,
                       const std::vector<std::uint8_t*>& pending) {
    // A step on the CPU has to wait for hyperparameters on a device.
    if (on_device || !cache.hypers.on_device().empty() || !scaling.is_none()) {
        std::vector<TensorRef> tensors(work.begin(), work.end());
        for (std::size_t i = 0; i < pending.size(); ++i) tensors[i].pending = pending[i];
        device_steps_.step(tensors, param_groups, cache.hypers, options, callbacks(tensors, scaling));
    } else {
        step_on_cpu(work, elements, cache.hypers.all(), options);
    }
}

bool TorchPlan::run_items(const py::object& groups, const py::list& items, double grad_factor, bool dry_run,
                          const py::object& scaling) {
    const py::list param_groups = list_of(groups);
    Cache cache;
    std::vector<std::uint8_t*> pending;
    cache.hypers.read(rule_, param_groups);
    Layouts layouts;
    cache.listing.start();
    std::size_t position = 0;
    for (const py::handle item : items) {
        const auto [parameter, grad, states, group, first_step, flags] =
            py::cast<std::tuple<py::object, py::object, py::tuple, std::uint32_t, bool, std::uintptr_t>>(item);
        pending.push_back(pointer_of<std::uint8_t>(flags));
        TorchOperands operands;
        if (!view_item(reader_, parameter, grad, states, operands, layouts) ||
            cache.listing.add(reader_, position++, grad.ptr(), operands, group, first_step) !=
                TorchListing::Answer::listed) {
            return false;
        }
    }
    cache.listing.finish();
    if (!cache.listing.overlapping().empty()) return false;
    if (!dry_run) {
        StepOptions options = step_options(grad_factor);
        if (asks_for_norm()) options.clip_factor = clipping->factor;  // the items were in the norm of `run_prepared`
        update(cache, cache.listing.tensors(), cache.listing.elements(), cache.listing.on_device(), param_groups,
               options, scaling, pending);
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
    // Their deallocation may run Python code, which must find them gone.
    const auto pending = std::move(pending_);
    const auto observed_by = std::exchange(observers, Observers());
}

}  // namespace sgdcore::bindings
