"""Time whole optimizer steps beside torch.optim.SGD: interleaved rounds, medians, ratios.

    python benchmarks/step.py [--quick] [--threads N] [--json FILE]

Every contender of a workload takes three steps from the same start first, and their results are compared
bit by bit (torch's fused kernel differs in the last n % 8 elements by design of its own, so it is compared to
a rounding); then all of them are timed in turn, round after round, in this one process. Ratios of
medians (and medians of the ratios within each round) carry over to other machines; times do not. Needs torch; see
CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sgdcore
from sgdcore import _core

Array = NDArray[Any]
HYPER: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
MLP = [(64, 128), (128,), (128, 10), (10,)]  # 9,610 parameters
GPT2 = 124_439_808  # elements, as one flat array


def machine() -> str:
    """Return the processor's name and the number of cores, as Linux tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}), {os.cpu_count()} cores"


class Contender:
    """A way to take one step: the function to time, and the parameters it updates."""

    def __init__(self, step: Callable[[], object], params: list[Any] | None = None) -> None:
        self.step = step
        self.params = params
        self.seconds: list[float] = []

    def result(self) -> Array:
        """Return all parameters, flat, as float32."""
        assert self.params is not None
        return np.concatenate([np.asarray(p, np.float32).ravel() for p in self.params])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def arrays(shapes: list[tuple[int, ...]], seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def separate(shapes: list[tuple[int, ...]]) -> Contender:
    params = [sgdcore.Parameter(array) for array in arrays(shapes, 0)]
    for param, grad in zip(params, arrays(shapes, 1), strict=True):
        param.grad = grad
    return Contender(sgdcore.SGD(params, **HYPER).step, [p.data for p in params])


def flat(
    shapes: list[tuple[int, ...]], dtype: str = "float32", zero_grad: bool = False
) -> Contender:
    buffer = sgdcore.ParameterBuffer({str(i): s for i, s in enumerate(shapes)}, dtype)
    for param, data, grad in zip(
        buffer.values(), arrays(shapes, 0), arrays(shapes, 1), strict=True
    ):
        param.data[...] = data
        param.grad = grad
    optimizer = sgdcore.SGD(buffer, **HYPER)
    if zero_grad:
        return Contender(lambda: optimizer.step(zero_grad=True), [buffer.data])
    return Contender(optimizer.step, [buffer.data])


def torch_sgd(shapes: list[tuple[int, ...]], zero_grad: bool = False, **path: bool) -> Contender:
    params = [torch.nn.Parameter(torch.from_numpy(a)) for a in arrays(shapes, 0)]
    for param, grad in zip(params, arrays(shapes, 1), strict=True):
        param.grad = torch.from_numpy(grad)
    optimizer = torch.optim.SGD(params, **HYPER, **path)
    views = [p.detach().numpy() for p in params]
    if zero_grad:

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        return Contender(step, views)
    return Contender(optimizer.step, views)


def stream(size: int, dtype: str = "float32") -> Contender:
    """Return the same memory streams without arithmetic."""
    buffer = sgdcore.ParameterBuffer({"flat": (size,)}, dtype)
    momentum = sgdcore.ParameterBuffer({"flat": (size,)}, dtype).data
    buffer.data[:], buffer.grad[:], momentum[:] = 1, 2, 3
    return Contender(lambda: _core.stream(buffer.data, buffer.grad, momentum))


def torch_variants(shapes: list[tuple[int, ...]], **kwargs: Any) -> dict[str, Contender]:
    return {
        "torch loop": torch_sgd(shapes, foreach=False, **kwargs),
        "torch foreach": torch_sgd(shapes, foreach=True, **kwargs),
        "torch fused": torch_sgd(shapes, fused=True, **kwargs),
    }


def check(contenders: dict[str, Contender]) -> None:
    """Take three steps with each contender and compare the results; raise if one is wrong."""
    checked = {
        name: c for name, c in contenders.items() if c.params is not None and "bfloat16" not in name
    }
    for contender in checked.values():
        for _ in range(3):
            contender.step()
    results = {name: contender.result() for name, contender in checked.items()}
    expected = results.get("torch loop", next(iter(results.values()), None))
    for name, result in results.items():
        assert expected is not None
        if name == "torch fused":
            np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(result, expected, err_msg=name)


def measure(contenders: dict[str, Contender], rounds: int, round_seconds: float) -> None:
    """Time all contenders in turn, `rounds` times; each turn repeats a short step for `round_seconds`."""
    repeats = {}
    for name, contender in contenders.items():
        start = time.perf_counter()
        contender.step()
        once = time.perf_counter() - start
        repeats[name] = max(1, int(round_seconds / max(once, 1e-7)))
    for _ in range(rounds):
        for name, contender in contenders.items():
            step, count = contender.step, repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                step()
            contender.seconds.append((time.perf_counter() - start) / count)


def report(title: str, contenders: dict[str, Contender], results: dict[str, Any]) -> None:
    base_name, base = next(iter(contenders.items()))
    print(f"\n{title}")
    for name, contender in contenders.items():
        low, _, high = statistics.quantiles(contender.seconds, n=4)
        ratio = contender.median / base.median
        # What slows the machine for a while slows a whole round, and cancels within it.
        paired = statistics.median(
            a / b for a, b in zip(contender.seconds, base.seconds, strict=True)
        )
        print(
            f"  {name:<28} {contender.median * 1e6:12.2f} us   IQR {(high - low) / contender.median:5.0%}"
            f"   {ratio:7.2f} x {base_name}   (by rounds {paired:.2f})"
        )
        results.setdefault(title, {})[name] = {
            "median_us": contender.median * 1e6,
            "iqr": (high - low) / contender.median,
            "ratio": ratio,
            "ratio_by_rounds": paired,
        }


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, with the machine and the versions they belong to."""
    document = {
        "machine": machine(),
        "build": sgdcore.build_info(),
        "torch": torch.__version__,
        "results": results,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, and 16M elements instead of 124M"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads for sgdcore and torch (default: all)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.threads:
        sgdcore.set_num_threads(args.threads)
        torch.set_num_threads(args.threads)
    info = sgdcore.build_info()
    print(
        f"sgdcore {info['version']} ({info['isa']}, {info['threads']} threads), torch {torch.__version__} "
        f"({torch.get_num_threads()} threads), {platform.machine()}"
    )
    rounds = 15 if args.quick else 61
    large_rounds = 7 if args.quick else 21
    size = 1 << 24 if args.quick else GPT2
    results: dict[str, Any] = {}

    small: dict[str, list[tuple[int, ...]]] = {
        "one tensor of 10 elements": [(10,)],
        "MLP, 4 tensors, 9,610 elements": MLP,
        "1,000 tensors of 10 elements": [(10,)] * 1000,
        "100 tensors of 1,000 elements": [(1000,)] * 100,
    }
    for title, shapes in small.items():
        contenders = {
            "sgdcore": separate(shapes),
            "sgdcore flat": flat(shapes),
            **torch_variants(shapes),
        }
        check(contenders)
        measure(contenders, rounds, 5e-3)
        report(title, contenders, results)

    title = f"{size:,} elements, flat"
    shapes = [(size,)]
    contenders = {
        "sgdcore flat": flat(shapes),
        "streams, no arithmetic": stream(size),
        **torch_variants(shapes),
    }
    check(contenders)
    measure(contenders, large_rounds, 0)
    report(title, contenders, results)
    fp32 = contenders["sgdcore flat"]
    del contenders

    contenders = {
        "sgdcore step(zero_grad=True)": flat(shapes, zero_grad=True),
        "sgdcore step": fp32,
        "torch fused, zero_grad": torch_sgd(shapes, fused=True, zero_grad=True),
    }
    fp32.seconds = []
    measure(contenders, large_rounds, 0)
    report(f"{title}, clearing the gradient", contenders, results)
    del contenders

    contenders = {
        "sgdcore bfloat16": flat(shapes, "bfloat16"),
        "sgdcore float16": flat(shapes, "float16"),
        "streams, bfloat16": stream(size, "bfloat16"),
        "sgdcore float32": fp32,
    }
    fp32.seconds = []
    measure(contenders, large_rounds, 0)
    report(f"{title}, 16-bit", contenders, results)

    if args.json:
        write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
