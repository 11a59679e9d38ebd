// Threads: how many work on a step, and the parallel region.
#pragma once

namespace sgdcore::cpu {

/// The number of threads that a large step uses: that of `set_num_threads`, else OpenMP's setting (OMP_NUM_THREADS,
/// torch.set_num_threads). Always 1 in a forked child, where OpenMP's pool does not exist.
int num_threads();

/// Chooses the number of threads; 0 follows OpenMP's setting again.
void set_num_threads(int count);

/// Calls body(context, thread, count) once for each thread in [0, count), in parallel where count > 1.
/// `body` must not throw. Every thread computes in the caller's floating-point mode, and has its own again afterwards.
/// OpenMP's threads may have small stacks (OMP_STACKSIZE): `body` keeps no arrays there.
void run_parallel(int count, void (*body)(void* context, int thread, int count), void* context);

}  // namespace sgdcore::cpu
