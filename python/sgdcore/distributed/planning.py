"""How often to average, and what it costs: the alpha-beta model of an all-reduce, measured or given.

An all-reduce of S bytes over N ranks in a ring takes 2 (N - 1) messages one after the other, each of S / N bytes, so
with a latency of alpha seconds and a bandwidth of beta bytes a second::

    t_s = 2 (N - 1) alpha + 2 (N - 1) / N * S / beta

A worker whose own step takes t_c and that averages every H steps spends t_c + t_s / H a step; where the traffic is
hidden behind the computation, max(t_c, t_s / H). Its efficiency is t_c over that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, product
from operator import attrgetter
from time import perf_counter
from typing import Any

import numpy as np

from sgdcore.distributed._checks import check_choice, check_count, check_number, integer
from sgdcore.distributed._flat import FLOATS, ITEM_BYTES, dtype_name
from sgdcore.distributed.groups import ProcessGroup, as_process_group

_WORDS = {"keep": 1, "reset": 1, "average": 2}  # averaged in a round, for each parameter
# 4 KiB to 16 MiB; closest together where the time goes.
_SIZES = tuple(1 << power for power in (12, 14, 16, 18, 20, 21, 22, 23, 24))
# A size is timed in a train of all-reduces, this many bytes or calls: a round sends chunk after chunk, and a throttled
# link lets more through after a pause.
_TRAIN_BYTES, _TRAIN_CALLS = 8 << 20, 32


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    Args:
        latency: seconds that a message takes however short it is.
        bandwidth: bytes a second that each rank sends, while it receives as many: ``10e9 / 8`` for 10 Gbit/s.
        ranks: how many ranks it was measured with; None for numbers given by hand.
        samples: what was measured: pairs of (bytes, seconds of an all-reduce).

    Example:
        >>> Link(latency=50e-6, bandwidth=10e9 / 8).all_reduce(100e6, ranks=8)
        0.1407
    """

    latency: float
    bandwidth: float
    ranks: int | None = None
    samples: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        check_number("latency", self.latency)
        check_number("bandwidth", self.bandwidth, positive=True)

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of an all-reduce of so many bytes over so many ranks."""
        return 2 * (ranks - 1) * (self.latency + nbytes / ranks / self.bandwidth)


def measure(
    group: Any = None, *, sizes: Sequence[int] = _SIZES, rounds: int = 5, buffer: Any = None
) -> Link:
    """Time all-reduces of several sizes and fit latency and bandwidth to the medians; every rank gets the same.

    Args:
        group: what `as_process_group` takes; all ranks call this together.
        sizes: bytes of the all-reduces, two multiples of 4 or more, in the range that the model is to hold for.
        rounds: how often to time each size, in turn with the others.
        buffer: float32 memory to reduce, which is overwritten: a CUDA tensor for NCCL. Default: a NumPy array.

    Raises:
        TypeError: if `buffer` is not float32.
        ValueError: if the group has one rank, `buffer` is smaller than the largest size, or a number is out of range.
    """
    process_group = as_process_group(group)
    ranks = process_group.size
    if ranks < 2:
        raise ValueError("group: has one rank, so that there is nothing to measure")
    if len(set(sizes)) < 2 or any(size < 4 or size % 4 for size in sizes):
        raise ValueError(f"sizes: expected two multiples of 4 or more, got {list(sizes)}")
    check_count("rounds", rounds, 1)
    sizes = sorted(set(sizes))
    buffer = np.zeros(sizes[-1] // 4, np.float32) if buffer is None else buffer
    if dtype_name(buffer.dtype) != "float32":
        raise TypeError(f"buffer: expected dtype float32, got {buffer.dtype}")
    if 4 * len(buffer) < sizes[-1]:
        raise ValueError(f"buffer: expected {sizes[-1]} bytes or more, got {4 * len(buffer)}")
    buffer[:] = 0  # and stays so: the sums neither overflow nor slow the addition down
    seconds = np.empty((rounds, len(sizes)))
    for row in (seconds[0], *seconds):  # the first time opens connections; it is overwritten
        row[:] = [_time_all_reduce(process_group, buffer[: size // 4]) for size in sizes]
    means = buffer[: len(sizes)]  # over the ranks
    for i, median in enumerate(np.median(seconds, axis=0).tolist()):
        means[i] = median / ranks
    process_group.all_reduce(means).wait()
    samples = tuple(zip(sizes, map(float, means), strict=True))
    intercept, slope = _fit_line(samples)
    messages = 2 * (ranks - 1)
    return Link(intercept / messages, messages / ranks / slope, ranks, samples)


def _time_all_reduce(group: ProcessGroup, buffer: Any) -> float:
    calls = max(1, min(_TRAIN_CALLS, _TRAIN_BYTES // (4 * len(buffer))))
    group.all_reduce(buffer[:1]).wait()  # all begin together
    began = perf_counter()
    for _ in range(calls):
        group.all_reduce(buffer).wait()
    float(buffer[0])  # NCCL's wait returns early; reading the result does not
    return (perf_counter() - began) / calls


def _fit_line(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the a >= 0 and b > 0 that minimise the sum of ``sqrt(x) |(a + b x) / y - 1|`` over the samples (x, y).

    A sample that does not fit does not bend the line. Large x count for more, because most of a round's time is theirs.
    The best line goes through two samples, or through one and the origin: all are tried.
    """
    x, y = np.array(samples, float).T
    slopes = ((a, b, (b[1] - a[1]) / (b[0] - a[0])) for a, b in combinations(samples, 2))
    lines = [(0.0, y1 / x1) for x1, y1 in samples]
    lines += [(a[1] - slope * a[0], slope) for a, _, slope in slopes]
    return min(
        ((a, b) for a, b in lines if a >= 0 and b > 0),
        key=lambda line: float((np.sqrt(x) * np.abs((line[0] + line[1] * x) / y - 1)).sum()),
    )


@dataclass(frozen=True)
class Prediction:
    """What the model says for one number of ranks N, dtype that is sent, and period H (`sync_every`).

    Attributes:
        round_seconds: seconds of one all-reduce of everything.
        step_seconds: seconds of a step, the rounds spread over all steps.
        efficiency: seconds of a step without traffic over `step_seconds`.
        step_bytes: bytes that each rank sends a step.
    """

    ranks: int
    wire_dtype: str
    sync_every: int
    round_seconds: float
    step_seconds: float
    efficiency: float
    step_bytes: float


@dataclass(frozen=True)
class Plan:
    """Predictions for every combination of what `plan` was given, as a table if printed."""

    parameters: float
    step_seconds: float
    link: Link
    momentum_sync: str
    overlap: bool
    predictions: tuple[Prediction, ...] = ()

    def predict(self, ranks: int, wire_dtype: str, sync_every: int) -> Prediction:
        """Return one prediction, also for a combination that is not in the table; a ValueError names what is wrong."""
        check_count("sync_every", sync_every, 1)
        nbytes, seconds = self._round(ranks, wire_dtype)
        own, spread = self.step_seconds, seconds / sync_every
        total = max(own, spread) if self.overlap else own + spread
        sent = 2 * (ranks - 1) / ranks * nbytes / sync_every
        return Prediction(ranks, wire_dtype, sync_every, seconds, total, own / total, sent)

    def sync_every(self, efficiency: float, ranks: int, wire_dtype: str = "float32") -> int:
        """Return the smallest period with at least this efficiency e, which is above 0 and below 1.

        That is H >= e / (1 - e) * t_s / t_c; or H >= e * t_s / t_c where the traffic is hidden behind the computation.
        """
        if not 0 < efficiency < 1:
            raise ValueError(f"efficiency: expected above 0 and below 1, got {efficiency}")
        least = efficiency * self._round(ranks, wire_dtype)[1] / self.step_seconds
        return max(1, math.ceil(least if self.overlap else least / (1 - efficiency)))

    def _round(self, ranks: int, wire_dtype: str) -> tuple[float, float]:
        """Return the bytes of a round, and its seconds."""
        check_count("ranks", ranks, 1)
        check_choice("wire_dtype", wire_dtype, FLOATS)
        nbytes = self.parameters * _WORDS[self.momentum_sync] * ITEM_BYTES[wire_dtype]
        return nbytes, self.link.all_reduce(nbytes, ranks)

    def __str__(self) -> str:
        link = f"{1e6 * self.link.latency:.3g} us a message, {_scaled(self.link.bandwidth)}B/s"
        periods = dict.fromkeys(p.sync_every for p in self.predictions)
        lines = [
            f"{_scaled(self.parameters)} parameters, {_scaled(self.step_seconds)}s a step without traffic; {link}",
            f"step time and efficiency when averaging every H steps{', overlapped' * self.overlap}:",
            f"{'N':>5}  {'wire':<8}" + "".join(f"{f'H={period}':>15}" for period in periods),
        ]
        rows = groupby(self.predictions, attrgetter("ranks", "wire_dtype"))
        for (ranks, wire_dtype), row in rows:
            cells = (f"{_scaled(p.step_seconds)}s {p.efficiency:4.0%}" for p in row)
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
    """Predict step time and efficiency of averaging every H steps over N ranks, t_c + t_s / H.

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
        TypeError, ValueError: naming the argument that is no number, out of range, or not one of those above.

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
    table = Plan(parameters, step_seconds, link, momentum_sync, overlap)
    rows = product(_several("ranks", ranks), wire_dtypes, _several("sync_every", sync_every))
    return replace(table, predictions=tuple(table.predict(*row) for row in rows))


def _several(argument: str, counts: Any) -> list[Any]:
    """Return one integer, also NumPy's, or several as a list."""
    if integer(counts) is not None:
        return [counts]
    try:
        return list(counts)
    except TypeError:
        raise TypeError(f"{argument}: expected an integer or several, got {counts!r}") from None


def _scaled(value: float) -> str:
    """Return a number to three digits, and the prefix of the largest unit that is not larger."""
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"))
    scale, prefix = next((unit for unit in units if value >= 0.9995 * unit[0]), units[-1])
    return f"{value / scale:.3g} {prefix}"
