// The states that a rule keeps of one parameter.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

#include "../engine/catalog.hpp"
#include "parameter.hpp"

namespace sgdcore::bindings {

/// The states of one parameter in one optimizer, by their number in the rule's declaration.
///
/// Storage is reserved before a parameter's first step. It holds nothing until that step has succeeded.
/// The parameter is kept alive only while the optimizer's state has something to say about it.
class StateSlots {
  public:
    /// `rule` is the rule's number.
    StateSlots(int rule, const py::object& parameter) : rule_(&rules()[rule]), parameter_(parameter) {}

    /// The number of the state with that key; -1 if the rule has none.
    int find(const std::string& key) const;

    /// The state from now on: an array of the parameter's shape and memory layout, of any storage type; None removes
    /// it. Raises ReferenceError if the parameter is gone.
    void set(int state, const py::object& array);
    /// Storage for the first step to fill, unless there is some already.
    void reserve(int state, const py::object& storage);
    /// A step has written these states: bit s is state s.
    void note_step(std::uint32_t states);
    /// Whether the user has values of other keys for the parameter.
    void note_other_values(bool exist);
    /// Takes the slots out of the optimizer's state, with what they hold.
    void detach();

    /// The storage of a state; empty if there is none.
    const ArrayRef& array(int state) const { return slots_[static_cast<std::size_t>(state)].array; }
    /// Whether it holds something.
    bool holds(int state) const { return slots_[static_cast<std::size_t>(state)].holds; }
    int count() const { return static_cast<int>(rule_->states.size()); }
    const char* key(int state) const { return rule_->states[static_cast<std::size_t>(state)].key; }

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
    /// Keeps the parameter alive, or lets it go.
    void update_kept();

    std::array<Slot, max_states> slots_;
    const RuleInfo* rule_;
    py::weakref parameter_;
    py::object kept_;  // the parameter; null where it is not kept alive
    bool has_other_values_ = false;
    bool is_attached_ = true;
};

}  // namespace sgdcore::bindings
