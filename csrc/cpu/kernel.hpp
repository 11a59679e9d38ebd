// The interface between the kernels, compiled once per instruction set, and the code that picks and drives them.
//
// No standard containers here: this header is included by the kernel source, where an inline function must not
// survive as a symbol (see platform.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtypes.hpp"
#include "../rules/sgd.hpp"

namespace sgdcore::cpu {

/// Updates `size` elements. Any alignment; the three ranges must not overlap; `momentum` is not touched by the
/// variants without momentum and not read by those of a first step; `grad` is not written.
using Kernel = void (*)(std::byte* param, const std::byte* grad, std::byte* momentum, std::int64_t size,
                        const SgdHyper& hyper);

/// A step's memory traffic without its arithmetic, the yardstick of the benchmarks: reads `size` bytes of each array
/// and writes `param` and `momentum`, exchanging their contents. Without momentum (null) it writes the exclusive or of
/// `param` and `grad` to `param`. Sets `grad` to zero where `clear` says so. Returns a value that depends on `grad`, so
/// that its reads happen.
using MemoryPass = std::uint64_t (*)(std::byte* param, std::byte* grad, std::byte* momentum, std::int64_t size,
                                     bool clear);

/// One instruction set's kernels, for every combination of storage types and variants.
struct KernelTable {
    static constexpr int size = dtype_count * dtype_count * dtype_count * SgdVariant::count;
    Kernel entries[size];
    MemoryPass memory_pass;

    Kernel find(DType param, DType grad, DType momentum, SgdVariant variant) const {
        return entries[((static_cast<int>(param) * dtype_count + static_cast<int>(grad)) * dtype_count +
                        static_cast<int>(momentum)) *
                           SgdVariant::count +
                       variant.index()];
    }
};

}  // namespace sgdcore::cpu
