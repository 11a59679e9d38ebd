"""Rounding to a wire's dtype, with error feedback: what rounding leaves over is added to the next value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import BLOCK, dtype_name


class ErrorFeedback:
    """Rounds values, or what was added to anchors since they were equal on all ranks, to the dtype on the wire.

    The engine's sums of such a dtype round as well, which nothing feeds back.

    Attributes:
        residuals: what rounding left over, in each array's `compute_dtype`.
        anchors: the arrays' values when they were equal on all ranks; None where the arrays themselves travel.
        renews: the anchors become the mean once it is there: nothing else needs them.
    """

    def __init__(self) -> None:
        self.residuals: list[Any] = []
        self.anchors: Sequence[Any] | None = None
        self.renews = False

    def grow(self, views: Sequence[Any]) -> None:
        """Begin with residuals of zero for the arrays that have none yet."""
        for view in views[len(self.residuals) :]:
            self.residuals += _flat.alike([view], _flat.compute_dtype(dtype_name(view.dtype)))
            self.residuals[-1][...] = 0

    def clear(self) -> None:
        """Forget what rounding left over."""
        for residual in self.residuals:
            residual[...] = 0

    def pack(self, chunk: Any, views: Sequence[Any], array: Any, factor: float, look: bool) -> bool:
        """Round a chunk of the views times the factor into an array; returns whether it is finite, if that counts."""
        finite = True
        for view, anchor, residual, target, value in self._blocks(chunk, views, array):
            value[...] = view
            if anchor is not None:
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
            if anchor is not None:
                total += anchor
            view[...] = total
            if anchor is not None and self.renews:
                anchor[...] = view

    def _blocks(self, chunk: Any, views: Sequence[Any], array: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the chunk's blocks: view, anchor, residual and place on the wire, and memory to compute in."""
        anchors = repeat(None) if self.anchors is None else chunk.pieces(self.anchors)
        place = 0
        for view, anchor, residual in zip(
            chunk.pieces(views), anchors, chunk.pieces(self.residuals), strict=False
        ):
            scratch = _flat.empty(residual, min(BLOCK, len(view)), dtype_name(residual.dtype))
            for start in range(0, len(view), BLOCK):
                where = slice(start, min(start + BLOCK, len(view)))
                size = where.stop - start
                yield (
                    view[where],
                    None if anchor is None else anchor[where],
                    residual[where],
                    array[place : place + size],
                    scratch[:size],
                )
                place += size
