// The core's one entry for a step on the CPU, and the check of a work list for any device.
#pragma once

#include <span>

#include "work.hpp"

namespace sgdcore {

/// Throws std::invalid_argument if an entry is malformed. `hypers` are of the rule that will be used.
void check(std::span<const TensorRef> tensors, std::span<const Hyper> hypers);

/// Updates every tensor of the list with the hyperparameters it names, in one pass over memory.
///
/// The written ranges (parameters, states, and gradients if cleared) must not overlap each other or a gradient.
/// Throws std::invalid_argument, before anything is changed, if an entry is malformed.
/// Allocates nothing, except staging memory at a thread's first step by blocks, before anything is changed. Safe to
/// call from several threads on disjoint memory.
void step(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, const StepOptions& options);

}  // namespace sgdcore
