"""Averages arrays over the ranks in chunks of megabytes, by the engine's all-reduce.

A chunk is part of a large array, or of arrays side by side in memory, and is reduced where it is. Small separate arrays
are packed into a bucket: one chunk of a staging buffer. Small chunks cost latency, and an operation for each tensor
costs more than all bytes together. The cutting depends on shapes and dtypes only, which all ranks have in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgdcore.distributed._flat import (
    copy_all,
    count_change,
    dtype_name,
    empty,
    item_bytes,
    join,
    scale,
)
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import MpiGroup, ProcessGroup, Work, abort

__all__ = ["Averager", "Chunk", "Part", "Sizes", "exchange", "plan_chunks"]


@dataclass(frozen=True)
class Sizes:
    """How large chunks are. All ranks use the same engine, and so the same sizes.

    Attributes:
        chunk_bytes: the most bytes in a chunk that travels from where it is.
        bucket_bytes: the most bytes in a chunk that is copied.
        in_flight: the number of chunks under way at once, while another one is prepared or taken back.
        direct_bytes: from this size on, what lies together travels from where it is: an operation of its own costs less
            than copying into a bucket and back.
    """

    chunk_bytes: int
    bucket_bytes: int
    in_flight: int = 8
    direct_bytes: int = 3 << 20


# An operation of gloo's costs its threads more than it gains by being cut and overlapped (benchmarks/distributed.py).
GLOO_SIZES = Sizes(256 << 20, 16 << 20)
# MPICH allocates up to as much memory as a chunk has for each operation. What is small enough comes back from the last
# operation; what is large comes from the system anew, page after page.
MPI_SIZES = Sizes(28 << 20, 28 << 20, 2)
# Rounding to a wire dtype costs the processor as much as a fast link takes to send: the sooner the first chunk leaves,
# the better.
WIRE_SIZES = Sizes(4 << 20, 4 << 20)


@dataclass(frozen=True)
class Part:
    """The elements from `start` to `stop` of the array number `index`."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """Parts that travel as one array."""

    parts: tuple[Part, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return sum(part.stop - part.start for part in self.parts)


def plan_chunks(
    runs: Iterable[Sequence[int]], sizes: Sequence[int], dtypes: Sequence[str], limits: Sizes
) -> list[Chunk]:
    """Cut arrays into chunks.

    Args:
        runs: the arrays' positions, those together that lie side by side.
        sizes: their numbers of elements.
        dtypes: the dtypes in which they travel.
        limits: how large chunks may be.
    """
    bucket_bytes = min(limits.chunk_bytes, limits.bucket_bytes)
    chunks: list[Chunk] = []
    buckets: dict[str, list[Part]] = {}
    filled: dict[str, int] = {}  # elements in the buckets
    for run in runs:
        dtype = dtypes[run[0]]
        size = sum(sizes[i] for i in run)
        if size * item_bytes(dtype) >= min(limits.direct_bytes, bucket_bytes):
            limit = max(1, limits.chunk_bytes // item_bytes(dtype))
            limit = -(-size // -(-size // limit))
            chunks += [Chunk(parts, dtype) for parts in _cut(run, sizes, limit)]
            continue
        bucket, limit = buckets.setdefault(dtype, []), bucket_bytes // item_bytes(dtype)
        if filled.get(dtype, 0) + size > limit:
            chunks.append(Chunk(tuple(bucket), dtype))
            bucket.clear()
            filled[dtype] = 0
        bucket += [Part(i, 0, sizes[i]) for i in run if sizes[i]]
        filled[dtype] = filled.get(dtype, 0) + size
    return chunks + [Chunk(tuple(parts), dtype) for dtype, parts in buckets.items() if parts]


def _cut(run: Sequence[int], sizes: Sequence[int], limit: int) -> list[tuple[Part, ...]]:
    """Cut arrays side by side into pieces of `limit` elements, and one of the rest."""
    pieces: list[list[Part]] = [[]]
    room = limit
    for i in run:
        start = 0
        while start < sizes[i]:
            if room == 0:
                pieces.append([])
                room = limit
            stop = min(sizes[i], start + room)
            pieces[-1].append(Part(i, start, stop))
            room -= stop - start
            start = stop
    return [tuple(piece) for piece in pieces if piece]


def exchange(
    count: int,
    start: Callable[[int], Work],
    finish: Callable[[int], None],
    in_flight: int,
) -> None:
    """Run operations 0 to `count`, several at a time, each finished in its turn, the next one started before.

    If one fails, this raises only once no other is under way: they write into memory until they are done.
    """
    pending: deque[Work] = deque()
    started = 0
    try:
        for number in range(count):
            while started < min(number + in_flight, count):
                pending.append(start(started))
                started += 1
            pending[0].wait()
            pending.popleft()
            if started < count:
                pending.append(start(started))
                started += 1
            finish(number)
    except Exception:
        for work in pending:
            with suppress(Exception):  # the first failure is the one that is reported
                work.wait()
        raise


@dataclass(frozen=True)
class _Cargo:
    """A chunk ready to travel.

    Attributes:
        array: what travels: the memory that the chunk covers, or part of a staging buffer.
        views: what is copied into the array and back; none where it travels from where it is.
        places: where in the array each of them goes.
        parts: the chunk's parts that some rank has a value of, with their places in the array.
    """

    array: Any
    views: list[Any]
    places: list[Any]
    parts: list[tuple[Part, Any]]

    @property
    def is_direct(self) -> bool:
        """Whether it travels from where it is."""
        return not self.parts


class Averager:
    """Averages arrays of given sizes over the ranks, in place.

    Args:
        runs: the arrays' positions, those together that lie side by side; the same on all ranks.
        sizes: their numbers of elements.
        wires: the dtypes in which they travel.
        like: an array of their kind, on their device.
        feedback: how they are rounded to the wire's dtype; None for those that travel as they are.
        chunk_bytes: the most bytes in a chunk; None for what suits the engine.
    """

    def __init__(
        self,
        runs: Sequence[Sequence[int]],
        sizes: Sequence[int],
        wires: Sequence[str],
        like: Any,
        feedback: ErrorFeedback | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        self._plan = runs, sizes, wires
        self._like, self._feedback = like, feedback
        self._own_limits = None if chunk_bytes is None else Sizes(chunk_bytes, chunk_bytes)
        self._chunks: dict[Sizes, list[Chunk]] = {}
        self._staging: dict[tuple[str, int], Any] = {}
        self._bound: tuple[Any, Sizes, list[_Cargo]] | None = None

    def _limits(self, group: ProcessGroup) -> Sizes:
        if self._own_limits is not None:
            return self._own_limits
        if self._feedback is not None:
            return WIRE_SIZES
        return MPI_SIZES if isinstance(group, MpiGroup) else GLOO_SIZES

    def bind(self, group: ProcessGroup, views: Sequence[Any]) -> list[_Cargo]:
        """Find or allocate the memory that travels. What was found for these very views before is found again.

        Args:
            group: the ranks.
            views: the arrays as flat views. None for one that no rank has, and on a rank that has nothing to average.
        """
        limits = self._limits(group)
        bound = self._bound
        if bound is not None and bound[0] is views and bound[1] == limits:
            return bound[2]
        if limits not in self._chunks:
            self._chunks[limits] = plan_chunks(*self._plan, limits)
        # Every so many copies share a staging buffer: they are never under way together.
        slots = limits.in_flight + 1
        cargos: list[_Cargo] = []
        for chunk in self._chunks[limits]:
            array = None if self._feedback is not None else self._find(chunk, views)
            if array is None:
                cargos.append(self._stage(chunk, views, len(cargos) % slots))
            else:
                cargos.append(_Cargo(array, [], [], []))
        self._bound = views, limits, cargos
        return cargos

    def _find(self, chunk: Chunk, views: Sequence[Any]) -> Any:
        """Return the memory that a chunk covers as it stands, or None if it has to be copied."""
        found = []
        for part in chunk.parts:
            view = views[part.index]
            if view is None or dtype_name(view.dtype) != chunk.dtype:
                return None
            found.append(_cut_out(view, part))
        return join(found)

    def _stage(self, chunk: Chunk, views: Sequence[Any], slot: int) -> _Cargo:
        key = chunk.dtype, slot
        if key not in self._staging or len(self._staging[key]) < chunk.size:
            self._staging[key] = empty(self._like, chunk.size, chunk.dtype)
        array = self._staging[key][: chunk.size]
        parts = list(_places(chunk, array))
        there = [(part, place) for part, place in parts if views[part.index] is not None]
        found = [_cut_out(views[part.index], part) for part, _ in there]
        return _Cargo(array, found, [place for _, place in there], parts)

    def release(self) -> None:
        """Forget the arrays, so that nothing here keeps them alive."""
        self._bound = None

    def average(
        self, group: ProcessGroup, views: Sequence[Any], factor: float, look: bool = False
    ) -> list[int]:
        """Replace each array by the sum over the group of the arrays times each rank's factor.

        Args:
            group: the ranks.
            views: the arrays; see `bind`.
            factor: this rank's weight; those of all ranks add up to 1. Where it is 0 zeros are sent, whatever this
                rank's arrays hold.
            look: look which ranks have values that are not finite.

        Returns:
            Those ranks, the same on all; none where they were not looked for.

        Raises:
            Exception: the engine's, if a rank is gone; some of the arrays are then overwritten.
        """
        cargos = self.bind(group, views)
        finite = True
        own, everyone = (empty(self._like, n, "int64") for n in (1, group.size))

        def start(number: int) -> Work:
            nonlocal finite
            if number == len(cargos):  # all chunks are under way, or were
                own[0] = not finite
                return group.all_gather(everyone, own)
            finite &= self._load(cargos[number], views, factor, look)
            return group.all_reduce(cargos[number].array)

        def finish(number: int) -> None:
            if number < len(cargos):
                self._unload(cargos[number], views)

        try:
            # Where numbers overflow is each rank's own: an error there would leave the others waiting.
            with np.errstate(all="ignore"):
                exchange(len(cargos) + look, start, finish, self._limits(group).in_flight)
        except BaseException:  # an interrupt, too
            abort(group)
            raise
        return [rank for rank, bad in enumerate(everyone.tolist()) if bad] if look else []

    def _load(self, cargo: _Cargo, views: Sequence[Any], factor: float, look: bool) -> bool:
        """Make the array ready to travel."""
        if factor == 0 or (not cargo.is_direct and not cargo.views):
            cargo.array[...] = 0  # a product would keep NaN
            return True
        if self._feedback is not None:
            return self._feedback.pack(cargo.parts, views, factor, look)
        if len(cargo.views) < len(cargo.parts):
            cargo.array[...] = 0
        copy_all(cargo.places, cargo.views)
        return scale(cargo.array, factor, look)

    def _unload(self, cargo: _Cargo, views: Sequence[Any]) -> None:
        """Bring what arrived to where the arrays are."""
        if cargo.is_direct:
            count_change(cargo.array)
        elif self._feedback is not None:
            self._feedback.unpack(cargo.parts, views)
        else:
            copy_all(cargo.views, cargo.places)

    def broadcast(self, group: ProcessGroup, views: Sequence[Any], source: int = 0) -> None:
        """Replace each array by that of the rank `source`."""
        if group.size == 1:
            return
        cargos = self.bind(group, views)

        def start(number: int) -> Work:
            copy_all(cargos[number].places, cargos[number].views)
            return group.broadcast(cargos[number].array, source)

        exchange(
            len(cargos),
            start,
            lambda number: self._unload(cargos[number], views),
            self._limits(group).in_flight,
        )


def _cut_out(view: Any, part: Part) -> Any:
    """Return a part of an array; all of it is the array itself, which saves time for many small ones."""
    whole = part.start == 0 and part.stop == view.shape[0]
    return view if whole else view[part.start : part.stop]


def _places(chunk: Chunk, array: Any) -> Iterator[tuple[Part, Any]]:
    """Return each part of a chunk with its place in the chunk's array."""
    start = 0
    for part in chunk.parts:
        stop = start + part.stop - part.start
        yield part, array[start:stop]
        start = stop
