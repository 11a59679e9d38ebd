// The yardstick of the benchmarks: a step's memory traffic without its arithmetic.
#pragma once

#include <cstdint>

#include "memory.hpp"

namespace sgdcore::cuda {

/// One thread's part of a step's memory traffic without the arithmetic. Parameter and state are exchanged; the
/// gradient's bits are mixed into one of them, so that the gradient has to be read.
SGDCORE_HOST_DEVICE SGDCORE_INLINE void memory_pass(const MemoryPassArrays& arrays, std::int64_t thread,
                                                    std::int64_t threads) {
    constexpr int turn = 2;
    for (std::int64_t first = thread; first < arrays.quads; first += turn * threads) {
        Vector<storage::Float32, 4> p[turn], g[turn], b[turn];
        std::int64_t at[turn];
        SGDCORE_UNROLL
        for (int i = 0; i < turn; ++i) {
            const std::int64_t quad = first + i * threads;
            at[i] = (quad < arrays.quads ? quad : first) * vector_bytes;
            p[i].load(arrays.param + at[i]);
            g[i].load(arrays.grad + at[i]);
            b[i].load(arrays.state + at[i]);
        }
        SGDCORE_UNROLL
        for (int i = 0; i < turn; ++i) {
            if (first + i * threads >= arrays.quads) break;
            for (int word = 0; word < 4; ++word) b[i].words[word] ^= g[i].words[word];
            b[i].store(arrays.param + at[i]);
            p[i].store(arrays.state + at[i]);
        }
    }
}

}  // namespace sgdcore::cuda
