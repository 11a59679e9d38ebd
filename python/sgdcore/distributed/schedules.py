"""When to average: schedules of the number of steps between two rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Progress:
    """Where training is, at the start of a round; equal on all ranks, provided their learning rates are."""

    step: int  # taken so far
    round: int  # completed so far
    period: int  # the steps of the last round; 0 before the first
    lr: float  # of this rank's first param group


@runtime_checkable
class Schedule(Protocol):
    """Any object with this method. All ranks ask it at the start of each round, and have to get the same answer."""

    def period(self, progress: Progress) -> int:
        """Return the number of steps until the next averaging, at least 1."""


@dataclass(frozen=True)
class Stagewise:
    """A period for each stage of training, as the learning rate falls: ``Stagewise({1000: 8, 5000: 32})``.

    Before the first stage it is 1.

    Source: Shen et al., "STL-SGD: speeding up Local SGD with stagewise communication period", AAAI 2021 (arXiv
    2006.06377). One stage is post-local SGD: Lin et al., "Don't use large mini-batches, use Local SGD", ICLR 2020
    (arXiv 1808.07217).
    """

    stages: Mapping[int, int]  # the first step of each stage, and its period

    def period(self, progress: Progress) -> int:
        """Return the period of the stage that the step is in."""
        begun = [step for step in self.stages if step <= progress.step]
        return self.stages[max(begun)] if begun else 1
