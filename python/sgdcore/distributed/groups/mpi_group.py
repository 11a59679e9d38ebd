"""An mpi4py communicator as a `ProcessGroup`."""

from __future__ import annotations

from typing import Any

from sgdcore._arrays import Array
from sgdcore._hints import needs
from sgdcore.distributed._flat import dtype_name, is_torch
from sgdcore.distributed.groups.protocol import NOT_A_MEMBER, Engine, Work, array_view

__all__ = ["MpiGroup"]


class MpiGroup(Engine):
    """An mpi4py communicator.

    16-bit types are refused: MPI has none, and some implementations return garbage for them without an error.

    Args:
        comm: an mpi4py intracommunicator; None for ``MPI.COMM_WORLD``.

    Raises:
        RuntimeError: if MPI is not initialised, or this process is not in the communicator.
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
        operations = {"sum": MPI.SUM, "max": MPI.MAX}
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), operations)
        self._in_place = MPI.IN_PLACE

    def _view(self, argument: str, array: Any) -> Array:
        view: Any = array.detach() if is_torch(array) else array_view(argument, array)
        if is_torch(view) and view.device.type != "cpu":
            raise ValueError(f"{argument}: expected a CPU tensor for MPI, got one on {view.device}")
        if dtype_name(view.dtype) not in self.dtypes:
            expected, got = ", ".join(sorted(self.dtypes)), dtype_name(view.dtype)
            raise TypeError(f"{argument}: expected one of {expected} for MPI, got {got}")
        return array_view(argument, view.numpy()) if is_torch(view) else view

    def all_reduce(self, array: Any, op: str = "sum") -> Work:
        """See `ProcessGroup.all_reduce`."""
        view, operation = self._view("array", array), self._operation(op)
        return _MpiWork(self._comm.Iallreduce(self._in_place, view, operation), view)

    def broadcast(self, array: Any, source: int = 0) -> Work:
        """See `ProcessGroup.broadcast`."""
        view = self._view("array", array)
        self._check_source(source)
        return _MpiWork(self._comm.Ibcast(view, source), view)

    def all_gather(self, output: Any, array: Any) -> Work:
        """See `ProcessGroup.all_gather`."""
        target, view = self._view("output", output), self._view("array", array)
        self._check_gathered(target, view)
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
