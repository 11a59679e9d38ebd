"""An mpi4py communicator as a `ProcessGroup`."""

from __future__ import annotations

from typing import Any

from sgdcore._hints import needs
from sgdcore.distributed._flat import dtype_name, is_torch
from sgdcore.distributed.groups.protocol import NOT_A_MEMBER, Work, array_view


class MpiGroup:
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
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self._in_place = MPI.IN_PLACE

    def all_reduce(self, array: Any) -> Work:
        """See `ProcessGroup.all_reduce`."""
        if is_torch(array) and array.device.type != "cpu":
            raise ValueError(f"array: expected a CPU tensor for MPI, got one on {array.device}")
        if hasattr(array, "dtype") and dtype_name(array.dtype) not in self.dtypes:
            expected, got = ", ".join(sorted(self.dtypes)), dtype_name(array.dtype)
            raise TypeError(f"array: expected one of {expected} for MPI, got {got}")
        view = array_view(array.detach().numpy() if is_torch(array) else array)
        return _MpiWork(self._comm.Iallreduce(self._in_place, view), view)

    def __repr__(self) -> str:
        return f"MpiGroup(rank {self.rank} of {self.size})"


class _MpiWork:
    """MPI's request, with the array that the operation reads and writes."""

    def __init__(self, request: Any, array: Any) -> None:
        self._request, self._array = request, array

    def wait(self) -> None:
        self._request.Wait()
