// SGD's hyperparameters with their names, and steps that take them.
#pragma once

#include <span>
#include <vector>

#include "engine/catalog.hpp"
#include "step.hpp"

namespace sgdcore::test {

struct SgdHyper {
    double lr = 1e-3, momentum = 0, dampening = 0, weight_decay = 0;
    bool nesterov = false, maximize = false;
};

/// As the core takes them.
inline std::vector<Hyper> hypers_of(std::span<const SgdHyper> hypers) {
    std::vector<Hyper> result;
    for (const SgdHyper& hyper : hypers) {
        Values values;
        values[Sgd::lr] = hyper.lr;
        values[Sgd::momentum] = hyper.momentum;
        values[Sgd::dampening] = hyper.dampening;
        values[Sgd::weight_decay] = hyper.weight_decay;
        values[Sgd::nesterov] = hyper.nesterov;
        values[Sgd::maximize] = hyper.maximize;
        result.push_back(rules()[0].hyper(values));
    }
    return result;
}

inline void step(std::span<const TensorRef> tensors, std::span<const SgdHyper> hypers, const StepOptions& options) {
    sgdcore::step(tensors, hypers_of(hypers), options);
}

}  // namespace sgdcore::test
