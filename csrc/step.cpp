// Checks a work list and hands it to the backend. The CPU is the only one so far; a device backend would be given its
// tensors here.
#include "step.hpp"

#include <stdexcept>

#include "cpu/run.hpp"

namespace sgdcore {

void step(std::span<const TensorRef> tensors, std::span<const SgdHyper> hypers, const StepOptions& options) {
    for (const TensorRef& tensor : tensors) {
        if (tensor.hyper >= hypers.size()) throw std::invalid_argument("step: hyperparameter index out of range");
        if (tensor.size < 0) throw std::invalid_argument("step: negative tensor size");
        const bool needs_momentum = hypers[tensor.hyper].momentum != 0;
        if (tensor.size > 0 &&
            (tensor.param == nullptr || tensor.grad == nullptr || (needs_momentum && tensor.momentum == nullptr))) {
            throw std::invalid_argument("step: null pointer in the work list");
        }
    }
    cpu::run(tensors, hypers, options);
}

}  // namespace sgdcore
