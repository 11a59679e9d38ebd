"""What the averaging needs of an engine, and the checks of arguments that both engines have in common.

Every operation works in place, on memory that the caller keeps. A NumPy array reaches torch.distributed, and a CPU
tensor reaches MPI, as a view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sgdcore._arrays import Array

__all__ = ["NOT_A_MEMBER", "Engine", "ProcessGroup", "Work", "contiguous", "unknown_kind"]

NOT_A_MEMBER = "{}: this process is not one of its ranks"
_OPERATIONS = ("sum", "max")


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

    Attributes:
        rank: this process's number, from 0.
        size: the number of ranks.
        dtypes: names of the dtypes that `all_reduce` adds up correctly.
    """

    @property
    def rank(self) -> int:
        """The number of this process."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """The number of ranks."""
        raise NotImplementedError

    @property
    def dtypes(self) -> frozenset[str]:
        """What `all_reduce` adds up correctly."""
        raise NotImplementedError

    def all_reduce(self, array: Any, op: str = "sum") -> Work:
        """Replace the array on each rank by the sum (or ``"max"``) over all ranks, equal in every bit on all."""

    def broadcast(self, array: Any, source: int = 0) -> Work:
        """Replace the array on each rank by that of the rank `source`."""

    def reduce_scatter(self, output: Any, array: Any) -> Work:
        """Give each rank its part of the sum: `array` is cut into `size` parts along its first axis."""

    def all_gather(self, output: Any, array: Any) -> Work:
        """Give each rank the arrays of all, one after the other in `output`."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""


class Engine(ABC):
    """Checks arguments, and leaves the operations to the engine's own class."""

    _rank: int
    _size: int

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return self._rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._size

    def all_reduce(self, array: Any, op: str = "sum") -> Work:
        """See `ProcessGroup.all_reduce`."""
        view = self._view("array", array)
        if op not in _OPERATIONS:
            raise ValueError(f"op: expected one of {', '.join(_OPERATIONS)}, got {op!r}")
        return self._all_reduce(view, op)

    def broadcast(self, array: Any, source: int = 0) -> Work:
        """See `ProcessGroup.broadcast`."""
        view = self._view("array", array)
        if not 0 <= source < self.size:
            raise ValueError(f"source: expected a rank from 0 to {self.size - 1}, got {source}")
        return self._broadcast(view, source)

    def reduce_scatter(self, output: Any, array: Any) -> Work:
        """See `ProcessGroup.reduce_scatter`."""
        target, view = self._view("output", output), self._view("array", array)
        _check_sizes("array", view, "output", target, self.size)
        return self._reduce_scatter(target, view)

    def all_gather(self, output: Any, array: Any) -> Work:
        """See `ProcessGroup.all_gather`."""
        target, view = self._view("output", output), self._view("array", array)
        _check_sizes("output", target, "array", view, self.size)
        return self._all_gather(target, view)

    @abstractmethod
    def _view(self, argument: str, array: Any) -> Any:
        """Return what the engine takes, over the same memory."""

    @abstractmethod
    def _all_reduce(self, view: Any, op: str) -> Work: ...

    @abstractmethod
    def _broadcast(self, view: Any, source: int) -> Work: ...

    @abstractmethod
    def _reduce_scatter(self, target: Any, view: Any) -> Work: ...

    @abstractmethod
    def _all_gather(self, target: Any, view: Any) -> Work: ...


def unknown_kind(argument: str, array: Any) -> TypeError:
    """Return the error for what is neither an array nor a tensor."""
    kind = type(array).__name__
    return TypeError(f"{argument}: expected a NumPy array or a torch tensor, got {kind}")


def contiguous(argument: str, array: Any) -> Array:
    """Return a NumPy array that an engine can write to.

    Raises:
        TypeError: if it is none.
        ValueError: if it is not contiguous or not writable.
    """
    if not isinstance(array, np.ndarray):
        raise unknown_kind(argument, array)
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(
            f"{argument}: expected a contiguous and writable array, got flags {array.flags}"
        )
    return array


def _elements(array: Any) -> int:
    return int(array.size if isinstance(array, np.ndarray) else array.numel())


def _check_sizes(whole_name: str, whole: Any, part_name: str, part: Any, size: int) -> None:
    if _elements(whole) != size * _elements(part):
        raise ValueError(
            f"{whole_name}: expected {size} times the elements of {part_name}, {size * _elements(part)}, "
            f"got {_elements(whole)}"
        )
    if whole.dtype != part.dtype:
        raise TypeError(
            f"{part_name}: expected dtype {whole.dtype}, that of {whole_name}, got {part.dtype}"
        )
