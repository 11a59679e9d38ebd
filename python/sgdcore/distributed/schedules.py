"""When to average: schedules of the number of steps between two rounds.

A schedule is any object with a method ``period(progress)``. All ranks ask it at the start of each round, and have to
get the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sgdcore.distributed._checks import check_count


@dataclass(frozen=True)
class Progress:
    """Where training is, at the start of a round; equal on all ranks, provided their learning rates are.

    Attributes:
        step, round: steps taken and rounds completed so far.
        period: the steps of the last round; 0 before the first.
        lr: the learning rate of this rank's first param group.
        loss: the mean over ranks and steps of the losses of the last round; None if none were passed.
        first_loss: the same of the first round that had any.
    """

    step: int
    round: int
    period: int
    lr: float
    loss: float | None = None
    first_loss: float | None = None


@runtime_checkable
class Schedule(Protocol):
    """Says how many steps the next round has."""

    def period(self, progress: Progress) -> int:
        """Return the number of steps until the next averaging, at least 1."""


@dataclass(frozen=True)
class PostLocal:
    """Average after each step until `after` steps are taken, then every `sync_every` steps.

    Source: Lin et al., "Don't use large mini-batches, use Local SGD", ICLR 2020 (arXiv 1808.07217).
    """

    sync_every: int
    after: int

    def __post_init__(self) -> None:
        check_count("sync_every", self.sync_every, 1)
        check_count("after", self.after, 0)

    def period(self, progress: Progress) -> int:
        """Return 1, or `sync_every`."""
        return 1 if progress.step < self.after else self.sync_every


@dataclass(frozen=True)
class Stagewise:
    """A period for each stage of training, as the learning rate falls: ``Stagewise({0: 1, 1000: 8, 5000: 32})``.

    Source: Shen et al., "STL-SGD: speeding up Local SGD with stagewise communication period", AAAI 2021 (arXiv
    2006.06377).
    """

    stages: Mapping[int, int]  # the first step of each stage, one of them 0, and its period

    def __post_init__(self) -> None:
        if 0 not in self.stages:
            raise ValueError(f"stages: expected one that begins at step 0, got {dict(self.stages)}")
        for step, period in self.stages.items():
            check_count("stages", step, 0)
            check_count(f"stages[{step}]", period, 1)

    def period(self, progress: Progress) -> int:
        """Return the period of the stage that the step is in."""
        return self.stages[max(step for step in self.stages if step <= progress.step)]


@dataclass(frozen=True)
class AdaComm:
    r"""Average more often as the loss falls: few rounds at first, for speed, many in the end, for accuracy.

    The period is `initial` at first. Every `interval` steps, with the mean loss F of the last round and that of the
    first one::

        period = ceil(sqrt(F / F_first) * initial)      if that is less than the period before
        period = ceil(period / 2)                       otherwise

    Needs the loss: ``step(loss=loss)``, or a closure that returns it. One that is not finite changes nothing.

    Source: Wang and Joshi, "Adaptive communication strategies to achieve the best error-runtime trade-off in
    local-update SGD", MLSys 2019 (arXiv 1810.08313).
    """

    initial: int
    interval: int

    def __post_init__(self) -> None:
        check_count("initial", self.initial, 1)
        check_count("interval", self.interval, 1)

    def period(self, progress: Progress) -> int:
        """Return the period for this loss."""
        last, loss, first = progress.period, progress.loss, progress.first_loss
        if last == 0:
            return self.initial
        if progress.step // self.interval == (progress.step - last) // self.interval:
            return last
        if loss is None or first is None:
            raise ValueError(
                "loss: AdaComm needs it; pass step(loss=...), or a closure that returns it"
            )
        if not (math.isfinite(loss) and math.isfinite(first)):
            return last
        ratio = max(0.0, loss / first) if first > 0 else 0.0
        period = max(1, math.ceil(math.sqrt(ratio) * self.initial))
        return period if period < last else math.ceil(last / 2)
