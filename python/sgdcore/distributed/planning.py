"""How often to average, and what it costs: the alpha-beta model of an all-reduce, measured or given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np

from sgdcore._arrays import Array
from sgdcore.distributed._checks import check_choice, check_count, check_number
from sgdcore.distributed._flat import FLOATS, ITEM_BYTES, dtype_name
from sgdcore.distributed.groups import ProcessGroup, as_process_group

_WORDS = {"keep": 1, "reset": 1, "average": 2}  # averaged in a round, for each parameter
# 4 KiB to 16 MiB; closest together where the time goes.
_SIZES = tuple(1 << power for power in (12, 14, 16, 18, 20, 21, 22, 23, 24))
_ROUNDS = 5
# A size is timed in a train of all-reduces, this many bytes or calls: a round sends chunk after chunk, and a throttled
# link lets more through after a pause.
_TRAIN_BYTES, _TRAIN_CALLS = 8 << 20, 32


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    An all-reduce of S bytes over N ranks in a ring takes these seconds::

        t_s = 2 (N - 1) latency + 2 (N - 1) / N * S / bandwidth
    """

    latency: float  # seconds that a message takes however short it is
    bandwidth: float  # bytes a second that each rank sends, while it receives as many: 10e9 / 8 for 10 Gbit/s
    ranks: int | None = None  # that it was measured with

    def __post_init__(self) -> None:
        check_number("latency", self.latency)
        check_number("bandwidth", self.bandwidth, positive=True)

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of an all-reduce of so many bytes over so many ranks."""
        return 2 * (ranks - 1) * (self.latency + nbytes / ranks / self.bandwidth)


def measure(group: Any = None, *, buffer: Any = None) -> Link:
    """Time all-reduces of several sizes and fit latency and bandwidth to the medians; every rank gets the same.

    All ranks of the group call this together. `buffer` is float32 memory of 16 MiB to reduce, which is overwritten: a
    CUDA tensor for NCCL. Raises a ValueError if it is other memory, or the group has one rank.
    """
    ranks = as_process_group(group)
    if ranks.size < 2:
        raise ValueError("group: has one rank, so that there is nothing to measure")
    buffer = np.zeros(_SIZES[-1] // 4, np.float32) if buffer is None else buffer
    if dtype_name(buffer.dtype) != "float32" or 4 * len(buffer) < _SIZES[-1]:
        got = f"{buffer.dtype} of length {len(buffer)}"
        raise ValueError(f"buffer: expected float32 of length {_SIZES[-1] // 4}, got {got}")
    buffer[:] = 0  # and stays so: the sums neither overflow nor slow the addition down
    # The first time opens connections, and does not count.
    times = [[_seconds(ranks, buffer[: n // 4]) for n in _SIZES] for _ in range(1 + _ROUNDS)]
    medians = buffer[: len(_SIZES)]
    for i, median in enumerate(np.median(times[1:], axis=0).tolist()):
        medians[i] = median / ranks.size
    ranks.all_reduce(medians).wait()
    seconds = [float(each) for each in medians]
    intercept, slope = _fit_line(np.array(_SIZES, float), np.array(seconds))
    messages = 2 * (ranks.size - 1)
    return Link(intercept / messages, messages / ranks.size / slope, ranks.size)


def _seconds(group: ProcessGroup, buffer: Any) -> float:
    """Return the seconds of an all-reduce in a train of them."""
    calls = max(1, min(_TRAIN_CALLS, _TRAIN_BYTES // (4 * len(buffer))))
    group.all_reduce(buffer[:1]).wait()  # all begin together
    began = perf_counter()
    for _ in range(calls):
        group.all_reduce(buffer).wait()
    float(buffer[0])  # NCCL's wait returns early; reading the result does not
    return (perf_counter() - began) / calls


def _fit_line(x: Array, y: Array) -> tuple[float, float]:
    """Return a >= 0 and b > 0 of a line y = a + b x; relative errors count, those of large x more."""
    b, a = np.polyfit(x, y, 1, w=np.sqrt(x) / y).tolist()
    return (a, b) if a >= 0 and b > 0 else (0.0, float(y[-1] / x[-1]))


@dataclass(frozen=True)
class Plan:
    """What `plan` was given, and what the model says; printed, a table."""

    parameters: float
    step_seconds: float
    link: Link
    momentum_sync: str
    overlap: bool
    ranks: tuple[int, ...]
    wire_dtypes: tuple[str, ...]
    periods: tuple[int, ...]

    def round_seconds(self, ranks: int, wire_dtype: str = "float32") -> float:
        """Return t_s, the seconds of one all-reduce of everything."""
        check_count("ranks", ranks, 1)
        check_choice("wire_dtype", wire_dtype, FLOATS)
        words = _WORDS[self.momentum_sync] * self.parameters
        return self.link.all_reduce(words * ITEM_BYTES[wire_dtype], ranks)

    def seconds(self, ranks: int, sync_every: int, wire_dtype: str = "float32") -> float:
        """Return the seconds of a step, the rounds spread over all steps; its efficiency is t_c over that."""
        spread = self.round_seconds(ranks, wire_dtype) / check_count("sync_every", sync_every, 1)
        return max(self.step_seconds, spread) if self.overlap else self.step_seconds + spread

    def sync_every(self, efficiency: float, ranks: int, wire_dtype: str = "float32") -> int:
        """Return the smallest H with an efficiency of e: H >= e / (1 - e) * t_s / t_c; if hidden, e * t_s / t_c."""
        if not 0 < efficiency < 1:
            raise ValueError(f"efficiency: expected above 0 and below 1, got {efficiency}")
        least = efficiency * self.round_seconds(ranks, wire_dtype) / self.step_seconds
        return max(1, math.ceil(least if self.overlap else least / (1 - efficiency)))

    def __str__(self) -> str:
        link = f"{1e6 * self.link.latency:.3g} us a message, {_scaled(self.link.bandwidth)}B/s"
        own = self.step_seconds
        lines = [
            f"{_scaled(self.parameters)} parameters, {_scaled(own)}s a step without traffic; {link}",
            f"step time and efficiency when averaging every H steps{', overlapped' * self.overlap}:",
            f"{'N':>5}  {'wire':<8}" + "".join(f"{f'H={period}':>15}" for period in self.periods),
        ]
        for ranks, wire_dtype in product(self.ranks, self.wire_dtypes):
            row = [self.seconds(ranks, period, wire_dtype) for period in self.periods]
            cells = (f"{_scaled(seconds)}s {own / seconds:4.0%}" for seconds in row)
            lines.append(f"{ranks:>5}  {wire_dtype:<8}" + "".join(f"{cell:>15}" for cell in cells))
        return "\n".join(lines)


def plan(
    parameters: float,
    step_seconds: float,
    link: Link,
    *,
    ranks: int | Sequence[int] | None = None,
    sync_every: int | Sequence[int] = (1, 4, 16, 64, 256),
    wire_dtypes: Sequence[str] = ("float32", "bfloat16"),
    momentum_sync: str = "keep",
    overlap: bool = False,
) -> Plan:
    """Predict step time and efficiency of averaging every H steps over N ranks: t_c + t_s / H, and t_c over that.

    Args:
        parameters: how many elements are trained.
        step_seconds: t_c, seconds of a worker's step without traffic: forward, backward, update.
        link: latency and bandwidth, from `measure` or by hand.
        ranks: N, one or several. Default: those that the link was measured with.
        sync_every: H, one period or several; 1 is synchronous SGD.
        wire_dtypes: dtypes that are sent: float64, float32, bfloat16, float16.
        momentum_sync: as for `LocalSGD`; ``"average"`` sends the momentum too, twice the bytes.
        overlap: the traffic is hidden behind the computation, max(t_c, t_s / H).

    Raises:
        TypeError, ValueError: naming the argument that is out of range.

    Example:
        >>> link = Link(latency=50e-6, bandwidth=1e9 / 8)  # 1 Gbit/s, for ResNet-50
        >>> plan(25.6e6, 0.1, link, ranks=8).sync_every(efficiency=0.95, ranks=8)
        273
    """
    if not isinstance(link, Link):
        raise TypeError(f"link: expected a Link, got {link!r}")
    check_number("parameters", parameters, positive=True)
    check_number("step_seconds", step_seconds, positive=True)
    check_choice("momentum_sync", momentum_sync, _WORDS)
    ranks = link.ranks if ranks is None else ranks
    if ranks is None:
        raise ValueError("ranks: needed, because the link was not measured")
    counts, periods = (np.atleast_1d(np.array(each)).tolist() for each in (ranks, sync_every))
    dtypes = tuple(wire_dtypes)
    table = Plan(
        parameters,
        step_seconds,
        link,
        momentum_sync,
        overlap,
        tuple(counts),
        dtypes,
        tuple(periods),
    )
    str(table)  # raises if a number is out of range
    return table


def _scaled(value: float) -> str:
    """Return a number to three digits, and the prefix of the largest unit that is not larger."""
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"))
    scale, prefix = next((unit for unit in units if value >= 0.9995 * unit[0]), units[-1])
    return f"{value / scale:.3g} {prefix}"
