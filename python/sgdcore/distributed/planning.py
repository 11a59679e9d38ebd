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
from io import BytesIO
from itertools import combinations, groupby
from numbers import Real
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sgdcore._hints import needs
from sgdcore.distributed._checks import check_count, integer
from sgdcore.distributed._flat import item_bytes
from sgdcore.distributed.groups import ProcessGroup, as_process_group

__all__ = ["Link", "Plan", "Prediction", "measure", "plan"]

_WIRE_DTYPES = ("float64", "float32", "bfloat16", "float16")
_WORDS = {"keep": 1, "reset": 1, "average": 2}  # averaged in a round, for each parameter
# 4 KiB to 16 MiB; closest together where the time goes.
_SIZES = tuple(1 << power for power in (12, 14, 16, 18, 20, 21, 22, 23, 24))
# A size is timed in a train of all-reduces, this many bytes or calls: a round sends chunk after chunk, and a throttled
# link lets more through after a pause.
_TRAIN_BYTES, _TRAIN_CALLS = 8 << 20, 32
_ROW = attrgetter("ranks", "wire_dtype")  # of a table
_LARGE = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
_SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    Args:
        latency: seconds that a message takes however short it is, at least 0.
        bandwidth: bytes a second that each rank sends, while it receives as many: ``10e9 / 8`` for 10 Gbit/s.
        ranks: how many ranks it was measured with; None for numbers given by hand.
        samples: what was measured: pairs of (bytes, seconds of an all-reduce).

    Raises:
        TypeError: if an argument is no number.
        ValueError: if one is out of range.

    Example:
        >>> Link(latency=50e-6, bandwidth=10e9 / 8).all_reduce(100e6, ranks=8)
        0.1407
    """

    latency: float
    bandwidth: float
    ranks: int | None = None
    samples: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check_number("latency", self.latency, "of at least 0")
        _check_number("bandwidth", self.bandwidth, "above 0")

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of an all-reduce of so many bytes over so many ranks."""
        return 2 * (ranks - 1) * (self.latency + nbytes / ranks / self.bandwidth)

    @property
    def error(self) -> float:
        """The median of the relative deviations of the samples from the model; 0 without samples."""
        if self.ranks is None or not self.samples:
            return 0.0
        deviations = [abs(self.all_reduce(s, self.ranks) / t - 1) for s, t in self.samples]
        return float(np.median(deviations))

    def __str__(self) -> str:
        text = f"{1e6 * self.latency:.3g} us a message, {_scaled(self.bandwidth, _LARGE)}B/s"
        if self.ranks is not None:
            text += f", measured with {self.ranks} ranks, median deviation {self.error:.0%}"
        return text


def measure(
    group: Any = None, *, sizes: Sequence[int] = _SIZES, rounds: int = 5, buffer: Any = None
) -> Link:
    """Time all-reduces of several sizes and fit latency and bandwidth to them; every rank gets the same.

    Each size is timed `rounds` times, in turn with the others, and its median counts. The line through the medians is
    the one with the least sum of relative deviations, weighted by the square root of the size: a size that does not
    fit, because of caches or another algorithm, does not bend it.

    Args:
        group: what `as_process_group` takes; all ranks call this together.
        sizes: bytes of the all-reduces, two multiples of 4 or more, in the range that the model is to hold for.
        rounds: how often to time each size.
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
    if buffer is None:
        buffer = np.zeros(sizes[-1] // 4, np.float32)
    if str(buffer.dtype).rpartition(".")[2] != "float32":
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
    group.barrier()
    began = perf_counter()
    for _ in range(calls):
        group.all_reduce(buffer).wait()
    float(buffer[0])  # NCCL's wait returns early; reading the result does not
    return (perf_counter() - began) / calls


def _fit_line(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the a >= 0 and b > 0 that minimise the sum of ``sqrt(x) |(a + b x) / y - 1|`` over the samples (x, y).

    Large x count for more, because most of a round's time is theirs. The best line goes through two samples, or
    through one and the origin: all are tried.
    """
    x, y = np.array(samples, float).T

    def cost(line: tuple[float, float]) -> float:
        return float((np.sqrt(x) * np.abs((line[0] + line[1] * x) / y - 1)).sum())

    lines = [(0.0, y1 / x1) for x1, y1 in samples]
    for (x1, y1), (x2, y2) in combinations(samples, 2):
        slope = (y2 - y1) / (x2 - x1)
        lines.append((y1 - slope * x1, slope))
    return min((line for line in lines if line[0] >= 0 and line[1] > 0), key=cost)


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
    """Predictions for every combination of what `plan` was given: print it, or `draw` it."""

    parameters: float
    step_seconds: float
    link: Link
    momentum_sync: str
    overlap: bool
    predictions: tuple[Prediction, ...]

    def predict(self, ranks: int, wire_dtype: str, sync_every: int) -> Prediction:
        """Return one prediction, also for a combination that is not in the table.

        Raises:
            ValueError: if an argument is out of range.
        """
        check_count("ranks", ranks, 1)
        check_count("sync_every", sync_every, 1)
        round_bytes = self._round_bytes(wire_dtype)
        round_seconds = self.link.all_reduce(round_bytes, ranks)
        own, spread = self.step_seconds, round_seconds / sync_every
        total = max(own, spread) if self.overlap else own + spread
        sent = 2 * (ranks - 1) / ranks * round_bytes / sync_every
        return Prediction(ranks, wire_dtype, sync_every, round_seconds, total, own / total, sent)

    def sync_every(self, efficiency: float, ranks: int, wire_dtype: str = "float32") -> int:
        """Return the smallest period with at least this efficiency.

        That is H >= e / (1 - e) * t_s / t_c; or H >= e * t_s / t_c where the traffic is hidden behind the computation.

        Raises:
            TypeError: if `ranks` is no integer.
            ValueError: if an argument is out of range: e above 0 and below 1, N from 1 on, a dtype of `plan`.
        """
        if not 0 < efficiency < 1:
            raise ValueError(f"efficiency: expected above 0 and below 1, got {efficiency}")
        check_count("ranks", ranks, 1)
        round_seconds = self.link.all_reduce(self._round_bytes(wire_dtype), ranks)
        least = efficiency * round_seconds / self.step_seconds
        return max(1, math.ceil(least if self.overlap else least / (1 - efficiency)))

    def _round_bytes(self, wire_dtype: str) -> float:
        if wire_dtype not in _WIRE_DTYPES:
            expected = ", ".join(_WIRE_DTYPES)
            raise ValueError(f"wire_dtype: expected one of {expected}, got {wire_dtype!r}")
        return self.parameters * _WORDS[self.momentum_sync] * item_bytes(wire_dtype)

    def __str__(self) -> str:
        periods = dict.fromkeys(p.sync_every for p in self.predictions)
        parameters, step = _scaled(self.parameters, _LARGE), _scaled(self.step_seconds, _SECONDS)
        lines = [
            f"{parameters} parameters, {step} a step without traffic; {self.link}",
            f"step time and efficiency when averaging every H steps{', overlapped' * self.overlap}:",
            f"{'N':>5}  {'wire':<8}" + "".join(f"{f'H={period}':>15}" for period in periods),
        ]
        for (ranks, wire_dtype), row in groupby(self.predictions, _ROW):
            cells = (f"{_scaled(p.step_seconds, _SECONDS)} {p.efficiency:4.0%}" for p in row)
            lines.append(f"{ranks:>5}  {wire_dtype:<8}" + "".join(f"{cell:>15}" for cell in cells))
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Write a PNG with the step time (left) and the efficiency (right) over the period.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        # Figure and canvas made by hand need no display, and leave pyplot's global state alone.
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(needs("drawing a plan", "matplotlib", "demo", error)) from error
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(str(self).partition("\n")[0], fontsize="medium")
        shown = {"step_seconds": "Seconds a step", "efficiency": "Efficiency"}
        for axes, (name, title) in zip(figure.subplots(1, 2), shown.items(), strict=True):
            for (ranks, wire_dtype), group in groupby(self.predictions, _ROW):
                points = [(p.sync_every, getattr(p, name)) for p in group]
                axes.plot(*zip(*points, strict=True), ".-", label=f"{ranks} ranks, {wire_dtype}")
            axes.set(title=title, xlabel="steps between two averagings, H")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        axes.legend()
        image = BytesIO()  # so that an error while drawing leaves no half a file
        figure.savefig(image, format="png", dpi=120)
        Path(path).write_bytes(image.getvalue())


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
        TypeError: if `link` is not a `Link`, or a number is none.
        ValueError: if a number is out of range, or a name is not one of those above.

    Example:
        ResNet-50 on eight machines with 1 Gbit/s:

        >>> table = plan(25.6e6, 0.1, Link(latency=50e-6, bandwidth=1e9 / 8), ranks=8, sync_every=(1, 16, 256))
        >>> print(table)
        25.6 M parameters, 100 ms a step without traffic; 50 us a message, 125 MB/s
        step time and efficiency when averaging every H steps:
            N  wire                H=1           H=16          H=256
            8  float32     1.53 s   7%    190 ms  53%    106 ms  95%
            8  bfloat16    818 ms  12%    145 ms  69%    103 ms  97%
        >>> table.sync_every(efficiency=0.95, ranks=8)
        273
    """
    if not isinstance(link, Link):
        raise TypeError(f"link: expected a Link, got {link!r}")
    _check_number("parameters", parameters, "above 0")
    _check_number("step_seconds", step_seconds, "above 0")
    if momentum_sync not in _WORDS:
        expected = ", ".join(_WORDS)
        raise ValueError(f"momentum_sync: expected one of {expected}, got {momentum_sync!r}")
    if ranks is None:
        if link.ranks is None:
            raise ValueError("ranks: needed, because the link was not measured")
        ranks = link.ranks
    table = Plan(parameters, step_seconds, link, momentum_sync, overlap, ())
    predictions = tuple(
        table.predict(n, wire_dtype, period)
        for n in _several("ranks", ranks)
        for wire_dtype in wire_dtypes
        for period in _several("sync_every", sync_every)
    )
    return replace(table, predictions=predictions)


def _several(argument: str, counts: Any) -> list[Any]:
    """Return one integer, also NumPy's, or several as a list."""
    if integer(counts) is not None:
        return [counts]
    try:
        return list(counts)
    except TypeError:
        raise TypeError(f"{argument}: expected an integer or several, got {counts!r}") from None


def _check_number(argument: str, value: Any, bound: str) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    lowest = 0.0 if "least" in bound else math.ulp(0.0)
    if not (math.isfinite(value) and float(value) >= lowest):
        raise ValueError(f"{argument}: expected a finite number {bound}, got {value}")


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Return a number to three digits in the largest unit that is not larger."""
    scale, unit = next((u for u in units if value >= 0.9995 * u[0]), units[-1])
    return f"{value / scale:.3g} {unit}"
