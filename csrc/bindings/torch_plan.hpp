// The step over torch tensors: finds each parameter's gradient and states and hands a work list to the core.
//
// What is unusual (see `run`) is left to Python code that turns it into the usual.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "../work.hpp"
#include "devices.hpp"
#include "observers.hpp"
#include "parameter.hpp"
#include "torch_listing.hpp"
#include "torch_reader.hpp"
#include "torch_rows.hpp"

namespace sgdcore::bindings {

class TorchPlan {
  public:
    /// `rule` is the rule's number.
    TorchPlan(int rule, TorchInterface interface);

    /// One step over the groups' parameters that have a gradient, with the rule's states from `state`. Returns True if
    /// every tensor is as usual: of torch's own types or part of a DTensor, dense memory of a storage type on the CPU
    /// or a CUDA device, each state there already and laid out as its parameter, and nothing overlapping but
    /// whole tensors on the CPU; or the gradient is sparse (COO) and all is in C order on the CPU. `grad_factor`
    /// multiplies every gradient; `scaling` is DeviceInterface's, or None.
    ///
    /// Else nothing is changed. Returns a tuple of what is in the way: lists of the parameters that are unusual, that
    /// lack only states, and that overlap others in memory, each as a tuple (position among all, index of
    /// the group, position in the group); a list that is empty here; and whether gradients overlap, so that they cannot
    /// be cleared. Returns False if the groups themselves are unusual.
    py::object run(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                   const py::object& scaling);

    /// The same without factor and scaling, unless somebody observes it: None then, with nothing changed.
    py::object run_unobserved(const py::object& groups, const py::object& state, bool zero_grad);

    /// The same beside what is unusual: without the parameters at the positions `left_out`, a sorted list, or without
    /// all of them if it is None; with new states for those of `new_states`, a sorted list of tuples (position,
    /// states), zeros where the gradient is sparse; and with `items`, tuples (parameter, gradient, states,
    /// index of the group, first, address of TensorRef's pending flags or 0, memory, apart). `memory` lists tuples
    /// (address, bytes, written) that the item stands for, or is None if that is what its tensors show. An item that is
    /// `apart` does not step; its memory is only compared with what does. The list that `run` leaves empty has the
    /// items that overlap something or that cannot be read, by index. States are a tuple in the
    /// rule's order, with None for those that take no part. Does not increment versions for items, which are
    /// never cleared.
    py::object run_beside(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                          const py::object& scaling, const py::object& left_out, const py::list& new_states,
                          const py::list& items);

    /// One step over `items`, tuples (parameter, gradient, states, index of the group, first, address of TensorRef's
    /// pending flags or 0). False as above; `dry_run` goes no further than that. Does not increment
    /// versions.
    bool run_items(const py::object& groups, const py::list& items, double grad_factor, bool dry_run,
                   const py::object& scaling);

    /// Gives the parameters with these states, and no others, flags: tuples (tensor, address), where the tensor is the
    /// first of the parameter's states that takes part.
    void set_pending(const py::list& flags);

    /// True if the elements fill one range of memory, axes in any order.
    bool is_dense(const py::object& tensor);

    /// Whether anyone may hold a reference to the optimizer's state. As long as nobody has asked for it, nobody can
    /// have moved the states' memory or recorded one for autograd, so a step need neither read them anew nor
    /// increment their versions.
    bool state_exposed = true;

    /// Who observes steps; `in_backward` says that steps are part of the backward pass.
    Observers observers;
    bool in_backward = false;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    /// A tensor as the last step found it. Between steps nothing here refers to a tensor: what the user lets go is
    /// freed at once, and swap_tensors takes it.
    struct Known {
        TensorIdentity identity;
        const std::byte* data = nullptr;
    };
    /// What is remembered of one parameter, by its position; a cache.
    struct Entry {
        PyObject* object = nullptr;  // the parameter; `parameter` is its part in this process if it is a DTensor
        Known parameter;
        TensorIdentity grad;  // of the last gradient that was read
        Py_hash_t hash = 0;   // of the parameter: a Python call otherwise
    };
    /// References that a step holds.
    struct References {
        std::vector<PyObject*> params, grads, states;
        std::vector<PyObject*> parts;  // of DTensors and sparse gradients

        void release();
    };
    /// Where a parameter is: its position among all, the index of its group, its position in that.
    struct Place {
        std::size_t position, group, index;
    };
    /// What is kept from step to step. A step takes it away from the plan for its time, so that another one, in another
    /// thread or from code that this one calls, finds none and makes its own.
    struct Memory {
        std::vector<Entry> entries;
        std::vector<Known> states;  // of the entries: as many of each as the rule has
        GroupHypers hypers;
        TorchListing listing;
        References held;  // those of a step, which releases them at its end
        /// The parameters that the last step left to Python as unusual, and where the groups began.
        std::vector<Place> expected;
        std::vector<std::size_t> group_starts;
        bool complete = false;  // the last step found everything as usual
    };
    class Lease;
    class States;
    struct Beside;
    struct Pass;
    /// What became of a parameter in a pass: it is listed, or skipped without a gradient; it is unusual; it lacks
    /// states only.
    enum class Outcome { done, odd, missing };

    py::object attempt(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                       const py::object& scaling, Beside* beside);
    /// Makes the memory's listing the work list of a step; false if a group is unusual.
    bool list(Pass& pass, const py::list& param_groups);
    /// Takes the parameter at the pass's position, and what was held for it, out of the pass again; `counts` are those
    /// of the references before.
    void leave_out(Pass& pass, Outcome outcome, const std::size_t (&counts)[3]);
    /// Lists the parameter at the pass's position if it has a gradient.
    Outcome list_parameter(Pass& pass, PyObject* parameter, PyObject* group);
    /// The same where the gradient, or this process's part of it, was read.
    Outcome list_dense(Pass& pass, PyObject* parameter, PyObject* grad, TensorKind kind);
    /// The same for a sparse gradient.
    Outcome list_rows(Pass& pass, PyObject* parameter, PyObject* grad, PyObject* group);
    /// Reads the states of the parameter at the pass's position.
    Outcome read_states(Pass& pass, PyObject* parameter, TensorKind kind);
    /// Reads a tuple of some that are not in the optimizer's state yet.
    Outcome read_new_states(Pass& pass, PyObject* tuple, TensorKind kind);
    /// Holds the states of the parameter at the pass's position if nobody can have moved them since they were read.
    bool hold_known_states(Pass& pass);
    /// What is known of the states of the parameter at a position.
    Known* known_states(Memory& memory, std::size_t position) const {
        return memory.states.data() + position * state_count();
    }
    std::size_t state_count() const { return state_keys_.size(); }
    /// Reads a tensor, or this process's part of a DTensor; false if it is unusual.
    bool read(PyObject* tensor, TensorKind kind, References& held, Known& known, TorchView& view,
              std::vector<std::int64_t>& layout) const;
    /// True if what the last step left to Python is unusual still. A pass over all the others would find no more.
    bool finds_as_expected(Pass& pass, const py::list& param_groups);
    /// Steps the listed tensors that are entangled, each seeing what those before it wrote, as in torch's loop.
    void take_turns(const Memory& memory, const StepOptions& options) const;
    /// Notes the parameters and items that overlap others; true if there are any. Says nothing of parameters that only
    /// overlap each other.
    bool find_overlaps(Pass& pass, const py::list& param_groups) const;
    /// Tells autograd of what a step has written.
    void increment_versions(const References& held, bool with_states, bool with_grads) const;
    void update(const Memory& memory, std::span<const TensorRef> tensors, std::int64_t elements, bool on_device,
                const py::list& param_groups, const StepOptions& options, const py::object& scaling,
                const std::vector<std::uint8_t*>& pending);
    /// The flags of each tensor in the listing; empty if there are none at all.
    std::vector<std::uint8_t*> pending_of(const Memory& memory) const;

    const int rule_;
    const std::vector<PyObject*> state_keys_;  // of the rule's states, interned
    TorchReader reader_;
    DeviceSteps device_steps_;
    std::map<PyObject*, std::pair<py::object, std::uint8_t*>> pending_;  // by state
    std::unique_ptr<Memory> memory_;                                     // null while a step uses it
};

}  // namespace sgdcore::bindings
