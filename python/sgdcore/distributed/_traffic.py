"""What goes over the wire: the parameters, or their gradients, cut into slices of megabytes.

Small slices cost latency, tensor after tensor costs more than all bytes together. A slice covers part of a large array, or of
arrays side by side in memory, and is then reduced where it is; small separate arrays are copied into a bucket together.
The cutting depends on shapes and dtypes only, which all ranks have in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from sgdcore.distributed._flat import (
    divide_into,
    dtype_name,
    empty,
    item_bytes,
    join,
)
from sgdcore.distributed.groups import ProcessGroup, Work

__all__ = [
    "Averager",
    "Codec",
    "Part",
    "Plain",
    "Slice",
    "drain",
    "exchange",
    "places",
    "plan_slices",
    "wire_name",
]

SLICE_BYTES = 16 << 20
# From this size on, an operation of its own costs less than copying into a bucket and back (benchmarks/distributed.py).
DIRECT_BYTES = 3 << 20
IN_FLIGHT = 8  # slices; keeps the engine busy while the next one is prepared


@dataclass(frozen=True)
class Part:
    """The elements from `start` to `stop` of the array number `index`."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Slice:
    """Parts that travel as one array."""

    parts: tuple[Part, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return sum(part.stop - part.start for part in self.parts)


def wire_name(dtype: str, wire: str | None = None) -> str:
    """Return the dtype on the wire for arrays of a dtype: 16-bit ones are added up in float32 if nothing is asked for."""
    if wire is not None and item_bytes(wire) <= item_bytes(dtype):
        return wire
    return "float64" if dtype == "float64" else "float32"


def plan_slices(
    runs: Iterable[Sequence[int]],
    sizes: Sequence[int],
    dtypes: Sequence[str],
    slice_bytes: int = SLICE_BYTES,
) -> list[Slice]:
    """Cut arrays into slices.

    Args:
        runs: the arrays' positions, those together that lie side by side.
        sizes: their numbers of elements.
        dtypes: what they are on the wire.
        slice_bytes: the most bytes in a slice.
    """
    slices: list[Slice] = []
    buckets: dict[str, list[Part]] = {}
    for run in runs:
        dtype = dtypes[run[0]]
        limit = max(1, slice_bytes // item_bytes(dtype))
        size = sum(sizes[i] for i in run)
        if size * item_bytes(dtype) >= min(DIRECT_BYTES, slice_bytes):
            count = -(-size // limit)
            slices += [Slice(parts, dtype) for parts in _cut(run, sizes, -(-size // count))]
            continue
        bucket = buckets.setdefault(dtype, [])
        if sum(part.stop - part.start for part in bucket) + size > limit:
            slices.append(Slice(tuple(bucket), dtype))
            bucket.clear()
        bucket += [Part(i, 0, sizes[i]) for i in run if sizes[i]]
    return slices + [Slice(tuple(parts), dtype) for dtype, parts in buckets.items() if parts]


def _cut(run: Sequence[int], sizes: Sequence[int], limit: int) -> list[tuple[Part, ...]]:
    """Cut arrays side by side into pieces of `limit` elements, the last one of the rest."""
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
    return [tuple(piece) for piece in pieces]


def exchange(
    count: int,
    start: Callable[[int], Work],
    finish: Callable[[int], None],
    in_flight: int = IN_FLIGHT,
) -> None:
    """Run operations 0 to `count`, several at a time, each finished in its turn.

    If one fails, returns (by raising) only once no other is under way: they write into memory until they are done.
    """
    pending: deque[tuple[int, Work]] = deque()
    try:
        for i in range(count):
            if len(pending) == in_flight:
                number, work = pending[0]
                work.wait()
                pending.popleft()
                finish(number)
            pending.append((i, start(i)))
        while pending:
            number, work = pending[0]
            work.wait()
            pending.popleft()
            finish(number)
    except Exception:
        drain(work for _, work in pending)
        raise


def drain(works: Iterable[Work]) -> None:
    """Wait for operations whose results are of no use any more."""
    for work in works:
        with suppress(Exception):  # the first failure is the one that is reported
            work.wait()


class Codec(Protocol):
    """How parts of arrays become a slice's array, and back."""

    def pack(self, part: Part, target: Any) -> None:
        """Write a part into its place on the wire."""

    def unpack(self, part: Part, source: Any, ranks: int) -> None:
        """Take a part of the sum over all ranks back."""


class Plain:
    """The arrays themselves."""

    def __init__(self, views: Sequence[Any]) -> None:
        self.views = views

    def pack(self, part: Part, target: Any) -> None:
        target[...] = self.views[part.index][part.start : part.stop]

    def unpack(self, part: Part, source: Any, ranks: int) -> None:
        divide_into(self.views[part.index][part.start : part.stop], source, ranks)


class Differences:
    """What was added to the arrays since they were equal on all ranks, rounded to a shorter dtype.

    What the rounding leaves over is added to the next difference (error feedback). The engine's sums of such a dtype round,
    too, which nothing feeds back.

    Args:
        views: the arrays.
        anchors: their values when they were equal.
        errors: what is left over, in float32 or float64.
    """

    def __init__(
        self, views: Sequence[Any], anchors: Sequence[Any], errors: Sequence[Any], ranks: int
    ) -> None:
        self.views, self.anchors, self.errors, self.ranks = views, anchors, errors, ranks

    def pack(self, part: Part, target: Any) -> None:
        where = slice(part.start, part.stop)
        error = self.errors[part.index][where]
        # Divided before the sum, which could leave float16's range.
        difference = error * self.ranks  # new memory, of the error's dtype
        difference += self.views[part.index][where]
        difference -= self.anchors[part.index][where]
        difference /= self.ranks
        target[...] = difference
        difference -= target
        error[...] = difference

    def unpack(self, part: Part, source: Any, ranks: int) -> None:  # noqa: ARG002
        where = slice(part.start, part.stop)
        total = empty(source, len(source), dtype_name(self.errors[part.index].dtype))
        total[...] = self.anchors[part.index][where]
        total += source
        self.views[part.index][where] = total


class Averager:
    """Averages arrays over the ranks, in place.

    Args:
        views: flat arrays; the same sizes and dtypes on all ranks.
        runs: their positions, those together that lie side by side; the same on all ranks.
        codec: how they travel; `Plain` ones are reduced where they are if they can be.
        wires: the dtype of each on the wire; default: float32 for 16-bit arrays, else their own.
        slice_bytes: the most bytes in a slice.
    """

    def __init__(
        self,
        views: Sequence[Any],
        runs: Sequence[Sequence[int]],
        codec: Codec | None = None,
        wires: Sequence[str] | None = None,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        self._plain = codec is None
        self._codec = Plain(views) if codec is None else codec
        if wires is None:
            wires = [wire_name(dtype_name(view.dtype)) for view in views]
        self._slices = plan_slices(runs, [len(view) for view in views], wires, slice_bytes)
        self._views = views
        self._direct = [self._find(part) for part in self._slices]
        self._staging: dict[tuple[str, int], Any] = {}
        self._arrays: list[Any] = [None] * len(self._slices)

    def _find(self, piece: Slice) -> Any:
        """Return the memory that a slice covers as it stands, or None if it has to be copied."""
        views = [self._views[part.index][part.start : part.stop] for part in piece.parts]
        if not self._plain or dtype_name(views[0].dtype) != piece.dtype:
            return None
        return join(views)

    def _load(self, number: int) -> Any:
        """Return the array that travels."""
        if self._direct[number] is not None:
            array = self._direct[number]
        else:
            piece = self._slices[number]
            array = self._bucket(number, piece)
            for part, place in places(piece, array):
                self._codec.pack(part, place)
        self._arrays[number] = array
        return array

    def _bucket(self, number: int, piece: Slice) -> Any:
        # The slice that had this memory before is finished: no more than IN_FLIGHT are under way.
        key = piece.dtype, number % IN_FLIGHT
        memory = self._staging.get(key)
        if memory is None or len(memory) < piece.size:
            like = self._views[piece.parts[0].index]
            memory = self._staging[key] = empty(like, piece.size, piece.dtype)
        return memory[: piece.size]

    def _average(self, number: int, ranks: int) -> None:
        array, piece = self._arrays[number], self._slices[number]
        if self._direct[number] is not None:
            if ranks > 1:
                divide_into(array, array, ranks)
            return
        for part, place in places(piece, array):
            self._codec.unpack(part, place, ranks)

    def average(self, group: ProcessGroup) -> None:
        """Replace each array by its mean over the group; one rank alone changes nothing.

        Raises:
            Exception: the engine's, if a rank is gone; some of the arrays are then overwritten.
        """
        if group.size == 1:
            return
        exchange(
            len(self._slices),
            lambda number: group.all_reduce(self._load(number)),
            lambda number: self._average(number, group.size),
        )

    def broadcast(self, group: ProcessGroup, source: int = 0) -> None:
        """Replace each array by that of the rank `source`."""
        if group.size == 1:
            return
        exchange(
            len(self._slices),
            lambda number: group.broadcast(self._load(number), source),
            lambda number: self._average(number, 1),
        )


def places(piece: Slice, array: Any) -> Iterable[tuple[Part, Any]]:
    """Return each part of a slice with its place in the slice's array."""
    start = 0
    for part in piece.parts:
        stop = start + part.stop - part.start
        yield part, array[start:stop]
        start = stop
