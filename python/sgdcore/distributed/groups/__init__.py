"""Process groups: one small protocol over the engines that move the bytes, torch.distributed and MPI.

Nothing here opens a connection: torch.distributed is initialised by its user, MPI by mpiexec.
"""

from __future__ import annotations

import sys
from typing import Any

from sgdcore.distributed.groups.mpi_group import MpiGroup
from sgdcore.distributed.groups.protocol import NOT_A_MEMBER, ProcessGroup, Work
from sgdcore.distributed.groups.torch_group import TorchGroup

__all__ = ["MpiGroup", "ProcessGroup", "TorchGroup", "Work", "as_process_group"]


def as_process_group(group: Any = None) -> ProcessGroup:
    """Return the process group that an object stands for, or the one that is initialised.

    Args:
        group: a `ProcessGroup`, a process group of torch.distributed, an mpi4py communicator; or None for all ranks of
            the one engine that is initialised in this process.

    Raises:
        TypeError: if it is none of these.
        RuntimeError: if it is None and no engine is initialised, or both are; if this process is not one of its ranks.
    """
    if group is None:
        return _initialised_group()
    if isinstance(group, ProcessGroup) and not isinstance(group, type):
        return group
    dist, mpi = sys.modules.get("torch.distributed"), sys.modules.get("mpi4py.MPI")
    if dist is not None and dist.is_available():
        # What torch.distributed.new_group returns to the processes that are not in the new group.
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise RuntimeError(NOT_A_MEMBER.format("group"))
        if isinstance(group, dist.ProcessGroup):
            return TorchGroup(group)
    if mpi is not None and isinstance(group, mpi.Intracomm | type(mpi.COMM_NULL)):
        return MpiGroup(group)
    raise TypeError(
        f"group: expected a process group of torch.distributed, an mpi4py communicator or None, got {group!r}"
    )


def _initialised_group() -> ProcessGroup:
    dist, mpi = sys.modules.get("torch.distributed"), sys.modules.get("mpi4py.MPI")
    groups: list[ProcessGroup] = []
    if dist is not None and dist.is_available() and dist.is_initialized():
        groups.append(TorchGroup())
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        groups.append(MpiGroup())
    if not groups:
        raise RuntimeError(
            "group: no process group is initialised. With torch, start with torchrun and call "
            "torch.distributed.init_process_group('gloo'); with MPI, start with mpiexec and import mpi4py.MPI"
        )
    # Libraries import mpi4py where they find it, Lightning among them: without mpiexec that is MPI with one rank.
    several = [group for group in groups if group.size > 1] or groups
    if len(several) > 1:
        raise RuntimeError(
            "group: both torch.distributed and MPI are initialised; say which with "
            "group=torch.distributed.group.WORLD or group=MPI.COMM_WORLD"
        )
    return several[0]
