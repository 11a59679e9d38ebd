"""Averages arrays over the ranks in chunks of megabytes, by the engine's all-reduce.

A chunk is part of a large array, or of arrays side by side in memory, and is reduced where it is. Small separate arrays
are packed into a staging buffer: each operation costs as much as many bytes. The cutting depends on sizes and dtypes
only, which all ranks have in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest
from typing import Any

import numpy as np

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import BLOCK, ITEM_BYTES, dtype_name, wire_name
from sgdcore.distributed.groups import MpiGroup, ProcessGroup, TorchGroup, Work


@dataclass(frozen=True)
class Sizes:
    """How large chunks are, where they are and in a bucket; how many are under way; the least that is not copied."""

    chunk_bytes: int
    bucket_bytes: int
    in_flight: int = 8
    direct_bytes: int = 3 << 20  # an operation costs less than copying so much there and back


# An operation of gloo's costs its threads more than it gains by being cut and overlapped (benchmarks/distributed.py).
GLOO_SIZES = Sizes(256 << 20, 16 << 20)
# MPICH allocates up to as much memory as a chunk has for each operation. What is small enough comes back from the last
# operation, if that is done; what is large comes from the system anew, page after page.
MPI_SIZES = Sizes(28 << 20, 28 << 20, 1)
# Rounding to a wire dtype takes the processor as long as a fast link takes to send: the first chunk is to leave soon.
WIRE_SIZES = Sizes(4 << 20, 4 << 20)


@dataclass(frozen=True)
class Chunk:
    """Elements of arrays, by their positions, that travel as one array: of the first and last one not all."""

    arrays: Sequence[int]
    size: int
    dtype: str
    before: int = 0  # elements of the first array that are left out
    after: int = 0  # of the last one

    def pieces(self, views: Sequence[Any]) -> list[Any]:
        """Return the part of each of the arrays that is in the chunk."""
        found = [views[i] for i in self.arrays]
        if self.after:
            found[-1] = found[-1][: -self.after]
        if self.before:
            found[0] = found[0][self.before :]
        return found


def plan_chunks(
    runs: Iterable[Sequence[int]], sizes: Sequence[int], dtypes: Sequence[str], limits: Sizes
) -> list[Chunk]:
    """Cut arrays of these sizes, which travel in these dtypes, into chunks; those of a run lie side by side."""
    bucket_bytes = min(limits.chunk_bytes, limits.bucket_bytes)
    direct_bytes = min(limits.direct_bytes, bucket_bytes)
    chunks: list[Chunk] = []
    buckets: dict[str, tuple[list[int], int]] = {}  # arrays, and their elements
    for run in filter(None, runs):
        dtype, size = dtypes[run[0]], sum([sizes[i] for i in run])
        if size * ITEM_BYTES[dtype] >= direct_bytes:
            chunks += _cut(run, sizes, dtype, limits.chunk_bytes)
        elif size:
            arrays, filled = buckets.get(dtype, ([], 0))
            if (filled + size) * ITEM_BYTES[dtype] > bucket_bytes:
                chunks.append(Chunk(arrays, filled, dtype))
                arrays, filled = [], 0
            arrays += run
            buckets[dtype] = arrays, filled + size
    return chunks + [Chunk(arrays, size, dtype) for dtype, (arrays, size) in buckets.items()]


def _cut(run: Sequence[int], sizes: Sequence[int], dtype: str, limit: int) -> Iterator[Chunk]:
    """Cut arrays side by side into chunks of at most `limit` bytes, all but the last one equal."""
    ends = np.cumsum([sizes[i] for i in run])
    size = int(ends[-1])
    length = -(-size // -(-size // max(1, limit // ITEM_BYTES[dtype])))
    for start in range(0, size, length):
        stop = min(start + length, size)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        before = start - int(ends[first]) + sizes[run[first]]
        yield Chunk(run[first : last + 1], stop - start, dtype, before, int(ends[last]) - stop)


@dataclass(frozen=True)
class Cargo:
    """A chunk ready to travel: the array, and the pieces that are copied into it and back; none where they are it."""

    chunk: Chunk
    array: Any
    pieces: Sequence[Any] = ()


class ErrorFeedback:
    """Rounds what was added to parameters since they were equal to the dtype on the wire; `residuals` are left over."""

    def __init__(self, data: Sequence[Any], anchors: Sequence[Any]) -> None:
        flats = [_flat.flat(each, "parameter") for each in data]
        dtypes = [wire_name(dtype_name(each.dtype)) for each in flats]
        self.residuals = [_flat.zeros_like(*each) for each in zip(data, dtypes, strict=True)]
        self._flat_residuals = [_flat.flat(each, "residual") for each in self.residuals]
        self._anchors = [_flat.flat(each, "anchor") for each in anchors[: len(data)]]

    def load(self, saved: Sequence[Any] = ()) -> None:
        """Take over saved residuals; those that are not there, or None, are zero."""
        for residual, value in zip_longest(self.residuals, saved):
            residual[...] = 0 if value is None else value

    def pack(self, chunk: Chunk, views: Sequence[Any], array: Any, factor: float) -> bool:
        """Round a chunk of the views times the factor into an array; returns whether all is finite."""
        finite = True
        for view, anchor, residual, target, value in self._blocks(chunk, views, array):
            value[...] = view
            value -= anchor
            value *= factor  # before the sum, which could leave float16's range
            value += residual
            finite = finite and _flat.all_finite(value)
            target[...] = value
            residual[...] = value
            residual -= target
            if not _flat.all_finite(residual):
                # An overflow is not carried into the next values.
                residual[~_flat.library(residual).isfinite(residual)] = 0
        return finite

    def unpack(self, chunk: Chunk, views: Sequence[Any], array: Any) -> None:
        """Take the sum of what all ranks sent."""
        for view, anchor, _, source, total in self._blocks(chunk, views, array):
            total[...] = source
            total += anchor
            view[...] = total

    def _blocks(self, chunk: Chunk, views: Sequence[Any], array: Any) -> Iterator[tuple[Any, ...]]:
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


class Averager:
    """Averages arrays like flat `views` over the ranks, in place, as `dtypes`; those of a run lie side by side."""

    def __init__(
        self, views: Sequence[Any], runs: Sequence[Sequence[int]], dtypes: Sequence[str]
    ) -> None:
        self._arrays = runs, [len(view) for view in views], dtypes
        self._like = views[0][:0] if views else None
        self._planned: tuple[Any, list[Chunk]] = None, []
        self._staging: dict[tuple[str, int], Any] = {}

    def average(
        self,
        group: ProcessGroup,
        views: Sequence[Any],
        factor: float,
        wanted: Sequence[bool] | None = None,
        feedback: ErrorFeedback | None = None,
        look: bool = False,
    ) -> list[int]:
        """Replace each array by the sum over the group of the arrays times each rank's factor.

        `views` are the arrays, flat; a rank with nothing to average has none. Where its factor is 0, they count for
        nothing, whatever they hold. Those that are not `wanted`, on all ranks alike, are left alone. To `look` is to
        return the ranks that have sent values that are not finite, the same on all.
        """
        finite, bad = True, _flat.as_kind(self._like, np.zeros(group.size, np.int64))

        def send(cargo: Cargo) -> Work:
            nonlocal finite
            if cargo.array is bad:
                bad[group.rank] = not finite
            elif factor == 0:
                cargo.array[...] = -0.0  # which leaves each sum as it is, also a zero's sign
            elif feedback is not None:
                finite &= feedback.pack(cargo.chunk, views, cargo.array, factor)
            else:
                if cargo.pieces:
                    _flat.library(cargo.array).concatenate(cargo.pieces, out=cargo.array)
                finite &= _flat.scale(cargo.array, factor)
            return group.all_reduce(cargo.array)

        def unload(cargo: Cargo) -> None:
            if not cargo.pieces:
                _flat.count_change(cargo.array)
            elif feedback is not None:
                feedback.unpack(cargo.chunk, views, cargo.array)
            else:
                _flat.scatter(cargo.array, cargo.pieces)

        limits = MPI_SIZES if isinstance(group, MpiGroup) else GLOO_SIZES
        limits = limits if feedback is None else WIRE_SIZES
        cargos = self._load(limits, views, wanted, in_place=feedback is None)
        if look:
            cargos.append(Cargo(Chunk((), group.size, "int64"), bad))
        pending: deque[tuple[Cargo, Work]] = deque()
        try:
            # Where numbers overflow is each rank's own: an error there would leave the others waiting.
            with np.errstate(all="ignore"):
                for cargo in chain(cargos, repeat(None, limits.in_flight)):
                    if len(pending) == limits.in_flight or (cargo is None and pending):
                        pending[0][1].wait()
                        unload(pending.popleft()[0])
                    if cargo is not None:
                        pending.append((cargo, send(cargo)))
        except BaseException as error:  # an interrupt, too
            # What is under way writes into memory until it is done; the first failure is the one to report.
            for _, work in pending if isinstance(error, Exception) else ():
                with suppress(Exception):
                    work.wait()
            if isinstance(group, TorchGroup):
                group.abort()
            raise
        return [rank for rank, is_bad in enumerate(bad.tolist()) if is_bad]

    def broadcast(self, group: ProcessGroup, views: Sequence[Any], source: int) -> None:
        """Replace each array by that of the rank `source`, bit for bit."""
        self.average(group, views, float(group.rank == source))

    def _load(
        self, limits: Sizes, views: Sequence[Any], wanted: Sequence[bool] | None, in_place: bool
    ) -> list[Cargo]:
        """Return each chunk with the memory that travels: the arrays' own, or a staging buffer."""
        key = limits, None if wanted is None else tuple(wanted)
        if self._planned[0] != key:
            runs, sizes, dtypes = self._arrays
            if wanted is not None:
                runs = [[i for i in run if wanted[i]] for run in runs]
            self._planned = key, plan_chunks(runs, sizes, dtypes, limits)
        cargos = []
        for number, chunk in enumerate(self._planned[1]):
            pieces = chunk.pieces(views) if views else []
            fits = pieces and in_place and dtype_name(pieces[0].dtype) == chunk.dtype
            joined = _flat.join(pieces) if fits else None
            # Chunks so far apart share a staging buffer: they are never under way together.
            slot = chunk.dtype, number % limits.in_flight
            if joined is None and len(self._staging.get(slot, ())) < chunk.size:
                self._staging[slot] = _flat.empty(self._like, chunk.size, chunk.dtype)
            if joined is None:
                cargos.append(Cargo(chunk, self._staging[slot][: chunk.size], pieces))
            else:
                cargos.append(Cargo(chunk, joined))
        return cargos
