// A step does not allocate. The program's allocation functions are replaced by counting ones.
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/threads.hpp"
#include "data.hpp"
#include "step.hpp"

namespace {

std::atomic<long> allocations = 0;

void* counted(void* memory) {
    ++allocations;
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

}  // namespace

// The other forms of new and delete call these.
void* operator new(std::size_t size) { return counted(std::malloc(size == 0 ? 1 : size)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
    const auto line = static_cast<std::size_t>(alignment);
    return counted(std::aligned_alloc(line, (size + line - 1) / line * line));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

#if defined(__GLIBC__) && !defined(SGDCORE_TEST_SANITIZED)
// glibc lets a program bring its own malloc and keeps its implementation within reach: also OpenMP's allocations count.
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

void* malloc(std::size_t size) noexcept {
    ++allocations;
    return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) noexcept {
    ++allocations;
    return __libc_calloc(count, size);
}
void* realloc(void* memory, std::size_t size) noexcept {
    ++allocations;
    return __libc_realloc(memory, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
    ++allocations;
    return __libc_memalign(alignment, size);
}
}
#define SGDCORE_TEST_COUNTS_MALLOC 1
#else
#define SGDCORE_TEST_COUNTS_MALLOC 0
#endif

namespace sgdcore::test {

TEST(allocation, the_count_works) {
    long before = allocations;
    void* volatile memory = ::operator new(1);  // volatile: GCC would warn of this program's own pair, inlined
    ::operator delete(memory);
    CHECK(allocations > before);
    before = allocations;
    // Through a pointer that the compiler cannot see through, or it would drop the pair.
    void* (*volatile allocate)(std::size_t) = std::malloc;
    std::free(allocate(1));
    CHECK(allocations > before || !SGDCORE_TEST_COUNTS_MALLOC);
}

TEST(allocation, no_step_after_the_first_allocates) {
    const std::vector<SgdHyper> named{{.lr = 0.1, .momentum = 0.9, .nesterov = true}, {.lr = 0.1}};
    const std::vector<Hyper> hypers = hypers_of(named);
    Random random(50);
    std::vector<TestTensor> tensors;
    for (const std::int64_t size : {3, 1000, 200'000}) {
        for (const std::uint32_t hyper : {0u, 1u}) {
            tensors.emplace_back(DTypes{DType::float32, DType::bfloat16, DType::float32}, size, hyper, false, random);
        }
    }
    std::vector<TensorRef> refs;
    for (TestTensor& tensor : tensors) refs.push_back(tensor.ref());
    const Axis columns[] = {{500, 2}, {2, 1000}}, repeated[] = {{1000, 2}, {200, 0}};
    refs[2].grad_axes = columns;
    refs[5].grad_axes = repeated;
    for (const int threads : {1, 2, 3}) {
        cpu::set_num_threads(threads);
        // OpenMP makes its pool when it is first used, and the first step with strided gradients its scratch memory.
        for (const bool zero_grad : {false, true}) sgdcore::step(refs, hypers, {.zero_grad = zero_grad});
        const long before = allocations;
        for (int i = 0; i < 10; ++i)
            sgdcore::step(refs, hypers, {.zero_grad = i % 2 == 1, .grad_factor = i % 3 == 1 ? 0.5 : 1});
        for (int i = 0; i < 10; ++i) sgdcore::step({refs.data(), 2}, hypers, {});
        const long count = allocations - before;
        CHECK(count == 0, std::to_string(count) + " allocations with " + std::to_string(threads) + " threads");
    }
    cpu::set_num_threads(0);
}

}  // namespace sgdcore::test
