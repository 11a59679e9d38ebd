// Large buffers are mapped directly and advised to use transparent huge pages, for fewer TLB misses in every pass.
// docs/design.md has the measurements.
#include "buffer.hpp"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

#include "huge_pages.hpp"

namespace sgdcore {
namespace {

/// The distance of the next large buffer from the start of its first huge page.
///
/// A step walks through several buffers at once, which the system often maps one behind the other. On Zen 4 a step
/// takes four times as long where they are within a page of a multiple of 128 MiB apart (benchmarks/aliasing.py):
/// presumably the first-level cache's hash of such addresses is the same.
std::size_t next_offset() {
    constexpr std::size_t stride = 4096 + AlignedBuffer::alignment;
    static std::atomic<std::size_t> count{0};
    return count.fetch_add(1, std::memory_order_relaxed) % 8 * stride;
}

}  // namespace

AlignedBuffer::AlignedBuffer(std::size_t size) : size_(size) {
    if (size < 2 * huge_page) {
        data_ = static_cast<std::byte*>(::operator new(size, std::align_val_t{alignment}));
        std::memset(data_, 0, size);
        return;
    }
    if (size > SIZE_MAX - 3 * huge_page) throw std::bad_alloc();
    // One huge page more than needed is mapped; the parts outside the aligned range are unmapped again.
    const std::size_t offset = next_offset();
    const std::size_t needed = (offset + size + huge_page - 1) / huge_page * huge_page;
    const std::size_t length = needed + huge_page;
    void* mapping = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<std::uintptr_t>(mapping);
    const std::size_t head = (huge_page - start % huge_page) % huge_page;
    if (head > 0) munmap(mapping, head);
    if (head < huge_page) munmap(reinterpret_cast<void*>(start + head + needed), huge_page - head);
    mapping_ = reinterpret_cast<std::byte*>(start + head);
    mapped_ = needed;
    data_ = mapping_ + offset;
    advise_huge_pages(mapping_, mapped_);
}

AlignedBuffer::~AlignedBuffer() {
    if (mapped_ > 0) {
        munmap(mapping_, mapped_);
    } else {
        ::operator delete(data_, std::align_val_t{alignment});
    }
}

}  // namespace sgdcore
