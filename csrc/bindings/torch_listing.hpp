// The work list of a step over torch tensors, kept from step to step. Mostly nothing but the addresses of some
// gradients has changed since the last step: a step then only compares the tensors that it reads with those of the
// list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "../extents.hpp"
#include "../work.hpp"
#include "torch_reader.hpp"

namespace sgdcore::bindings {

/// The tensors of one update. The states need not be read where nobody can have moved them since the last scan.
struct TorchOperands {
    TorchView param, grad, states[max_slots];
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
    /// Begins a scan, which calls `add` for each tensor, in order.
    void start();

    /// Lists the update of the parameter at `position` among all. `refused`: the core does not take such operands,
    /// whose memory has to be dense and whose states have to be laid out as the parameter. `read_states`: the states
    /// were not read, and the list has no such entry from the last scan.
    enum class Answer { listed, refused, read_states };
    Answer add(const TorchReader& reader, std::size_t position, PyObject* grad, const TorchOperands& operands,
               std::uint32_t group, bool first_step);

    /// True if `add` would list these operands with new states.
    bool takes(const TorchReader& reader, PyObject* grad, const TorchOperands& operands) const;

    /// Ends the scan and finds the tensors that overlap.
    void finish();
    /// The indices of the tensors that overlap others where a step writes, sorted. Gradients may overlap each other.
    const std::vector<std::size_t>& overlapping() const { return overlapping_; }
    /// True if the tensors that overlap can be stepped one after the other. They have to be on the CPU. A parameter and
    /// its own states must not overlap. A gradient in another memory order than its parameter must not overlap what its
    /// own step writes.
    bool can_step_in_sequence() const;
    /// True if a tensor's gradient overlaps what its own step writes.
    bool is_own_gradient(std::size_t index) const;
    /// True if each gradient can be cleared as soon as it was used, since no gradients overlap.
    bool can_clear();

    std::span<const TensorRef> tensors() const { return tensors_; }
    /// The memory that the tensors' steps read and write; the owner is the index.
    std::vector<Claim> claims() const;
    /// True if the last scan listed other parameters or states than the one before.
    bool relisted() const { return relisted_; }
    /// The position of the parameter of the tensor with this index.
    std::size_t position(std::size_t index) const { return sources_[index].position; }
    std::int64_t elements() const { return elements_; }
    /// Sets what stochastic rounding knows of the tensor with this index.
    void set_rounding(std::size_t index, const Rounding* rounding) { tensors_[index].rounding = rounding; }
    /// Makes `axes` those of a tensor's parameter in memory order, with distances of indices in logical order as
    /// strides; empty where the two orders are the same.
    void index_axes(std::size_t index, std::vector<Axis>& axes) const;
    /// True if some of the tensors are not on the CPU.
    bool on_device() const { return on_device_; }

    /// Prefetches what `add` will read of a later tensor, which saves 5 % of a step over 1,000 tensors of 8 elements.
    void prefetch() const;

  private:
    /// Where a tensor of the work list comes from.
    struct Source {
        std::size_t position;
        std::size_t layout;  // in layouts_: the shape, the parameter's strides, the gradient's strides
        std::size_t axes;    // in axes_: the end of its axes
        int dimensions;
        std::uint32_t in_use;  // its states
        bool may_be_negated;   // each step has to ask whether the gradient is
        // Where torch keeps the shapes, near the rest of its description of the tensors. Only prefetched.
        const void *param_header, *grad_header;
    };

    /// Calls `function(extent)` for what a step of this tensor writes.
    template <class Function>
    void for_each_write(std::size_t index, Function&& function) const;
    bool matches(std::size_t index, const TorchOperands& operands) const;
    Answer update(std::size_t index, const TorchOperands& operands);
    Answer append(const TorchReader& reader, std::size_t position, PyObject* grad, const TorchOperands& operands,
                  std::uint32_t group, bool first_step);
    void truncate(std::size_t count);
    bool writes_are_disjoint();
    bool apart_from_writes(const TensorRef& tensor) const;
    bool is_disjoint();
    bool grads_are_disjoint();

    std::vector<TensorRef> tensors_;
    std::vector<Source> sources_;  // parallel to tensors_
    std::vector<std::int64_t> layouts_;
    std::vector<Axis> axes_;
    std::vector<Extent> writes_;  // parameters and states, sorted by address
    std::vector<Extent> grads_;   // scratch memory of grads_are_disjoint
    std::vector<std::size_t> overlapping_;
    std::int64_t elements_ = 0;
    bool on_device_ = false;
    bool complete_ = false;        // the last scan came to its end
    bool disjoint_grads_ = false;  // false: not known

    // Of the running scan.
    std::size_t next_ = 0;
    bool relisted_ = false;
    bool moved_writes_ = false;             // since the last complete scan
    std::vector<std::size_t> moved_grads_;  // since the last complete scan
};

/// The work on a parameter whose average moves and which takes no step; nothing if the core does not take the two.
std::optional<TensorRef> average_of(const TorchOperands& operands, std::uint32_t group);

/// Writes the axes to `order`, slowest first. Returns false unless the elements fill one range of memory.
bool memory_order(const TorchView& view, int* order);

/// The number of elements.
std::int64_t size_of(const TorchView& view);

}  // namespace sgdcore::bindings
