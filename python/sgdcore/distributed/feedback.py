"""Rounding to a wire's dtype, with error feedback: what rounding leaves over is added to the next value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import BLOCK, compute_dtype, dtype_name


class ErrorFeedback:
    """Rounds what was added to parameters since they were equal on all ranks to the dtype on the wire.

    The engine's sums of such a dtype round as well, which nothing feeds back.

    Attributes:
        residuals: what rounding left over, for each parameter in its shape and `compute_dtype`.
    """

    def __init__(self) -> None:
        self.residuals: list[Any] = []
        self._flat_residuals: list[Any] = []
        self._anchors: Sequence[Any] = []

    def follow(self, data: Sequence[Any], flats: Sequence[Any], anchors: Sequence[Any]) -> None:
        """Take the order in memory of the parameters, and their flat anchors; residuals of new ones are zero."""
        self._anchors = anchors
        dtypes = (compute_dtype(dtype_name(view.dtype)) for view in flats)
        self.residuals = _flat.beside(self.residuals, data, dtypes)
        self._flat_residuals = [_flat.flat(each, "residual") for each in self.residuals]

    def load(self, saved: Sequence[Any] = ()) -> None:
        """Take over saved residuals; those that are not there, or None, are zero."""
        for residual, value in zip_longest(self.residuals, saved[: len(self.residuals)]):
            residual[...] = 0 if value is None else value

    def pack(self, chunk: Any, views: Sequence[Any], array: Any, factor: float, look: bool) -> bool:
        """Round a chunk of the views times the factor into an array; returns whether it is finite, if that counts."""
        finite = True
        for view, anchor, residual, target, value in self._blocks(chunk, views, array):
            value[...] = view
            value -= anchor
            # Scaled before the sum, which could leave float16's range.
            value *= factor
            value += residual
            finite = finite and (not look or _flat.all_finite(value))
            target[...] = value
            residual[...] = value
            residual -= target
            # An overflow is not carried into the values that follow it.
            _flat.zero_nonfinite(residual)
        return finite

    def unpack(self, chunk: Any, views: Sequence[Any], array: Any) -> None:
        """Take the sum of what all ranks sent."""
        for view, anchor, _, source, total in self._blocks(chunk, views, array):
            total[...] = source
            total += anchor
            view[...] = total

    def _blocks(self, chunk: Any, views: Sequence[Any], array: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the chunk's blocks: view, anchor, residual and place on the wire, and memory to compute in."""
        place, all_ = 0, (views, self._anchors, self._flat_residuals)
        for view, anchor, residual in zip(*map(chunk.pieces, all_), strict=True):
            scratch = _flat.copied(residual[:BLOCK])
            for start in range(0, len(view), BLOCK):
                end = min(start + BLOCK, len(view))
                wire = array[place : place + end - start]
                blocks = (each[start:end] for each in (view, anchor, residual))
                yield *blocks, wire, scratch[: end - start]
                place += end - start
