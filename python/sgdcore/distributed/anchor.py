"""The anchor of a round: parameters, momentum and buffers, as they were when all ranks were equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgdcore.distributed._flat import alike, copied, copy_all, join
from sgdcore.distributed.buffers import Buffers
from sgdcore.distributed.parameters import Parameters


class Anchor:
    """Copies of the parameters at the end of the last round, and of momentum and buffers if it `keeps_all`."""

    def __init__(self, keeps_all: bool) -> None:
        self.values: list[Any] = []  # for each parameter its flat copy
        self.momenta: list[Any] = []  # for each parameter, or None where there was none
        self.buffers: list[Any] = []
        self.valid = False  # the copies are those of the end of the last round
        self.verified = False  # ranks have compared what was loaded or copied by each of them alone
        self._keeps_all = keeps_all
        self._regions: tuple[list[Any], list[Any]] = [], []  # of the parameters, and their copies

    def bind(self, parameters: Parameters) -> None:
        """Allocate copies for the parameters that have none yet, and find the memory that is copied."""
        self.values += alike(parameters.flats[len(self.values) :])
        flats, values = parameters.flats, self.values
        self._regions = (
            [join([flats[i] for i in run]) for run in parameters.runs],
            [join([values[i] for i in run]) for run in parameters.runs],
        )

    def take(self, parameters: Parameters, buffers: Buffers) -> None:
        """Copy the parameters, which are equal on all ranks."""
        regions, copies = self._regions
        copy_all(copies, regions)
        if self._keeps_all:
            self.keep(parameters.momenta.all(), buffers)
        self.valid = True

    def keep(self, momenta: Sequence[Any], buffers: Buffers) -> None:
        """Copy momentum, into the memory of the last copies where there are any, and buffers."""
        kept = self.momenta + [None] * (len(momenta) - len(self.momenta))
        for i, (old, momentum) in enumerate(zip(kept, momenta, strict=True)):
            if momentum is None or old is None or old.dtype != momentum.dtype:
                kept[i] = copied(momentum)
            else:
                old[...] = momentum
        self.momenta, self.buffers = kept, buffers.copies() if self._keeps_all else []

    def restore(self, parameters: Parameters, buffers: Buffers, state: Any) -> None:
        """Bring parameters, momentum (in the optimizer's state) and buffers back to the end of the last round."""
        self.to_parameters()
        momenta = zip(parameters.all, parameters.momenta.all(), self.momenta, strict=True)
        for parameter, momentum, kept in momenta:
            if momentum is not None and kept is not None:
                momentum[...] = kept
            elif momentum is not None:
                del state[parameter]["momentum_buffer"]
        buffers.restore(self.buffers)

    def subtract_parameters(self) -> None:
        """Put anchor - parameters, which the outer step takes for a gradient, where the parameters are."""
        for values, anchor in zip(*self._regions, strict=True):
            values *= -1
            values += anchor

    def to_parameters(self) -> None:
        """Copy the anchor to the parameters."""
        regions, copies = self._regions
        copy_all(regions, copies)
