"""What ranks tell each other before a round: Python objects in one small operation, and what follows from them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from sgdcore._arrays import Array
from sgdcore.distributed._flat import as_kind, as_numpy, flat, is_torch
from sgdcore.distributed.groups import ProcessGroup

# What is longer takes a second operation. The first one has one size, so that ranks that call different things find
# that out before anything else is sent.
HEADER_BYTES = 1 << 10
CHECKSUM_BLOCK = 1 << 20

Headers = dict[str, list[Any]]  # what each rank says, by name


class RoundError(RuntimeError):
    """A round of averaging failed: a rank died, did not answer within the group's timeout, or could not take part.

    Attributes:
        round: the number of the round (of the step, for `DataParallel`) that failed, from 1.
        restored: whether the parameters are those of the round before, bit for bit.
    """

    def __init__(self, message: str, round: int = 0, restored: bool = False) -> None:
        super().__init__(message)
        self.round, self.restored = round, restored


@dataclass(frozen=True)
class Ranks:
    """A group whose ranks tell each other objects that pickle takes; `like` is an array of the kind that it takes."""

    group: ProcessGroup
    like: Any

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's object."""
        if self.group.size == 1:
            return [value]
        content = pickle.dumps(value)
        rows = self._rows(len(content).to_bytes(8, "little") + content, HEADER_BYTES)
        longest = int(np.ascontiguousarray(rows[:, :8]).view(np.int64).max())
        rows = rows[:, 8:] if longest <= HEADER_BYTES - 8 else self._rows(content, longest)
        return [pickle.loads(row.tobytes()) for row in rows]  # from ranks of this program

    def _rows(self, content: bytes, size: int) -> Array:
        """Return the first bytes of all ranks' contents, a row for each."""
        rows = np.zeros((self.group.size, -(-size // 8) * 8), np.uint8)
        rows[self.group.rank] = np.frombuffer(content[:size].ljust(rows.shape[1], b"\0"), np.uint8)
        return self._sum(rows)

    def _sum(self, array: Array) -> Array:
        """Return the sum of the ranks' bytes, of which one rank's at most are not 0."""
        words = as_kind(self.like, array.reshape(-1).view(np.int64))
        self.group.all_reduce(words).wait()
        return as_numpy(words).view(np.uint8).reshape(array.shape)

    def broadcast(self, content: bytes, source: int) -> bytes:
        """Return the bytes of one rank."""
        size = self.gather(len(content))[source]
        own = content if self.group.rank == source else b""
        padded = np.frombuffer(own.ljust(-(-size // 8) * 8, b"\0"), np.uint8)
        return content if self.group.size == 1 else self._sum(padded).tobytes()[:size]


def compare(
    what: str,
    values: Sequence[Any],
    among: Sequence[Any] | None = None,
    error: type[Exception] = RuntimeError,
) -> None:
    """Raise an error if the ranks' values differ, of those ranks `among` them that count: it names the first line."""
    ranks = [rank for rank in range(len(values)) if among is None or among[rank]]
    for rank in ranks:
        if values[rank] != values[ranks[0]]:
            lines = (str(values[each]).split("\n") for each in (ranks[0], rank))
            a, b = next(ab for ab in zip_longest(*lines, fillvalue="nothing") if ab[0] != ab[1])
            raise error(
                f"{what}: expected the same on all ranks, got on rank {ranks[0]}: {a}; on rank {rank}: {b}"
            )


def fingerprint(text: str) -> int:
    """Return a hash that is the same in all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def checksums(labels: Iterable[str], arrays: Iterable[Any]) -> Iterator[str]:
    """Yield a line for each array, or None, with its label and a hash of its bits."""
    for label, array in zip(labels, arrays, strict=True):
        digest = hashlib.blake2b(digest_size=7)
        values: Any = () if array is None else flat(array, label)
        for start in range(0, len(values), CHECKSUM_BLOCK):
            block = values[start : start + CHECKSUM_BLOCK]
            if is_torch(block):  # which may have a dtype that NumPy lacks
                block = block.detach().view(block.new_empty(0).byte().dtype)
            digest.update(as_numpy(block).view(np.uint8).data)
        yield f"{label}: {'none' if array is None else digest.hexdigest()}"


def any_flags(packed: Sequence[Array], size: int) -> list[bool]:
    """Return which of the truth values, packed by numpy.packbits, are true on any of the ranks."""
    either = np.bitwise_or.reduce(packed)
    flags: list[bool] = np.unpackbits(either, count=size).astype(bool).tolist()
    return flags
