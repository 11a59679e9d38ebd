// Gradients whose memory order differs from their parameter's.
#pragma once

#include <algorithm>
#include <cstring>

#include "../work.hpp"

namespace sgdcore::cpu {

inline bool grad_may_overlap(const TensorRef& tensor) {
    return may_overlap(tensor.grad_axes, item_size(tensor.grad_dtype));
}

/// Walks a strided gradient in the order of its parameter's elements.
class StridedGradient {
  public:
    StridedGradient(const TensorRef& tensor, std::int64_t start)
        : axes_(tensor.grad_axes), item_(item_size(tensor.grad_dtype)), address_(tensor.grad) {
        for (std::size_t axis = axes_.size(); axis-- > 0;) {
            index_[axis] = start % axes_[axis].length;
            start /= axes_[axis].length;
            address_ += index_[axis] * axes_[axis].stride;
        }
    }

    /// Copies the next `count` elements to `target`.
    void gather(std::byte* target, std::int64_t count) {
        walk(count, [&](const std::byte* element) {
            std::memcpy(target, element, item_);
            target += item_;
        });
    }

    /// Copies the next `count` elements from `source`.
    void scatter(const std::byte* source, std::int64_t count) {
        walk(count, [&](std::byte* element) {
            std::memcpy(element, source, item_);
            source += item_;
        });
    }

    /// Zeroes the next `count` elements.
    void clear(std::int64_t count) {
        walk(count, [&](std::byte* element) { std::memset(element, 0, item_); });
    }

  private:
    template <class Visit>
    void walk(std::int64_t count, Visit visit) {
        const std::size_t last = axes_.size() - 1;
        while (count > 0) {
            const std::int64_t run = std::min(count, axes_[last].length - index_[last]);
            for (std::int64_t i = 0; i < run; ++i, address_ += axes_[last].stride) visit(address_);
            count -= run;
            index_[last] += run;
            for (std::size_t axis = last; index_[axis] == axes_[axis].length && axis > 0; --axis) {
                address_ += axes_[axis - 1].stride - axes_[axis].length * axes_[axis].stride;
                index_[axis] = 0;
                ++index_[axis - 1];
            }
        }
    }

    std::span<const Axis> axes_;
    std::size_t item_;
    std::byte* address_;
    std::int64_t index_[max_dimensions];
};

}  // namespace sgdcore::cpu
