"""Steps on a CUDA device: ``python -m sgdcore bench --device cuda``.

Device time is taken with events around whole steps, over sets of tensors that are used in turn and together exceed the
second-level cache; host time with the clock around calls that do not wait; launches are counted by torch's profiler.
Before anything is timed, ours is compared with itself on the CPU, bit by bit.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import sgdcore
from sgdcore import _core, _devices
from sgdcore.bench.cases import HYPERS, SGD, WORKLOADS, Shapes, rule_in, states_in
from sgdcore.bench.contenders import optimizer_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

_CEILINGS = ("device copy", "same streams")
_ROUNDS = 31
_TURN = 5e-3  # seconds of device time in a round, about

# By name: shapes, and whether each tensor is a group of its own. What the device's memory does not hold is left out.
CASES: dict[str, tuple[Shapes, bool]] = {
    "flat1G": ([(1_000_000_000,)], False),
    "flat64M": (WORKLOADS["flat64M"], False),
    "resnet50": (WORKLOADS["resnet50"], False),
    "161x8": (WORKLOADS["161x8"], False),
    "465 groups": ([(1000,)] * 465, True),
    "465 in one group": ([(1000,)] * 465, False),
}
_QUICK = ("flat64M", "resnet50", "465 groups", "465 in one group")


class _Set:
    """Tensors of a case, and a step over them for each contender."""

    def __init__(self, name: str, hyper: str, contenders: list[str]) -> None:
        import torch

        shapes, apart = CASES[name]
        generator = torch.Generator("cuda").manual_seed(1)
        self.params = [
            torch.nn.Parameter(torch.randn(s, device="cuda", generator=generator)) for s in shapes
        ]
        for p in self.params:
            p.grad = torch.randn(p.shape, device="cuda", generator=generator)
        groups: Any = [{"params": [p]} for p in self.params] if apart else self.params
        kwargs = HYPERS[hyper]
        torch_kwargs = {
            "torch loop": {"foreach": False},
            "torch foreach": {"foreach": True},
            "torch fused": {"fused": True},
            "torch compiled": {"foreach": True},
        }
        self.steps: dict[str, Callable[[], Any]] = {}
        self._held: list[Any] = []
        for contender in contenders:
            if contender == "sgdcore.torch":
                make = optimizer_of(sgdcore.torch, rule_in(hyper))
                self.steps[contender] = make(groups, **kwargs).step
            elif contender in torch_kwargs:
                optimizer = torch.optim.SGD(groups, **kwargs, **torch_kwargs[contender])
                step = optimizer.step
                self.steps[contender] = (
                    torch.compile(step) if contender == "torch compiled" else step
                )
            elif contender == "cupy":
                self.steps[contender] = self._cupy_step(kwargs)
            else:
                self.steps[contender] = self._ceiling(contender)

    def _arrays(self) -> list[tuple[Any, Any, Any]]:
        """Return parameter, gradient and a third tensor of the same size, for each parameter."""
        import torch

        triples = [(p.detach(), p.grad, torch.zeros_like(p)) for p in self.params]
        self._held.append(triples)
        return triples

    def _ceiling(self, name: str) -> Callable[[], Any]:
        import torch

        size = sum(p.numel() for p in self.params)
        flat = [torch.randn(size, device="cuda") for _ in range(3)]
        self._held.append(flat)
        if name == "device copy":
            return lambda: flat[0].copy_(flat[1])
        p, g, b = (each[: size // 4 * 4] for each in flat)

        def memory_pass() -> None:
            _core.memory_pass_on_device(p, g, b, _devices.current_stream(p, 0))

        return memory_pass

    def _cupy_step(self, hyper: dict[str, Any]) -> Callable[[], None]:
        import cupy
        import torch

        kernel = cupy.ElementwiseKernel(
            "float32 g, float32 lr, float32 momentum, float32 decay, bool nesterov",
            "float32 p, float32 b",
            "float d = fmaf(decay, p, g); b = fmaf(1.0f, d, momentum * b); "
            "p = fmaf(-lr, nesterov ? fmaf(momentum, b, d) : b, p)",
            "sgd",
        )
        triples = [tuple(map(cupy.asarray, triple)) for triple in self._arrays()]
        numbers = (
            hyper["lr"],
            hyper.get("momentum", 0.0),
            hyper.get("weight_decay", 0.0),
            hyper.get("nesterov", False),
        )

        def step() -> None:
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                for p, g, b in triples:
                    kernel(g, *numbers, p, b)

        return step


def _contenders(hyper: str, full: bool) -> list[str]:
    if rule_in(hyper) != SGD:
        return ["sgdcore.torch", *_CEILINGS]
    names = ["sgdcore.torch", "torch loop", "torch foreach", "torch fused"]
    if full:
        names.append("torch compiled")
    if importlib.util.find_spec("cupy") is not None:
        names.append("cupy")
    return [*names, *_CEILINGS]


def _moved(name: str, hyper: str, contender: str) -> int:
    """Return the least bytes that a step moves."""
    elements = sum(int(np.prod(shape)) for shape in CASES[name][0])
    if contender == "device copy":
        return 2 * 4 * elements
    streams = 5 if contender == "same streams" else 3 + 2 * states_in(hyper)
    return streams * 4 * elements


def _check(name: str, hyper: str) -> str:
    """Compare three of our steps with those on the CPU; return the difference in words, or an empty string."""
    import torch

    shapes = CASES[name][0]
    generator = torch.Generator().manual_seed(2)
    cpu = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    ours = [torch.nn.Parameter(p.detach().cuda()) for p in cpu]
    make = optimizer_of(sgdcore.torch, rule_in(hyper))
    optimizers = [make(params, **HYPERS[hyper]) for params in (cpu, ours)]
    for _ in range(3):
        for p, q in zip(cpu, ours, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for i, (p, q) in enumerate(zip(cpu, ours, strict=True)):
        wrong = int((p.detach().view(torch.int32) != q.detach().cpu().view(torch.int32)).sum())
        if wrong:
            return f"tensor {i}: {wrong} of {p.numel()} elements differ"
    return ""


def _launches(step: Callable[[], Any]) -> int:
    """Count the kernels of one step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    events = (e for e in found.events() if e.device_type == on_device)
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in events)


def _host_seconds(step: Callable[[], Any]) -> float:
    """Return the median time of calls that do not wait for the device, with its queue empty at first."""
    import torch

    taken = []
    for _ in range(9):
        torch.cuda.synchronize()
        for _ in range(5):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(taken)


def _device_seconds(steps: list[Callable[[], Any]], repeats: int) -> float:
    """Return the device's time of a step, taking turns among the sets."""
    import torch

    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for i in range(repeats):
        steps[i % len(steps)]()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / repeats


def _fitting() -> Iterator[str]:
    import torch

    free = torch.cuda.mem_get_info()[0]
    for name, (shapes, _) in CASES.items():
        elements = sum(int(np.prod(shape)) for shape in shapes)
        # Parameters, gradients, one state for each contender, and three arrays for each ceiling.
        if elements * 4 * (2 + 5 + 2 * 3) < 0.9 * free:
            yield name


def _measure(name: str, hyper: str, full: bool, console: Console) -> dict[str, Any]:
    import torch

    wrong = _check(name, hyper) if name != "flat1G" else ""
    contenders = _contenders(hyper, full)
    elements = sum(int(np.prod(shape)) for shape in CASES[name][0])
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    # Sets that together exceed the cache twice; a step over tiny tensors is not about memory.
    sets = min(16, 1 + 2 * cache // max(1, 12 * elements))
    made = [_Set(name, hyper, contenders) for _ in range(sets)]
    result: dict[str, Any] = {
        "case": name,
        "hyper": hyper,
        "sets": sets,
        "wrong": wrong,
        "contenders": {},
    }
    steps = {c: [each.steps[c] for each in made] for c in contenders}
    for each in steps.values():
        for step in each * 3:
            step()
    repeats = {
        c: max(sets, min(200, int(_TURN / max(1e-6, _device_seconds(each, 2 * sets)))))
        for c, each in steps.items()
    }
    taken: dict[str, list[float]] = {c: [] for c in contenders}
    for _ in range(_ROUNDS):
        for c in contenders:  # in turn
            taken[c].append(_device_seconds(steps[c], repeats[c]))
    for c in contenders:
        seconds = statistics.median(taken[c])
        result["contenders"][c] = {
            "device_seconds": taken[c],
            "median": seconds,
            "bytes_per_second": _moved(name, hyper, c) / seconds,
            "host_seconds": _host_seconds(steps[c][0]),
            "launches": _launches(steps[c][0]),
        }
    _print(result, console)
    return result


def _print(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"{result['case']}, {result['hyper']}, float32", title_justify="left")
    for column in ("", "device", "GB/s", "of copy", "host", "launches", "to ours"):
        table.add_column(column, justify="left" if not column else "right")
    found = result["contenders"]
    ours, copy = found["sgdcore.torch"], found["device copy"]
    for name, each in found.items():
        table.add_row(
            name,
            f"{each['median'] * 1e6:.1f} us",
            f"{each['bytes_per_second'] / 1e9:.0f}",
            f"{each['bytes_per_second'] / copy['bytes_per_second']:.1%}",
            f"{each['host_seconds'] * 1e6:.1f} us",
            str(each["launches"]),
            f"{each['median'] / ours['median']:.2f}",
        )
    console.print(table)
    if result["wrong"]:
        console.print(f"! not the CPU's bits: {result['wrong']}", markup=False)


def main(full: bool, json_path: Path | None, console: Console) -> int:
    """Measure and print; return the exit code: 0, 1 if a result is wrong, 2 if there is no device."""
    info = sgdcore.build_info()
    if not info["cuda"]:
        console.print(f"--device cuda: CUDA cannot be used: {info['cuda_reason']}", markup=False)
        return 2
    try:
        import torch

        missing = not torch.cuda.is_available()
    except ImportError:
        missing = True
    if missing:
        console.print("--device cuda: needs PyTorch built for CUDA, which times it", markup=False)
        return 2
    device = info["cuda_devices"][0]
    console.print(f"sgdcore {info['version']}, torch {torch.__version__}, {device}", markup=False)
    fitting = set(_fitting())
    results = []
    for name in CASES if full else _QUICK:
        if name not in fitting:
            console.print(
                f"{name}: skipped: it does not fit into the device's memory", markup=False
            )
            continue
        for hyper in HYPERS if full else ("momentum",):
            results.append(_measure(name, hyper, full, console))
            torch.cuda.empty_cache()
    if json_path is not None:
        found = {
            "device": device,
            "versions": {
                "sgdcore": info["version"],
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            },
            "date": time.strftime("%Y-%m-%d"),
            "results": results,
        }
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(result["wrong"] for result in results))
