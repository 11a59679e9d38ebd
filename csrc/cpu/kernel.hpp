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

/// One instruction set's kernels, for every combination of storage types and variants.
struct KernelTable {
    static constexpr int size = dtype_count * dtype_count * dtype_count * SgdVariant::count;
    Kernel entries[size];

    Kernel find(DType param, DType grad, DType momentum, SgdVariant variant) const {
        return entries[((static_cast<int>(param) * dtype_count + static_cast<int>(grad)) * dtype_count +
                        static_cast<int>(momentum)) *
                           SgdVariant::count +
                       variant.index()];
    }
};

}  // namespace sgdcore::cpu
