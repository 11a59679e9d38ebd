"""An mpi4py communicator as a `ProcessGroup`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from sgdcore.distributed._flat import check_array, dtype_name, is_torch


class MpiGroup:
    """An mpi4py intracommunicator. MPI has no 16-bit types; some implementations return garbage for them."""

    dtypes = frozenset({"float64", "float32", "int64", "int32"})

    def __init__(self, comm: Any) -> None:
        mpi = sys.modules["mpi4py.MPI"]
        if comm == mpi.COMM_NULL:
            raise RuntimeError("group: this process is not one of its ranks")
        self._comm, self._in_place = comm, mpi.IN_PLACE
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def all_reduce(self, array: Any) -> _MpiWork:
        """See `ProcessGroup.all_reduce`."""
        check_array(array)
        if (dtype := dtype_name(array.dtype)) not in self.dtypes:
            expected = ", ".join(sorted(self.dtypes))
            raise TypeError(f"array: expected one of {expected} for MPI, got {dtype}")
        view = array.detach().numpy() if is_torch(array) else array
        return _MpiWork(self._comm.Iallreduce(self._in_place, view), view)


@dataclass(frozen=True)
class _MpiWork:
    """MPI's request, with the array that the operation reads and writes."""

    request: Any
    array: Any

    def wait(self) -> None:
        self.request.Wait()
