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

/// The tensors of one update. A momentum buffer may be left out where nobody can have moved it since the last pass.
struct TorchViews {
    TorchView param, grad, momentum;
    bool has_momentum = false, momentum_is_read = false;
};

class TorchListing {
  public:
    /// Begins a new pass: the tensors are `add`ed one by one, in order.
    void start();

    /// Lists the update of the parameter at `position` among all. Refuses views that are not as the core takes them:
    /// dense memory, the momentum laid out as its parameter. Asks for the momentum to be read if it was not and there
    /// is more to it than at the last pass.
    enum class Answer { listed, refused, read_momentum };
    Answer add(const TorchReader& reader, std::size_t position, PyObject* grad, const TorchViews& views,
               std::uint32_t group, bool first);

    /// Ends the pass. Returns false if memory that a step writes overlaps other memory of the list; gradients may
    /// overlap each other unless they are cleared.
    bool finish(bool zero_grad);

    std::span<const TensorRef> tensors() const { return tensors_; }
    /// True if the last pass listed other parameters than the one before, or others with momentum.
    bool relisted() const { return relisted_; }
    /// Of the tensor with this index: the position of its parameter, and whether it has a momentum buffer.
    std::size_t position(std::size_t index) const { return found_[index].position; }
    bool has_momentum(std::size_t index) const { return found_[index].has_momentum; }
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
        bool has_momentum;
        bool may_be_negated;  // the gradient has to be asked each time
        // Where torch keeps the shapes, beside the rest of what it knows of a tensor; only to be prefetched.
        const void *param_header, *grad_header;
    };

    bool matches(std::size_t index, const TorchViews& views) const;
    Answer update(std::size_t index, const TorchViews& views);
    Answer append(const TorchReader& reader, std::size_t position, PyObject* grad, const TorchViews& views,
                  std::uint32_t group, bool first);
    void truncate(std::size_t count);
    bool writes_are_disjoint();
    bool apart_from_writes(const TensorRef& tensor) const;
    bool grads_are_disjoint();
    static Extent grad_extent(const TensorRef& tensor);

    std::vector<TensorRef> tensors_;
    std::vector<Found> found_;  // parallel to tensors_
    std::vector<std::int64_t> layouts_;
    std::vector<Axis> axes_;
    std::vector<Extent> writes_;  // parameters and momentum buffers, sorted by address
    std::vector<Extent> grads_;   // used while they are compared
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
