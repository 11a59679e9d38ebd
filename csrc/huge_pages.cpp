// Huge pages by madvise; docs/design.md has the measurements.
#include "huge_pages.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace sgdcore {
namespace {

/// The huge pages that lie wholly within a range.
Extent whole_huge_pages(const Extent& range) {
    return {(range.begin + huge_page - 1) / huge_page * huge_page, range.end / huge_page * huge_page};
}

#if defined(__linux__)
constexpr int collapse = 25;  // MADV_COLLAPSE, which the headers of older systems lack

/// True if the system's setting is to use no huge pages. An explicit request would not respect the setting.
bool never_wanted() {
    std::ostringstream text;
    text << std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled").rdbuf();
    return text.str().find("[never]") != std::string::npos;
}

/// True if at least seven eighths of a huge page are in use. The whole page would be in use afterwards, and a table
/// with few used rows may be larger than the machine's memory.
bool is_in_use(std::uintptr_t begin) {
    static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> flags(huge_page / page);
    if (mincore(reinterpret_cast<void*>(begin), huge_page, flags.data()) != 0) return false;
    const auto resident = std::ranges::count_if(flags, [](unsigned char each) { return (each & 1) != 0; });
    return static_cast<std::size_t>(resident) >= flags.size() - flags.size() / 8;
}
#endif

}  // namespace

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] std::size_t size) {
#if defined(MADV_HUGEPAGE)
    const Extent pages = whole_huge_pages(extent_at(begin, size));
    // Only advice: the system may use ordinary pages all the same.
    if (pages.begin < pages.end) madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_HUGEPAGE);
#endif
}

void collapse_huge_pages([[maybe_unused]] std::vector<Extent> ranges) {
#if defined(__linux__)
    // Between arrays from one heap lie the heap's own records and little else. Memory in a gap keeps its values and its
    // addresses.
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
        for (std::uintptr_t begin = pages.begin, end = begin; begin < pages.end; begin = end + huge_page) {
            for (end = begin; end < pages.end && is_in_use(end);) end += huge_page;
            // Pages that cannot be collapsed, for lack of memory say, stay as they are.
            if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, collapse);
        }
    }
#endif
}

}  // namespace sgdcore
