// Reading and writing elements in a device's memory: one by one in any storage type, or in vectors.
#pragma once

#include <cstdint>

#include "table.hpp"

namespace sgdcore::cuda {

#if defined(__CUDA_ARCH__)
#define SGDCORE_UNROLL _Pragma("unroll")
#else
#define SGDCORE_UNROLL
#endif

/// Tells the compiler that a pointer from a table points into device memory.
SGDCORE_HOST_DEVICE SGDCORE_INLINE std::byte* in_device_memory(std::byte* pointer) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

template <class Storage>
inline constexpr int item_of = sizeof(typename Storage::Word);

template <class Storage>
SGDCORE_HOST_DEVICE SGDCORE_INLINE typename Storage::Word load_word(const std::byte* base, std::int64_t index) {
    using Word [[gnu::may_alias]] = typename Storage::Word;
    return reinterpret_cast<const Word*>(base)[index];
}

template <class Storage>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void store_word(std::byte* base, std::int64_t index, typename Storage::Word word) {
    using Word [[gnu::may_alias]] = typename Storage::Word;
    reinterpret_cast<Word*>(base)[index] = word;
}

template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE C load_as(DType dtype, const std::byte* base, std::int64_t index) {
    return storage::with_storage(dtype, [&]<class Storage>(Storage) SGDCORE_INLINE_LAMBDA {
        return static_cast<C>(Storage::decode(load_word<Storage>(base, index)));
    });
}

template <class C>
SGDCORE_HOST_DEVICE SGDCORE_INLINE void store_as(DType dtype, std::byte* base, std::int64_t index, C value) {
    storage::with_storage(dtype, [&]<class Storage>(Storage) SGDCORE_INLINE_LAMBDA {
        store_word<Storage>(base, index, Storage::encode(value));
    });
}

/// The widest access of a thread.
struct alignas(vector_bytes) [[gnu::may_alias]] Quad {
    std::uint32_t x, y, z, w;
};

/// `lanes` neighbouring elements, as they are stored.
template <class Storage, int lanes>
struct Vector {
    using StorageWord = typename Storage::Word;
    static constexpr int item = sizeof(StorageWord);
    static constexpr int quads = lanes * item / vector_bytes;
    static_assert(quads * vector_bytes == lanes * item);
    std::uint32_t words[4 * quads];

    SGDCORE_HOST_DEVICE SGDCORE_INLINE void load(const std::byte* from) {
        for (int i = 0; i < quads; ++i) {
            const Quad quad = reinterpret_cast<const Quad*>(from)[i];
            words[4 * i] = quad.x;
            words[4 * i + 1] = quad.y;
            words[4 * i + 2] = quad.z;
            words[4 * i + 3] = quad.w;
        }
    }
    /// Loads element by element, from any address.
    SGDCORE_HOST_DEVICE SGDCORE_INLINE void load_elements(const std::byte* from) {
        *this = {};
        for (int lane = 0; lane < lanes; ++lane) set_word(lane, load_word<Storage>(from, lane));
    }
    SGDCORE_HOST_DEVICE SGDCORE_INLINE void store(std::byte* to) const {
        for (int i = 0; i < quads; ++i) {
            reinterpret_cast<Quad*>(to)[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
        }
    }
    SGDCORE_HOST_DEVICE SGDCORE_INLINE StorageWord word(int lane) const {
        if constexpr (item == 8) {
            return bits_as<double>(std::uint64_t{words[2 * lane + 1]} << 32 | std::uint64_t{words[2 * lane]});
        } else if constexpr (item == 4) {
            return bits_as<float>(words[lane]);
        } else {
            return static_cast<StorageWord>(words[lane / 2] >> (lane % 2 * 16));
        }
    }
    SGDCORE_HOST_DEVICE SGDCORE_INLINE void set_word(int lane, StorageWord word) {
        if constexpr (item == 8) {
            const auto bits = bits_as<std::uint64_t>(word);
            words[2 * lane] = static_cast<std::uint32_t>(bits);
            words[2 * lane + 1] = static_cast<std::uint32_t>(bits >> 32);
        } else if constexpr (item == 4) {
            words[lane] = bits_as<std::uint32_t>(word);
        } else {
            const std::uint32_t bits = word, other = words[lane / 2];
            words[lane / 2] = lane % 2 == 0 ? (other & 0xffff0000u) | bits : (other & 0xffffu) | bits << 16;
        }
    }
};

}  // namespace sgdcore::cuda
