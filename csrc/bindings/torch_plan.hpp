// The step over torch tensors: finds each parameter's gradient and states and hands a work list to the core.
//
// A parameter that the core cannot read is irregular (see `run`). Python code prepares tensors for it that the core can
// read; `run_prepared` steps them together with the regular parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "../engine/averaged_steps.hpp"
#include "../work.hpp"
#include "clipping.hpp"
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

    /// One step over the groups' parameters that have a gradient, with the rule's states from `state`. `grad_factor`
    /// multiplies every gradient; `scaling` is DeviceCallbacks', or None. Returns True if every parameter is regular:
    ///
    /// - its tensors are of torch's own types, or parts of DTensors;
    /// - their memory is dense, of a storage type, on the CPU or a CUDA device;
    /// - its states, and its average, are there already and laid out as the parameter;
    /// - no tensors overlap, except whole tensors on the CPU.
    ///
    /// A sparse (COO) gradient is regular, too, where all tensors are in C order on the CPU. Of a parameter without a
    /// gradient only the average moves.
    ///
    /// Otherwise nothing is changed, and the result is a tuple. Its first three items are lists of places (position
    /// among all, index of the group, position in the group): of the parameters that are irregular, that lack only
    /// states, and that overlap others in memory. The fourth is the list of `run_prepared`, empty here. The fifth tells
    /// whether the gradients can be cleared, which they cannot where they overlap.
    ///
    /// Returns False if the groups themselves are irregular, and None if `clipping` leaves the step out, which has then
    /// cleared the regular parameters' gradients if `zero_grad`.
    py::object run(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                   const py::object& scaling);

    /// `run` without factor and scaling; True also for a step that was left out. Returns None, with nothing changed, if
    /// anything observes the step, torch's profiler included.
    py::object run_unobserved(const py::object& groups, const py::object& state, bool zero_grad);

    /// Writes the rule's counts and sums to the groups, after a step that `run_prepared` has taken. The other steps do
    /// so themselves.
    void finish_step(const py::object& groups);

    /// `run` together with what Python code has prepared:
    ///
    /// - `left_out`: the sorted positions of the parameters that the step leaves alone; None for all of them.
    /// - `new_states`: a sorted list of tuples (position, states, first step), for parameters that lacked states. They
    ///   are zeros where the gradient is sparse.
    /// - `items`: tuples (parameter, gradient, states, index of the group, first step, address of TensorRef's pending
    ///   flags or 0, memory, apart). `memory` lists the ranges (address, bytes, written) that the item stands for; None
    ///   if those are its tensors' own. An item that is `apart` takes no step: its memory is only checked for overlap.
    ///
    /// States are a tuple in the rule's order, with None for those that take no part. The averages of items, and of
    /// parameters that are left out or have new states, do not move. The fourth item of the result
    /// lists the items, by index, that overlap other memory or cannot be read. Items' gradients are not cleared, and
    /// their versions are not incremented.
    py::object run_prepared(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                            const py::object& scaling, const py::object& left_out, const py::list& new_states,
                            const py::list& items);

    /// One step over `items`, tuples (parameter, gradient, states, index of the group, first step, address of
    /// TensorRef's pending flags or 0). Returns False, with nothing changed, if an item cannot be read or items
    /// overlap. `dry_run` only finds that out. Versions are not incremented.
    bool run_items(const py::object& groups, const py::list& items, double grad_factor, bool dry_run,
                   const py::object& scaling);

    /// Gives the parameters with these states, and no others, flags: tuples (tensor, address), where the tensor is the
    /// first of the parameter's states that takes part.
    void set_pending(const py::list& flags);

    /// True if the elements fill one range of memory, axes in any order.
    bool is_dense(const py::object& tensor);

    /// Whether anyone may hold a reference to the optimizer's state. As long as nobody has asked for it, no state's
    /// memory can have moved, and autograd has recorded none: a step then neither reads the states anew nor increments
    /// their versions.
    bool state_exposed = true;

    /// How the parameters are averaged; null if they are not.
    const std::shared_ptr<AveragedSteps>& averaged() const { return averaged_; }
    void set_averaged(std::shared_ptr<AveragedSteps> averaged);

    /// What observes steps, beside torch's profiler. `in_backward`: steps are part of the backward pass.
    Observers observers;
    bool in_backward = false;

    /// What is done to the gradients; null if nothing.
    std::shared_ptr<Clipping> clipping;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    /// A tensor as the last step found it. The identity is no reference: a tensor that the user lets go is freed at
    /// once, and torch.utils.swap_tensors takes the others.
    struct CachedTensor {
        TensorIdentity identity;
        const std::byte* data = nullptr;
    };
    /// One parameter as the last step found it.
    struct CachedParameter {
        PyObject* object = nullptr;
        CachedTensor tensor;  // the parameter, or this process's part of a DTensor
        TensorIdentity grad;  // the last gradient that was read
        Py_hash_t hash = 0;   // the parameter's hash, which takes a call into Python
    };
    /// The references that a step holds.
    struct References {
        std::vector<PyObject*> params, grads, states;
        std::vector<PyObject*> parts;  // of DTensors and sparse gradients

        void release();
    };
    /// Where a parameter is: its position among all, the index of its group, its position in the group.
    struct Place {
        std::size_t position, group, index;
    };
    /// What steps keep for later steps, to save time: a cache, which may be dropped at any moment. A running step takes
    /// the cache away from the plan. A second step, in another thread or in code that the first one calls, finds none
    /// and makes its own.
    struct Cache {
        std::vector<CachedParameter> parameters;  // by position
        std::vector<CachedTensor> states;         // for each parameter as many as the rule has
        GroupHypers hypers;
        TorchListing listing;
        /// Averages that move after the step, apart from their parameters: of those without a gradient, and where
        /// others may change the parameters.
        std::vector<TensorRef> averages;
        std::vector<Rounding> roundings;            // of the listed tensors; empty where none is rounded stochastically
        std::vector<std::vector<Axis>> index_axes;  // what these refer to
        std::uint32_t extras = 0;                   // the options' states that take part: bit s is state s
        References held;                            // the running step's, which releases them at its end
        /// The parameters that the last step left to Python, and the positions where the groups began.
        std::vector<Place> irregular;
        std::vector<std::size_t> group_starts;
        bool complete = false;  // the last step listed every parameter
    };
    class Lease;
    class States;
    struct Prepared;
    struct Scan;
    /// What a scan made of a parameter. `done`: it is listed, or has no gradient.
    enum class Outcome { done, irregular, lacks_states };

    py::object attempt(const py::object& groups, const py::object& state, bool zero_grad, double grad_factor,
                       const py::object& scaling, Prepared* prepared);
    /// Makes the cache's listing the work list of a step. Returns false if a group is irregular.
    bool list(Scan& scan, const py::list& param_groups);
    /// Takes the parameter at the scan's position out of the scan again, and releases the references that were added
    /// since their numbers were `counts`.
    void leave_out(Scan& scan, Outcome outcome, const std::size_t (&counts)[3]);
    /// Lists the parameter at the scan's position if it has a gradient.
    Outcome list_parameter(Scan& scan, PyObject* parameter, PyObject* group);
    /// Lists it with a dense gradient that was read: the gradient, or this process's part of a DTensor.
    Outcome list_dense(Scan& scan, PyObject* parameter, PyObject* grad, TensorKind kind);
    /// Lists it with a sparse gradient.
    Outcome list_rows(Scan& scan, PyObject* parameter, PyObject* grad, PyObject* group);
    /// Lists the average of a parameter without a gradient, or with a sparse one, to move after the step.
    Outcome list_average(Scan& scan, PyObject* parameter, TensorKind kind);
    /// Moves the averages that are apart from their parameters' steps.
    void move_averages(const Cache& cache, const py::list& param_groups, const StepOptions& options,
                       const py::object& scaling);
    /// Reads the states of the parameter at the scan's position.
    Outcome read_states(Scan& scan, PyObject* parameter, TensorKind kind);
    /// Reads a tuple of states that are not in the optimizer's state yet.
    Outcome read_new_states(Scan& scan, PyObject* states, TensorKind kind);
    /// Holds the states of the parameter at the scan's position, if all of them are cached.
    bool hold_cached_states(Scan& scan);
    /// Makes the states of options known by their keys.
    void name_extras(Cache& cache);
    /// Raises TypeError if the parameter at the scan's position does not fit its group's precision.
    void require_fitting(const Scan& scan, TensorKind kind) const;
    /// Tells stochastic rounding what it has to know of the listed tensors.
    void set_roundings(Cache& cache, PyObject* state) const;
    /// Counts the running step where rounding is stochastic.
    void count_steps(const Cache& cache, PyObject* state) const;
    /// What the last step found of the parameter at a position; nothing if that was another one.
    CachedParameter& cached_parameter(Cache& cache, std::size_t position, PyObject* parameter);
    /// The states of the parameter at a position, as the last step found them.
    CachedTensor* cached_states(Cache& cache, std::size_t position) const {
        return cache.states.data() + position * state_count();
    }
    bool asks_for_norm() const { return clipping && clipping->asks_for_norm(); }
    StepOptions step_options(double grad_factor) const;
    /// Finds the norm of all gradients of a step. Returns false if the step is left out; it has then cleared the
    /// gradients of the listing, if asked.
    bool measure(Scan& scan, const py::list& param_groups, StepOptions& options, const py::object& scaling);
    DeviceCallbacks callbacks(std::span<const TensorRef> tensors, const py::object& scaling) const;
    std::size_t state_count() const { return state_keys_.size(); }
    /// Reads a tensor, or this process's part of a DTensor. Returns false if the core cannot read it.
    bool read(PyObject* tensor, TensorKind kind, References& held, CachedTensor& cached, TorchView& view,
              std::vector<std::int64_t>& layout, bool integers = false) const;
    /// True if the parameters that the last step left to Python are irregular still. The step then goes to Python at
    /// once, and the regular parameters are scanned only there.
    bool is_still_irregular(Scan& scan, const py::list& param_groups);
    /// Steps the listed tensors that overlap one after the other, as torch's loop does: each reads what those before it
    /// wrote.
    void step_in_sequence(Cache& cache, const StepOptions& options) const;
    /// Notes the parameters with sparse gradients and the items that overlap other memory, and the parameters that they
    /// overlap. Returns true if there are any. Dense parameters are compared with each other by the listing.
    bool find_overlaps(Scan& scan, const py::list& param_groups) const;
    /// Tells autograd which tensors a step has written.
    void increment_versions(const References& held, bool with_params, bool with_states, bool with_grads) const;
    void update(const Cache& cache, std::span<const TensorRef> tensors, std::int64_t elements, bool on_device,
                const py::list& param_groups, const StepOptions& options, const py::object& scaling,
                const std::vector<std::uint8_t*>& pending);
    /// The pending flags of each tensor in the listing; empty if no tensor has any.
    std::vector<std::uint8_t*> pending_of(const Cache& cache) const;

    const int rule_;
    std::vector<PyObject*> state_keys_;  // by the states' numbers, interned; null between the rule's and the options'
    std::shared_ptr<AveragedSteps> averaged_;
    TorchReader reader_;
    DeviceSteps device_steps_;
    std::map<PyObject*, std::pair<py::object, std::uint8_t*>> pending_;  // by state
    std::unique_ptr<Cache> cache_;                                       // null while a step uses it
};

}  // namespace sgdcore::bindings
