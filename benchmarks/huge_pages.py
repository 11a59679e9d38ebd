"""Measure what transparent huge pages do for a ParameterBuffer: first touch and step, with and without.

    python benchmarks/huge_pages.py

Each side runs in processes of its own, in turn; the one without switches the pages off with prctl. results/ holds a
run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time

PR_SET_THP_DISABLE = 41
# Elements of float32: 1 MiB to 256 MiB an array.
SIZES = [1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
ROUNDS = 5


def child(size: int, huge: bool) -> None:
    """Print the seconds of allocating and filling a buffer, and of a step."""
    if not huge and ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError("prctl could not switch transparent huge pages off")
    import sgdcore

    start = time.perf_counter()
    buffer = sgdcore.ParameterBuffer({"w": (size,)})
    buffer.data[:] = 1
    buffer.grad[:] = 1e-3
    optimizer = sgdcore.SGD(buffer, lr=1e-3, momentum=0.9)
    optimizer.step()
    first = time.perf_counter() - start
    repeats = max(5, (1 << 24) // size)
    samples = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(repeats):
            optimizer.step()
        samples.append((time.perf_counter() - start) / repeats)
    print(json.dumps([first, statistics.median(samples)]))


def main() -> None:
    print("elements     first touch, ratio    step, ratio   (ordinary pages / huge pages, medians)")
    for size in SIZES:
        seconds: dict[bool, list[list[float]]] = {True: [], False: []}
        for _ in range(ROUNDS):
            for huge in (True, False):
                command = [sys.executable, __file__, str(size), str(int(huge))]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds[huge].append(json.loads(output))
        first, step = (
            statistics.median(row[i] for row in seconds[False])
            / statistics.median(row[i] for row in seconds[True])
            for i in (0, 1)
        )
        print(f"{size:>11,}  {first:18.2f}  {step:13.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:  # from main
        child(int(sys.argv[1]), bool(int(sys.argv[2])))
    else:
        argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
        main()
