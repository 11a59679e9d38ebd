// The yardstick of the benchmarks: a step's memory traffic without its arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sgdcore::cpu {

/// Streams `size` bytes of each array as a step does, on as many threads as a large step uses; see Stream in
/// kernel.hpp.
std::uint64_t stream(std::byte* param, std::byte* grad, std::byte* momentum, std::int64_t size, bool clear);

}  // namespace sgdcore::cpu
