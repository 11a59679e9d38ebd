"""Measure what it is worth that sgdcore.torch.SGD puts parameters on huge pages, and what it costs when it is made.

    python benchmarks/collapse.py

Each process makes two optimizers over tensors that torch allocated, one of which leaves them on the pages where they
are, lets them step in turn, and is followed by one that makes them in the other order. results/ holds a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from unittest import mock

import numpy as np

WORKLOADS = ("resnet50", "gpt2", "flat64M")
THREADS = (1, 2)
PROCESSES = 6
STEPS = 61


def child(workload: str, threads: int, collapses_first: bool) -> None:
    """Print for each of the two the seconds of making it and of a step, as it is and without huge pages."""
    import torch

    import sgdcore.torch
    from sgdcore import _core
    from sgdcore.bench.cases import HYPERS
    from sgdcore.bench.cases import WORKLOADS as SHAPES

    torch.set_num_threads(threads)
    optimizers, making = {}, {}
    for collapses in (collapses_first, not collapses_first):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES[workload]]
        for p in params:
            p.grad = torch.randn_like(p)
        start = time.perf_counter()
        if collapses:
            optimizers[True] = sgdcore.torch.SGD(params, **HYPERS["nesterov"])
        else:
            with mock.patch.object(_core, "collapse_huge_pages"):
                optimizers[False] = sgdcore.torch.SGD(params, **HYPERS["nesterov"])
        making[collapses] = time.perf_counter() - start
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(STEPS):
        for collapses in np.random.default_rng(number).permutation([True, False]):
            start = time.perf_counter()
            optimizers[collapses].step()
            seconds[collapses].append(time.perf_counter() - start)
    print(json.dumps([[making[c], statistics.median(seconds[c])] for c in (True, False)]))


def main() -> None:
    print(
        "               threads   step, without / with   [least, most of the processes]   made in, more   = steps"
    )
    for workload in WORKLOADS:
        for threads in THREADS:
            runs = []
            for number in range(PROCESSES):
                command = [sys.executable, __file__, workload, str(threads), str(number % 2)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs.append(json.loads(output))
            ratios = [without[1] / with_[1] for with_, without in runs]
            more = statistics.median(with_[0] - without[0] for with_, without in runs)
            step = statistics.median(with_[1] for with_, _ in runs)
            faster = f"{statistics.median(ratios):20.3f}   [{min(ratios):.3f}, {max(ratios):.3f}]"
            cost = f"{more * 1e3:8.0f} ms   {more / step:7.1f}"
            print(f"{workload:<14} {threads:>7}   {faster}{'':18}{cost}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:  # from main
        child(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))
    else:
        argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
        main()
