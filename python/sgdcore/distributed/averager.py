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

from sgdcore.distributed import _flat
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import MpiGroup, ProcessGroup, Work, abort


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
# Rounding to a wire dtype costs the processor as much as a fast link takes to send: the sooner the first chunk leaves,
# the better.
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
    for run in runs:
        dtype, size = dtypes[run[0]], sum([sizes[i] for i in run])
        if size * _flat.item_bytes(dtype) >= direct_bytes:
            chunks += _cut(run, sizes, dtype, limits.chunk_bytes)
        elif size:
            arrays, filled = buckets.get(dtype, ([], 0))
            if (filled + size) * _flat.item_bytes(dtype) > bucket_bytes:
                chunks.append(Chunk(arrays, filled, dtype))
                arrays, filled = [], 0
            arrays += run
            buckets[dtype] = arrays, filled + size
    return chunks + [Chunk(arrays, size, dtype) for dtype, (arrays, size) in buckets.items()]


def _cut(run: Sequence[int], sizes: Sequence[int], dtype: str, limit: int) -> Iterator[Chunk]:
    """Cut arrays side by side into chunks of at most `limit` bytes, all but the last one equal."""
    ends = np.cumsum([sizes[i] for i in run])
    size = int(ends[-1])
    length = -(-size // -(-size // max(1, limit // _flat.item_bytes(dtype))))
    for start in range(0, size, length):
        stop = min(start + length, size)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        before = start - int(ends[first]) + sizes[run[first]]
        yield Chunk(run[first : last + 1], stop - start, dtype, before, int(ends[last]) - stop)


def exchange(
    count: int, start: Callable[[int], Work], finish: Callable[[int], None], in_flight: int
) -> None:
    """Run operations 0 to `count`, several at a time, each finished in its turn, the next one started before.

    If one fails, this raises only once no other is under way: they write into memory until they are done.
    """
    pending: deque[Work] = deque()
    left = iter(range(count))
    try:
        for number in range(count + in_flight):
            if number >= in_flight:
                pending[0].wait()
                pending.popleft()
            if (following := next(left, None)) is not None:
                pending.append(start(following))
            if number >= in_flight:
                finish(number - in_flight)
    except Exception:
        for work in pending:
            with suppress(Exception):  # the first failure is the one that is reported
                work.wait()
        raise


@dataclass(frozen=True)
class _Cargo:
    """A chunk ready to travel: the array, and the pieces that are copied into it and back; none where they are it."""

    chunk: Chunk
    array: Any
    pieces: list[Any]


class Averager:
    """Averages arrays over the ranks, in place.

    Args:
        views: arrays of the same sizes and dtypes, on the same device, as flat views; they are not kept.
        runs: the positions of those that lie side by side, together; the same on all ranks.
        wires: the dtypes in which they travel; None for `wire_name` of each with `wire`.
        wire: the dtype that they are rounded to, or None.
        feedback: how they are rounded; None for those that travel as they are.
        chunk_bytes: the most bytes in a chunk; None for what suits the engine.
    """

    def __init__(
        self,
        views: Sequence[Any],
        runs: Sequence[Sequence[int]],
        wires: Sequence[str] | None = None,
        wire: str | None = None,
        feedback: ErrorFeedback | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        if wires is None:
            wires = [_flat.wire_name(_flat.dtype_name(view.dtype), wire) for view in views]
        self._arrays = runs, [len(view) for view in views], wires
        self._like, self._feedback = views[0][:0], feedback
        self._limits = None if chunk_bytes is None else Sizes(chunk_bytes, chunk_bytes)
        self._planned: tuple[Any, list[Chunk]] = None, []
        self._bound: tuple[Any, list[_Cargo]] = None, []
        self._staging: dict[tuple[str, int], Any] = {}

    def average(
        self,
        group: ProcessGroup,
        views: Sequence[Any],
        factor: float,
        look: bool = False,
        wanted: Sequence[bool] | None = None,
    ) -> list[int]:
        """Replace each array by the sum over the group of the arrays times each rank's factor.

        Args:
            group: the ranks.
            views: the arrays as flat views; none on a rank that has nothing to average.
            factor: this rank's weight; those of all ranks add up to 1. Where it is 0 zeros are sent, whatever this
                rank's arrays hold.
            look: look which ranks have values that are not finite.
            wanted: for each array whether it is averaged, the same on all ranks; None for all.

        Returns:
            Those ranks, the same on all; none where they were not looked for.

        Raises:
            Exception: the engine's, if a rank is gone; some of the arrays are then overwritten.
        """
        finite = True
        own, everyone = (_flat.empty(self._like, n, "int64") for n in (1, group.size))

        def send(cargo: _Cargo) -> Work:
            nonlocal finite
            if factor == 0:
                cargo.array[...] = 0  # a product would keep NaN
            elif self._feedback is not None:
                finite &= self._feedback.pack(cargo.chunk, views, cargo.array, factor, look)
            else:
                if cargo.pieces:
                    _flat.concatenate(cargo.pieces, cargo.array)
                finite &= _flat.scale(cargo.array, factor, look)
            return group.all_reduce(cargo.array)

        def tell() -> Work:
            own[0] = not finite
            return group.all_gather(everyone, own)

        try:
            # Where numbers overflow is each rank's own: an error there would leave the others waiting.
            with np.errstate(all="ignore"):
                self._run(group, views, wanted, send, tell if look else None)
        except BaseException:  # an interrupt, too
            abort(group)
            raise
        return [rank for rank, bad in enumerate(everyone.tolist()) if bad] if look else []

    def broadcast(
        self,
        group: ProcessGroup,
        views: Sequence[Any],
        source: int = 0,
        wanted: Sequence[bool] | None = None,
    ) -> None:
        """Replace each array by that of the rank `source`."""

        def send(cargo: _Cargo) -> Work:
            if cargo.pieces:
                _flat.concatenate(cargo.pieces, cargo.array)
            return group.broadcast(cargo.array, source)

        if group.size > 1:
            self._run(group, views, wanted, send, None)

    def release(self) -> None:
        """Forget the arrays, so that nothing here keeps them alive."""
        self._bound = None, []

    def _run(
        self,
        group: ProcessGroup,
        views: Sequence[Any],
        wanted: Sequence[bool] | None,
        send: Callable[[_Cargo], Work],
        tell: Callable[[], Work] | None,
    ) -> None:
        """Send all chunks and take back what arrives. After the last one is sent, `tell` starts an operation."""
        engines = MPI_SIZES if isinstance(group, MpiGroup) else GLOO_SIZES
        limits = self._limits or (engines if self._feedback is None else WIRE_SIZES)
        key = limits, None if wanted is None else tuple(wanted)
        if self._planned[0] != key:
            runs, sizes, wires = self._arrays
            if wanted is not None:
                runs = [left for run in runs if (left := [i for i in run if wanted[i]])]
            self._planned = key, plan_chunks(runs, sizes, wires, limits)
            self.release()
        if self._bound[0] is not views:
            # Every so many copies share a staging buffer: they are never under way together.
            slots, chunks = limits.in_flight + 1, enumerate(self._planned[1])
            self._bound = views, [self._bind(chunk, views, n % slots) for n, chunk in chunks]
        cargos = self._bound[1]

        def start(number: int) -> Work:
            if tell is not None and number == len(cargos):
                return tell()
            return send(cargos[number])

        def finish(number: int) -> None:
            if number < len(cargos):
                self._unload(cargos[number], views)

        exchange(len(cargos) + (tell is not None), start, finish, limits.in_flight)

    def _bind(self, chunk: Chunk, views: Sequence[Any], slot: int) -> _Cargo:
        """Find or allocate the memory that travels."""
        pieces = chunk.pieces(views) if views else []
        if pieces and self._feedback is None and _flat.dtype_name(pieces[0].dtype) == chunk.dtype:
            joined = _flat.join(pieces)
            if joined is not None:
                return _Cargo(chunk, joined, [])
        key = chunk.dtype, slot
        if key not in self._staging or len(self._staging[key]) < chunk.size:
            self._staging[key] = _flat.empty(self._like, chunk.size, chunk.dtype)
        return _Cargo(chunk, self._staging[key][: chunk.size], pieces)

    def _unload(self, cargo: _Cargo, views: Sequence[Any]) -> None:
        """Bring what arrived to where the arrays are."""
        if not cargo.pieces:
            _flat.count_change(cargo.array)
        elif self._feedback is not None:
            self._feedback.unpack(cargo.chunk, views, cargo.array)
        else:
            _flat.scatter(cargo.array, cargo.pieces)
