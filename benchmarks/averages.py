"""A step that also averages, beside the step alone and beside torch's fused step followed by AveragedModel.

Run ``python benchmarks/averages.py [--threads 1] [--rounds 20] [workloads ...]``. The workloads are those of
``python -m sgdcore bench``, in float32 with momentum. Before anything is timed, the averages of sgdcore and torch are
compared in every bit after three steps. All contenders of a workload are timed in turn, in one process; printed are the
median time of each and the medians of the ratios of neighbouring times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sgdcore
from sgdcore.bench.cases import WORKLOADS

DECAY = 0.999
HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
ALONE, EMA, TORCH = "step alone", "step with EMA", "torch fused + AveragedModel"


def parameters(workload: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in WORKLOADS[workload]
    ]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01
    return made


def contenders(workload: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, after three steps whose averages were found equal."""
    alone = sgdcore.torch.SGD(parameters(workload), **HYPER)
    params = parameters(workload)
    ours = sgdcore.torch.SGD(params, **HYPER, average=sgdcore.EMA(DECAY))
    model = torch.nn.ParameterList(parameters(workload))
    fused = torch.optim.SGD(model.parameters(), **HYPER, fused=True)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]

    def with_torch() -> None:
        fused.step()
        averaged.update_parameters(model)

    found: dict[str, Callable[[], Any]] = {ALONE: alone.step, EMA: ours.step, TORCH: with_torch}
    for _ in range(3):
        for step in found.values():
            step()
    for p, q, average in zip(params, model.parameters(), averaged.parameters(), strict=True):
        # torch's fused step rounds the last elements of a tensor differently.
        body = p.numel() // 8 * 8
        assert torch.equal(p.detach().view(-1)[:body], q.detach().view(-1)[:body])
        # Asking for `state` would make each later step read all states.
        own = ours._state[p]["average"].view(-1)[:body]
        assert torch.equal(own, average.detach().view(-1)[:body])
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
    over_alone = statistics.median(a / b for a, b in zip(times[EMA], times[ALONE], strict=True))
    over_torch = statistics.median(a / b for a, b in zip(times[TORCH], times[EMA], strict=True))
    shown = ", ".join(f"{name} {median:,.1f} us" for name, median in medians.items())
    return f"{workload:10} {over_alone:5.2f} of the step alone, {over_torch:5.2f} times sooner than torch ({shown})"


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
