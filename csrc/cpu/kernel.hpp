// The interface between the kernels, compiled once per instruction set, and the code that picks and drives them.
//
// A rule has a kernel for each of its variants and each combination of storage types in `direct_storage`, except first
// steps over 16-bit storage, and on the x86-64 baseline all of 16-bit storage. All other combinations are converted
// block by block to the compute type and back. So the number of kernels is rules x variants x direct combinations, and
// that of conversions is storage types x compute types.
//
// This header has no standard containers: the kernel source includes it, where no inline function may become a symbol
// (see platform.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtypes.hpp"
#include "../precision.hpp"
#include "../rules/all.hpp"

namespace sgdcore::cpu {

/// Updates `size` elements. The arrays may have any alignment and must not overlap. `grad` is not written. Use says
/// what is done with each state.
using Kernel = void (*)(std::byte* param, const std::byte* grad, std::byte* const* states, std::int64_t size,
                        const Values& values);

/// Converts `size` elements of a storage type to the compute type, or back.
using Conversion = void (*)(const std::byte* from, std::int64_t size, std::byte* to);

/// Joins `size` elements of two 16-bit arrays to float32, or parts them (see precision.hpp).
using Joining = void (*)(const std::byte* visible, const std::byte* rest, std::int64_t size, std::byte* to);
using Parting = void (*)(const std::byte* from, std::int64_t size, std::byte* visible, std::byte* rest);

/// Converts `size` elements of float32 to a 16-bit storage type, rounding stochastically. Element i has the index
/// `first` + i * `stride` in logical order.
using StochasticConversion = void (*)(const std::byte* from, std::int64_t size, std::byte* to, storage::RandomBits bits,
                                      std::int64_t first, std::int64_t stride);

/// Writes `size` elements of the compute type to `to`, multiplied by `factor`, rounded to that type. The arrays are the
/// same, or do not overlap.
using Scaling = void (*)(const std::byte* from, std::int64_t size, double factor, std::byte* to);

/// The same, with each element limited to [-limit, limit], rounded to that type. A NaN stays as it is. Returns true if
/// all elements in `from` are finite.
using Clamping = bool (*)(const std::byte* from, std::int64_t size, double limit, std::byte* to);

constexpr std::int64_t squares_block = 1024;  // elements
constexpr int squares_lanes = 16;

/// Sums of squares. The sum of a lane is that of its two numbers, of which the second is small.
struct SquareSums {
    double high[squares_lanes], low[squares_lanes];
};

/// Adds the squares of at most `squares_block` elements of a storage type to the sums; the i-th to lane i modulo
/// `squares_lanes`. Returns true if all elements are finite. If one is not, a sum becomes infinite, or NaN where an
/// element is one.
///
/// The bits are those of all instruction sets and of both compute types.
using AddSquares = bool (*)(const std::byte* elements, std::int64_t size, SquareSums& sums);

/// Moves `size` elements of an average towards a parameter: `weight`, rounded to the compute type, is the part of the
/// distance. The arrays may have any alignment and must not overlap.
using Averaging = void (*)(std::byte* average, const std::byte* param, std::int64_t size, double weight);

/// A step's memory traffic without its arithmetic, the yardstick of the benchmarks: reads `size` bytes of each array
/// and writes `param` and `state`, exchanging their contents. Without a state (null) it writes the exclusive or of
/// `param` and `grad` to `param`. Sets `grad` to zero where `clear` says so. Returns a value that depends on `grad`, so
/// that its reads happen.
using MemoryPass = std::uint64_t (*)(std::byte* param, std::byte* grad, std::byte* state, std::int64_t size,
                                     bool clear);

/// The storage types of a tensor's arrays; all its states have one.
struct Storage {
    DType param, grad, state;
};

/// The combinations that kernels read and write without staging: each storage type throughout, the compute types first,
/// and the usual mixtures of 16 and 32 bits.
inline constexpr Storage direct_storage[] = {
    {DType::float32, DType::float32, DType::float32},  {DType::float64, DType::float64, DType::float64},
    {DType::float16, DType::float16, DType::float16},  {DType::bfloat16, DType::bfloat16, DType::bfloat16},
    {DType::float32, DType::bfloat16, DType::float32}, {DType::bfloat16, DType::bfloat16, DType::float32},
};
inline constexpr int direct_count = sizeof direct_storage / sizeof *direct_storage;

/// Finds a combination's place in `direct_storage`.
class DirectIndex {
  public:
    constexpr DirectIndex() {
        for (std::int8_t& place : places_) place = -1;
        for (std::int8_t i = 0; i < direct_count; ++i) places_[number(direct_storage[i])] = i;
    }
    /// -1 where no kernel has the combination.
    constexpr int find(const Storage& storage) const { return places_[number(storage)]; }

  private:
    static constexpr int number(const Storage& storage) {
        return (static_cast<int>(storage.param) * dtype_count + static_cast<int>(storage.grad)) * dtype_count +
               static_cast<int>(storage.state);
    }
    std::int8_t places_[dtype_count * dtype_count * dtype_count];
};
inline constexpr DirectIndex direct_index;

/// The kernels of one rule, by combination and variant.
struct RuleKernels {
    const Kernel* kernels;
    const Kernel* float32_blocks;  // by variant
    int variants;

    /// Null where the storage is converted: see above.
    Kernel find(int direct, int variant) const { return kernels[direct * variants + variant]; }
    /// The kernel for tensors that are converted block by block.
    Kernel for_blocks(DType param, bool wide, int variant) const {
        constexpr DType float32 = DType::float32, float64 = DType::float64;
        if (wide) return find(direct_index.find({float64, float64, float64}), variant);
        // A parameter of float32 is updated where it is, so memory is the limit.
        if (param == float32) return find(direct_index.find({float32, float32, float32}), variant);
        return float32_blocks[variant];
    }
};

/// One instruction set's code. Of two entries the first is for the compute type float32, the second for float64.
struct KernelTable {
    RuleKernels rules[Rules::size];
    Conversion decode[dtype_count][2];  // null for float64 to float32, which never happens
    Conversion encode[dtype_count][2];
    Scaling scale[2];
    Clamping clamp[2];
    // Parameters in a precision of their own, by precision and storage type. Null where there is none.
    Joining join[precision_count][dtype_count];
    Parting part[precision_count][dtype_count];
    StochasticConversion encode_stochastic[dtype_count];
    // By the types of parameter and average. Null where they are converted.
    Averaging average[dtype_count][dtype_count];
    AddSquares add_squares[dtype_count];
    MemoryPass memory_pass;
};

}  // namespace sgdcore::cpu
