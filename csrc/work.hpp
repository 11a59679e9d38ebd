// A step's work list as plain data, which the bindings fill in and the backends read.
//
// Nothing here owns memory. Sizes and strides are int64 throughout; strides count bytes.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <span>

#include "dtypes.hpp"
#include "precision.hpp"
#include "rules/rule.hpp"

namespace sgdcore {

inline constexpr int cpu_device = -1;  // CUDA's devices count from 0

inline constexpr int max_dimensions = 64;  // NumPy's limit

/// Elements of a tensor that a device's block handles together; `TensorRef::pending` has one flag for each such chunk.
inline constexpr std::int64_t chunk_size = 8192;

/// One axis of a gradient whose memory order differs from its parameter's.
struct Axis {
    std::int64_t length;
    std::int64_t stride;  // of the gradient, in bytes; may be zero or negative
};

/// True unless every axis steps over all that the axes with shorter strides reach; no two elements share memory then.
inline bool may_overlap(std::span<const Axis> axes, std::size_t item) {
    for (std::size_t i = 0; i < axes.size(); ++i) {
        if (axes[i].length == 1) continue;
        const std::int64_t step = std::abs(axes[i].stride);
        auto reach = static_cast<std::int64_t>(item);
        for (std::size_t j = 0; j < axes.size(); ++j) {
            const std::int64_t other = std::abs(axes[j].stride);
            if (other < step || (other == step && j < i)) reach += (axes[j].length - 1) * other;
        }
        if (step < reach) return true;
    }
    return false;
}

/// The hyperparameters of one parameter group. `RuleInfo::hyper` makes one.
struct Hyper {
    Values values;
    /// The states that take part in the rule's update, among them the second half of a parameter: bit s is state s.
    std::uint32_t states = 0;
    std::uint8_t variants[2] = {};  // the rule's variant for a tensor's later steps, and for its first
    bool skips_zero_grads = false;  // an element whose gradient is zero stays as it is, and so do its states
    Precision precision = Precision::plain;
    std::uint64_t seed = 0;  // of stochastic rounding

    bool has_state(int state) const { return (states >> state & 1) != 0; }
    int variant(bool first_step) const { return variants[first_step]; }
    void keep_in(Precision precision_, std::uint64_t seed_) {
        precision = precision_;
        seed = seed_;
        if (rest_slot(precision) >= 0) states |= 1u << rest_slot(precision);
        // A sum that was not rounded yet is rounded by any step.
        if (precision == Precision::kahan) skips_zero_grads = false;
    }
};

/// Calls `function(state)` for the number of each state in a set, in which bit s is state s.
template <class Function>
void for_each_state(std::uint32_t states, Function&& function) {
    for (; states != 0; states &= states - 1) function(std::countr_zero(states));
}

/// What stochastic rounding knows of a tensor beside its elements.
struct Rounding {
    std::uint64_t position = 0;  // of the parameter in the optimizer
    std::uint64_t steps = 0;     // that the parameter has taken
    std::int64_t first = 0;      // the index, in logical order, of the tensor's first element
    /// The axes in memory order, slowest first, where that is not the logical order. A stride is a distance of indices.
    std::span<const Axis> axes = {};
};

/// One tensor of the work list: where its arrays are and which hyperparameters apply.
///
/// `param` and the states are `size` contiguous elements in the parameter's memory order. So is `grad`, unless
/// `grad_axes` is non-empty: then it lists the axes in the parameter's memory order, slowest first, `grad` is the
/// address of the element with index zero, and the axes' lengths multiply to `size`.
///
/// Without a gradient (null) the rule does nothing: of such a tensor only the average moves.
struct TensorRef {
    std::byte* param = nullptr;
    std::byte* grad = nullptr;          // only read, unless StepOptions::zero_grad
    std::byte* states[max_slots] = {};  // the rule's, then the options'; null where a state takes no part
    std::int64_t size = 0;
    std::span<const Axis> grad_axes = {};
    std::uint32_t hyper = 0;  // index into the step's list of Hyper
    std::int32_t device = cpu_device;
    DType param_dtype = DType::float32;
    DType grad_dtype = DType::float32;
    DType state_dtypes[max_slots] = {DType::float32, DType::float32, DType::float32,
                                     DType::float32, DType::float32, DType::float32};
    bool first_step = false;      // the rule's states hold nothing before this step
    std::uint8_t new_extras = 0;  // the options' states that hold nothing before this step: bit s is max_states + s
    /// Pending first step, on a device only: null, or the address on the device of one byte for each chunk. A byte is
    /// not zero while the chunk's states hold nothing; the step that fills them clears it. The host does not know
    /// whether a step with `found_inf` happened, so the steps after a first one may still be the first.
    std::uint8_t* pending = nullptr;
    const Rounding* rounding = nullptr;  // where the precision is stochastic

    bool has_average() const { return states[average_slot] != nullptr; }
};

/// A hyperparameter in a device's memory; the address is null where there is none.
struct DeviceScalar {
    const std::byte* address = nullptr;
    std::int32_t device = cpu_device;
    DType dtype = DType::float32;
    std::uint8_t unused[3] = {};  // instead of padding: CUDA's tables are compared as bytes
};

/// A group's hyperparameters on devices: the i-th is that of the i-th hyperparameter that the rule lets a device read.
struct DeviceScalars {
    DeviceScalar of[max_device_hypers];
};

struct StepOptions {
    int rule = 0;            // the rule's number
    bool zero_grad = false;  // clear each gradient right after it was used
    double grad_factor = 1;  // multiplies every gradient, rounded to the compute type; undoes a loss's scaling
    /// Each element of a gradient, once multiplied, is limited to [-clip_value, clip_value]; a NaN stays a NaN.
    double clip_value = std::numeric_limits<double>::infinity();
    double clip_factor = 1;  // then multiplies every gradient, rounded to the compute type; limits the gradients' norm
    double average_weight = 0;            // of the parameter as it is after the step, in the average
    bool average_weight_changes = false;  // from step to step

    bool limits_grads() const { return clip_value != std::numeric_limits<double>::infinity(); }
    /// True if a kernel gets other gradients than those in memory.
    bool changes_grads() const { return grad_factor != 1 || limits_grads() || clip_factor != 1; }
};

}  // namespace sgdcore
