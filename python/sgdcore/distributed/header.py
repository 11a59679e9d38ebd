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
from sgdcore.distributed._flat import as_kind, as_numpy, flat, library
from sgdcore.distributed.groups import ProcessGroup

# What is longer takes a second operation. The first one has one size, so that ranks that call different things find
# that out before anything else is sent.
HEADER_BYTES = 1 << 10

Headers = dict[str, list[Any]]  # what each rank says, by name


class RoundError(RuntimeError):
    """A round of averaging failed: a rank died, did not answer within the group's timeout, or could not take part.

    `round` is its number, from 1; for `DataParallel` the step's. If `restored` is true, the parameters are those of the
    round before, bit for bit.
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

    def of(self, source: int, content: bytes) -> Any:
        """Return the object that one rank has pickled."""
        size = self.gather(len(content))[source]
        rows = self._rows(content if self.group.rank == source else b"", size, 1)
        return pickle.loads(rows.tobytes())

    def _rows(self, content: bytes, size: int, count: int = 0) -> Array:
        """Return the first bytes of all ranks' contents, a row for each, or their sum if it is one row."""
        rows = np.zeros((count or self.group.size, -(-size // 8) * 8), np.uint8)
        own = np.frombuffer(content[:size], np.uint8)
        rows[self.group.rank % len(rows), : len(own)] = own
        words = as_kind(self.like, rows.reshape(-1).view(np.int64))
        self.group.all_reduce(words).wait()  # of which one rank's at most are not 0
        return as_numpy(words).view(np.uint8).reshape(rows.shape)


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


def fingerprint(content: Any) -> str:
    """Return a hash of bytes, or of an array's memory, that is the same in all processes."""
    return hashlib.blake2b(content, digest_size=7).hexdigest()


def checksums(labels: Iterable[str], arrays: Iterable[Any]) -> Iterator[str]:
    """Yield a line for each array, or None, with its label and a hash of its bits."""
    for label, array in zip(labels, arrays, strict=True):
        if array is None:
            yield f"{label}: none"
            continue
        values = flat(array, label)
        yield f"{label}: {fingerprint(as_numpy(values.view(library(values).uint8)).data)}"


def anywhere(missing: Sequence[Sequence[int]], count: int) -> list[bool]:
    """Return which of so many arrays are not among the missing ones of all ranks."""
    nowhere = set(missing[0]).intersection(*missing)
    return [i not in nowhere for i in range(count)]
