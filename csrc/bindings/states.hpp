// The states that a rule, and the options of an optimizer, keep for one parameter.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

#include "../engine/catalog.hpp"
#include "parameter.hpp"

namespace sgdcore::bindings {

/// The states of one parameter in one optimizer, by their number: the position in the rule's declaration, or that of an
/// option's state behind it (`extra_states`).
///
/// Storage is reserved before a parameter's first step, and holds nothing until that step has succeeded. The slots keep
/// the parameter alive while they hold a value and are part of the optimizer's state.
class StateSlots {
  public:
    /// `rule` is the rule's number. `extras` tells which of the options' states there are: bit s is state s.
    StateSlots(int rule, std::uint32_t extras, const py::object& parameter)
        : rule_(&rules()[rule]), extras_(extras), parameter_(parameter) {}

    /// The number of the state with that key; -1 if there is none.
    int find(const std::string& key) const;

    /// Sets a state to an array of the parameter's shape and memory layout, of any storage type; None removes the
    /// state. Raises ReferenceError if the parameter is gone.
    void set(int state, const py::object& array);
    /// Gives a state storage for the first step to fill, unless it has storage.
    void reserve(int state, const py::object& storage);
    /// Notes that a step has written these states: bit s is state s.
    void note_step(std::uint32_t states);
    /// Notes whether the user has values of other keys for the parameter.
    void note_other_values(bool exist);
    /// Takes the slots, with their values, out of the optimizer's state.
    void detach();

    /// The storage of a state; empty if it has none.
    const ArrayRef& array(int state) const { return slots_[static_cast<std::size_t>(state)].array; }
    /// Whether a state holds a value.
    bool holds(int state) const { return slots_[static_cast<std::size_t>(state)].holds; }
    /// The numbers of all states are below this one.
    int count() const { return extras_ == 0 ? static_cast<int>(rule_->states.size()) : max_slots; }
    const char* key(int state) const {
        return state < max_states ? rule_->states[static_cast<std::size_t>(state)].key
                                  : extra_states[state - max_states].key;
    }

    /// The steps that the parameter has taken with stochastic rounding.
    std::uint64_t steps() const { return steps_; }
    void set_steps(std::uint64_t steps);

    /// Counts the assignments, so that a plan notices arrays it has not checked for overlap yet.
    std::uint32_t version = 0;
    Dependents dependents;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    struct Slot {
        ArrayRef array;
        bool holds = false;
    };

    void assign(int state, const py::object& array, bool holds);
    /// Takes or releases the reference that keeps the parameter alive.
    void update_kept();

    std::array<Slot, max_slots> slots_;
    const RuleInfo* rule_;
    std::uint32_t extras_;
    py::weakref parameter_;
    py::object kept_;  // the parameter; null where it is not kept alive
    std::uint64_t steps_ = 0;
    bool has_other_values_ = false;
    bool is_attached_ = true;
};

}  // namespace sgdcore::bindings
