// The way of a step from param_groups to the core. The order in `run`: match the groups, read hyperparameters, list the
// tensors, check memory, and only then write.
#include "plan.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "gil.hpp"
#include "hypers.hpp"
#include "python_functions.hpp"
#include "text.hpp"

namespace sgdcore::bindings {
namespace {

/// The arrays of one parameter's update.
struct Operands {
    const ArrayRef& data;
    const ArrayRef* grad;  // null without a gradient
    const StateSlots& slots;
    std::uint32_t in_use;  // the states that take part: bit s is state s
    std::span<const Axis> grad_axes;
    std::uint32_t group;
    bool first_step;
    std::uint8_t new_extras;
    const Rounding* rounding;  // null unless it is stochastic
};

/// True if each array of `next` begins where that of `tensor` ends, and all else is the same: one entry serves both.
bool continues(const TensorRef& tensor, const Operands& next) {
    const auto ends_at = [&](const std::byte* base, DType dtype, const ArrayRef& array) {
        return dtype == array.dtype && base + tensor.size * static_cast<std::int64_t>(item_size(dtype)) == array.data;
    };
    // Separate arrays, the usual case, differ here.
    if (!ends_at(tensor.param, tensor.param_dtype, next.data)) return false;
    const bool grad_continues = next.grad == nullptr
                                    ? tensor.grad == nullptr
                                    : tensor.grad != nullptr && ends_at(tensor.grad, tensor.grad_dtype, *next.grad);
    if (!grad_continues || !tensor.grad_axes.empty() || !next.grad_axes.empty() || tensor.hyper != next.group ||
        tensor.device != next.data.device || tensor.first_step != next.first_step ||
        tensor.new_extras != next.new_extras || next.rounding != nullptr) {
        return false;
    }
    bool all = true;
    for_each_state(next.in_use, [&](int state) {
        all = all && ends_at(tensor.states[state], tensor.state_dtypes[state], next.slots.array(state));
    });
    return all;
}

/// Fills an entry of the work list in place, over the entry of an earlier step. Copying an entry that was just written
/// piece by piece would be slow.
void fill(TensorRef& tensor, const Operands& operands) {
    tensor.param = operands.data.data;
    tensor.grad = operands.grad == nullptr ? nullptr : operands.grad->data;
    tensor.size = operands.data.size;
    tensor.grad_axes = operands.grad_axes;
    tensor.hyper = operands.group;
    tensor.device = operands.data.device;
    tensor.param_dtype = operands.data.dtype;
    if (operands.grad != nullptr) tensor.grad_dtype = operands.grad->dtype;
    tensor.first_step = operands.first_step;
    tensor.new_extras = operands.new_extras;
    tensor.rounding = operands.rounding;
    tensor.states[average_slot] = nullptr;
    for_each_state(operands.in_use, [&](int state) {
        const ArrayRef& array = operands.slots.array(state);
        tensor.states[state] = array.data;
        tensor.state_dtypes[state] = array.dtype;
    });
}

bool is_sequence(const py::object& object) {
    if (py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object)) return true;
    if (py::isinstance<py::str>(object) || PyObject_CheckBuffer(object.ptr())) return false;
    const py::object sequence = attribute_of("collections.abc", "Sequence");
    const int answer = unless_python_ends([&] { return PyObject_IsInstance(object.ptr(), sequence.ptr()); });
    if (answer < 0) throw py::error_already_set();
    return answer != 0;
}

/// A list or tuple as it is; any other sequence as a tuple, since its items come from Python code.
py::sequence as_list(const py::object& grads) {
    if (PyList_CheckExact(grads.ptr()) || PyTuple_CheckExact(grads.ptr())) return py::sequence(grads);
    if (!is_sequence(grads)) {
        throw py::type_error("grads: expected a list, tuple or other sequence of arrays, got " + type_name(grads));
    }
    PyObject* const items = unless_python_ends([&] { return PySequence_Tuple(grads.ptr()); });
    if (items == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::tuple>(items);
}

/// Calls its function when the scope is left, also by an exception.
template <class F>
struct AtExit {
    F function;
    ~AtExit() { function(); }
};
template <class F>
AtExit(F) -> AtExit<F>;

}  // namespace

void Plan::build(const py::list& parameters, const py::list& slots) {
    require_no_step();
    std::vector<Entry> entries;
    for (std::size_t group = 0; group < parameters.size(); ++group) {
        append(entries, group, parameters[group], slots[group]);
    }
    group_count_ = parameters.size();
    std::swap(entries_, entries);  // the old entries are released last: that may run Python code
    stop_relying_on(entries);
    rely_on(entries_);
    outdated_ = false;
    disjoint_grads_checked_ = false;
    writes_.clear();
    start_with(0);
}

void Plan::add_group(const py::list& parameters, const py::list& slots) {
    require_no_step();
    std::vector<Entry> entries;
    append(entries, group_count_, parameters, slots);
    rely_on(entries);
    const std::size_t from = entries_.size();
    entries_.insert(entries_.end(), std::make_move_iterator(entries.begin()), std::make_move_iterator(entries.end()));
    ++group_count_;
    // No gradient has been compared with the group's memory yet.
    for (Entry& entry : entries_) entry.grad_version = entry.parameter->grad_version - 1;
    start_with(from);
}

void Plan::require_no_step() const {
    if (running_.is_inside()) throw std::runtime_error("the optimizer's parameters cannot change while it is stepping");
}

void Plan::append(std::vector<Entry>& entries, std::size_t group, const py::list& parameters, const py::list& slots) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const py::object object = parameters[i];
        py::object slots_object = slots[i];
        auto* states = &py::cast<StateSlots&>(slots_object);
        auto* parameter = &py::cast<Parameter&>(object);
        entries.push_back({std::move(slots_object), states, parameter, object.ptr(), static_cast<std::uint32_t>(group),
                           parameter->data_version, states->version, parameter->grad_version - 1});
    }
}

void Plan::start_with(std::size_t from) {
    missing_.clear();
    used_grads_.assign(entries_.size(), nullptr);
    tensors_.resize(entries_.size());
    tensor_count_ = 0;
    first_steps_.reserve(entries_.size());
    hypers_.reserve(group_count_);
    try {
        collect_writes(from);
    } catch (...) {
        clear();  // a plan that was not checked must match no groups
        throw;
    }
}

bool Plan::is_current(const py::list& param_groups) const {
    return matches(param_groups) && std::ranges::none_of(entries_, [](const Entry& entry) {
               return entry.data_version != entry.parameter->data_version ||
                      entry.states_version != entry.slots->version;
           });
}

bool Plan::matches(const py::list& param_groups) const {
    if (param_groups.size() != group_count_) return false;
    std::size_t next = 0;
    for (std::size_t group = 0; group < group_count_; ++group) {
        PyObject* params = group_item(group_at(param_groups, group), params_key(), group);
        if (!PyList_Check(params)) return false;
        const auto count = static_cast<std::size_t>(PyList_GET_SIZE(params));
        if (next + count > entries_.size()) return false;
        for (std::size_t i = 0; i < count; ++i, ++next) {
            const Entry& entry = entries_[next];
            if (PyList_GET_ITEM(params, static_cast<Py_ssize_t>(i)) != entry.parameter_object || entry.group != group) {
                return false;
            }
        }
    }
    return next == entries_.size();
}

std::optional<std::vector<Plan::Missing>> Plan::missing_states(const py::list& param_groups) const {
    if (!matches(param_groups)) return std::nullopt;
    std::vector<Missing> missing;
    for (const auto& [entry, state] : missing_) {
        missing.push_back({py::reinterpret_borrow<py::object>(entries_[entry].parameter_object),
                           py::reinterpret_borrow<py::object>(group_at(param_groups, entries_[entry].group)), state});
    }
    return missing;
}

void Plan::read_given(const py::object& grads) {
    hold_parameters();
    const py::sequence list = as_list(grads);
    if (list.size() != entries_.size()) {
        throw py::value_error("grads: expected " + std::to_string(entries_.size()) +
                              " gradients, one per parameter, got " + std::to_string(list.size()));
    }
    given_.resize(entries_.size());
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        // Checked access, which takes a reference: reading the previous item may have run code that changed the list.
        const py::object item = list[i];
        if (item.is_none()) continue;
        const Argument argument{"grads", static_cast<std::ptrdiff_t>(i)};
        GivenGrad& given = given_[i];
        given.ref = read_array(item, argument);
        require_same_shape(given.ref, entries_[i].parameter->data(), argument);
        require_same_device(given.ref, entries_[i].parameter->data(), argument);
        axes_in_order_of(given.ref, entries_[i].parameter->data(), given.axes);
    }
}

void Plan::forget_step() {
    for (GivenGrad& given : given_) given.ref = {};
    // Releasing the last reference to a parameter clears the plan. The step no longer needs the plan here.
    held_.clear();
    parameters_held_ = false;
    if (outdated_) clear();
}

void Plan::hold_parameters() {
    if (std::exchange(parameters_held_, true)) return;
    for (const Entry& entry : entries_) held_.push_back(py::reinterpret_borrow<py::object>(entry.parameter_object));
}

void Plan::require_reachable_grads() {
    if (entries_.empty()) return;
    hold_parameters();  // a class derived from Parameter may have a __getattr__
    for (const Entry& entry : entries_) {
        const py::handle parameter = entry.parameter_object;
        if (entry.parameter->grad_version != 0 ||
            !py::cast<bool>(attribute_or(parameter, "_made_of_array", py::bool_(false))))
            return;
    }
    throw py::type_error(
        "grads: no parameter has a gradient, and the arrays that the optimizer was given have no place for one; pass "
        "step(grads=[...]), or give the optimizer sgdcore.Parameter(array) objects and assign to their grad");
}

bool Plan::run(const py::list& param_groups, const py::object& grads, bool zero_grad) {
    if (running_.is_inside()) {
        throw std::runtime_error("step() is already running on this optimizer in another thread");
    }
    if (running_.is_lost()) forget_step();
    running_.enter();
    const AtExit finish{[&] {
        forget_step();
        running_.leave();
    }};
    missing_.clear();
    if (!matches(param_groups)) return false;
    if (averaged) {
        averaged->require_parameters();
        extras_ = averaged->extras();
    }
    hypers_.read(rule_, param_groups, {[](void* plan) { static_cast<Plan*>(plan)->hold_parameters(); }, this});
    if (hypers_.size() != group_count_) return false;  // Python code changed the groups
    hypers_.require_steps(rule_);
    const bool given = !grads.is_none();
    if (given) read_given(grads);
    const Listed listed = list_tensors(given);
    if (!missing_.empty()) return false;
    if (!given && !listed.any_grad) require_reachable_grads();
    check_memory(listed, given, zero_grad);
    StepOptions options{.rule = rule_, .zero_grad = zero_grad};
    if (averaged) averaged->apply_to(options);
    if (clipping) {
        clipping->apply_to(options);
        if (clipping->asks_for_norm() && !measure(param_groups, listed, options)) return true;
    }
    update(param_groups, listed, options);
    // Only a device knows whether its step was left out, and is asked where that matters.
    if (!first_steps_.empty() && clipping && clipping->skip_nonfinite && clipping->on_device &&
        py::cast<bool>(call(clipping->left_out, py::make_tuple(clipping->result)))) {
        return true;
    }
    note_first_steps();
    count_steps();
    if (averaged) ++averaged->taken;
    hypers_.finish_step(rule_, param_groups);
    return true;
}

Plan::Listed Plan::list_tensors(bool given) {
    std::size_t count = 0;
    first_steps_.clear();
    Listed listed;
    listed.new_grads = given;
    // A step on the CPU waits for a hyperparameter on a device; a device reads its own.
    listed.on_device = !hypers_.on_device().empty();
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        const Entry& entry = entries_[i];
        const Parameter& parameter = *entry.parameter;
        const ArrayRef& grad = given ? given_[i].ref : parameter.grad();
        listed.rebound |= entry.data_version != parameter.data_version || entry.states_version != entry.slots->version;
        const bool has_grad = !grad.empty();
        used_grads_[i] = has_grad ? &grad : nullptr;
        const Hyper& hyper = hypers_[entry.group];
        const std::uint32_t in_use = has_grad ? extras_ | hyper.states : extras_;
        Operands operands{
            .data = parameter.data(),
            .grad = used_grads_[i],
            .slots = *entry.slots,
            .in_use = in_use,
            .grad_axes = {},
            .group = entry.group,
            .first_step = false,
            .new_extras = 0,
            .rounding = nullptr,
        };
        if (has_grad) {
            listed.any_grad = true;
            listed.new_grads |= entry.grad_version != parameter.grad_version;
            operands.grad_axes = given ? given_[i].axes : parameter.grad_axes();
            if (hyper.precision != Precision::plain) operands.rounding = rounding_of(i);
        } else if (in_use == 0) {
            continue;
        }
        for_each_state(in_use, [&](int state) {
            if (entry.slots->array(state).empty()) missing_.emplace_back(i, state);
            if (entry.slots->holds(state)) return;
            if (state < max_states) {
                operands.first_step = true;
            } else {
                operands.new_extras = static_cast<std::uint8_t>(operands.new_extras | 1u << (state - max_states));
            }
        });
        if (operands.first_step || operands.new_extras != 0) first_steps_.push_back(i);
        listed.on_device |= operands.data.device != cpu_device;
        listed.elements += operands.data.size;
        if (operands.data.size == 0) continue;
        if (count > 0 && continues(tensors_[count - 1], operands)) {
            tensors_[count - 1].size += operands.data.size;
        } else {
            fill(tensors_[count++], operands);
        }
    }
    tensor_count_ = count;
    return listed;
}

const Rounding* Plan::rounding_of(std::size_t entry) {
    const Hyper& hyper = hypers_[entries_[entry].group];
    const ArrayRef& data = entries_[entry].parameter->data();
    if (!fits(hyper.precision, data.dtype)) {
        throw py::type_error("precision: " + std::string(precision_name(hyper.precision)) + " is for " +
                             (hyper.precision == Precision::split ? "bfloat16" : "bfloat16 and float16") + ", and " +
                             label(entry) + " is of " + dtype_name(data.dtype));
    }
    if (hyper.precision != Precision::stochastic) return nullptr;
    roundings_.resize(entries_.size());
    RoundingOf& of = roundings_[entry];
    index_axes(data, of.axes);
    of.rounding = {.position = entry, .steps = entries_[entry].slots->steps(), .axes = of.axes};
    return &of.rounding;
}

void Plan::check_memory(const Listed& listed, bool given, bool zero_grad) {
    if (listed.rebound) {
        writes_.clear();
        collect_writes(0);
    }
    if (listed.rebound || listed.new_grads) {
        // Before the check: it may throw after it has noted some gradients as checked.
        disjoint_grads_checked_ = false;
        check_grads_against_writes(given);
    }
    const bool check_disjoint = zero_grad && !disjoint_grads_checked_;
    // Comparing gradients and stepping may let other threads run, which may rebind arrays of the list.
    if (check_disjoint || listed.on_device || releases_gil(listed.elements)) hold_arrays();
    if (check_disjoint) check_disjoint_grads(given);
    if (zero_grad) disjoint_grads_checked_ = !given;
}

void Plan::check_grads_against_writes(bool given) {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        Entry& entry = entries_[i];
        if (used_grads_[i] == nullptr) continue;
        if (!given && entry.grad_version == entry.parameter->grad_version) continue;
        check_against_writes(i, *used_grads_[i], given);
        if (!given) entry.grad_version = entry.parameter->grad_version;
    }
}

bool Plan::measure(const py::list& param_groups, const Listed& listed, StepOptions& options) {
    const int device = Clipping::device_of(tensors());
    if (device != cpu_device) {
        clipping->require_uncounted(averaged != nullptr || rules()[static_cast<std::size_t>(rule_)].counts);
        // The step reads what is found.
        const DeviceCallbacks callbacks{.stream = stream_function(), .norm = clipping->result_on(device)};
        device_steps_.find_norm(tensors(), param_groups, hypers_, options, callbacks, clipping->norm_options());
        return true;
    }
    if (clipping->measure(tensors(), listed.elements, hypers_.all(), options)) return true;
    if (options.zero_grad) cpu::clear_grads(tensors());
    return false;
}

void Plan::update(const py::list& param_groups, const Listed& listed, const StepOptions& options) {
    if (listed.on_device) {
        update_on_devices(param_groups, options);
    } else {
        step_on_cpu(tensors(), listed.elements, hypers_.all(), options);
    }
}

void Plan::count_steps() {
    if (roundings_.empty()) return;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        if (used_grads_[i] == nullptr || hypers_[entries_[i].group].precision != Precision::stochastic) continue;
        entries_[i].slots->set_steps(roundings_[i].rounding.steps + 1);
    }
}

void Plan::note_first_steps() {
    for (const std::size_t i : first_steps_) {
        const Entry& entry = entries_[i];
        if (entry.slots->version != entry.states_version) continue;  // a state was replaced meanwhile
        entry.slots->note_step(states_of(i));
    }
}

py::object Plan::stream_function() {
    const auto stream = [this](int device) {
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            const ArrayRef& data = entries_[i].parameter->data();
            if ((used_grads_[i] == nullptr && states_of(i) == 0) || data.device != device) continue;
            return call(python_functions().current_stream, py::make_tuple(data.object(), device));
        }
        return py::object(py::int_(0));
    };
    return py::cpp_function(stream);
}

void Plan::update_on_devices(const py::list& param_groups, const StepOptions& options) {
    DeviceCallbacks callbacks{.stream = stream_function()};
    if (clipping && clipping->asks_for_norm()) {
        if (const int device = Clipping::device_of(tensors()); device != cpu_device) {
            callbacks.norm = clipping->result_on(device);
        }
    }
    device_steps_.step(tensors(), param_groups, hypers_, options, callbacks);
}

void Plan::hold_arrays() {
    hold_parameters();
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        if (used_grads_[i] == nullptr && states_of(i) == 0) continue;
        held_.push_back(entries_[i].parameter->data().array);
        if (used_grads_[i] != nullptr) held_.push_back(used_grads_[i]->array);
        for (int state = 0; state < entries_[i].slots->count(); ++state) {
            const ArrayRef& array = entries_[i].slots->array(state);
            if (!array.empty()) held_.push_back(array.array);
        }
    }
    held_axes_.clear();
    std::size_t axes = 0;
    for (const TensorRef& tensor : tensors()) axes += tensor.grad_axes.size();
    held_axes_.reserve(axes);  // so that the spans below stay valid
    for (TensorRef& tensor : tensors()) {
        const auto start = held_axes_.insert(held_axes_.end(), tensor.grad_axes.begin(), tensor.grad_axes.end());
        tensor.grad_axes = {start, tensor.grad_axes.size()};
    }
}

void Plan::collect_writes(std::size_t from) {
    ++checks_;
    const std::size_t sorted = writes_.size();
    const auto add = [this](const ArrayRef& array, std::size_t entry, Kind kind, int state) {
        if (const Extent extent = extent_of(array); extent.begin != extent.end) {
            writes_.push_back({extent, entry, kind, array.array, state});
        }
    };
    for (std::size_t i = from; i < entries_.size(); ++i) {
        const Entry& entry = entries_[i];
        add(entry.parameter->data(), i, Kind::data, 0);
        for (int state = 0; state < entry.slots->count(); ++state) {
            if (!entry.slots->array(state).empty()) add(entry.slots->array(state), i, Kind::state, state);
        }
    }
    sort_by_address(writes_, sorted);
    if (const auto found = find_overlap(writes_); found != writes_.end()) refuse_overlap(found[0], found[1]);
    // Noted after the check: the next step checks again what was refused.
    for (std::size_t i = from; i < entries_.size(); ++i) {
        Entry& entry = entries_[i];
        entry.data_version = entry.parameter->data_version;
        entry.states_version = entry.slots->version;
        entry.grad_version = entry.parameter->grad_version - 1;  // not compared with these ranges yet
    }
}

void Plan::check_against_writes(std::size_t entry, const ArrayRef& grad, bool given) const {
    if (grad.size == 0) return;
    const Range range{extent_of(grad), entry, given ? Kind::given_grad : Kind::grad, grad.array};
    if (const auto write = find_overlap(writes_, range); write != writes_.end()) refuse_overlap(*write, range);
}

void Plan::check_disjoint_grads(bool given) {
    grad_ranges_.clear();
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        if (used_grads_[i] == nullptr || used_grads_[i]->size == 0) continue;
        if (!used_grads_[i]->writable) {
            throw py::value_error("zero_grad: the gradient of " + label(i) + " is read-only and cannot be zeroed");
        }
        if (repeats_elements(*used_grads_[i])) {
            throw py::value_error("zero_grad: the gradient of " + label(i) + " has strides " +
                                  utf8(py::str(used_grads_[i]->array.attr("strides"))) +
                                  ", which reach the same element twice, and cannot be zeroed");
        }
        const Kind kind = given ? Kind::given_grad : Kind::grad;
        grad_ranges_.push_back({extent_of(*used_grads_[i]), i, kind, used_grads_[i]->array});
    }
    sort_by_address(grad_ranges_);
    for (auto first = grad_ranges_.begin(); first != grad_ranges_.end();) {
        // [first, last) are all ranges that hang together by overlaps.
        auto last = first + 1;
        for (std::uintptr_t end = first->end; last != grad_ranges_.end() && last->begin < end; ++last) {
            end = std::max(end, last->end);
        }
        const std::span<const Range> ranges(first, last);
        if (ranges.size() > 1 && !are_interleaved(ranges)) check_pairs(ranges);
        first = last;
    }
}

bool Plan::are_interleaved(std::span<const Range> ranges) {
    runs_.clear();
    std::uintptr_t period = 0;
    for (const Range& range : ranges) {
        const Spacing spacing = spacing_of(py::reinterpret_borrow<py::array>(range.array));
        runs_.push_back({range.begin, range.begin + spacing.run});
        period = std::gcd(period, spacing.period);
    }
    if (period == 0) return false;
    // Each array's runs lie a multiple of the period apart, so comparing them within one period is enough.
    for (Extent& run : runs_) {
        const std::uintptr_t before = run.begin / period * period;
        run = {run.begin - before, run.end - before};
    }
    sort_by_address(runs_);
    return find_overlap(runs_) == runs_.end() && runs_.back().end <= runs_.front().begin + period;
}

void Plan::check_pairs(std::span<const Range> ranges) const {
    const py::object shares_memory = attribute_of("numpy", "shares_memory");
    for (std::size_t i = 0; i < ranges.size(); ++i) {
        for (std::size_t j = i + 1; j < ranges.size() && ranges[j].begin < ranges[i].end; ++j) {
            const py::object shared = call(shares_memory, py::make_tuple(ranges[i].array, ranges[j].array));
            if (py::cast<bool>(shared)) refuse_overlap(ranges[i], ranges[j]);
        }
    }
}

void Plan::refuse_overlap(const Range& a, const Range& b) const {
    if (a.entry != b.entry && entries_[a.entry].parameter == entries_[b.entry].parameter) {
        throw py::value_error("some parameters appear in more than one parameter group, or twice: " + label(a.entry));
    }
    if (b.kind == Kind::given_grad) {
        throw py::value_error(describe(b) + ": overlaps " + describe(a) + " in memory");
    }
    throw py::value_error("params: " + describe(a) + " and " + describe(b) + " overlap in memory");
}

std::string Plan::describe(const Range& range) const {
    switch (range.kind) {
        case Kind::data:
            return "the data of " + label(range.entry);
        case Kind::state:
            return "the " + std::string(entries_[range.entry].slots->key(range.state)) + " of " + label(range.entry);
        case Kind::grad:
            return "the grad of " + label(range.entry);
        case Kind::given_grad:
            break;
    }
    return Argument("grads", static_cast<std::ptrdiff_t>(range.entry)).text();
}

std::string Plan::label(std::size_t entry) const {
    return entries_[entry].parameter->label("parameter " + std::to_string(entry));
}

int Plan::traverse(visitproc visit, void* arg) const {
    for (const Entry& entry : entries_) Py_VISIT(entry.slots_object.ptr());
    return 0;
}

void Plan::clear() {
    // Deallocation may run Python code, which must find a plan that matches no groups.
    const auto entries = std::exchange(entries_, {});
    stop_relying_on(entries);
    group_count_ = 0;
    outdated_ = false;
    writes_.clear();
    missing_.clear();
}

void Plan::outdate() {
    if (running_.is_inside()) {
        outdated_ = true;
    } else {
        clear();
    }
}

void Plan::rely_on(const std::vector<Entry>& entries) {
    for (const Entry& entry : entries) {
        entry.parameter->dependents.add(this);
        entry.slots->dependents.add(this);
    }
}

void Plan::stop_relying_on(const std::vector<Entry>& entries) {
    for (const Entry& entry : entries) {
        entry.parameter->dependents.remove(this);
        entry.slots->dependents.remove(this);
    }
}

}  // namespace sgdcore::bindings
