// Memory in use goes onto huge pages where it is, counted by what the system says of it.
#include "huge_pages.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "check.hpp"

namespace sgdcore::test {
namespace {

#if defined(__linux__)
constexpr int collapse = 25;  // MADV_COLLAPSE, from Linux 6.1
constexpr std::uintptr_t kib = 1024;

/// Mapped memory in use, on ordinary pages. What lies around it cannot be touched.
class OrdinaryPages {
  public:
    /// Of the second of the pages, so many bytes at the end are not in use.
    explicit OrdinaryPages(std::size_t huge_pages, std::size_t unused = 0)
        : size_(huge_pages * huge_page),
          mapped_(size_ + 2 * huge_page),
          mapping_(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        if (mapping_ == MAP_FAILED) throw Skip{"the system maps no more memory"};
        begin_ = (reinterpret_cast<std::uintptr_t>(mapping_) / huge_page + 1) * huge_page;
        mprotect(data(), size_, PROT_READ | PROT_WRITE);
        madvise(data(), size_, MADV_NOHUGEPAGE);
        for (std::size_t i = 0; i < size_; ++i) {
            if (i / huge_page != 1 || i % huge_page < huge_page - unused) data()[i] = value(i);
        }
        // Allowed from now on, and still not done.
        madvise(data(), size_, MADV_HUGEPAGE);
    }
    ~OrdinaryPages() { munmap(mapping_, mapped_); }
    OrdinaryPages(const OrdinaryPages&) = delete;
    OrdinaryPages& operator=(const OrdinaryPages&) = delete;

    std::uintptr_t begin() const { return begin_; }

    bool is_unchanged() const {
        for (std::size_t i = 0; i < size_; ++i) {
            if (data()[i] != value(i)) return false;
        }
        return true;
    }

    /// How many of the pages are huge by now.
    long huge() const {
        std::ifstream map("/proc/self/smaps");
        std::string line;
        bool inside = false;
        while (std::getline(map, line)) {
            std::istringstream words(line);
            std::string first;
            words >> first;
            const auto dash = first.find('-');
            if (dash != std::string::npos && first.back() != ':') {
                inside = std::stoull(first, nullptr, 16) <= begin_ &&
                         begin_ < std::stoull(first.substr(dash + 1), nullptr, 16);
            } else if (inside && first == "AnonHugePages:") {
                long size = 0;
                words >> size;
                return size * static_cast<long>(kib) / static_cast<long>(huge_page);
            }
        }
        return -1;
    }

  private:
    unsigned char* data() const { return reinterpret_cast<unsigned char*>(begin_); }
    static unsigned char value(std::size_t i) { return static_cast<unsigned char>(i % 251); }

    std::size_t size_, mapped_;
    void* mapping_;
    std::uintptr_t begin_ = 0;
};

void skip_where_nothing_can_be_seen() {
    std::ostringstream setting;
    setting << std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled").rdbuf();
    if (setting.str().empty() || setting.str().find("[never]") != std::string::npos) {
        throw Skip{"the system has no transparent huge pages"};
    }
    if (madvise(nullptr, 0, collapse) != 0) throw Skip{"the system cannot collapse pages"};
    const OrdinaryPages pages(1);
    madvise(reinterpret_cast<void*>(pages.begin()), huge_page, collapse);
    if (pages.huge() != 1) throw Skip{"the system has no huge page to give"};
}
#endif

}  // namespace

#if defined(__linux__)
TEST(huge_pages, memory_in_use_is_put_on_them) {
    skip_where_nothing_can_be_seen();
    struct Case {
        const char* what;
        std::vector<Extent> ranges;  // from the beginning of four huge pages on
        long expected;
    };
    const std::uintptr_t one = huge_page;
    std::vector<Extent> small = {{4 * one - 16, 4 * one}};
    for (std::uintptr_t at = 0; at + 1024 < 4 * one; at += 1040) small.push_back({at, at + 1024});
    const Case cases[] = {
        {"nothing", {}, 0},
        {"less than a page", {{0, one - 1}}, 0},
        {"parts of two", {{1, 2 * one - 1}}, 0},
        {"all", {{0, 4 * one}}, 4},
        {"what lies wholly within", {{1, 4 * one - 1}}, 2},
        {"neighbours, in any order", {{one / 2, 2 * one}, {2 * one, 4 * one}, {0, one / 2}}, 4},
        {"small gaps", {{0, one / 2}, {one / 2 + 64 * kib, 3 * one}, {3 * one + 16, 4 * one}}, 4},
        {"large gaps", {{0, one / 2}, {one / 2 + 64 * kib + 1, 3 * one}, {3 * one + 128 * kib, 4 * one}}, 2},
        {"the same twice, and parts of it", {{0, 2 * one}, {0, 2 * one}, {one / 4, one / 2}}, 2},
        {"many small ones", small, 4},
    };
    for (const Case& c : cases) {
        const OrdinaryPages pages(4);
        CHECK(pages.huge() == 0, c.what);
        std::vector<Extent> ranges;
        for (const Extent& range : c.ranges) ranges.push_back({pages.begin() + range.begin, pages.begin() + range.end});
        collapse_huge_pages(ranges);
        CHECK(pages.huge() == c.expected, std::string(c.what) + ": " + std::to_string(pages.huge()));
        CHECK(pages.is_unchanged(), c.what);
    }
}

TEST(huge_pages, memory_that_is_not_in_use_stays_so) {
    skip_where_nothing_can_be_seen();
    for (const bool much : {false, true}) {
        const OrdinaryPages pages(4, huge_page / 8 + (much ? 64 * kib : 0));
        CHECK(pages.huge() == 0);
        collapse_huge_pages({{pages.begin(), pages.begin() + 4 * huge_page}});
        CHECK(pages.huge() == (much ? 3 : 4), std::to_string(pages.huge()));
    }
}

TEST(huge_pages, memory_that_is_not_there_is_left_alone) {
    collapse_huge_pages({{huge_page, 5 * huge_page}});
    const OrdinaryPages pages(1);
    // Ranges that reach into what cannot be touched on either side.
    collapse_huge_pages({{pages.begin() - huge_page, pages.begin() + 2 * huge_page}});
    CHECK(pages.is_unchanged());
}
#endif

}  // namespace sgdcore::test
