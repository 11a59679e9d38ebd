"""Process groups: one small protocol over the engines that move the bytes, torch.distributed and MPI."""

from __future__ import annotations

import sys
from typing import Any, Protocol, runtime_checkable

from sgdcore.distributed.groups.mpi_group import MpiGroup
from sgdcore.distributed.groups.torch_group import TorchGroup

__all__ = ["MpiGroup", "ProcessGroup", "TorchGroup", "Work", "as_process_group"]


class Work(Protocol):
    """An operation under way. The array that it was given belongs to it until it is done."""

    def wait(self) -> None:
        """Return when the operation is done on this rank; raise if it failed."""


@runtime_checkable
class ProcessGroup(Protocol):
    """The ranks that train together. All of them call the same operations in the same order."""

    rank: int  # the number of this process, from 0
    size: int  # the number of ranks
    dtypes: frozenset[str]  # what `all_reduce` adds up correctly, int64 among them

    def all_reduce(self, array: Any) -> Work:
        """Replace an array on each rank by the sum over all ranks, equal in every bit on all. Returns at once.

        The array is a contiguous NumPy array or torch tensor, of the same size and dtype on all ranks.
        """


_BOTH = "group: both torch.distributed and MPI are initialised; pass torch.distributed.group.WORLD or MPI.COMM_WORLD"
_NONE = (
    "group: no process group is initialised. With torch, start with torchrun and call init_process_group('gloo'); with "
    "MPI, start with mpiexec and import mpi4py.MPI"
)


def as_process_group(group: Any = None) -> ProcessGroup:
    """Return the process group that an object stands for, or the one that is initialised.

    That is a `ProcessGroup`, a process group of torch.distributed, an mpi4py communicator; or None for all ranks of
    the one engine that is initialised in this process.

    Raises:
        TypeError: if it is none of these.
        RuntimeError: if no engine is initialised, or both are; if this process is not one of the group's ranks.
    """
    dist, mpi = sys.modules.get("torch.distributed"), sys.modules.get("mpi4py.MPI")
    dist = dist if dist is not None and dist.is_available() else None
    if group is None:
        groups: list[ProcessGroup] = []
        if dist is not None and dist.is_initialized():
            groups.append(TorchGroup(dist.group.WORLD))
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            groups.append(MpiGroup(mpi.COMM_WORLD))
        # Libraries import mpi4py where they find it, Lightning among them: without mpiexec that is MPI with one rank.
        meant = [each for each in groups if each.size > 1] or groups
        if len(meant) == 1:
            return meant[0]
        raise RuntimeError(_BOTH if groups else _NONE)
    if isinstance(group, ProcessGroup) and not isinstance(group, type):
        return group
    # torch.distributed.new_group returns NON_GROUP_MEMBER to the processes that are not in the new group.
    if dist is not None and (
        group is dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, dist.ProcessGroup)
    ):
        return TorchGroup(group)
    if mpi is not None and isinstance(group, mpi.Intracomm | type(mpi.COMM_NULL)):
        return MpiGroup(group)
    raise TypeError(
        f"group: expected a process group of torch.distributed, an mpi4py communicator or None, got {group!r}"
    )
