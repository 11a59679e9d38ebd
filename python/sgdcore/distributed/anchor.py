"""The anchor of a round: parameters, and momentum, as they were when all ranks were equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgdcore.distributed._flat import alike, copied, join, reorder
from sgdcore.distributed.buffers import Buffers
from sgdcore.distributed.parameters import Parameters

__all__ = ["Anchor"]


class Anchor:
    """Copies of the parameters at the end of the last round.

    Attributes:
        values: for each parameter its flat copy.
        momenta: copies of the momentum buffers, or None where there was none; empty unless they are kept.
        buffers: copies of the model's buffers; empty unless they are kept.
        valid: the copies are those of the end of the last round.
        verified: ranks have compared what was loaded or copied by each of them alone.

    Args:
        keeps_all: keep momentum and buffers, too.
    """

    def __init__(self, keeps_all: bool) -> None:
        self.values: list[Any] = []
        self.momenta: list[Any] = []
        self.buffers: list[Any] = []
        self.valid = self.verified = False
        self.keeps_all = keeps_all
        self._regions: list[tuple[Any, Any]] = []

    def grow(self, parameters: Parameters) -> None:
        """Allocate copies for the parameters that have none yet."""
        self.values += alike(parameters.flats[len(self.values) :])
        self.bind(parameters)

    def bind(self, parameters: Parameters) -> None:
        """Find the memory that is copied."""
        self._regions = [
            (join([parameters.flats[i] for i in run]), join([self.values[i] for i in run]))
            for run in parameters.runs
        ]

    def reorder(self, changes: Sequence[tuple[int, Any, Any]]) -> None:
        """Follow parameters into another order in memory; see `Parameters.reordered`."""
        for i, old, new in changes:
            reorder(self.values[i], old, new)

    def take(self, parameters: Parameters, buffers: Buffers) -> None:
        """Copy the parameters, which are equal on all ranks."""
        for values, anchor in self._regions:
            anchor[...] = values
        if self.keeps_all:
            self.keep(parameters.momenta.all())
            self.buffers = buffers.copies()
        self.valid = True

    def keep(self, momenta: Sequence[Any]) -> None:
        """Copy the momentum, into the memory of the last copies where there are any."""
        kept = self.momenta or [None] * len(momenta)
        for i, momentum in enumerate(momenta):
            old = kept[i] if i < len(kept) else None
            if momentum is None or old is None or old.dtype != momentum.dtype:
                kept[i : i + 1] = [copied(momentum)]
            else:
                old[...] = momentum
        self.momenta = kept

    def restore(self, parameters: Parameters, buffers: Buffers, state: Any) -> None:
        """Bring parameters, momentum and buffers back to the end of the last round.

        Args:
            parameters: the parameters.
            buffers: the model's buffers.
            state: the optimizer's.
        """
        for values, anchor in self._regions:
            values[...] = anchor
        for parameter, momentum, kept in zip(
            parameters.all, parameters.momenta.all(), self.momenta, strict=True
        ):
            if momentum is not None and kept is not None:
                momentum[...] = kept
            elif momentum is not None:
                del state[parameter]["momentum_buffer"]
        if self.buffers:
            buffers.restore(self.buffers)

    def subtract_parameters(self) -> None:
        """Put anchor - parameters, which the outer step takes for a gradient, where the parameters are."""
        for values, anchor in self._regions:
            values *= -1
            values += anchor

    def to_parameters(self) -> None:
        """Copy the anchor to the parameters."""
        for values, anchor in self._regions:
            values[...] = anchor
