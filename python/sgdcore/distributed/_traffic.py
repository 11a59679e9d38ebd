"""What goes over the wire: the parameters, or their gradients, cut into slices of megabytes.

Small slices cost latency, tensor after tensor costs more than all bytes together. A slice covers part of a large array,
or of arrays side by side in memory, and is then reduced where it is; small separate arrays are copied into a bucket
together. The cutting depends on shapes and dtypes only, which all ranks have in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from sgdcore.distributed._flat import (
    array_namespace,
    compute_dtype,
    copy_into,
    count_change,
    divide_into,
    dtype_name,
    empty,
    item_bytes,
    join,
)
from sgdcore.distributed._messages import MessageMean
from sgdcore.distributed.groups import (
    MpiGroup,
    PeerGroup,
    ProcessGroup,
    Work,
    break_off,
    is_peer_group,
)

__all__ = [
    "SLICE_BYTES",
    "Averager",
    "Codec",
    "Differences",
    "Pace",
    "Part",
    "Plain",
    "Slice",
    "drain",
    "exchange",
    "places",
    "plan_messages",
    "plan_slices",
    "wire_name",
]

# The most bytes in a slice of gradients, unless the user says otherwise.
SLICE_BYTES = 16 << 20
# Between ranks of one machine arrays go from each to all if together they have at most so many bytes,
COMBINED_MOST_BYTES = 256 << 10
# and there are at least so many ranks: with two a ring is as direct.
COMBINED_LEAST_RANKS = 3
# They go by messages (_messages.py) if they have at least so many bytes. In between an all-reduce is as soon.
MESSAGES_LEAST_TOTAL_BYTES = 8 << 20
# The most ranks between which they do either.
MESSAGES_MOST_RANKS = 8
# The most bytes in a message.
MESSAGE_BYTES = 8 << 20
# From this size on, what lies together is sent from where it is; what is smaller is copied into one array.
MESSAGE_DIRECT_BYTES = 512 << 10
# The most bytes that are copied to be sent, into memory of their own, which is kept.
MESSAGES_MOST_COPIED_BYTES = 64 << 20
# Elements that are encoded at a time: what they pass through stays in the processor's cache.
CHUNK = 1 << 16


@dataclass(frozen=True)
class Pace:
    """How much travels at a time. All ranks use the same engine, and so the same pace.

    Attributes:
        slice_bytes: the most bytes in a slice that travels from where it is.
        bucket_bytes: the most bytes in one that is copied.
        in_flight: slices under way at once, while another one is prepared or taken back.
        direct_bytes: from this size on, what lies together travels from where it is: an operation of its own costs less
            than copying into a bucket and back.
    """

    slice_bytes: int
    bucket_bytes: int
    in_flight: int = 8
    direct_bytes: int = 3 << 20


# An operation of gloo's costs its threads more than it wins by being cut and overlapped (benchmarks/distributed.py).
PACE = Pace(256 << 20, 16 << 20)
# MPICH allocates up to as much memory as a slice has for each operation. What is small enough comes back from the last
# operation; what is large comes from the system anew, page after page.
MPI_PACE = Pace(28 << 20, 28 << 20, 2)
# Encoding costs the processor as much as a fast link takes to send: the sooner the first slice leaves, the better.
ENCODED_PACE = Pace(4 << 20, 4 << 20)


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
    """Return the dtype on the wire for arrays of a dtype: 16-bit ones are added up in float32 unless `wire` says so."""
    if wire is not None and item_bytes(wire) <= item_bytes(dtype):
        return wire
    return compute_dtype(dtype)


def plan_slices(
    runs: Iterable[Sequence[int]],
    sizes: Sequence[int],
    dtypes: Sequence[str],
    pace: Pace,
) -> list[Slice]:
    """Cut arrays into slices.

    Args:
        runs: the arrays' positions, those together that lie side by side.
        sizes: their numbers of elements.
        dtypes: what they are on the wire.
        pace: how large slices may be.
    """
    bucket_bytes = min(pace.slice_bytes, pace.bucket_bytes)
    slices: list[Slice] = []
    buckets: dict[str, list[Part]] = {}
    filled: dict[str, int] = {}  # elements in the buckets
    for run in runs:
        dtype = dtypes[run[0]]
        size = sum(sizes[i] for i in run)
        if size * item_bytes(dtype) >= min(pace.direct_bytes, bucket_bytes):
            limit = max(1, pace.slice_bytes // item_bytes(dtype))
            count = -(-size // limit)
            limit = -(-size // count)
            slices += [Slice(parts, dtype) for parts in _cut(run, sizes, limit, limit)]
            continue
        bucket, limit = buckets.setdefault(dtype, []), bucket_bytes // item_bytes(dtype)
        if filled.get(dtype, 0) + size > limit:
            slices.append(Slice(tuple(bucket), dtype))
            bucket.clear()
            filled[dtype] = 0
        bucket += [Part(i, 0, sizes[i]) for i in run if sizes[i]]
        filled[dtype] = filled.get(dtype, 0) + size
    return slices + [Slice(tuple(parts), dtype) for dtype, parts in buckets.items() if parts]


def plan_messages(
    runs: Iterable[Sequence[int]], sizes: Sequence[int], dtypes: Sequence[str], ranks: int
) -> list[list[Slice]]:
    """Cut arrays into messages of one size for each dtype, about as many for each rank, of one or more slices.

    Args:
        runs: the arrays' positions, those together that lie side by side.
        sizes: their numbers of elements.
        dtypes: what they are on the wire.
        ranks: how many there are.
    """
    direct: dict[str, list[Sequence[int]]] = {}
    copied: dict[str, list[int]] = {}
    for run in runs:
        dtype = dtypes[run[0]]
        if sum(sizes[i] for i in run) * item_bytes(dtype) >= MESSAGE_DIRECT_BYTES:
            direct.setdefault(dtype, []).append(run)
        else:
            copied.setdefault(dtype, []).extend(run)
    messages: list[list[Slice]] = []
    for dtype in dict.fromkeys(dtypes):
        arrays = [*direct.get(dtype, []), copied.get(dtype, [])]
        total = sum(sizes[i] for run in arrays for i in run)
        count = ranks * -(-total * item_bytes(dtype) // (ranks * MESSAGE_BYTES))
        limit = -(-total // max(1, count))
        limit += -limit % 16  # where they are cut, aligned arrays stay aligned
        room = 0
        for run in arrays:
            for parts in _cut(run, sizes, limit, room):
                if room == 0:
                    messages.append([])
                    room = limit
                messages[-1].append(Slice(parts, dtype))
                room -= messages[-1][-1].size
    return messages


def _cut(run: Sequence[int], sizes: Sequence[int], limit: int, room: int) -> list[tuple[Part, ...]]:
    """Cut arrays side by side into pieces of `limit` elements, the first one of up to `room`, the last of the rest."""
    pieces: list[list[Part]] = [[]]
    room = room or limit
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

    If one fails, returns (by raising) only once no other is under way: they write into memory until they are done.
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
        drain(pending)
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

    def unpack(self, part: Part, source: Any, divisor: float) -> None:
        """Take a part of what arrived back, divided: a sum by the number of ranks, anything else by 1."""


class Plain:
    """The arrays themselves."""

    def __init__(self, views: Sequence[Any]) -> None:
        self.views = views

    def pack(self, part: Part, target: Any) -> None:
        copy_into(target, self.views[part.index][part.start : part.stop])

    def unpack(self, part: Part, source: Any, divisor: float) -> None:
        target = self.views[part.index][part.start : part.stop]
        if divisor == 1:
            copy_into(target, source)
        else:
            divide_into(target, source, divisor)


class Differences:
    """What was added to the arrays since they were equal on all ranks, rounded to a shorter dtype.

    What the rounding leaves over is added to the next difference (error feedback). The engine's sums of such a dtype
    round, too, which nothing feeds back.

    Args:
        views: the arrays.
        anchors: their values when they were equal.
        residuals: what rounding left over, in the arrays' `compute_dtype`.
        ranks: how many there are.
        renew: the anchors are not needed any more once the mean is there, and become it.
    """

    def __init__(
        self,
        views: Sequence[Any],
        anchors: Sequence[Any],
        residuals: Sequence[Any],
        ranks: int,
        renew: bool,
    ) -> None:
        self.views, self.anchors, self.residuals = views, anchors, residuals
        self.ranks, self.renew = ranks, renew
        self._memory: dict[str, Any] = {}

    def pack(self, part: Part, target: Any) -> None:
        subtract = array_namespace(target).subtract
        for view, anchor, residual, place, difference in self._chunks(part, target):
            if view.dtype == difference.dtype:
                subtract(view, anchor, out=difference)
            else:
                copy_into(difference, view)
                difference -= anchor
            # Divided before the sum, which could leave float16's range.
            divide_into(difference, difference, self.ranks)
            difference += residual
            copy_into(place, difference)
            subtract(difference, place, out=residual)

    def unpack(self, part: Part, source: Any, divisor: float) -> None:  # noqa: ARG002 (pack divides)
        add = array_namespace(source).add
        for view, anchor, _, place, total in self._chunks(part, source):
            if view.dtype == total.dtype:
                add(anchor, place, out=view)
            else:
                copy_into(total, anchor)
                total += place
                copy_into(view, total)
            if self.renew:
                copy_into(anchor, view)

    def _chunks(self, part: Part, wire: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the chunks of a part: its view, anchor, residual and place on the wire, and memory to compute in."""
        index = part.index
        name = dtype_name(self.residuals[index].dtype)
        if name not in self._memory:
            self._memory[name] = empty(wire, CHUNK, name)
        for start in range(part.start, part.stop, CHUNK):
            where = slice(start, min(start + CHUNK, part.stop))
            size = where.stop - start
            yield (
                self.views[index][where],
                self.anchors[index][where],
                self.residuals[index][where],
                wire[start - part.start :][:size],
                self._memory[name][:size],
            )


@dataclass(frozen=True)
class Cargo:
    """A slice ready to travel.

    Attributes:
        array: what travels: the memory that the slice covers, or a copy's.
        copies: each part with its place in the array; none where it travels from where it is.
    """

    array: Any
    copies: tuple[tuple[Part, Any], ...]


class Averager:
    """Averages arrays over the ranks, in place.

    Args:
        views: flat arrays; the same sizes on all ranks.
        runs: their positions, those together that lie side by side; the same on all ranks.
        codec: how they travel; `Plain` ones are reduced where they are if they can be.
        dtypes: theirs by rights, the same on all ranks; default: what they have. One that has another here is copied.
        wire: the dtype on the wire; None for float32 where `dtypes` says a 16-bit one, else what that says.
    """

    def __init__(
        self,
        views: Sequence[Any],
        runs: Sequence[Sequence[int]],
        codec: Codec | None = None,
        dtypes: Sequence[str] | None = None,
        wire: str | None = None,
    ) -> None:
        self._plain = codec is None
        self._codec = Plain(views) if codec is None else codec
        if dtypes is None:
            dtypes = [dtype_name(view.dtype) for view in views]
        wires = [wire_name(dtype, wire) for dtype in dtypes]
        self._views, self._runs, self._wires = views, runs, wires
        bytes_of = [len(v) * item_bytes(w) for v, w in zip(views, wires, strict=True)]
        self._bytes = sum(bytes_of)
        # What goes by messages as a copy on every rank: what is small, or another dtype on the wire.
        self._copied_bytes = sum(
            size
            for run in runs
            if (size := sum(bytes_of[i] for i in run)) < MESSAGE_DIRECT_BYTES
            or any(dtypes[i] != wires[i] for i in run)
        )
        self._cargos: dict[Pace, list[Cargo]] = {}
        self._messages: dict[tuple[int, int], tuple[MessageMean, list[list[Cargo]]]] = {}

    def _pace(self, group: ProcessGroup) -> Pace:
        if not self._plain:
            return ENCODED_PACE
        return MPI_PACE if isinstance(group, MpiGroup) else PACE

    def _prepare(self, pace: Pace) -> list[Cargo]:
        """Cut the arrays; kept from round to round."""
        if pace not in self._cargos:
            sizes = [len(view) for view in self._views]
            slices = plan_slices(self._runs, sizes, self._wires, pace)
            self._cargos[pace] = self._cargos_of(slices, pace.in_flight + 1)
        return self._cargos[pace]

    def _cargos_of(self, slices: Sequence[Slice], count: int) -> list[Cargo]:
        """Find or allocate the memory that travels; every so many copies share it, and are never together under way."""
        direct = [self._find(piece) for piece in slices]
        copied = [piece for piece, array in zip(slices, direct, strict=True) if array is None]
        copies = iter(self._stage(copied, count))
        return [next(copies) if array is None else Cargo(array, ()) for array in direct]

    def _find(self, piece: Slice) -> Any:
        """Return the memory that a slice covers as it stands, or None if it has to be copied."""
        views = [self._views[part.index][part.start : part.stop] for part in piece.parts]
        if not self._plain or dtype_name(views[0].dtype) != piece.dtype:
            return None
        return join(views)

    def _stage(self, slices: Sequence[Slice], count: int) -> list[Cargo]:
        """Give each slice memory for a copy, which every so many of them share."""
        largest: dict[tuple[str, int], int] = {}
        for number, piece in enumerate(slices):
            key = piece.dtype, number % count
            largest[key] = max(largest.get(key, 0), piece.size)
        like = self._views[0]
        memory = {key: empty(like, size, key[0]) for key, size in largest.items()}
        cargos = []
        for number, piece in enumerate(slices):
            array = memory[piece.dtype, number % count][: piece.size]
            cargos.append(Cargo(array, tuple(places(piece, array))))
        return cargos

    def _load(self, cargo: Cargo) -> Any:
        """Return the array that travels, ready to."""
        for part, place in cargo.copies:
            self._codec.pack(part, place)
        return cargo.array

    def _unload(self, cargo: Cargo, divisor: int) -> None:
        """Bring what arrived to where the arrays are, divided: a sum by the number of ranks, anything else by 1."""
        for part, place in cargo.copies:
            self._codec.unpack(part, place, divisor)
        if not cargo.copies:
            if divisor > 1:
                divide_into(cargo.array, cargo.array, divisor)
            else:
                count_change(cargo.array)

    def average(self, group: ProcessGroup, same_machine: bool = False) -> None:
        """Replace each array by its mean over the group; one rank alone changes nothing.

        Args:
            group: the ranks.
            same_machine: they are all on one machine.

        Raises:
            Exception: the engine's, if a rank is gone; some of the arrays are then overwritten.
        """
        if group.size == 1:
            return
        try:
            if same_machine and is_peer_group(group) and self._goes_by_messages(group):
                self._send_messages(group)
            elif same_machine and is_peer_group(group) and self._goes_to_all(group):
                self._send_to_all(group)
            else:
                self._exchange(group, group.all_reduce, divisor=group.size)
        except BaseException:  # an interrupt, too
            break_off(group)
            raise

    def _goes_by_messages(self, group: PeerGroup) -> bool:
        """Return whether messages are sooner there than an all-reduce; the same on all ranks."""
        return (
            self._bytes >= MESSAGES_LEAST_TOTAL_BYTES
            and self._copied_bytes <= MESSAGES_MOST_COPIED_BYTES
            and self._can_be_sent(group)
        )

    def _goes_to_all(self, group: PeerGroup) -> bool:
        """Return whether it is sooner if each rank sends all it has to all; the same on all ranks."""
        return (
            self._bytes <= COMBINED_MOST_BYTES
            and group.size >= COMBINED_LEAST_RANKS
            and self._can_be_sent(group)
        )

    def _can_be_sent(self, group: PeerGroup) -> bool:
        return (
            self._plain
            and group.size <= MESSAGES_MOST_RANKS
            and all(map(group.can_send, self._views))
        )

    def _send_to_all(self, group: PeerGroup) -> None:
        for cargo in self._prepare(self._pace(group)):
            group.combine(self._load(cargo))
            self._unload(cargo, group.size)

    def _send_messages(self, group: PeerGroup) -> None:
        key = group.rank, group.size
        if key not in self._messages:
            sizes = [len(view) for view in self._views]
            plan = plan_messages(self._runs, sizes, self._wires, group.size)
            slices = [piece for message in plan for piece in message]
            cargos = iter(self._cargos_of(slices, len(slices)))
            messages = [list(islice(cargos, len(message))) for message in plan]
            arrays = [[cargo.array for cargo in message] for message in messages]
            self._messages[key] = MessageMean(arrays, *key), messages
        mean, messages = self._messages[key]

        def load(number: int) -> None:
            for cargo in messages[number]:
                self._load(cargo)

        def take(number: int) -> None:
            for cargo in messages[number]:
                self._unload(cargo, divisor=1)

        mean.run(group, load, take)

    def broadcast(self, group: ProcessGroup, source: int = 0) -> None:
        """Replace each array by that of the rank `source`."""
        if group.size > 1:
            self._exchange(group, lambda array: group.broadcast(array, source), divisor=1)

    def _exchange(self, group: ProcessGroup, start: Callable[[Any], Work], divisor: int) -> None:
        pace = self._pace(group)
        cargos = self._prepare(pace)
        exchange(
            len(cargos),
            lambda number: start(self._load(cargos[number])),
            lambda number: self._unload(cargos[number], divisor),
            pace.in_flight,
        )


def places(piece: Slice, array: Any) -> Iterable[tuple[Part, Any]]:
    """Return each part of a slice with its place in the slice's array."""
    start = 0
    for part in piece.parts:
        stop = start + part.stop - part.start
        yield part, array[start:stop]
        start = stop
