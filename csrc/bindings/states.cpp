// Assigning arrays to the states of a parameter.
#include "states.hpp"

#include <algorithm>
#include <utility>

namespace sgdcore::bindings {

int StateSlots::find(const std::string& key) const {
    const auto& states = rule_->states;
    const auto found = std::ranges::find_if(states, [&](const StateSpec& spec) { return spec.key == key; });
    if (found != states.end()) return static_cast<int>(found - states.begin());
    int number = -1;
    for_each_state(extras_, [&](int state) {
        if (key == extra_states[state - max_states].key) number = state;
    });
    return number;
}

void StateSlots::set(int state, const py::object& array) { assign(state, array, !array.is_none()); }

void StateSlots::reserve(int state, const py::object& storage) {
    if (!array(state).empty()) return;  // a step in another thread came first
    assign(state, storage, false);
}

void StateSlots::assign(int state, const py::object& array, bool holds) {
    ArrayRef ref;
    if (!array.is_none()) {
        ref = read_array(array, key(state));
        require_updatable(ref, key(state));
        const py::object parameter = parameter_();
        if (parameter.is_none()) {
            const std::string text = std::string(key(state)) + ": the parameter that the state belonged to is gone";
            PyErr_SetString(PyExc_ReferenceError, text.c_str());
            throw py::error_already_set();
        }
        const ArrayRef& data = py::cast<Parameter&>(parameter).data();
        require_same_layout(ref, data, key(state));
        const bool fits = state == compensation_slot ? ref.dtype == data.dtype
                                                     : state != master_low_slot || item_size(ref.dtype) == 2;
        if (!fits) {
            throw py::type_error(std::string(key(state)) + ": expected dtype " +
                                 (state == compensation_slot ? dtype_name(data.dtype) : "int16") + ", got " +
                                 dtype_name(ref.dtype));
        }
    }
    Slot& slot = slots_[static_cast<std::size_t>(state)];
    slot.holds = holds;
    std::swap(slot.array, ref);  // the old array is released last, as in Parameter::set_data
    ++version;
    update_kept();
}

void StateSlots::note_step(std::uint32_t states) {
    for_each_state(states, [&](int state) { slots_[static_cast<std::size_t>(state)].holds = true; });
    update_kept();
}

void StateSlots::note_other_values(bool exist) {
    has_other_values_ = exist;
    update_kept();
}

void StateSlots::set_steps(std::uint64_t steps) {
    const bool decides = (steps == 0) != (steps_ == 0);
    steps_ = steps;
    if (decides) update_kept();
}

void StateSlots::detach() {
    is_attached_ = false;
    dependents.tell(&Dependent::slots_are_detached);
    update_kept();
}

void StateSlots::update_kept() {
    const bool says_something = has_other_values_ || steps_ != 0 || std::ranges::any_of(slots_, &Slot::holds);
    py::object kept;
    if (is_attached_ && says_something) {
        kept = parameter_();
        if (kept.is_none()) kept = py::object();
    }
    std::swap(kept_, kept);  // the old reference is released last: the parameter may end with it
}

int StateSlots::traverse(visitproc visit, void* arg) const {
    Py_VISIT(kept_.ptr());
    for (const Slot& slot : slots_) {
        Py_VISIT(slot.array.array.ptr());
        Py_VISIT(slot.array.on_device.ptr());
    }
    return 0;
}

void StateSlots::clear() {
    ++version;  // plans look at the states only when the version has changed
    const auto kept = std::move(kept_);
    std::array<ArrayRef, max_slots> arrays;
    for (std::size_t i = 0; i < arrays.size(); ++i) std::swap(arrays[i], slots_[i].array);
}

}  // namespace sgdcore::bindings
