// Large buffers are mapped directly and advised to use transparent huge pages: fewer page faults at the first touch
// and fewer TLB misses in every pass. docs/design.md says what that was measured to be worth.
#include "buffer.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace sgdcore {

AlignedBuffer::AlignedBuffer(std::size_t size) : size_(size) {
    if (size < 2 * huge_page) {
        data_ = static_cast<std::byte*>(::operator new(size, std::align_val_t{alignment}));
        std::memset(data_, 0, size);
        return;
    }
    if (size > SIZE_MAX - 2 * huge_page) throw std::bad_alloc();
    // Map one huge page more than needed and give back what lies outside the aligned range.
    const std::size_t needed = (size + huge_page - 1) / huge_page * huge_page;
    const std::size_t length = needed + huge_page;
    void* mapping = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<std::uintptr_t>(mapping);
    const std::size_t head = (huge_page - start % huge_page) % huge_page;
    if (head > 0) munmap(mapping, head);
    if (head < huge_page) munmap(reinterpret_cast<void*>(start + head + needed), huge_page - head);
    data_ = reinterpret_cast<std::byte*>(start + head);
    mapped_ = needed;
#if defined(MADV_HUGEPAGE)
    madvise(data_, mapped_, MADV_HUGEPAGE);  // advice: without it the pages are ordinary ones
#endif
}

AlignedBuffer::~AlignedBuffer() {
    if (mapped_ > 0) {
        munmap(data_, mapped_);
    } else {
        ::operator delete(data_, std::align_val_t{alignment});
    }
}

}  // namespace sgdcore
