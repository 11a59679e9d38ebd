"""torch.distributed as a `ProcessGroup`: gloo for memory of the CPU, NCCL for that of CUDA devices."""

from __future__ import annotations

import weakref
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

from sgdcore._arrays import as_tensor
from sgdcore._hints import needs
from sgdcore.distributed._flat import is_torch
from sgdcore.distributed.groups.protocol import NOT_A_MEMBER, Work, array_view

_AT_ONCE = timedelta(milliseconds=1)
_NEVER_SENT = 2 << 16  # a tag
_RELEASE_SECONDS = 1.0  # of microseconds that it takes


class TorchGroup:
    """A process group of torch.distributed.

    Args:
        group: what ``torch.distributed.new_group`` returned; None for all ranks.

    Raises:
        RuntimeError: if torch.distributed is not initialised, or this process is not in the group; from `all_reduce`,
            once the group is destroyed, also where another one is the default group by then.
    """

    # What gloo and NCCL both add up; gloo's sums of 16-bit types round after each addition.
    dtypes = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32"})

    def __init__(self, group: Any = None) -> None:
        try:
            import torch
            import torch.distributed as dist
        except ImportError as error:
            raise ImportError(needs("TorchGroup", "torch", "torch", error)) from error

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group first"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError(NOT_A_MEMBER.format("group"))
        # torch's annotations leave out some of what torch.distributed has.
        distributed: Any = dist
        self._torch, self._dist = torch, distributed
        # The group's threads and connections end with it: this must not keep a group alive that is destroyed.
        self._alive = weakref.ref(dist.group.WORLD if group is None else group)
        # A backend's name is "undefined" where the user gave none; the configuration names one for each device.
        self.backend = str(distributed.get_backend_config(group))

    def _live(self) -> Any:
        """Return torch's group. None in its place would be whichever is the default one by now."""
        group = self._alive()
        with suppress(KeyError):
            if group is not None and self._dist.get_process_group_ranks(group):
                return group
        raise RuntimeError("the process group was destroyed; rebind to one that is initialised")

    def all_reduce(self, array: Any) -> Work:
        """See `ProcessGroup.all_reduce`."""
        tensor = array.detach() if is_torch(array) else as_tensor(array_view(array))
        if not tensor.is_contiguous():
            raise ValueError(f"array: expected a contiguous tensor, got strides {array.stride()}")
        work = self._dist.all_reduce(tensor, group=self._live(), async_op=True)
        return _TorchWork(self, work, tensor)

    def abort(self) -> None:
        """End gloo's connections after a failure, so that no other rank waits for this one.

        A collective operation that fails on one rank may leave others waiting for that rank: in a ring only the
        neighbours of a dead process lose a connection. ``ProcessGroup.abort`` leaves gloo's connections open (torch
        2.13); a receive whose time is up ends them.
        """
        for peer in {*range(self.size)} - {self.rank} if "gloo" in self.backend else ():
            with suppress(RuntimeError, ValueError):  # also from a peer, or a group, that is gone
                group, byte = self._live(), self._torch.zeros(1, dtype=self._torch.uint8)
                source = self._dist.get_global_rank(group, peer)
                self._dist.irecv(byte, source, group, _NEVER_SENT).wait(_AT_ONCE)

    def __repr__(self) -> str:
        return f"TorchGroup({self.backend}, rank {self.rank} of {self.size})"


class _TorchWork:
    """torch's handle, with the tensor that the operation reads and writes."""

    def __init__(self, group: TorchGroup, work: Any, tensor: Any) -> None:
        self._group, self._work, self._tensor = group, work, tensor

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
        except BaseException:
            self._group.abort()
            raise
        self._work = None
        # gloo's thread refers to the tensor for a moment longer. Were it the last to do so, it would need the
        # interpreter to release it, and abort the process if that is on its way out
        # (github.com/pytorch/pytorch/pull/179291).
        deadline = monotonic() + _RELEASE_SECONDS
        while self._tensor.device.type == "cpu" and self._tensor._use_count() > 1:
            if monotonic() > deadline:
                break
            sleep(0)
