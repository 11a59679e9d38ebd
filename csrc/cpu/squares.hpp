// Passes over all gradients of a step: the sum of their squares, and what rewrites them.
#pragma once

#include <span>

#include "../work.hpp"

namespace sgdcore::cpu {

struct Squares {
    double sum = 0;          // rounded to float64
    bool all_finite = true;  // every element of every gradient is, before `clip_value` limits it
};

/// Sums the squares of the gradients as the step uses them: multiplied by `grad_factor` and limited by `clip_value`.
///
/// The gradients are read in the order of the list, each in its parameter's memory order, as one row of elements, which
/// is cut into blocks of a fixed number of elements. So the bits depend on the row alone: on no number of threads, no
/// instruction set, and no division of the row into tensors. The sum is compensated: it is that of exact arithmetic,
/// rounded once, unless its exact value lies within about 2^-80 of it of where rounding changes direction.
Squares squares_of(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, const StepOptions& options);

/// Multiplies every gradient in memory by `factor`: in float64 if it is stored so, else in float32, rounded once.
void scale_grads(std::span<const TensorRef> tensors, double factor);

/// Sets every gradient to zeros, as a step with `zero_grad` does.
void clear_grads(std::span<const TensorRef> tensors);

}  // namespace sgdcore::cpu
