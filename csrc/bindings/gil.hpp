// When a step on the CPU lets other threads of Python run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>

#include "../platform.hpp"
#include "../step.hpp"

namespace sgdcore::bindings {

/// Releasing and taking back the GIL costs about as much as updating so many elements, and other threads may make us
/// wait for it.
constexpr bool releases_gil(std::int64_t elements) { return elements >= 16 * 1024; }

/// One step over tensors on the CPU, of so many elements together. Always inlined, which a step over few elements
/// notices.
SGDCORE_INLINE void step_on_cpu(std::span<const TensorRef> tensors, std::int64_t elements,
                                std::span<const SgdHyper> hypers, const StepOptions& options) {
    if (!releases_gil(elements)) return step(tensors, hypers, options);
    const pybind11::gil_scoped_release release;
    step(tensors, hypers, options);
}

}  // namespace sgdcore::bindings
