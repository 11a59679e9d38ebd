// The yardstick of the benchmarks: a step's memory traffic without its arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sgdcore::cpu {

/// Reads and writes `size` bytes of each array as a step does, on as many threads as a large step uses; see MemoryPass
/// in kernel.hpp.
std::uint64_t memory_pass(std::byte* param, std::byte* grad, std::byte* state, std::int64_t size, bool clear);

}  // namespace sgdcore::cpu
