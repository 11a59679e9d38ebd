// Ranges of memory, and which of them overlap.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

namespace sgdcore {

inline std::uintptr_t address_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

/// A half-open range of addresses.
struct Extent {
    std::uintptr_t begin = 0, end = 0;
};

/// The range of so many bytes from an address on.
inline Extent extent_at(const void* begin, std::uintptr_t bytes) {
    return {address_of(begin), address_of(begin) + bytes};
}

/// True if two extents, which may not be empty, share a byte.
inline bool overlap(const Extent& a, const Extent& b) { return a.begin < b.end && b.begin < a.end; }

// The following functions take vectors of extents, or of types derived from Extent. No extent may be empty.

/// Sorts the ranges by address. The first `sorted` ones are in order already.
template <class Range>
void sort_by_address(std::vector<Range>& ranges, std::size_t sorted = 0) {
    const auto before = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
    const auto middle = ranges.begin() + static_cast<std::ptrdiff_t>(sorted);
    std::sort(middle, ranges.end(), before);
    if (sorted == 0) return;
    std::vector<Range> merged;
    merged.reserve(ranges.size());
    std::merge(ranges.begin(), middle, middle, ranges.end(), std::back_inserter(merged), before);
    ranges.swap(merged);
}

/// The first of the ranges, sorted by address, that overlaps the next one; the end if they are disjoint.
template <class Range>
auto find_overlap(const std::vector<Range>& sorted) {
    return std::adjacent_find(sorted.begin(), sorted.end(),
                              [](const Extent& a, const Extent& b) { return b.begin < a.end; });
}

/// The first of the disjoint ranges, sorted by address, that overlaps `extent`; the end if there is none.
template <class Range>
auto find_overlap(const std::vector<Range>& disjoint, const Extent& extent) {
    // The ends of disjoint ranges are sorted, too.
    const auto next = std::upper_bound(disjoint.begin(), disjoint.end(), extent.begin,
                                       [](std::uintptr_t begin, const Extent& range) { return begin < range.end; });
    return next != disjoint.end() && next->begin < extent.end ? next : disjoint.end();
}

/// A range of memory that a step reads or writes for one of its tensors, the owner.
struct Claim : Extent {
    std::size_t owner = 0;
    bool written = false;
};

/// Marks the owners of claims that conflict, and returns whether there are any. Claims form groups that hang together
/// by overlaps; all claims of a group conflict if the group has several and one of them is written.
inline bool mark_conflicts(std::vector<Claim>& claims, std::vector<bool>& marked) {
    bool found = false;
    std::erase_if(claims, [](const Claim& claim) { return claim.begin == claim.end; });
    sort_by_address(claims);
    for (auto first = claims.begin(); first != claims.end();) {
        auto last = first + 1;
        bool written = first->written;
        for (std::uintptr_t end = first->end; last != claims.end() && last->begin < end; ++last) {
            end = std::max(end, last->end);
            written |= last->written;
        }
        if (written && last - first > 1) {
            found = true;
            for (; first != last; ++first) marked[first->owner] = true;
        }
        first = last;
    }
    return found;
}

/// The union of some ranges, which tells whether another range overlaps it.
class Covered {
  public:
    explicit Covered(std::vector<Extent> extents) : disjoint_(std::move(extents)) {
        std::erase_if(disjoint_, [](const Extent& extent) { return extent.begin == extent.end; });
        sort_by_address(disjoint_);
        std::size_t count = 0;
        for (const Extent& extent : disjoint_) {
            if (count > 0 && extent.begin <= disjoint_[count - 1].end) {
                disjoint_[count - 1].end = std::max(disjoint_[count - 1].end, extent.end);
            } else {
                disjoint_[count++] = extent;
            }
        }
        disjoint_.resize(count);
    }

    bool overlaps(const Extent& extent) const {
        return extent.begin != extent.end && find_overlap(disjoint_, extent) != disjoint_.end();
    }

  private:
    std::vector<Extent> disjoint_;
};

/// Marks the owners of claims, in either list, that overlap a claim of the other list where one of the two is written.
/// Returns whether there are any.
inline bool mark_conflicts_between(const std::vector<Claim>& ones, const std::vector<Claim>& others,
                                   std::vector<bool>& ones_marked, std::vector<bool>& others_marked) {
    const auto covered = [](const std::vector<Claim>& claims, const auto& is_taken) {
        std::vector<Extent> all, written;
        for (const Claim& claim : claims) {
            if (!is_taken(claim)) continue;
            all.push_back(claim);
            if (claim.written) written.push_back(claim);
        }
        return std::pair(Covered(std::move(all)), Covered(std::move(written)));
    };
    const auto mark = [](const std::vector<Claim>& claims, const std::pair<Covered, Covered>& memory,
                         std::vector<bool>& marked) {
        bool found = false;
        for (const Claim& claim : claims) {
            if (!(claim.written ? memory.first : memory.second).overlaps(claim)) continue;
            marked[claim.owner] = found = true;
        }
        return found;
    };
    std::vector<bool> met(ones_marked.size());
    if (!mark(ones, covered(others, [](const Claim&) { return true; }), met)) return false;
    mark(others, covered(ones, [&](const Claim& claim) { return met[claim.owner]; }), others_marked);
    for (std::size_t i = 0; i < met.size(); ++i) {
        if (met[i]) ones_marked[i] = true;
    }
    return true;
}

}  // namespace sgdcore
