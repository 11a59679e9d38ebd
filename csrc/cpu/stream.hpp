// The yardstick of the benchmarks: a step's memory traffic without its arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sgdcore::cpu {

/// Reads `size` bytes of each array and writes `param` and `momentum`, exchanging their contents, on as many
/// threads as a step of that size would use. Returns a value that depends on `grad`, so that its reads happen.
std::uint64_t stream(std::byte* param, const std::byte* grad, std::byte* momentum, std::int64_t size);

}  // namespace sgdcore::cpu
