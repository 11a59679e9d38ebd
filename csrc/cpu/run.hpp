// The CPU backend: a work list in, updated memory out.
#pragma once

#include <span>

#include "../work.hpp"

namespace sgdcore::cpu {

/// Updates every tensor of a checked work list, on as many threads as the total work is worth.
void run(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, const StepOptions& options);

}  // namespace sgdcore::cpu
