// Memory for parameters, gradients and momentum: aligned, zeroed, on huge pages where it pays.
#pragma once

#include <cstddef>

#include "platform.hpp"

namespace sgdcore {

/// One owned allocation, zero-filled and aligned to `alignment`. From two huge pages on it has a mapping of its own, on
/// such pages.
class AlignedBuffer {
  public:
    static constexpr std::size_t alignment = cache_line;  // also the widest vector

    /// Throws std::bad_alloc.
    explicit AlignedBuffer(std::size_t size);
    ~AlignedBuffer();
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;

    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

  private:
    std::byte* data_;
    std::size_t size_;
    std::byte* mapping_ = nullptr;
    std::size_t mapped_ = 0;  // length of the mapping; 0 if the memory came from the heap
};

}  // namespace sgdcore
