"""Ctrl-C at any line of what a round does once its parameters are averaged, and what ranks are left with."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, Self

import numpy as np
import pytest

import sgdcore
from sgdcore.distributed import (
    LocalSGD,
    OuterSGD,
    RoundError,
    SlowMo,
    local_sgd,
    outer,
)
from sgdcore.distributed import round as rounds
from sgdcore.distributed.averager import Averager

RANKS = 2
WRITTEN_TO = (local_sgd.__file__, outer.__file__, rounds.__file__)


class Done:
    def wait(self) -> None: ...


class ThreadGroup:
    """A process group whose ranks are threads."""

    size = RANKS
    dtypes = frozenset({"float64", "float32", "int64", "int32"})

    def __init__(self, rank: int, barrier: threading.Barrier, arrays: list[Any]) -> None:
        self.rank, self._barrier, self._arrays = rank, barrier, arrays

    def all_reduce(self, array: Any) -> Done:
        self._arrays[self.rank] = array.copy()
        self._barrier.wait()
        total = np.sum(self._arrays, axis=0)
        self._barrier.wait()
        array[...] = total
        return Done()


def on_all(function: Callable[[Any], Any]) -> list[Any]:
    """What a function of a rank's group returns, called in a thread for each rank."""
    barrier, arrays = threading.Barrier(RANKS, timeout=30), [None] * RANKS
    groups = [ThreadGroup(rank, barrier, arrays) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(function, groups))


class InterruptAt:
    """Raises KeyboardInterrupt in this thread, at a line of the package counted from the first average's end on."""

    def __init__(self, line: int) -> None:
        self._left = line
        self._averaged = False
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._averaged |= frame.f_code is Averager.average.__code__
        if frame.f_code.co_filename not in WRITTEN_TO:
            return None
        if event == "line" and self._averaged and not self.where:
            self._left -= 1
            if self._left < 0:
                self.where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> Self:
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reset": {"momentum_sync": "reset"},
    "transactional": {"transactional": True},
    "transactional, reset": {"transactional": True, "momentum_sync": "reset"},
    "outer": {"outer": OuterSGD(0.5, 0.5)},
    "slowmo": {"outer": SlowMo(0.5)},
    "transactional, outer": {"transactional": True, "outer": OuterSGD(0.5, 0.5)},
    "wire": {"wire_dtype": "float32"},
}


def build(group: ThreadGroup, options: dict[str, Any]) -> LocalSGD:
    values = [np.full(5, 1.0), np.full(3, 2.0)]
    inner = sgdcore.SGD([sgdcore.Parameter(value) for value in values], lr=0.25, momentum=0.5)
    return LocalSGD(inner, group, sync_every=2, **options)


def step(local: LocalSGD, group: ThreadGroup) -> None:
    for i, p in enumerate(local.param_groups[0]["params"]):
        p.grad = np.full(p.shape, group.rank + i + 1.0)
    local.step()


def values(local: LocalSGD) -> bytes:
    return b"".join(p.data.tobytes() for p in local.param_groups[0]["params"])


def interrupted(
    group: ThreadGroup, options: dict[str, Any], line: int, victims: int
) -> dict[str, Any]:
    """Interrupt the first ranks in the second round; meet again; end another round."""
    local = build(group, options)
    rounds = [values(local)]
    for _ in range(2):
        step(local, group)
    rounds.append(values(local))
    step(local, group)
    interrupt = InterruptAt(line)
    report: dict[str, Any] = {"where": "", "rounds": rounds}
    if group.rank < victims:
        try:
            with interrupt:
                step(local, group)
        except KeyboardInterrupt:
            report["where"] = interrupt.where
    else:
        step(local, group)
    report["refuses"] = local._round.broken
    report["left"] = values(local), local.round, local.step_in_round
    try:
        local.rebind(group)
    except RuntimeError as error:
        report["error"] = str(error)
        return report
    report["met"] = values(local), local.round
    report["steps"] = local._round.steps
    for _ in range(2):
        step(local, group)
    report["went on"] = values(local), local.round
    return report


@pytest.mark.parametrize("victims", [1, RANKS], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_interrupts_after_the_average(options: dict[str, Any], victims: int) -> None:
    """The round is finished, or the last one is returned to under its number, or the wrapper says that neither is."""
    never = on_all(lambda group: interrupted(group, options, sys.maxsize, 0))[0]
    rounds = [*never["rounds"], never["left"][0]]
    assert never["left"][1:] == (2, 0)
    for line in range(1000):
        reports = on_all(lambda group: interrupted(group, options, line, victims))  # noqa: B023
        if not reports[0]["where"]:
            break
        for report in reports:
            what = f"{report['where']}: {report}"
            if not report["refuses"]:
                assert report["left"] == (rounds[2], 2, 0), what
            if "error" in report:
                assert "every rank's parameters are left in the middle" in report["error"], what
                assert all(each["refuses"] for each in reports), what
                continue
            met, number = report["met"]
            assert met == rounds[number], what
            assert number == 2 or options.get("transactional"), what
            assert number == 2 or victims == RANKS, what
            assert report["steps"] == 2 * number, what
            assert report["went on"][1] == number + 1, what
        assert len({report.get("went on") for report in reports}) == 1
    assert line > 10


def test_an_outer_step_that_fails_leaves_nothing_to_return_to() -> None:
    def fail(group: ThreadGroup) -> RoundError:
        local = build(group, {"transactional": True, "outer": SlowMo(0.5)})

        def raises(*_: Any) -> None:
            raise MemoryError("no memory")

        assert local._outer is not None
        local._outer.step = raises  # type: ignore[method-assign]
        step(local, group)
        with pytest.raises(RoundError, match="left in the middle: no memory") as e:
            step(local, group)
        with pytest.raises(RuntimeError, match="a round failed, or was interrupted"):
            step(local, group)
        return e.value

    assert [(error.round, error.restored) for error in on_all(fail)] == [(1, False)] * RANKS
