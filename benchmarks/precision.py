"""Steps of bfloat16 parameters in each precision, beside those of float32 and of plain bfloat16.

Run ``python benchmarks/precision.py [--threads 1] [--rounds 20] [--elements 33554432]``. The arrays are larger than the
caches. Gradients have the parameters' dtype, momentum is bfloat16 or float32. All contenders are timed in turn, in one
process; printed are the median times and the medians of the ratios of neighbouring times, as parameters a second.
Before anything is timed, a step of each contender over 1,000 elements is compared with `sgdcore.reference`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import ml_dtypes
import numpy as np

import sgdcore
from sgdcore import reference

HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
CONTENDERS: dict[str, tuple[np.dtype[Any], np.dtype[Any], str | None]] = {
    "float32": (FLOAT32, FLOAT32, None),
    "bfloat16": (BFLOAT16, BFLOAT16, None),
    "split": (BFLOAT16, BFLOAT16, "split"),
    "split, float32 momentum": (BFLOAT16, FLOAT32, "split"),
    "kahan": (BFLOAT16, BFLOAT16, "kahan"),
    "stochastic": (BFLOAT16, BFLOAT16, "stochastic"),
}


def made(name: str, elements: int) -> tuple[Any, sgdcore.SGD]:
    dtype, momentum, precision = CONTENDERS[name]
    buffer = sgdcore.ParameterBuffer({"w": (elements,)}, dtype=dtype)
    (parameter,) = buffer.parameters()
    rng = np.random.default_rng(0)
    parameter.data[...] = rng.standard_normal(elements, dtype=np.float32).astype(dtype)
    parameter.grad[...] = rng.standard_normal(elements, dtype=np.float32).astype(dtype)
    return parameter, sgdcore.SGD(
        [parameter], **HYPER, momentum_dtype=momentum, precision=precision
    )


def check(name: str) -> None:
    """Compare a step with the oracles."""
    parameter, optimizer = made(name, 1000)
    precision = CONTENDERS[name][2]
    start = parameter.data.astype(np.float32)
    optimizer.step()
    expected, _ = reference.sgd_update(start, parameter.grad, **HYPER)
    visible: Any = expected.astype(parameter.data.dtype)
    if precision == "split":
        visible = reference.part_split(expected)[0].view(BFLOAT16)
    elif precision == "kahan":
        visible = reference.part_kahan(expected, BFLOAT16)[0]
    elif precision == "stochastic":
        random = reference.random_bits(0, 0, 0, np.arange(1000))
        visible = reference.round_stochastically(expected, BFLOAT16, random)
    assert parameter.data.tobytes() == visible.tobytes(), name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--elements", type=int, default=1 << 25)
    options = parser.parse_args()
    sgdcore.set_num_threads(options.threads)
    for name in CONTENDERS:
        check(name)
    optimizers = {name: made(name, options.elements)[1] for name in CONTENDERS}
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(options.rounds + 2):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    print(f"{options.elements:,} elements, {options.threads} threads, {sgdcore.get_isa()}")
    for name, found in times.items():
        ratios = {
            other: statistics.median(a / b for a, b in zip(times[other], found, strict=True))
            for other in ("float32", "bfloat16")
        }
        print(
            f"{name:24} {1e3 * statistics.median(found):7.2f} ms (least {1e3 * min(found):6.2f}), "
            f"{ratios['float32']:5.2f} of float32's parameters a second, {ratios['bfloat16']:5.2f} of bfloat16's"
        )


if __name__ == "__main__":
    main()
