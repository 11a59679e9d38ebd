"""A step that clips by the global norm, beside the step alone and beside torch's clip_grad_norm_ with its fused step.

Run ``python benchmarks/clipping.py [--threads 1] [--rounds 20] [workloads ...]``. The workloads are those of
``python -m sgdcore bench``, in float32 with momentum. Before anything is timed, the parameters of sgdcore and torch are
compared after three steps. All contenders of a workload are timed in turn, in one process; printed are the median time
of each and the medians of the ratios of neighbouring times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import sgdcore
from sgdcore.bench.cases import WORKLOADS

HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
ALONE, NORM, CLIP, TORCH = "step alone", "norm", "norm and factor", "torch clip_grad_norm_ + fused"


def parameters(workload: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in WORKLOADS[workload]
    ]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01
    return made


def contenders(workload: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, after three steps whose parameters were found equal up to the rounding of the norm."""
    alone = sgdcore.torch.SGD(parameters(workload), **HYPER)
    params, others = parameters(workload), parameters(workload)
    limit = 0.5 * float(
        torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    )
    measuring = sgdcore.torch.SGD(parameters(workload), **HYPER, max_grad_norm=float("inf"))
    ours = sgdcore.torch.SGD(params, **HYPER, max_grad_norm=limit)
    fused = torch.optim.SGD(others, **HYPER, fused=True)

    def with_torch() -> None:
        torch.nn.utils.clip_grad_norm_(others, limit)
        fused.step()

    found: dict[str, Callable[[], Any]] = {
        ALONE: alone.step,
        NORM: measuring.step,
        CLIP: ours.step,
        TORCH: with_torch,
    }
    for _ in range(3):
        for step in found.values():
            step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    return found


def measure(workload: str, rounds: int) -> str:
    steps = contenders(workload)
    elements = sum(p.numel() for p in parameters(workload))
    count = max(1, 200_000 // (elements + 500 * len(WORKLOADS[workload])))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(count):
                step()
            if turn > 0:
                times[name].append((time.perf_counter() - start) / count)
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    shown = ", ".join(f"{name} {median:,.1f} us" for name, median in medians.items())
    return (
        f"{workload:10} {ratio(CLIP, ALONE):5.2f} of the step alone ({ratio(NORM, ALONE):.2f} with factor 1), "
        f"{ratio(TORCH, CLIP):5.2f} times sooner than torch ({shown})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("workloads", nargs="*", default=["mlp", "161x8", "resnet50", "gpt2"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sgdcore.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {sgdcore.get_isa()}")
    for workload in options.workloads:
        print(measure(workload, options.rounds), flush=True)


if __name__ == "__main__":
    main()
