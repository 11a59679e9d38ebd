"""Check, then time: contenders take turns, round by round, in one process.

Where a step's memory lies moves the time of a large one by more than contenders differ by: of three times the same
step, set up one after the other, the first took 6 to 12 % longer (GPT-2's shapes; not if scattered pages were used up
before it). So large cases are set up several times, in orders where each of two contenders comes first equally often.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

import sgdcore
from sgdcore._arrays import Array
from sgdcore._rules import rule_of
from sgdcore.bench import training
from sgdcore.bench.cases import DTYPES, HYPERS, Case
from sgdcore.bench.contenders import CONTENDERS, Problem, Unsuitable
from sgdcore.bench.stats import Ratio, ratio, spread
from sgdcore.reference import progress, updates

__all__ = ["Extent", "Measured", "Result", "fitting", "run"]

WRONG = 4.0  # roundings after three steps, beyond which a result is wrong

_STEPS = 3  # that are compared with the oracle
_SAMPLE = 4096  # elements of each end of a large tensor, and of its middle, that are compared
_SLOW = 2.5  # times the fastest
_SLOW_ROUNDS = 3
_SLOW_TO_START = 10.0  # seconds, beyond which a contender is set up only once


class _Steps(Protocol):
    """What is timed: a Contender, or a Training."""

    @property
    def kind(self) -> str: ...
    @property
    def step(self) -> Callable[[], Any]: ...
    def load(self, index: int) -> None: ...
    def result(self) -> Iterable[Array]: ...


@dataclass(frozen=True)
class Extent:
    """How long to measure a case.

    Attributes:
        rounds: samples of each contender; slow ones over large arrays get three.
        turn: seconds that the repeats of a short step take in a round.
        budget: seconds for all rounds of a case; three are taken all the same.
    """

    rounds: int
    turn: float
    budget: float

    def part(self, parts: int) -> Extent:
        """Return one of so many parts, of three rounds or more."""
        rounds = max(min(self.rounds, _SLOW_ROUNDS), -(-self.rounds // parts))
        return Extent(rounds, self.turn, self.budget / parts)


@dataclass
class Result:
    """What became of a contender in one case.

    Attributes:
        kind: what it works on: "numpy", "torch", "jax" or "ceiling".
        check: "equal" to the oracle in every bit, "rounding" apart, "wrong", "failed" with an exception,
            "unsuitable" or "ceiling"; only what is equal, rounding or ceiling is timed.
        detail: why, in words.
        roundings: the largest difference from the oracle, in units of the dtype's eps times max(1, abs(p)).
        seconds: of one step, one sample for each round it took part in.
        placements: how many of those were taken each time that the contenders were set up.
        repeats: how many steps each sample is the mean of.
        page_faults: per step, the median.
        allocated_bytes: the most that one step held at a time beyond what it found, of Python's, NumPy's and torch's
            memory; None for jax, whose memory is not seen.
    """

    kind: str
    check: str
    detail: str = ""
    roundings: float | None = None
    seconds: list[float] = field(default_factory=list)
    placements: list[int] = field(default_factory=list)
    repeats: int = 1
    page_faults: float | None = None
    allocated_bytes: int | None = None

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Their interquartile range over their median."""
        return spread(self.seconds)

    def over(self, base: Result) -> Ratio:
        """Return the ratio of the times, of rounds in which both took part."""
        both = self.placements if self.placements == base.placements else ()
        return ratio(self.seconds, base.seconds, both)


@dataclass
class Measured:
    """A case, its results in the contenders' order, and the share of all cores that other programs used meanwhile."""

    case: Case
    results: dict[str, Result]
    others: float | None = None


def fitting(case: Case, names: Sequence[str], available: int) -> list[str]:
    """Return the contenders that fit into `available` bytes of memory, taken in order of precedence; maybe none."""
    if case.is_training:
        return list(names)
    names = [name for name in names if name in CONTENDERS]  # others take part in training only
    array = case.elements * DTYPES[case.dtype]
    gradients = 2 if case.grads == "cold" else 1
    shared = gradients * (2 if any(CONTENDERS[name].kind == "torch" for name in names) else 1)
    # Starting values, gradients, and what a step allocates at the most; then parameters, momentum and own gradients.
    free = available - (1 + shared + 3) * array
    each = (2 + gradients * case.clear) * array
    count = max(0, free // each) if each else len(names)
    precedence = [n for n in _FIRST if n in names] + [n for n in names if n not in _FIRST]
    kept = set(precedence[:count])
    return [name for name in names if name in kept]


_FIRST = (
    "sgdcore",
    "sgdcore.torch",
    "torch fused",
    "memory streams",
    "sgdcore flat",
    "torch loop",
    "empty call",
)


def run(case: Case, names: Sequence[str], extent: Extent, asked: Sequence[str] = ()) -> Measured:
    """Check and time one case.

    Args:
        case: what.
        names: the contenders; those that are not suitable say so in their result.
        extent: how long.
        asked: contenders that take part even where they take long to start.
    """
    _set_threads(case.threads)
    orders = _orders(case, names)
    part = extent.part(len(orders))
    results: dict[str, Result] = {}
    faults: dict[str, list[float]] = {name: [] for name in names}
    others = _Others()
    again = set(names)
    for order in orders:
        _release_memory()
        order = [name for name in order if name in again]
        if order:
            again = _place(case, order, asked, results, faults, part, others)
    for name, result in results.items():
        if result.seconds:
            result.page_faults = round(statistics.median(faults[name]), 2)
    return Measured(case, {name: results[name] for name in names if name in results}, others.share)


def _place(
    case: Case,
    names: Sequence[str],
    asked: Sequence[str],
    results: dict[str, Result],
    faults: dict[str, list[float]],
    extent: Extent,
    others: _Others,
) -> set[str]:
    """Set up, check and time contenders; return those that are to be set up again."""
    present: dict[str, _Steps] = {}
    once: dict[str, float] = {}
    slow: set[str] = set()
    if case.is_training:
        _start_training(case, names, results, present, once)
    else:
        slow = _start(case, names, asked, results, present, once)
    with others:
        slow |= _time(case, present, results, once, faults, extent)
    for name, each in present.items():
        if results[name].allocated_bytes is None:
            results[name].allocated_bytes = _allocated(each)
    return set(present) - slow


def _orders(case: Case, names: Sequence[str]) -> list[list[str]]:
    """Return the order in which contenders are set up, each time: of any two, either is the first in half of them."""
    order = random.Random(case.title).sample(list(names), len(names))
    if not case.is_training and case.bytes < 4 * cache_bytes():
        return [order]
    turned = order[len(order) // 2 :] + order[: len(order) // 2]
    return [order, order[::-1], turned, turned[::-1]]


def _release_memory() -> None:
    """Return what earlier cases freed to the system.

    The C library would hand out their scattered small pages again, to whoever comes first.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _set_threads(count: int) -> None:
    sgdcore.set_num_threads(count)
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(count)


# --- Checking -------------------------------------------------------------------------------------


def _start(
    case: Case,
    names: Sequence[str],
    asked: Sequence[str],
    results: dict[str, Result],
    present: dict[str, _Steps],
    once: dict[str, float],
) -> set[str]:
    """Set up and check each contender; note how long its last step took. Return those that took long to start."""
    problem = Problem(case)
    picks = [_pick(values) for values in problem.params]
    expected = _expected(problem, picks)
    slow = set()
    for name in names:
        cls = CONTENDERS.get(name)
        if cls is None:
            continue  # takes part in training only
        problem.patient = name in asked
        began = time.perf_counter()
        try:
            if cls.rule not in (None, case.rule):
                raise Unsuitable(f"it computes {cls.rule} only")
            each = cls(problem)
            if cls.kind == "ceiling":
                found = Result(cls.kind, "ceiling")
            else:
                for step in range(_STEPS):
                    each.load(step % len(problem.gradients))
                    once[name] = _sample(each.step, 1)[0]
                difference = _difference(_picked(each.result(), picks), expected, case.dtype)
                found = _checked(cls.kind, difference)
        except Unsuitable as reason:
            found = Result(cls.kind, "unsuitable", str(reason))
        except Exception as error:  # noqa: BLE001 - the others go on
            first = str(error).strip().partition("\n")[0]
            found = Result(cls.kind, "failed", f"{type(error).__name__}: {first}")
        if _enter(results, name, found):
            present[name] = each
            each.load(0)
        if time.perf_counter() - began > _SLOW_TO_START:
            slow.add(name)
    return slow


def _start_training(
    case: Case,
    names: Sequence[str],
    results: dict[str, Result],
    present: dict[str, _Steps],
    once: dict[str, float],
) -> None:
    variants = training.variants()
    chosen = [name for name in names if name in variants]
    if not chosen:
        return
    expected = _trained(case)
    _release_memory()  # which would go to whoever comes first
    for name in chosen:
        if case.is_step_alone and name == training.IN_BACKWARD:
            reason = "its step is a part of the backward pass"
            results[name] = Result("torch", "unsuitable", reason)
            continue
        each = training.of(case, *variants[name])
        for _ in range(_STEPS):
            each.load(0)
            once[name] = _sample(each.step, 1)[0]
        found = np.concatenate([values.ravel() for values in each.result()])
        if _enter(results, name, _checked("torch", _difference(found, expected, case.dtype))):
            present[name] = each


def _enter(results: dict[str, Result], name: str, found: Result) -> bool:
    """Add the result of a check; return whether there is something to time."""
    right = found.check in ("equal", "rounding", "ceiling")
    before = results.get(name)
    if before is None or not right:
        results[name] = found  # where it is wrong now, also what was timed before is none
    elif (found.roundings or 0) > (before.roundings or 0):
        results[name] = replace(
            before, check=found.check, detail=found.detail, roundings=found.roundings
        )
    return right


def _expected(problem: Problem, picks: Sequence[Array]) -> Array:
    """Return the oracle's parameters after three steps, at the places that are compared."""
    gradients = [_picked(each, picks) for each in problem.gradients]
    return _after_steps(
        _picked(problem.params, picks),
        [gradients[step % len(gradients)] for step in range(_STEPS)],
        problem.case,
    )


def _after_steps(param: Array, gradients: Iterable[Array], case: Case) -> Array:
    """Return an array after the oracle's steps with these gradients."""
    rule, hyper = rule_of(case.rule), dict(HYPERS[case.hyper])
    values: Sequence[Any] = [param] + [None] * len(rule.states)
    for gradient in gradients:
        values = updates[case.rule](values[0], gradient, *values[1:], **hyper)
        if rule.counts:
            numbers = progress[case.rule](**hyper)
            hyper |= {key: numbers[key] for key in rule.counts}
    found: Array = values[0]
    return found


def _trained(case: Case) -> Array:
    """Return all parameters after three steps of a training that the oracle has confirmed at the usual places."""
    witness = training.of(case, *training.variants()["torch loop"])
    picks = [_pick(values) for values in witness.result()]
    start, gradients = _picked(witness.result(), picks), []
    for _ in range(_STEPS):
        witness.backward()
        gradients.append(_picked(witness.gradients(), picks))
        witness.update()
    expected = _after_steps(start, gradients, case)
    wrong_by = _difference(_picked(witness.result(), picks), expected, case.dtype)
    if wrong_by > WRONG:
        raise RuntimeError(
            f"{case.title}: torch's own update differs from the oracle by {wrong_by:.2g}"
        )
    return np.concatenate([values.ravel() for values in witness.result()])


def _pick(values: Array) -> Array:
    """Return the indices of an array that are compared with the oracle: all, or of a large one some thousands."""
    size = values.size
    if size <= 4 * _SAMPLE:
        return np.arange(size)
    middle = np.random.default_rng(size).integers(_SAMPLE, size - _SAMPLE, _SAMPLE)
    return np.concatenate([np.arange(_SAMPLE), middle, np.arange(size - _SAMPLE, size)])


def _picked(arrays: Iterable[Array], picks: Sequence[Array]) -> Array:
    return np.concatenate(
        [np.asarray(a).reshape(-1)[p] for a, p in zip(arrays, picks, strict=True)]
    )


def _difference(found: Array, expected: Array, dtype: str) -> float:
    """Return the largest difference in roundings: infinite where one is not a number."""
    eps = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
    x, y = found.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(x - y) / (eps[dtype] * np.maximum(1, np.abs(y)))
    return float(np.max(np.nan_to_num(difference, nan=np.inf, posinf=np.inf), initial=0))


def _checked(kind: str, wrong_by: float) -> Result:
    if wrong_by == 0:
        return Result(kind, "equal", roundings=0.0)
    detail = f"differs from the oracle by {wrong_by:.2g} roundings"
    # JSON has no infinity.
    roundings = wrong_by if np.isfinite(wrong_by) else None
    return Result(kind, "rounding" if wrong_by <= WRONG else "wrong", detail, roundings)


# --- Timing ---------------------------------------------------------------------------------------


def _time(
    case: Case,
    present: dict[str, _Steps],
    results: dict[str, Result],
    once: dict[str, float],
    faults: dict[str, list[float]],
    extent: Extent,
) -> set[str]:
    """Time those present; return those that took few rounds, since they are slow."""
    cold = case.grads == "cold"
    flush = _Flush() if cold else None
    steps = {name: _seconds(each, once.get(name)) for name, each in present.items()}
    fastest = min((t for n, t in steps.items() if results[n].check != "ceiling"), default=0.0)
    last = dict.fromkeys(present, extent.rounds)  # of the rounds of each
    slow = set()
    for name, seconds in steps.items():
        if results[name].placements:
            continue  # its repeats are known, and that it is not slow
        single = cold or case.is_step_alone
        count = 1 if single else max(1, int(extent.turn / max(seconds, 1e-8)))
        # Momentum that no gradient feeds must stay far from subnormal numbers.
        results[name].repeats = min(count, 50) if case.clear else count
        # Beside a backward pass no step takes long.
        if seconds > max(_SLOW * fastest, 0.02) and not case.is_step_alone:
            last[name] = min(extent.rounds, _SLOW_ROUNDS)
            slow.add(name)
    taken = {name: len(results[name].seconds) for name in present}
    # Other turns in each placement.
    order = random.Random(max((len(faults[name]) for name in present), default=0))
    started = time.perf_counter()
    gc.collect()
    gc.disable()  # a collection takes as long as many small steps, and would hit one contender at random
    try:
        for round_ in range(extent.rounds):
            turns = [name for name in present if round_ < last[name]]
            order.shuffle(turns)  # none always follows the same one
            for name in turns:
                each, count = present[name], results[name].repeats
                if case.is_loaded:
                    each.load(round_ % 2 if cold else 0)
                if flush is not None:
                    flush()
                elif count > 1:
                    each.step()  # what it needs comes back into the caches, and its threads wake up
                seconds, faulted = _sample(each.step, count)
                results[name].seconds.append(float(f"{seconds:.5g}"))
                faults[name].append(faulted)
            late = time.perf_counter() - started > extent.budget
            if round_ >= 2 and late and not case.is_step_alone:
                break
    finally:
        gc.enable()
    for name, before in taken.items():
        results[name].placements.append(len(results[name].seconds) - before)
    return slow


def _seconds(each: _Steps, once: float | None) -> float:
    """Return about how long a step takes of which one took `once`."""
    if once is None:
        once, _ = _sample(each.step, 1)
    return once if once > 1e-3 else _sample(each.step, 10)[0]


def _sample(step: Callable[[], Any], count: int) -> tuple[float, float]:
    """Take `count` steps; return the seconds and the page faults of one."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(count):
        step()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return seconds / count, faults / count


class _Flush:
    """Empties the caches, by reading more than they hold."""

    def __init__(self) -> None:
        self._memory = np.ones(2 * cache_bytes() // 8)

    def __call__(self) -> None:
        self._memory.sum()


def cache_bytes() -> int:
    """Return the size of the last-level cache, as Linux tells it; 32 MiB where it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes) or 32 << 20


class _Others:
    """Measures how much of the machine other programs used within with blocks."""

    def __init__(self) -> None:
        # Processor seconds: the machine's, those not idle, this process's.
        self._spent = np.zeros(3)

    def __enter__(self) -> Self:
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._read()
        if self._before is not None and after is not None:
            self._spent += np.subtract(after, self._before)

    @property
    def share(self) -> float | None:
        """Of all cores, by other programs; None where unknown."""
        total, busy, own = self._spent.tolist()
        return round(max(0.0, busy - own) / total, 4) if total > 0 else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return the processor seconds of the machine: all, not idle, of this process."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [int(word) for word in stat.read_text().partition("\n")[0].split()[1:9]]
        scale = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        return sum(ticks) / scale, (sum(ticks) - idle) / scale, time.process_time()


# --- Memory ---------------------------------------------------------------------------------------


def _allocated(each: _Steps) -> int | None:
    """Return the most memory that one step held at a time, beyond what it found."""
    if each.kind == "jax":
        return None
    if each.kind == "torch":
        return _allocated_by_torch(each.step)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        each.step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _allocated_by_torch(step: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on stderr
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    assert profile.profiler is not None
    recorded = profile.profiler.kineto_results
    assert recorded is not None
    held = peak = 0
    for event in sorted(
        (e for e in recorded.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
