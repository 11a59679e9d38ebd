// The work list of a step over torch tensors. It is kept from step to step: as a rule nothing has changed since the
// last one but the addresses of some gradients, so a step only compares what it finds with what the list holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../extents.hpp"
#include "../work.hpp"
#include "torch_reader.hpp"

namespace sgdcore::bindings {

/// The tensors of one update. The states may be left out where nobody can have moved them since the last pass.
struct TorchViews {
    TorchView param, grad, states[max_states];
    std::uint32_t in_use = 0;  // the states that take part: bit s is state s
    bool states_are_read = false;

    /// Calls `function(state)` for the number of each state that takes part.
    template <class Function>
    void for_each_state(Function&& function) const {
        sgdcore::for_each_state(in_use, function);
    }
};

class TorchListing {
  public:
    /// Begins a new pass: the tensors are `add`ed one by one, in order.
    void start();

    /// Lists the update of the parameter at `position` among all. Refuses views that are not as the core takes them:
    /// dense memory, the states laid out as their parameter. Asks for the states to be read if they were not and there
    /// is more to them than at the last pass.
    enum class Answer { listed, refused, read_states };
    Answer add(const TorchReader& reader, std::size_t position, PyObject* grad, const TorchViews& views,
               std::uint32_t group, bool first);

    /// True if `add` would list a tensor like that, whose states are to be made yet.
    bool takes(const TorchReader& reader, PyObject* grad, const TorchViews& views) const;

    /// Ends the pass: finds the tensors that are entangled.
    void finish();
    /// Indices of the tensors whose memory, where a step writes it, overlaps other memory of the list; sorted.
    /// Gradients may overlap each other.
    const std::vector<std::size_t>& entangled() const { return entangled_; }
    /// True if the entangled tensors can be stepped one after the other: on the CPU, no parameter overlaps its own
    /// states, none of these overlap each other, and no gradient out of the parameter's order what its own step writes.
    bool can_take_turns() const;
    /// True if a tensor's gradient overlaps what its own step writes.
    bool is_own_gradient(std::size_t index) const;
    /// True if no gradients overlap, so that each can be cleared as soon as it was used.
    bool can_clear();

    std::span<const TensorRef> tensors() const { return tensors_; }
    /// What the tensors read and write, by index.
    std::vector<Claim> claims() const;
    /// True if the last pass listed other parameters than the one before, or with other states.
    bool relisted() const { return relisted_; }
    /// Of the tensor with this index: the position of its parameter.
    std::size_t position(std::size_t index) const { return found_[index].position; }
    std::int64_t elements() const { return elements_; }
    /// True if some of the tensors are not on the CPU.
    bool on_device() const { return on_device_; }

    /// Brings to the cache what is about to be read of the tensors that are a little ahead: 5 % of the time of a step
    /// over 1,000 tensors of 8 elements.
    void prefetch() const;

  private:
    /// How a tensor of the work list was found.
    struct Found {
        std::size_t position;
        std::size_t layout;  // in layouts_: the shape, the parameter's strides, the gradient's strides
        std::size_t axes;    // in axes_: the end of its axes
        int dimensions;
        std::uint32_t in_use;  // its states
        bool may_be_negated;   // the gradient has to be asked each time
        // Where torch keeps the shapes, beside the rest of what it knows of a tensor; only to be prefetched.
        const void *param_header, *grad_header;
    };

    /// Calls `function(extent)` for what a step of this tensor writes.
    template <class Function>
    void for_each_write(std::size_t index, Function&& function) const;
    bool matches(std::size_t index, const TorchViews& views) const;
    Answer update(std::size_t index, const TorchViews& views);
    Answer append(const TorchReader& reader, std::size_t position, PyObject* grad, const TorchViews& views,
                  std::uint32_t group, bool first);
    void truncate(std::size_t count);
    bool writes_are_disjoint();
    bool apart_from_writes(const TensorRef& tensor) const;
    bool is_disjoint();
    bool grads_are_disjoint();

    std::vector<TensorRef> tensors_;
    std::vector<Found> found_;  // parallel to tensors_
    std::vector<std::int64_t> layouts_;
    std::vector<Axis> axes_;
    std::vector<Extent> writes_;  // parameters and states, sorted by address
    std::vector<Extent> grads_;   // used while they are compared
    std::vector<std::size_t> entangled_;
    std::int64_t elements_ = 0;
    bool on_device_ = false;
    bool complete_ = false;        // the last pass came to its end
    bool disjoint_grads_ = false;  // so far as the last pass knows

    // Of the pass under way.
    std::size_t next_ = 0;
    bool relisted_ = false;
    bool moved_writes_ = false;             // since the last complete pass, as is what follows
    std::vector<std::size_t> moved_grads_;  // indices
};

/// Lists the axes, slowest first. Returns false unless the elements fill one range of memory.
bool memory_order(const TorchView& view, int* order);

/// The number of elements.
std::int64_t size_of(const TorchView& view);

}  // namespace sgdcore::bindings
