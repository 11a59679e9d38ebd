"""Averages arrays over the ranks in chunks of megabytes, by the engine's all-reduce.

A chunk is part of a large array, or of arrays side by side in memory, and is reduced where it is. Small separate arrays
are packed into a bucket, which is one chunk of a staging buffer: small chunks cost latency, and an operation for each
tensor costs more than all bytes together. The cutting depends on sizes and dtypes only, which all ranks have in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest
from typing import Any

import numpy as np

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import BLOCK, ITEM_BYTES, compute_dtype, dtype_name
from sgdcore.distributed.groups import MpiGroup, ProcessGroup, TorchGroup, Work


@dataclass(frozen=True)
class Sizes:
    """How large chunks are, where they are and in a bucket; how many are under way; the least that is not copied."""

    chunk_bytes: int
    bucket_bytes: int
    in_flight: int = 8
    # An operation of its own costs less than copying so much into a bucket and back.
    direct_bytes: int = 3 << 20


# An operation of gloo's costs its threads more than it gains by being cut and overlapped (benchmarks/distributed.py).
GLOO_SIZES = Sizes(256 << 20, 16 << 20)
# MPICH allocates up to as much memory as a chunk has for each operation. What is small enough comes back from the last
# operation, if that is done; what is large comes from the system anew, page after page.
MPI_SIZES = Sizes(28 << 20, 28 << 20, 1)
# Rounding to a wire dtype takes the processor as long as a fast link takes to send: the first chunk is to leave soon.
WIRE_SIZES = Sizes(4 << 20, 4 << 20)


@dataclass(frozen=True)
class Chunk:
    """Elements of arrays, by their positions, that travel as one array.

    Of the first array as many elements as `before` says are left out, of the last one as many as `after` says.
    """

    arrays: Sequence[int]
    size: int
    dtype: str
    before: int = 0
    after: int = 0

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

    def pack(self) -> None:
        """Copy the pieces into the array."""
        if self.pieces:
            _flat.concatenate(self.pieces, self.array)

    def unpack(self) -> None:
        """Copy the array to where the pieces are."""
        if self.pieces:
            _flat.scatter(self.array, self.pieces)
        else:
            _flat.count_change(self.array)


def exchange(
    cargos: Iterable[Cargo],
    send: Callable[[Cargo], Work],
    unload: Callable[[Cargo], None],
    in_flight: int,
) -> None:
    """Send cargos, several at a time; each is unloaded in its turn, after the next one is sent.

    If one fails, this raises only once no other is under way: they write into memory until they are done.
    """
    pending: deque[tuple[Cargo, Work]] = deque()
    try:
        for number, cargo in enumerate(chain(cargos, repeat(None, in_flight))):
            arrived = None
            if number >= in_flight and pending:
                arrived, work = pending[0]
                work.wait()
                pending.popleft()
            if cargo is not None:
                pending.append((cargo, send(cargo)))
            if arrived is not None:
                unload(arrived)
    except Exception:
        for _, work in pending:
            with suppress(Exception):  # the first failure is the one that is reported
                work.wait()
        raise


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
        """Take the order in memory of the parameters, and their anchors; residuals of new ones are zero."""
        self._anchors = [_flat.flat(each, "anchor") for each in anchors]
        dtypes = (compute_dtype(dtype_name(view.dtype)) for view in flats)
        self.residuals = _flat.beside(self.residuals, data, dtypes)
        self._flat_residuals = [_flat.flat(each, "residual") for each in self.residuals]

    def load(self, saved: Sequence[Any] = ()) -> None:
        """Take over saved residuals; those that are not there, or None, are zero."""
        for residual, value in zip_longest(self.residuals, saved[: len(self.residuals)]):
            residual[...] = 0 if value is None else value

    def pack(
        self, chunk: Chunk, views: Sequence[Any], array: Any, factor: float, look: bool
    ) -> bool:
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
    """Averages arrays of given sizes over the ranks, in place.

    Args:
        views: flat arrays on one device, of the sizes of those that are to be averaged; they are not kept.
        runs: the positions of those that lie side by side, together; the same on all ranks.
        dtypes: the dtypes in which they travel.
    """

    def __init__(
        self, views: Sequence[Any], runs: Sequence[Sequence[int]], dtypes: Sequence[str]
    ) -> None:
        self._arrays = runs, [len(view) for view in views], dtypes
        self._like = views[0][:0] if views else None
        self._planned: tuple[Any, list[Chunk]] = None, []
        self._loaded: tuple[Any, list[Cargo]] = None, []
        self._staging: dict[tuple[str, int], Any] = {}

    def average(
        self,
        group: ProcessGroup,
        views: Sequence[Any],
        factor: float,
        *,
        wanted: Sequence[bool] | None = None,
        feedback: ErrorFeedback | None = None,
        look: bool = False,
    ) -> list[int]:
        """Replace each array by the sum over the group of the arrays times each rank's factor.

        Args:
            group: the ranks.
            views: the arrays as flat views; none on a rank that has nothing to average.
            factor: this rank's weight. Where it is 0 zeros are sent, whatever this rank's arrays hold.
            wanted: for each array whether it is averaged, the same on all ranks; None for all.
            feedback: how they are rounded; None for those that travel as they are.
            look: return the ranks that have values that are not finite, the same on all.
        """
        finite = True
        bad = _flat.as_kind(self._like, np.zeros(group.size if look else 0, np.int64))

        def send(cargo: Cargo) -> Work:
            nonlocal finite
            if cargo.array is bad:
                bad[group.rank] = not finite
            elif factor == 0:
                cargo.array[...] = 0  # a product would keep NaN
            elif feedback is not None:
                finite &= feedback.pack(cargo.chunk, views, cargo.array, factor, look)
            else:
                cargo.pack()
                finite &= _flat.scale(cargo.array, factor, look)
            return group.all_reduce(cargo.array)

        def unload(cargo: Cargo) -> None:
            if feedback is not None and cargo.pieces:
                feedback.unpack(cargo.chunk, views, cargo.array)
            else:
                cargo.unpack()

        limits = MPI_SIZES if isinstance(group, MpiGroup) else GLOO_SIZES
        limits = limits if feedback is None else WIRE_SIZES
        cargos = self._load(limits, views, wanted, in_place=feedback is None)
        last = [Cargo(Chunk((), group.size, "int64"), bad)] if look else []
        try:
            # Where numbers overflow is each rank's own: an error there would leave the others waiting.
            with np.errstate(all="ignore"):
                exchange(chain(cargos, last), send, unload, limits.in_flight)
        except BaseException:  # an interrupt, too
            if isinstance(group, TorchGroup):
                group.abort()
            raise
        return [rank for rank, is_bad in enumerate(bad.tolist()) if is_bad]

    def broadcast(self, group: ProcessGroup, views: Sequence[Any], source: int = 0) -> None:
        """Replace each array by that of the rank `source`, bit for bit."""

        def send(cargo: Cargo) -> Work:
            if group.rank == source:
                cargo.pack()
            else:
                cargo.array[...] = 0
            return group.all_reduce(_flat.bits(cargo.array))

        if group.size > 1:
            cargos = self._load(MPI_SIZES, views)
            exchange(cargos, send, Cargo.unpack, MPI_SIZES.in_flight)

    def _load(
        self,
        limits: Sizes,
        views: Sequence[Any],
        wanted: Sequence[bool] | None = None,
        in_place: bool = True,
    ) -> Iterable[Cargo]:
        """Return each chunk with the memory that travels: the arrays' own, or a staging buffer."""
        key = limits, in_place, None if wanted is None else tuple(wanted)
        if self._planned[0] != key:
            runs, sizes, dtypes = self._arrays
            if wanted is not None:
                runs = [[i for i in run if wanted[i]] for run in runs]
            self._planned = key, plan_chunks(runs, sizes, dtypes, limits)
            self._loaded = None, []
        if self._loaded[0] is not views:
            # Chunks so far apart share a staging buffer: they are never under way together.
            slots, chunks = limits.in_flight + 1, enumerate(self._planned[1])
            cargos = [
                self._cargo(chunk, views, number % slots, in_place) for number, chunk in chunks
            ]
            # Gradients and momenta, of which not all may be wanted, are not kept alive.
            self._loaded = (views, cargos) if wanted is None else (None, [])
            return cargos
        return self._loaded[1]

    def _cargo(self, chunk: Chunk, views: Sequence[Any], number: int, in_place: bool) -> Cargo:
        pieces = chunk.pieces(views) if views else []
        if pieces and in_place and dtype_name(pieces[0].dtype) == chunk.dtype:
            joined = _flat.join(pieces)
            if joined is not None:
                return Cargo(chunk, joined)
        slot = chunk.dtype, number
        if slot not in self._staging or len(self._staging[slot]) < chunk.size:
            self._staging[slot] = _flat.empty(self._like, chunk.size, chunk.dtype)
        return Cargo(chunk, self._staging[slot][: chunk.size], pieces)
