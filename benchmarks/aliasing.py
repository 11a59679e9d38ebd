"""Measure what the distance between parameters, gradients and momentum does to the time of a step.

    python benchmarks/aliasing.py

All are views into one allocation, three arrays of 16 MiB each time, so that nothing but the distance differs. Caches
that find a line by some bits of its address cannot hold lines at the same time that agree in these; see
csrc/buffer.cpp, which keeps the arrays of a ParameterBuffer apart. results/ holds a run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import numpy as np

import sgdcore
from sgdcore import _core

ELEMENTS = 1 << 22  # float32
MIB = 1 << 20
EXTRA = (0, 64, 256, 1024, 4096, 4160, 2 * MIB)  # bytes beyond a multiple of a power of two
ROUNDS = 15


def main() -> None:
    distances = {
        power * MIB + extra for power in (32, 64, 128, 192, 256, 384, 512) for extra in EXTRA
    }
    memory = _core.allocate((2 * max(distances)) // 4 + ELEMENTS, np.dtype(np.float32))
    optimizers = {}
    for distance in distances:
        p, g, b = (memory[i * distance // 4 :][:ELEMENTS] for i in range(3))
        w = sgdcore.Parameter(p)
        w.grad = g
        optimizers[distance] = optimizer = sgdcore.SGD([w], lr=0.1, momentum=0.9)
        optimizer.state[w]["momentum_buffer"] = b
        optimizer.step()
    seconds: dict[int, list[float]] = {distance: [] for distance in distances}
    for _ in range(ROUNDS):
        for distance in random.sample(list(distances), len(distances)):
            start = time.perf_counter()
            optimizers[distance].step()
            seconds[distance].append(time.perf_counter() - start)
    medians = {distance: statistics.median(each) for distance, each in seconds.items()}
    best = statistics.median(medians.values())
    print("times of a step over the median of all")
    print("distance  " + "".join(f"{f'+ {extra:,}':>13}" for extra in EXTRA) + "   bytes")
    for power in sorted({distance // MIB // 32 * 32 for distance in distances}):
        row = (medians[power * MIB + extra] / best for extra in EXTRA)
        print(f"{power:>4} MiB  " + "".join(f"{ratio:>13.2f}" for ratio in row))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    sgdcore.set_num_threads(1)
    main()
