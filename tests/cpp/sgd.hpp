// The hyperparameters of SGD and SGDW with their names, and steps that take them.
#pragma once

#include <span>
#include <vector>

#include "engine/catalog.hpp"
#include "step.hpp"

namespace sgdcore::test {

struct SgdHyper {
    double lr = 1e-3, momentum = 0, dampening = 0, weight_decay = 0;
    bool nesterov = false, maximize = false;
    bool decoupled = false;  // SGDW's weight decay; all groups of a step have the same rule
    bool scale_decay_by_lr = false;

    int rule() const { return rule_number(decoupled ? "sgdw" : "sgd"); }
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
        if (hyper.decoupled) values[SgdW::scale_decay_by_lr] = hyper.scale_decay_by_lr;
        result.push_back(rules()[static_cast<std::size_t>(hyper.rule())].hyper(values));
    }
    return result;
}

inline void step(std::span<const TensorRef> tensors, std::span<const SgdHyper> hypers, const StepOptions& options) {
    sgdcore::step(tensors, hypers_of(hypers), options);
}

}  // namespace sgdcore::test
