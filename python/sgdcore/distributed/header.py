"""What ranks tell each other before a round, in one small operation, and the errors that follow from it.

All operations of the wrappers begin with a header of one size. So ranks that call different wrappers, or the same ones
in another order, find that out before anything else is sent, whatever their timing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import count, zip_longest
from typing import Any

import numpy as np

from sgdcore._arrays import Array
from sgdcore.distributed._flat import empty, is_torch, store
from sgdcore.distributed.errors import RoundError
from sgdcore.distributed.groups import ProcessGroup

__all__ = [
    "CHECKSUM_BLOCK",
    "OPERATIONS",
    "Caller",
    "broadcast_bytes",
    "check_failures",
    "checksum",
    "compare",
    "fingerprint",
    "gather",
    "require_equal",
]

# What ranks can do together.
OPERATIONS = (
    "to meet",
    "to add a group",
    "a step",
    "a round",
    "a level's average",
    "a period",
    "to end",
)

_FLAG_WORDS = 32  # 2,048 parameters; flags of more travel in an operation of their own
_FIELDS = (
    ("kind", "i8"),  # a fingerprint of the wrapper's class
    ("number", "i8"),  # of the wrapper
    ("operation", "i8"),
    ("failed", "i8"),  # this rank cannot take part
    ("layout", "i8"),  # a fingerprint of the parameters' layout
    ("hyper", "i8"),  # a fingerprint of what enters the step on each rank
    ("status", "i8"),
    ("steps", "i8"),
    ("active", "i8"),
    ("period", "i8"),
    ("ending", "i8"),
    ("unverified", "i8"),  # what was loaded since all were compared may differ
    ("nonfinite", "i8"),
    ("losses", "i8"),
    ("weight", "f8"),
    ("loss", "f8"),
    ("flags", "u1", 8 * _FLAG_WORDS),
)
_HEADER = np.dtype(list(_FIELDS))
CHECKSUM_BLOCK = 1 << 20


def fingerprint(text: str) -> int:
    """Return a hash that is the same in all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def checksum(arrays: Iterable[Any]) -> int:
    """Return a hash of the bits of flat arrays."""
    digest = hashlib.blake2b(digest_size=7)
    for array in arrays:
        for start in range(0, len(array), CHECKSUM_BLOCK):
            digest.update(_bytes_of(array[start : start + CHECKSUM_BLOCK]))
    return int.from_bytes(digest.digest(), "big")


def _bytes_of(array: Any) -> Any:
    if is_torch(array):
        import torch

        array = array.detach().cpu().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).view(np.uint8)


def gather(group: ProcessGroup, like: Any, words: Array) -> Array:
    """Return the 64-bit words of all ranks, a row for each; as many on all ranks."""
    if group.size == 1:
        return words.reshape(1, -1)
    own, everyone = (empty(like, n, "int64") for n in (len(words), len(words) * group.size))
    store(own, words)
    group.all_gather(everyone, own).wait()
    result = everyone.cpu().numpy() if is_torch(everyone) else everyone
    return np.asarray(result).reshape(group.size, -1)


class Caller:
    """A wrapper, as its headers name it.

    Wrappers of one group have different numbers, and each has one number on all ranks: `meet` agrees on it.

    Args:
        wrapper: the wrapper.
    """

    _numbers = count(1)  # this process's next number

    def __init__(self, wrapper: Any) -> None:
        self._name = type(wrapper).__name__
        self._number = 0
        self._first = ""  # its first parameter

    def meet(self, group: ProcessGroup, like: Any, first: str, **values: Any) -> Array:
        """Agree on a number; returns the headers of all ranks."""
        self._number, self._first = next(Caller._numbers), first
        headers = self.exchange(group, like, "to meet", **values)
        self._number = int(headers["number"].max())
        Caller._numbers = count(self._number + 1)
        return headers

    def exchange(
        self,
        group: ProcessGroup,
        like: Any,
        operation: str,
        flags: Sequence[bool] = (),
        **values: Any,
    ) -> Array:
        """Tell all ranks what this one has to say; returns the headers of all.

        Args:
            group: the ranks.
            like: an array of the kind that the group takes.
            operation: one of `OPERATIONS`.
            flags: one for each parameter; as many on all ranks whose ``layout`` is the same. `flags_of` reads them.
            **values: the header's other fields; 0 where they are not given.

        Raises:
            RoundError: if ranks call different wrappers or operations.
        """
        header = np.zeros(1, _HEADER)
        header["kind"], header["number"] = fingerprint(self._name), self._number
        header["operation"] = OPERATIONS.index(operation)
        for name, value in values.items():
            header[name] = value
        packed = np.packbits(np.asarray(flags, bool))
        if len(packed) <= header["flags"].size:
            header["flags"][0, : len(packed)] = packed
        words = gather(group, like, header.view(np.int64))
        headers = np.ascontiguousarray(words).view(_HEADER).reshape(-1)
        own = headers[["operation"] if operation == "to meet" else ["kind", "number", "operation"]]
        if (own != own[0]).any():
            name = f"{self._name} number {self._number}, {self._first}"
            found = _first_difference(group, like, f"{operation} ({name})")
            raise RoundError(f"ranks call different things: {found}", 0, False)
        return headers

    def flags_of(
        self, group: ProcessGroup, like: Any, headers: Array, flags: Sequence[bool]
    ) -> Array:
        """Return the flags of all ranks, a row for each, of ranks whose layout is the same."""
        packed = np.packbits(np.asarray(flags, bool))
        rows = headers["flags"]
        if len(packed) > rows.shape[1]:
            padded = np.zeros(-(-len(packed) // 8) * 8, np.uint8)
            padded[: len(packed)] = packed
            rows = np.ascontiguousarray(gather(group, like, padded.view(np.int64))).view(np.uint8)
        return np.unpackbits(rows, axis=1, count=len(flags)).astype(bool)


def compare(group: ProcessGroup, like: Any, facts: dict[str, str]) -> None:
    """Raise on all ranks if they differ in something.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        facts: what has to be equal, by name; the same names on all ranks.

    Raises:
        ValueError: naming it, and what it is on two of the ranks.
    """
    rows = gather(group, like, np.array([fingerprint(text) for text in facts.values()], np.int64))
    for i, (name, text) in enumerate(facts.items()):
        if (rows[:, i] != rows[0, i]).any():
            found = _first_difference(group, like, text)
            raise ValueError(f"{name}: expected the same on all ranks, got {found}")


def require_equal(
    group: ProcessGroup, like: Any, values: Array, what: str, text: str, among: Array | None = None
) -> None:
    """Raise a RuntimeError on all ranks if a field of their headers differs.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        values: the field's value on each rank.
        what: the field's name.
        text: what this rank has, one fact a line.
        among: which ranks count; None for all.
    """
    counted = values if among is None else values[among]
    if len(counted) and (counted != counted[0]).any():
        found = _first_difference(group, like, text, among)
        raise RuntimeError(f"{what}: expected the same on all ranks, got {found}")


def _first_difference(group: ProcessGroup, like: Any, text: str, among: Array | None = None) -> str:
    """Return the first line in which the text of a rank differs from that of the first rank, and both versions."""
    hashes = gather(group, like, np.array([fingerprint(text)], np.int64))[:, 0]
    ranks = [rank for rank in range(group.size) if among is None or among[rank]]
    first = ranks[0]
    other = next((rank for rank in ranks if hashes[rank] != hashes[first]), first)
    versions = [
        broadcast_bytes(group, like, text.encode(), rank).decode().split("\n")
        for rank in (first, other)
    ]
    for one, two in zip_longest(*versions, fillvalue="nothing"):
        if one != two:
            return f"on rank {first}: {one}; on rank {other}: {two}"
    return f"on rank {first}: {versions[0][0]}; on another rank the same text, of other bits"


def check_failures(
    group: ProcessGroup, like: Any, failures: Sequence[int], own: Exception | None
) -> None:
    """Raise on all ranks what the first of those that failed has to say.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        failures: for each rank whether it failed; the same on all.
        own: what this rank failed with.

    Raises:
        RuntimeError: naming the rank, and its error's type and text.
    """
    if not any(failures):
        return
    first = [failed > 0 for failed in failures].index(True)
    text = f"{type(own).__name__}: {own}".encode(errors="replace")
    told = broadcast_bytes(group, like, text, first).decode()
    raise RuntimeError(f"rank {first} failed with {told}") from own


def broadcast_bytes(group: ProcessGroup, like: Any, content: bytes, source: int) -> bytes:
    """Give all ranks the bytes of one of them."""
    if group.size == 1:
        return content
    size = empty(like, 1, "int64")
    store(size, np.array([len(content)]))
    group.broadcast(size, source).wait()
    length = int(size.tolist()[0])
    padded = -(-length // 8) * 8
    # Only the source's content counts; another rank's may be longer.
    words = np.frombuffer(content[:padded].ljust(padded, b"\0"), np.int64)
    array = empty(like, len(words), "int64")
    store(array, words)
    group.broadcast(array, source).wait()
    received = array.cpu().numpy() if is_torch(array) else array
    return bytes(received.tobytes()[:length])
