// The plan of an optimizer's step: which parameters, in which groups, with which states. Turns Python's objects into
// the core's work list without running Python code per parameter.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../engine/averaged_steps.hpp"
#include "../process.hpp"
#include "../work.hpp"
#include "clipping.hpp"
#include "devices.hpp"
#include "hypers.hpp"
#include "states.hpp"

namespace sgdcore::bindings {

class Plan final : private Dependent {
  public:
    /// `rule` is the rule's number.
    explicit Plan(int rule) : rule_(rule) {}
    ~Plan() { clear(); }
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    /// Takes in the parameters of each group, a list of lists; `slots` holds the StateSlots of each in the same form.
    /// The lists must be the caller's alone: another thread could change them here.
    /// Raises ValueError if two parameters, or a parameter and a state, overlap.
    void build(const py::list& parameters, const py::list& slots);

    /// Takes in one more group of a plan that is current, at a cost that hardly grows with the groups before it.
    /// Raises ValueError as `build` does.
    void add_group(const py::list& parameters, const py::list& slots);

    /// True if the plan matches the groups, and no parameter or state was rebound since its memory was checked.
    bool is_current(const py::list& param_groups) const;

    /// How often memory was checked. While the number stays the same, so do the parameters' addresses.
    std::uint64_t checks() const { return checks_; }

    /// One step over all groups. Returns false, with nothing changed, if the plan does not match the groups or the
    /// storage of a state is missing (see missing_states). Every check comes before the first write.
    bool run(const py::list& param_groups, const py::object& grads, bool zero_grad);

    /// A state whose storage is missing: its parameter, the parameter's group, and the state's number.
    using Missing = std::tuple<py::object, py::object, int>;
    /// What the last `run` found missing; nothing if the groups have changed since, so that the plan has to be built.
    std::optional<std::vector<Missing>> missing_states(const py::list& param_groups) const;

    /// Makes the next step build the plan anew. A running step goes on with the old plan.
    void outdate();

    /// What is done to the gradients; null if nothing.
    std::shared_ptr<Clipping> clipping;
    /// How the parameters are averaged; null if they are not.
    std::shared_ptr<AveragedSteps> averaged;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    /// An entry does not keep its parameter alive. The plan is cleared when a parameter ends, so an entry's lives.
    struct Entry {
        py::object slots_object;
        StateSlots* slots;
        Parameter* parameter;
        PyObject* parameter_object;
        std::uint32_t group;
        // The versions whose memory was last checked for overlap.
        std::uint32_t data_version, states_version, grad_version;
    };
    /// A gradient that was passed to the step.
    struct GivenGrad {
        ArrayRef ref;
        std::vector<Axis> axes;
    };
    struct RoundingOf {
        Rounding rounding;
        std::vector<Axis> axes;
    };
    /// A range of memory: which of an entry's arrays it is.
    enum class Kind { data, state, grad, given_grad };
    struct Range : Extent {
        std::size_t entry;
        Kind kind;
        py::handle array;  // only used while a reference is held
        int state = 0;     // the number of a state
    };

    /// What a step's work list holds.
    struct Listed {
        std::int64_t elements = 0;
        bool rebound = false;    // parameters or states were rebound since they were last checked
        bool new_grads = false;  // gradients were not checked yet
        bool any_grad = false;
        bool on_device = false;  // tensors or hyperparameters
    };

    /// True while every group holds the very parameters of the last `build`, in order.
    bool matches(const py::list& param_groups) const;

    void parameter_goes() override { clear(); }
    void slots_are_detached() override { outdate(); }
    /// Registers the plan with the entries' parameters and slots, or takes it out again.
    void rely_on(const std::vector<Entry>& entries);
    void stop_relying_on(const std::vector<Entry>& entries);

    void require_no_step() const;
    /// Adds an entry for each of a group's parameters.
    static void append(std::vector<Entry>& entries, std::size_t group, const py::list& parameters,
                       const py::list& slots);
    /// Makes room for a step over all entries, and checks the memory of those from `from` on.
    void start_with(std::size_t from);
    /// Releases what a step held.
    void forget_step();
    /// Raises TypeError if no parameter has ever had a gradient, and the optimizer made all of them of arrays: the
    /// caller then has no `grad` to assign to.
    void require_reachable_grads();
    /// Keeps all parameters alive while Python code or other threads run during a step.
    void hold_parameters();
    void read_given(const py::object& grads);
    /// Fills tensors_, first_steps_ and used_grads_ for a step, and missing_ with the states that it lacks.
    Listed list_tensors(bool given);
    /// The work list of the running step.
    std::span<TensorRef> tensors() { return {tensors_.data(), tensor_count_}; }
    /// Raises ValueError if the step writes memory that overlaps other memory of the list. Checks only memory that was
    /// not checked before.
    void check_memory(const Listed& listed, bool given, bool zero_grad);
    void check_grads_against_writes(bool given);
    /// Finds the norm of the gradients. Returns false if the step is left out; it has then cleared the gradients, if
    /// asked.
    bool measure(const py::list& param_groups, const Listed& listed, StepOptions& options);
    py::object stream_function();
    void update(const py::list& param_groups, const Listed& listed, const StepOptions& options);
    void note_first_steps();
    /// What stochastic rounding knows of an entry; null in another precision. Raises TypeError if the parameter's dtype
    /// does not fit its precision.
    const Rounding* rounding_of(std::size_t entry);
    /// Counts the running step where rounding is stochastic.
    void count_steps();
    void update_on_devices(const py::list& param_groups, const StepOptions& options);
    /// The states of an entry that the running step reads or writes: bit s is state s.
    std::uint32_t states_of(std::size_t entry) const {
        return used_grads_[entry] == nullptr ? extras_ : extras_ | hypers_[entries_[entry].group].states;
    }
    /// Keeps all arrays of the step alive and in place while other threads may rebind arrays or remove parameters.
    void hold_arrays();
    /// Adds the memory that a step writes for the entries from `from` on. Raises ValueError if ranges overlap.
    void collect_writes(std::size_t from);
    void check_against_writes(std::size_t entry, const ArrayRef& grad, bool given) const;
    void check_disjoint_grads(bool given);
    /// True if ranges that overlap are known to share no byte, because the arrays' gaps fit into each other, as those
    /// of a matrix's columns do.
    bool are_interleaved(std::span<const Range> ranges);
    void check_pairs(std::span<const Range> ranges) const;
    /// Blames `b` if it was passed to the step.
    [[noreturn]] void refuse_overlap(const Range& a, const Range& b) const;
    std::string describe(const Range& range) const;
    std::string label(std::size_t entry) const;

    const int rule_;
    std::size_t group_count_ = 0;
    std::vector<Entry> entries_;
    std::vector<std::pair<std::size_t, int>> missing_;  // entries, and numbers of states without storage

    std::uint32_t extras_ = 0;  // the options' states that take part in a step: bit s is state s

    // Refilled by every run; their capacity is kept, so that a step does not allocate.
    GroupHypers hypers_;
    std::vector<TensorRef>
        tensors_;  // the first tensor_count_ are in use; the others are for steps with more gradients
    std::size_t tensor_count_ = 0;
    std::vector<const ArrayRef*> used_grads_;  // per entry; null where there is no gradient
    std::vector<GivenGrad> given_;
    std::vector<RoundingOf> roundings_;     // per entry; empty before any was needed
    std::vector<std::size_t> first_steps_;  // the entries of which a state holds nothing before this step
    std::vector<py::object> held_;          // references kept while the GIL is released
    std::vector<Axis> held_axes_;
    std::vector<Range> writes_;  // sorted by address
    std::vector<Range> grad_ranges_;
    std::vector<Extent> runs_;
    DeviceSteps device_steps_;
    std::uint64_t checks_ = 0;
    bool disjoint_grads_checked_ = false;
    bool parameters_held_ = false;
    bool outdated_ = false;  // while a step ran
    Occupant running_;
};

}  // namespace sgdcore::bindings
