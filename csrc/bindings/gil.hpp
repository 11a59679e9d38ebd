// When a step on the CPU lets other threads of Python run.
#pragma once

#include <cstdint>

namespace sgdcore::bindings {

/// Releasing and taking back the GIL costs about as much as updating this many elements, and other threads may make us
/// wait for it.
inline constexpr std::int64_t gil_release_elements = 16 * 1024;

}  // namespace sgdcore::bindings
