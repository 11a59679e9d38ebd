"""A round of Local SGD: how far it is, what schedules are told of the last one, and what it started from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from sgdcore.distributed._checks import check_count
from sgdcore.distributed._flat import beside, copied, copy_all
from sgdcore.distributed.buffers import Buffers
from sgdcore.distributed.parameters import Parameters
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

    def saved(self) -> dict[str, Any]:
        """Return what is saved, and what a rank that joins is told; plain values."""
        return {**vars(self), "losses": float(self.losses), "broken": False}


class Anchor:
    """Copies of the parameters at the end of the last round, and of momentum and buffers if it `keeps_all`.

    Attributes:
        values: each parameter's copy.
        momenta: each parameter's, or None where there was none.
        valid: the copies are those of the end of the last round.
    """

    def __init__(self, keeps_all: bool) -> None:
        self.values: list[Any] = []
        self.momenta: list[Any] = []
        self.valid = False
        self._buffers: list[Any] = []
        self._keeps_all = keeps_all

    def follow(self, parameters: Parameters) -> None:
        """Take the order in memory of the parameters, and allocate copies of new ones."""
        self.values = beside(self.values, parameters.data, [each.dtype for each in parameters.data])

    def take(self, parameters: Parameters, buffers: Buffers) -> None:
        """Copy the parameters, which are equal on all ranks."""
        copy_all(self.values, parameters.data)
        if self._keeps_all:
            self.keep(parameters.momenta(), buffers)
        self.valid = True

    def keep(self, momenta: Sequence[Any], buffers: Buffers) -> None:
        """Copy momentum, into the memory of the last copies where there are any, and buffers."""
        kept = []
        for old, momentum in zip_longest(self.momenta[: len(momenta)], momenta):
            if momentum is not None and old is not None and old.dtype == momentum.dtype:
                old[...] = momentum
                kept.append(old)
            else:
                kept.append(copied(momentum))
        self.momenta, self._buffers = kept, buffers.copies()

    def restore(self, parameters: Parameters, buffers: Buffers, state: Any) -> None:
        """Bring parameters, momentum (in the optimizer's state) and buffers back to the end of the last round."""
        self.to_parameters(parameters)
        momenta = zip(parameters.all, parameters.momenta(), self.momenta, strict=True)
        for parameter, momentum, kept in momenta:
            if momentum is not None and kept is not None:
                momentum[...] = kept
            elif momentum is not None:
                del state[parameter]["momentum_buffer"]
        buffers.restore(self._buffers)

    def subtract_from(self, parameters: Parameters) -> None:
        """Put anchor - parameters, which the outer step takes for a gradient, where the parameters are."""
        for values, anchor in zip(parameters.data, self.values, strict=True):
            values *= -1
            values += anchor

    def to_parameters(self, parameters: Parameters) -> None:
        """Copy the anchor to the parameters."""
        copy_all(parameters.data, self.values)
