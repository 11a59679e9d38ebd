// Checks a work list and hands it to the CPU's backend. Tensors on a device go to cuda/stepper.cpp.
#include "step.hpp"

#include <stdexcept>

#include "cpu/run.hpp"
#include "rules/all.hpp"

namespace sgdcore {
namespace {

bool known(DType dtype) { return static_cast<int>(dtype) < dtype_count; }

/// True if the axes are positive and multiply to `size`.
bool axes_match(std::span<const Axis> axes, std::int64_t size) {
    if (axes.size() > max_dimensions) return false;
    for (const Axis& axis : axes) {
        if (axis.length <= 0 || size % axis.length != 0) return false;
        size /= axis.length;
    }
    return size == 1;
}

/// Throws std::invalid_argument if a tensor cannot be kept in that precision.
void check_precision(const TensorRef& tensor, Precision precision) {
    if (!fits(precision, tensor.param_dtype)) {
        throw std::invalid_argument("step: a parameter's storage type does not fit its precision");
    }
    // A tensor whose average alone moves is only read, as it is stored.
    if (tensor.grad == nullptr) return;
    if ((precision == Precision::split && item_size(tensor.state_dtypes[master_low_slot]) != 2) ||
        (precision == Precision::kahan && tensor.state_dtypes[compensation_slot] != tensor.param_dtype)) {
        throw std::invalid_argument("step: the storage type of a parameter's second half");
    }
    if (precision == Precision::stochastic && tensor.rounding == nullptr) {
        throw std::invalid_argument("step: stochastic rounding needs the parameter's position and steps");
    }
}

}  // namespace

void check(std::span<const TensorRef> tensors, std::span<const Hyper> hypers) {
    for (const TensorRef& tensor : tensors) {
        if (tensor.hyper >= hypers.size()) throw std::invalid_argument("step: hyperparameter index out of range");
        if (tensor.size < 0) throw std::invalid_argument("step: negative tensor size");
        const Hyper& hyper = hypers[tensor.hyper];
        bool known_dtypes = known(tensor.param_dtype) && known(tensor.grad_dtype), null_state = false;
        for_each_state(tensor.grad == nullptr ? 0 : hyper.states, [&](int state) {
            known_dtypes = known_dtypes && known(tensor.state_dtypes[state]);
            null_state = null_state || tensor.states[state] == nullptr;
        });
        if (tensor.has_average()) known_dtypes = known_dtypes && known(tensor.state_dtypes[average_slot]);
        if (!known_dtypes) throw std::invalid_argument("step: unknown storage type");
        if (tensor.size > 0 && !tensor.grad_axes.empty() && !axes_match(tensor.grad_axes, tensor.size)) {
            throw std::invalid_argument("step: the gradient's axes do not match the tensor's size");
        }
        if (hyper.precision != Precision::plain) check_precision(tensor, hyper.precision);
        const bool null_grad = tensor.grad == nullptr && (!tensor.has_average() || !tensor.grad_axes.empty());
        if (tensor.size > 0 && (tensor.param == nullptr || null_grad || null_state)) {
            throw std::invalid_argument("step: null pointer in the work list");
        }
    }
}

void step(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, const StepOptions& options) {
    if (options.rule < 0 || options.rule >= Rules::size) throw std::invalid_argument("step: unknown rule");
    check(tensors, hypers);
    cpu::run(tensors, hypers, options);
}

}  // namespace sgdcore
