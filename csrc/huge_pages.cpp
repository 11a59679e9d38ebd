// docs/design.md says what huge pages were measured to be worth.
#include "huge_pages.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace sgdcore {
namespace {

#if defined(__linux__)
constexpr int collapse = 25;  // MADV_COLLAPSE, which the headers of older systems lack
#endif

/// The addresses of the first and past the last huge page that lie wholly within a range.
Extent whole_huge_pages(const Extent& range) {
    return {(range.begin + huge_page - 1) / huge_page * huge_page, range.end / huge_page * huge_page};
}

/// Whether whoever runs the system wants no huge pages, which an explicit request would not respect.
bool never_wanted() {
    std::ostringstream text;
    text << std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled").rdbuf();
    return text.str().find("[never]") != std::string::npos;
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] std::size_t size) {
#if defined(MADV_HUGEPAGE)
    const auto start = reinterpret_cast<std::uintptr_t>(begin);
    const Extent pages = whole_huge_pages({start, start + size});
    // Advice: where it is not taken the pages are ordinary ones.
    if (pages.begin < pages.end) madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_HUGEPAGE);
#endif
}

void collapse_huge_pages([[maybe_unused]] std::vector<Extent> ranges) {
#if defined(__linux__)
    // Between arrays from one heap lie its notes, and little else that is not of the same making. What a gap holds
    // keeps its values and its address; what was not in use would be from then on, hence the bound.
    constexpr std::uintptr_t small_gap = 1 << 16;
    sort_by_address(ranges);
    std::vector<Extent> runs;
    for (const Extent& range : ranges) {
        if (!runs.empty() && range.begin <= runs.back().end + small_gap) {
            runs.back().end = std::max(runs.back().end, range.end);
        } else {
            runs.push_back(range);
        }
    }
    bool allowed = false;
    for (const Extent& run : runs) {
        const Extent pages = whole_huge_pages(run);
        if (pages.begin >= pages.end) continue;
        if (!allowed && never_wanted()) return;
        allowed = true;
        // A request: pages that the system cannot collapse, for want of memory say, stay as they are.
        madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, collapse);
    }
#endif
}

}  // namespace sgdcore
