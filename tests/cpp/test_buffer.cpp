// AlignedBuffer: alignment, zeroes to the last byte, and sizes around where the memory comes from elsewhere.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "check.hpp"
#include "huge_pages.hpp"

namespace sgdcore::test {
namespace {

constexpr std::size_t huge = huge_page;

bool all_zero(const AlignedBuffer& buffer) {
    return std::all_of(buffer.data(), buffer.data() + buffer.size(),
                       [](std::byte byte) { return byte == std::byte{0}; });
}

/// Bytes of address space in use by the process; zero if unknown.
long address_space() {
    long pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages * sysconf(_SC_PAGESIZE);
}

}  // namespace

TEST(buffer, is_aligned_zeroed_and_writable) {
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{63}, std::size_t{64}, std::size_t{65},
                                   huge - 1, huge, 2 * huge - 1, 2 * huge, 2 * huge + 1, 3 * huge, 5 * huge - 1}) {
        const AlignedBuffer buffer(size);
        const std::string text = std::to_string(size) + " bytes";
        const auto address = reinterpret_cast<std::uintptr_t>(buffer.data());
        CHECK(buffer.size() == size, text);
        CHECK(address % AlignedBuffer::alignment == 0, text);
        CHECK(size < 2 * huge || address % huge < 8 * 4160, text);
        CHECK(all_zero(buffer), text);
        std::fill(buffer.data(), buffer.data() + size, std::byte{1});
    }
}

TEST(buffer, memory_that_was_used_before_is_zeroed) {
    for (const std::size_t size : {std::size_t{4096}, 3 * huge}) {
        for (int i = 0; i < 10; ++i) {
            const AlignedBuffer buffer(size);
            CHECK(all_zero(buffer), std::to_string(size) + " bytes");
            std::fill(buffer.data(), buffer.data() + size, std::byte{1});
        }
    }
}

TEST(buffer, large_ones_are_given_back) {
    constexpr std::size_t size = 16 * huge + 1;
    const long before = address_space();
    if (before == 0) throw Skip{"the system does not tell how much address space is in use"};
    constexpr int times = 400;
    for (int i = 0; i < times; ++i) {
        const AlignedBuffer buffer(size);
        buffer.data()[size - 1] = std::byte{1};
    }
    // What is cut off to align a mapping adds up as well if it stays, to a huge page each time. A quarter of that is
    // left to an emulator or a sanitizer, which take some of their own.
    const long more = address_space() - before;
    CHECK(more < static_cast<long>(times * huge / 4), std::to_string(more) + " bytes stay");
}

TEST(buffer, those_that_follow_each_other_differ_in_their_place_within_a_page) {
    // However the system maps them, no two may lie a multiple of a large power of two apart.
    std::vector<std::unique_ptr<AlignedBuffer>> buffers;
    std::set<std::uintptr_t> places;
    for (std::size_t i = 0; i < 8; ++i) {
        buffers.push_back(std::make_unique<AlignedBuffer>(2 * huge + i));
        places.insert(reinterpret_cast<std::uintptr_t>(buffers[i]->data()) % huge / 4096);
    }
    CHECK(places.size() == 8, std::to_string(places.size()));
}

TEST(buffer, impossible_sizes_throw) {
    for (const std::size_t size : {SIZE_MAX, SIZE_MAX - 1, SIZE_MAX - 2 * huge, SIZE_MAX - 3 * huge, SIZE_MAX / 2}) {
        CHECK_THROWS(std::bad_alloc, "", AlignedBuffer{size});
    }
}

TEST(buffer, several_live_at_once) {
    std::vector<std::unique_ptr<AlignedBuffer>> buffers;
    for (std::size_t i = 0; i < 20; ++i) {
        buffers.push_back(std::make_unique<AlignedBuffer>(i % 2 == 0 ? 100 + i : 2 * huge + i));
        std::fill(buffers[i]->data(), buffers[i]->data() + buffers[i]->size(), static_cast<std::byte>(i));
    }
    for (std::size_t i = 0; i < buffers.size(); ++i) {
        CHECK(std::all_of(buffers[i]->data(), buffers[i]->data() + buffers[i]->size(),
                          [&](std::byte byte) { return byte == static_cast<std::byte>(i); }),
              std::to_string(i));
    }
}

}  // namespace sgdcore::test
