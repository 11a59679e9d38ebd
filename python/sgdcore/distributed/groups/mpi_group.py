"""An mpi4py communicator as a `ProcessGroup`."""

from __future__ import annotations

from typing import Any

import numpy as np

from sgdcore._arrays import Array
from sgdcore._hints import needs
from sgdcore.distributed._flat import dtype_name, is_torch
from sgdcore.distributed.groups.protocol import (
    NOT_A_MEMBER,
    Engine,
    Work,
    contiguous,
    unknown_kind,
)

__all__ = ["MpiGroup"]


class MpiGroup(Engine):
    """An mpi4py communicator.

    16-bit types are refused: MPI has none, and some implementations return garbage for them without an error.

    Args:
        comm: an mpi4py intracommunicator; None for ``MPI.COMM_WORLD``.

    Raises:
        RuntimeError: if MPI is not initialised.
    """

    dtypes = frozenset({"float64", "float32", "int64", "int32"})

    def __init__(self, comm: Any = None) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise ImportError(needs("MpiGroup", "mpi4py", "mpi", error)) from error

        if not MPI.Is_initialized() or MPI.Is_finalized():
            raise RuntimeError("MPI is not initialised")
        self._comm = MPI.COMM_WORLD if comm is None else comm
        if self._comm == MPI.COMM_NULL:
            raise RuntimeError(NOT_A_MEMBER.format("comm"))
        self._in_place = MPI.IN_PLACE
        self._operations = {"sum": MPI.SUM, "max": MPI.MAX}
        self._rank: int = self._comm.Get_rank()
        self._size: int = self._comm.Get_size()

    def _view(self, argument: str, array: Any) -> Array:
        if is_torch(array):
            if array.device.type != "cpu":
                raise ValueError(
                    f"{argument}: expected a CPU tensor for MPI, got one on {array.device}"
                )
        elif not isinstance(array, np.ndarray):
            raise unknown_kind(argument, array)
        if dtype_name(array.dtype) not in self.dtypes:
            expected = ", ".join(sorted(self.dtypes))
            raise TypeError(
                f"{argument}: expected one of {expected} for MPI, got {dtype_name(array.dtype)}"
            )
        return contiguous(argument, array.detach().numpy() if is_torch(array) else array)

    def _all_reduce(self, view: Any, op: str) -> Work:
        return _MpiWork(self._comm.Iallreduce(self._in_place, view, self._operations[op]), view)

    def _broadcast(self, view: Any, source: int) -> Work:
        return _MpiWork(self._comm.Ibcast(view, source), view)

    def _reduce_scatter(self, target: Any, view: Any) -> Work:
        operation = self._operations["sum"]
        request = self._comm.Ireduce_scatter_block(view, target, operation)
        return _MpiWork(request, target, view)

    def _all_gather(self, target: Any, view: Any) -> Work:
        return _MpiWork(self._comm.Iallgather(view, target), target, view)

    def barrier(self) -> None:
        """See `ProcessGroup.barrier`."""
        self._comm.Barrier()

    def __repr__(self) -> str:
        return f"MpiGroup(rank {self.rank} of {self.size})"


class _MpiWork:
    """MPI's request, with the arrays that the operation reads and writes."""

    def __init__(self, request: Any, *arrays: Array) -> None:
        self._request, self._arrays = request, arrays

    def wait(self) -> None:
        self._request.Wait()

    def test(self) -> bool:
        return bool(self._request.Test())
