// Ranges of memory, and which of them overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sgdcore {

/// A half-open range of addresses.
struct Extent {
    std::uintptr_t begin = 0, end = 0;
};

// For vectors of extents, or of what is derived from them. None may be empty.

template <class Range>
void sort_by_address(std::vector<Range>& ranges) {
    std::sort(ranges.begin(), ranges.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
}

/// Of ranges sorted by address, the first that overlaps the next one; the end if they are disjoint.
template <class Range>
auto find_overlap(const std::vector<Range>& sorted) {
    return std::adjacent_find(sorted.begin(), sorted.end(),
                              [](const Extent& a, const Extent& b) { return b.begin < a.end; });
}

/// Of disjoint ranges sorted by address, the first that overlaps `extent`; the end if there is none.
template <class Range>
auto find_overlap(const std::vector<Range>& disjoint, const Extent& extent) {
    // Their ends are sorted, too.
    const auto next = std::upper_bound(disjoint.begin(), disjoint.end(), extent.begin,
                                       [](std::uintptr_t begin, const Extent& range) { return begin < range.end; });
    return next != disjoint.end() && next->begin < extent.end ? next : disjoint.end();
}

}  // namespace sgdcore
