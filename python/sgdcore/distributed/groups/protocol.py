"""What the averaging needs of an engine, and the checks of arguments that both engines have in common.

Every operation works in place, on memory that the caller keeps. A NumPy array reaches torch.distributed, and a CPU
tensor reaches MPI, as a view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sgdcore._arrays import Array

__all__ = ["NOT_A_MEMBER", "Engine", "ProcessGroup", "Work", "array_view"]

NOT_A_MEMBER = "{}: this process is not one of its ranks"


class Work(Protocol):
    """An operation under way. The arrays that it was given belong to it until it is done."""

    def wait(self) -> None:
        """Return when the operation is done on this rank; raise if it failed."""

    def test(self) -> bool:
        """Return whether it is done, without waiting. MPI makes progress only in here and in `wait`."""


@runtime_checkable
class ProcessGroup(Protocol):
    """The ranks that train together, and what they can do with arrays.

    An array is a contiguous NumPy array or torch tensor. All ranks call the same operations in the same order, with
    arrays of the same size and dtype. Each operation returns at once, with a handle to wait on.
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def dtypes(self) -> frozenset[str]:
        """Names of the dtypes that `all_reduce` adds up correctly."""

    def all_reduce(self, array: Any, op: str = "sum") -> Work:
        """Replace the array on each rank by the sum (or ``"max"``) over all ranks, equal in every bit on all."""

    def broadcast(self, array: Any, source: int = 0) -> Work:
        """Replace the array on each rank by that of the rank `source`."""

    def all_gather(self, output: Any, array: Any) -> Work:
        """Give each rank the arrays of all, one after the other in `output`."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""


class Engine:
    """The ranks of an engine, its operations by name, and the checks of arguments that engines leave out."""

    def __init__(self, rank: int, size: int, operations: Mapping[str, Any]) -> None:
        self.rank, self.size, self._operations = rank, size, operations

    def _operation(self, op: str) -> Any:
        if op not in self._operations:
            raise ValueError(f"op: expected one of {', '.join(self._operations)}, got {op!r}")
        return self._operations[op]

    def _check_source(self, source: int) -> None:
        if not 0 <= source < self.size:
            raise ValueError(f"source: expected a rank from 0 to {self.size - 1}, got {source}")

    def _check_gathered(self, output: Any, array: Any) -> None:
        own, gathered = math.prod(array.shape), math.prod(output.shape)
        if gathered != self.size * own:
            raise ValueError(
                f"output: expected {self.size} times the elements of array, {self.size * own}, got {gathered}"
            )
        if output.dtype != array.dtype:
            raise TypeError(
                f"array: expected dtype {output.dtype}, that of output, got {array.dtype}"
            )


def array_view(argument: str, array: Any) -> Array:
    """Return a NumPy array that an engine can write to."""
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        raise TypeError(f"{argument}: expected a NumPy array or a torch tensor, got {kind}")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(
            f"{argument}: expected a contiguous and writable array, got flags {array.flags}"
        )
    return array
