"""A round of Local SGD: how far it is, how long it is to be, and what schedules are told of the last one."""

from __future__ import annotations

import math
from typing import Any

from sgdcore.distributed._checks import check_count
from sgdcore.distributed.schedules import Progress, Schedule

__all__ = ["Round"]


class Round:
    """Counts the steps of a round.

    Attributes:
        number: the rounds completed; equal on all ranks.
        steps: the steps taken when this round began; equal on all ranks.
        active: this rank's own steps in this round.
        position: the steps of this round that this rank has taken or passed over; 0 at its start.
        period: the steps that this round is to have; 0 as long as that is unknown.
        last_period: the steps of the last round.
        last_loss: the mean loss of the last round that had losses; None before one had.
        first_loss: that of the first round whose mean was finite.
        broken: the parameters are in the middle of an average, or were left there. Set before they are overwritten,
            cleared as the last thing that a round does, so that it holds wherever an exception, or an interrupt, ends
            that.
    """

    def __init__(self) -> None:
        self.number = self.steps = self.last_period = 0
        self.last_loss: float | None = None
        self.first_loss: float | None = None
        self.broken = False
        self.begin()

    def begin(self) -> None:
        """Begin the round, or begin it again: forget its steps."""
        self.position = self.active = self.period = 0
        self.losses: Any = 0.0
        self.losses_count = 0

    @property
    def total(self) -> int:
        """The steps taken in all."""
        return self.steps + self.active

    def count_loss(self, loss: Any) -> None:
        """Take a step's loss into the round's mean."""
        self.losses = self.losses + (loss.detach() if hasattr(loss, "detach") else loss)
        self.losses_count += 1

    def find_period(self, schedule: int | Schedule, warmup_steps: int, lr: float) -> None:
        """Find out how many steps this round is to have, unless that is known.

        Raises:
            TypeError, ValueError: if the schedule's answer is no integer of at least 1.
        """
        if self.period:
            return
        if self.steps < warmup_steps:
            self.period = 1
        elif isinstance(schedule, int):
            self.period = schedule
        else:
            progress = Progress(
                self.steps, self.number, self.last_period, lr, self.last_loss, self.first_loss
            )
            period = schedule.period(progress)
            self.period = check_count("the schedule's period", period, 1)

    def complete(self, steps: int, loss: float | None) -> None:
        """Begin the next round.

        Args:
            steps: the most steps that a rank has taken in this one.
            loss: the mean loss; None if there was none.
        """
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
        return {
            "number": self.number,
            "steps": self.steps,
            "active": self.active,
            "position": self.position,
            "period": self.period,
            "last_period": self.last_period,
            "losses": float(self.losses),
            "losses_count": self.losses_count,
            "last_loss": math.nan if self.last_loss is None else self.last_loss,
            "first_loss": math.nan if self.first_loss is None else self.first_loss,
        }

    def take(self, numbers: dict[str, float]) -> None:
        """Take over what `numbers` returned."""
        for name, value in numbers.items():
            if name in ("last_loss", "first_loss"):
                setattr(self, name, None if math.isnan(value) else value)
            else:
                setattr(self, name, value if name == "losses" else int(value))
        self.broken = False
