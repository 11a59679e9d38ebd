"""A round of Local SGD: how far it is, how long it is to be, and what schedules are told of the last one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sgdcore.distributed._checks import check_count
from sgdcore.distributed.schedules import Progress, Schedule


@dataclass
class Round:
    """Counts the steps of a round; all but `broken` is saved."""

    number: int = 0  # the rounds completed; equal on all ranks
    steps: int = 0  # taken when this round began; equal on all ranks
    active: int = 0  # this rank's own steps in this round
    position: int = 0  # the steps of this round that this rank has taken or passed over
    period: int = 0  # the steps that this round is to have; 0 as long as that is unknown
    last_period: int = 0  # the steps of the last round
    losses: Any = 0.0  # of this round, added up
    losses_count: int = 0
    last_loss: float | None = None  # the mean of the last round that had losses
    first_loss: float | None = None  # that of the first round whose mean was finite
    # The parameters are in the middle of an average, or were left there. Set before they are overwritten, and cleared
    # as the last thing that a round does, so that it holds wherever an exception, or an interrupt, ends that.
    broken: bool = False

    def begin(self) -> None:
        """Begin the round, or begin it again: forget its steps."""
        self.position = self.active = self.period = self.losses_count = 0
        self.losses = 0.0

    @property
    def total(self) -> int:
        """The steps taken in all."""
        return self.steps + self.active

    def count_loss(self, loss: Any) -> None:
        """Take a step's loss into the round's mean."""
        self.losses = self.losses + (loss.detach() if hasattr(loss, "detach") else loss)
        self.losses_count += 1

    def find_period(self, schedule: int | Schedule, warmup_steps: int, lr: float) -> None:
        """Find out how many steps this round is to have; raise if a schedule's answer is no integer of at least 1."""
        if self.steps < warmup_steps:
            self.period = 1
        elif isinstance(schedule, int):
            self.period = schedule
        else:
            losses = self.last_loss, self.first_loss
            progress = Progress(self.steps, self.number, self.last_period, lr, *losses)
            self.period = check_count("the schedule's period", schedule.period(progress), 1)

    def complete(self, steps: int, loss: float | None) -> None:
        """Begin the next round, after the most steps that a rank has taken in this one, and its mean loss if any."""
        self.last_period = steps
        self.steps += steps
        self.number += 1
        if loss is not None:
            self.last_loss = loss
            if self.first_loss is None and math.isfinite(loss):
                self.first_loss = loss
        self.begin()
        self.broken = False

    def numbers(self) -> dict[str, float]:
        """Return what is saved, and what a rank that joins is told: numbers only."""
        values = asdict(self) | {"losses": float(self.losses)}
        del values["broken"]
        return {name: math.nan if value is None else value for name, value in values.items()}

    def take(self, numbers: dict[str, float]) -> None:
        """Take over what `numbers` returned."""
        for name, value in numbers.items():
            absent = name.endswith("_loss") and math.isnan(value)
            setattr(self, name, None if absent else value)
        self.broken = False
