"""Rounding to a wire's dtype, with error feedback: what rounding leaves over is added to the next value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sgdcore.distributed._flat import (
    alike,
    all_finite,
    array_namespace,
    compute_dtype,
    copy_into,
    dtype_name,
    empty,
    reorder,
    zero_nonfinite,
)

__all__ = ["ErrorFeedback"]

# Elements that are rounded at a time: what they pass through stays in the processor's cache.
BLOCK = 1 << 16


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
        self._scratch: dict[str, Any] = {}

    def grow(self, views: Sequence[Any]) -> None:
        """Begin with residuals of zero for the arrays that have none yet."""
        for view in views[len(self.residuals) :]:
            [residual] = alike([view], compute_dtype(dtype_name(view.dtype)))
            residual[...] = 0
            self.residuals.append(residual)

    def clear(self) -> None:
        """Forget what rounding left over."""
        for residual in self.residuals:
            residual[...] = 0

    def reorder(self, changes: Sequence[tuple[int, Any, Any]]) -> None:
        """Follow arrays into another order in memory; see `Parameters.reordered`."""
        for i, old, new in changes:
            reorder(self.residuals[i], old, new)

    def pack(
        self, parts: Sequence[Any], views: Sequence[Any], factor: float, look: bool = False
    ) -> bool:
        """Round the parts of an array times the factor into their places, and keep what that leaves over.

        A part of an array that is None is sent as zeros; its residual waits. Returns whether all values were finite;
        True where they were not to be looked at.
        """
        finite = True
        for part, place in parts:
            if views[part.index] is None:
                place[...] = 0
                continue
            subtract = array_namespace(place).subtract
            for view, anchor, residual, target, value in self._blocks(part, place, views):
                if anchor is None:
                    copy_into(value, view)
                elif view.dtype == value.dtype:
                    subtract(view, anchor, out=value)
                else:
                    copy_into(value, view)
                    value -= anchor
                # Scaled before the sum, which could leave float16's range.
                value *= factor
                value += residual
                if look:
                    finite &= all_finite(value)
                copy_into(target, value)
                subtract(value, target, out=residual)
                # An overflow is not carried into the values that follow it.
                zero_nonfinite(residual)
        return finite

    def unpack(self, parts: Sequence[Any], views: Sequence[Any]) -> None:
        """Take the sum of what all ranks sent."""
        for part, place in parts:
            if views[part.index] is None:
                continue
            add = array_namespace(place).add
            for view, anchor, _, source, total in self._blocks(part, place, views):
                if anchor is None:
                    copy_into(view, source)
                    continue
                if view.dtype == total.dtype:
                    add(anchor, source, out=view)
                else:
                    copy_into(total, anchor)
                    total += source
                    copy_into(view, total)
                if self.renews:
                    copy_into(anchor, view)

    def _blocks(self, part: Any, wire: Any, views: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Yield the blocks of a part: view, anchor, residual and place on the wire, and memory to compute in."""
        i = part.index
        name = dtype_name(self.residuals[i].dtype)
        if name not in self._scratch:
            self._scratch[name] = empty(wire, BLOCK, name)
        for start in range(part.start, part.stop, BLOCK):
            where = slice(start, min(start + BLOCK, part.stop))
            size = where.stop - start
            yield (
                views[i][where],
                None if self.anchors is None else self.anchors[i][where],
                self.residuals[i][where],
                wire[start - part.start :][:size],
                self._scratch[name][:size],
            )
