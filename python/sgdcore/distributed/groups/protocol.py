"""What the averaging needs of an engine: its all-reduce, in place, on memory that the caller keeps."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from sgdcore._arrays import Array

NOT_A_MEMBER = "{}: this process is not one of its ranks"


class Work(Protocol):
    """An operation under way. The array that it was given belongs to it until it is done."""

    def wait(self) -> None:
        """Return when the operation is done on this rank; raise if it failed."""


@runtime_checkable
class ProcessGroup(Protocol):
    """The ranks that train together. All of them call the same operations in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def dtypes(self) -> frozenset[str]:
        """Names of the dtypes that `all_reduce` adds up correctly, int32 and int64 among them."""

    def all_reduce(self, array: Any) -> Work:
        """Replace an array on each rank by the sum over all ranks, equal in every bit on all. Returns at once.

        The array is a contiguous NumPy array or torch tensor, of the same size and dtype on all ranks.
        """


def array_view(array: Any) -> Array:
    """Return a NumPy array that an engine can write to."""
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        raise TypeError(f"array: expected a NumPy array or a torch tensor, got {kind}")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(f"array: expected contiguous and writable memory, got {array.flags}")
    return array
