"""What ranks tell each other before a round, in one small operation, and the errors that follow from it.

All operations of the wrappers begin with a header whose first block has one size. So ranks that call different
wrappers, or the same ones in another order, find that out before anything else is sent, whatever their timing.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, zip_longest
from typing import Any

import numpy as np

from sgdcore._arrays import Array
from sgdcore.distributed._flat import as_kind, as_numpy, empty, is_torch
from sgdcore.distributed.errors import RoundError
from sgdcore.distributed.groups import ProcessGroup

BLOCK = 1 << 10  # bytes of an object that travel at once; what is longer takes a second operation
CHECKSUM_BLOCK = 1 << 20

Headers = dict[str, list[Any]]  # what each rank says, by name


def fingerprint(text: str) -> int:
    """Return a hash that is the same in all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def checksum(array: Any) -> int:
    """Return a hash of the bits of a flat array."""
    digest = hashlib.blake2b(digest_size=7)
    for start in range(0, len(array), CHECKSUM_BLOCK):
        block = array[start : start + CHECKSUM_BLOCK]
        if is_torch(block):  # which may have a dtype that NumPy lacks
            block = block.detach().view(block.new_empty(0).byte().dtype)
        digest.update(as_numpy(block).view(np.uint8).data)
    return int.from_bytes(digest.digest(), "big")


def _gather(group: ProcessGroup, like: Any, content: bytes, size: int) -> Array:
    """Return the first bytes of all ranks' contents, a row for each."""
    own = np.frombuffer(content[:size].ljust(-(-size // 8) * 8, b"\0"), np.int64)
    everyone = empty(like, len(own) * group.size, "int64")
    group.all_gather(everyone, as_kind(like, own)).wait()
    return as_numpy(everyone).view(np.uint8).reshape(group.size, -1)


def gather_objects(group: ProcessGroup, like: Any, value: Any) -> list[Any]:
    """Return each rank's object, which pickle takes; `like` is an array of the kind that the group takes."""
    if group.size == 1:
        return [value]
    content = pickle.dumps(value)
    rows = _gather(group, like, len(content).to_bytes(8, "little") + content, BLOCK)
    longest = int(np.ascontiguousarray(rows[:, :8]).view(np.int64).max())
    rows = rows[:, 8:] if longest <= BLOCK - 8 else _gather(group, like, content, longest)
    return [pickle.loads(row.tobytes()) for row in rows]  # from ranks of this program


def broadcast_bytes(group: ProcessGroup, like: Any, content: bytes, source: int) -> bytes:
    """Give all ranks the bytes of one of them."""
    length = gather_objects(group, like, len(content))[source]
    if group.size == 1 or length == 0:
        return content[:length]
    # Only the source's content counts; another rank's may be longer.
    words = np.frombuffer(content[:length].ljust(-(-length // 8) * 8, b"\0"), np.int64)
    array = as_kind(like, words)
    group.broadcast(array, source).wait()
    return as_numpy(array).tobytes()[:length]


class Caller:
    """A wrapper, as its headers name it.

    Wrappers of one group have different numbers, and each has one number on all ranks: `meet` agrees on it.
    """

    _numbers = count(1)  # this process's next number

    def __init__(self, wrapper: Any) -> None:
        self._name, self._number, self._first = type(wrapper).__name__, 0, ""

    def meet(self, group: ProcessGroup, like: Any, first: str, **said: Any) -> Headers:
        """Agree on a number, and on what errors call the first parameter; returns what `exchange` does."""
        self._number, self._first = next(Caller._numbers), first
        headers = self.exchange(group, like, "to meet", number=self._number, **said)
        self._number = max(headers["number"])
        Caller._numbers = count(self._number + 1)
        return headers

    def exchange(
        self,
        group: ProcessGroup,
        like: Any,
        operation: str,
        failed: Exception | None = None,
        facts: Mapping[str, str] | None = None,
        **said: Any,
    ) -> Headers:
        """Tell all ranks what this one has to say; returns what each rank says.

        Args:
            group: the ranks.
            like: an array of the kind that the group takes.
            operation: what the ranks are to do together.
            failed: why this rank cannot take part.
            facts: what has to be equal on all ranks, by name.
            **said: what else there is to say, by name; the same names on all ranks.

        Raises:
            RoundError: if ranks call different wrappers or operations.
            RuntimeError: if a rank has failed, with its error's type and text.
            ValueError: naming the fact that differs, and what it is on two of the ranks.
        """
        reason = failed and f"{type(failed).__name__}: {failed}".encode(errors="replace").decode()
        facts = {"optimizer": self._name, **(facts or {})}
        prints = [fingerprint(text) for text in facts.values()]
        call = f"{operation} ({self._name} number {self._number}, {self._first})"
        # A new wrapper has no number yet.
        key = (operation,) if operation == "to meet" else (operation, self._name, self._number)
        everyone = gather_objects(group, like, (key, call, reason, prints, said))
        for rank, (theirs, called, *_) in enumerate(everyone):
            if theirs != everyone[0][0]:
                found = f"on rank 0: {everyone[0][1]}; on rank {rank}: {called}"
                raise RoundError(f"ranks call different things: {found}", 0, False)
        for rank, each in enumerate(everyone):
            if each[2]:
                raise RuntimeError(f"rank {rank} failed with {each[2]}") from failed
        for (name, text), *values in zip(
            facts.items(), *(each[3] for each in everyone), strict=False
        ):
            require_equal(group, like, name, text, values, error=ValueError)
        return {name: [each[4].get(name) for each in everyone] for name in said}


def pack_flags(flags: Iterable[bool]) -> bytes:
    """Return truth values as bits."""
    return np.packbits(np.fromiter(flags, bool)).tobytes()


def any_flags(packed: Sequence[bytes], size: int) -> list[bool]:
    """Return which of the truth values are true on any of the ranks."""
    rows = np.frombuffer(b"".join(packed), np.uint8).reshape(len(packed), -1)
    flags: list[bool] = np.unpackbits(np.bitwise_or.reduce(rows), count=size).astype(bool).tolist()
    return flags


def require_equal(
    group: ProcessGroup,
    like: Any,
    what: str,
    text: str | Callable[[], str],
    values: Sequence[Any] | None = None,
    among: Sequence[Any] | None = None,
    error: type[Exception] = RuntimeError,
) -> None:
    """Raise on all ranks if ranks, or those `among` them that count, differ in something.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        what: its name.
        text: what this rank has, one fact a line, or a function that returns it: errors name a line that differs.
        values: a value, or a fingerprint, of each rank; None for fingerprints of the text.
        among: for each rank whether it counts; None: all do.
        error: the class of what is raised.
    """
    if values is None:
        values = gather_objects(group, like, fingerprint(text if isinstance(text, str) else text()))
    ranks = [rank for rank in range(group.size) if among is None or among[rank]]
    other = next((rank for rank in ranks if values[rank] != values[ranks[0]]), None)
    if other is None:
        return
    texts = gather_objects(group, like, text if isinstance(text, str) else text())
    one, two = texts[ranks[0]].split("\n"), texts[other].split("\n")
    pairs = zip_longest(one, two, fillvalue="nothing")
    a, b = next(
        (pair for pair in pairs if pair[0] != pair[1]), (one[0], "the same text, of other bits")
    )
    raise error(
        f"{what}: expected the same on all ranks, got on rank {ranks[0]}: {a}; on rank {other}: {b}"
    )
