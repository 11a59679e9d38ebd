// OpenMP, because torch's wheels load the same libgomp: both share one pool instead of fighting for the cores.
#include "threads.hpp"

#include <omp.h>

#include <atomic>

#include "../process.hpp"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// libgomp is not instrumented, so the sanitizer cannot see that a region starts after what came before it and ends
// before what follows. These two say so; everything between them is checked.
#define SGDCORE_HAPPENS_BEFORE(tag) __tsan_release(tag)
#define SGDCORE_HAPPENS_AFTER(tag) __tsan_acquire(tag)
#define SGDCORE_NO_SANITIZE_THREAD __attribute__((no_sanitize_thread))
#else
#define SGDCORE_HAPPENS_BEFORE(tag)
#define SGDCORE_HAPPENS_AFTER(tag)
#define SGDCORE_NO_SANITIZE_THREAD
#endif

namespace sgdcore::cpu {
namespace {

std::atomic<int> requested = 0;

}  // namespace

int num_threads() {
    // A child inherits libgomp's record of a thread pool, but not the threads: its first parallel region would wait for
    // them forever.
    if (forks() > 0) return 1;
    const int count = requested.load(std::memory_order_relaxed);
    return count > 0 ? count : omp_get_max_threads();
}

void set_num_threads(int count) { requested.store(count, std::memory_order_relaxed); }

SGDCORE_NO_SANITIZE_THREAD
void run_parallel(int count, void (*body)(void* context, int thread, int count), void* context) {
    if (count <= 1) {
        body(context, 0, 1);
        return;
    }
    [[maybe_unused]] char region = 0;
    SGDCORE_HAPPENS_BEFORE(&region);
#pragma omp parallel num_threads(count)
    {
        SGDCORE_HAPPENS_AFTER(&region);
        // OpenMP may grant fewer threads than asked for.
        body(context, omp_get_thread_num(), omp_get_num_threads());
        SGDCORE_HAPPENS_BEFORE(&region);
    }
    SGDCORE_HAPPENS_AFTER(&region);
}

}  // namespace sgdcore::cpu
