// The threads are those of libgomp, GCC's OpenMP runtime. torch's wheels load libgomp, too, so both share one pool
// instead of fighting for the cores.
//
// A region is started by GOMP_parallel, the call that GCC makes of `#pragma omp parallel`. Clang would call a function
// that only its own runtime has, and a process with torch would have two pools. (Clang's runtime has GOMP_parallel,
// too.)
#include "threads.hpp"

#include <atomic>

#include "../float_mode.hpp"
#include "../platform.hpp"
#include "../process.hpp"

#if defined(SGDCORE_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
// libgomp is not instrumented, so the sanitizer does not see how a region is ordered with the code before and after it.
// These two macros tell. Everything between them is checked.
#define SGDCORE_HAPPENS_BEFORE(tag) __tsan_release(tag)
#define SGDCORE_HAPPENS_AFTER(tag) __tsan_acquire(tag)
#define SGDCORE_NO_SANITIZE_THREAD __attribute__((no_sanitize_thread))
#else
#define SGDCORE_HAPPENS_BEFORE(tag) static_cast<void>(tag)
#define SGDCORE_HAPPENS_AFTER(tag) static_cast<void>(tag)
#define SGDCORE_NO_SANITIZE_THREAD
#endif

// Declared here, since clang has no omp.h and does not find GCC's.
extern "C" {
int omp_get_max_threads(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
}

namespace sgdcore::cpu {
namespace {

std::atomic<int> requested = 0;

struct Region {
    void (*body)(void* context, int thread, int count);
    void* context;
    FloatMode mode;  // the caller's
};

SGDCORE_NO_SANITIZE_THREAD
void run_thread(void* data) {
    SGDCORE_HAPPENS_AFTER(data);
    const Region& region = *static_cast<const Region*>(data);
    {
        const FloatModeScope scope(region.mode);
        // OpenMP may grant fewer threads than asked for.
        region.body(region.context, omp_get_thread_num(), omp_get_num_threads());
    }
    SGDCORE_HAPPENS_BEFORE(data);
}

}  // namespace

int num_threads() {
    // A forked child inherits libgomp's record of a thread pool without the threads: its first parallel region would
    // wait for them forever.
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
    Region region{body, context, FloatMode::current()};
    SGDCORE_HAPPENS_BEFORE(&region);
    GOMP_parallel(run_thread, &region, static_cast<unsigned>(count), 0);
    SGDCORE_HAPPENS_AFTER(&region);
}

}  // namespace sgdcore::cpu
