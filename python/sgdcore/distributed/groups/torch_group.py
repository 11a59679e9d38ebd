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
from sgdcore.distributed.groups.protocol import NOT_A_MEMBER, Engine, Work, array_view

__all__ = ["TorchGroup"]

_AT_ONCE = timedelta(milliseconds=1)
_NEVER_SENT = 2 << 16  # a tag
_RELEASE_SECONDS = 1.0  # of microseconds that it takes


class TorchGroup(Engine):
    """A process group of torch.distributed.

    Args:
        group: what ``torch.distributed.new_group`` returned; None for all ranks.

    Raises:
        RuntimeError: if torch.distributed is not initialised, or this process is not in the group; from operations,
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
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        super().__init__(dist.get_rank(group), dist.get_world_size(group), operations)
        if self.rank < 0:
            raise RuntimeError(NOT_A_MEMBER.format("group"))
        # torch's annotations leave out some of what torch.distributed has.
        distributed: Any = dist
        self._torch, self._dist = torch, distributed
        # The group's threads and connections end with it: this must not keep a group alive that is destroyed.
        self._alive = weakref.ref(dist.group.WORLD if group is None else group)
        self.backend = str(dist.get_backend(group))
        # The backend's name is "undefined" where the user gave none; the configuration names one for each device.
        self._has_gloo = "gloo" in str(distributed.get_backend_config(group))

    def _live(self) -> Any:
        """Return torch's group. None in its place would be whichever is the default one by now."""
        group = self._alive()
        with suppress(KeyError):
            if group is not None and self._dist.get_process_group_ranks(group):
                return group
        raise RuntimeError("the process group was destroyed; rebind to one that is initialised")

    def _view(self, argument: str, array: Any) -> Any:
        if not is_torch(array):
            return as_tensor(array_view(argument, array))
        if not array.is_contiguous():
            raise ValueError(
                f"{argument}: expected a contiguous tensor, got strides {array.stride()}"
            )
        return array.detach()

    def all_reduce(self, array: Any, op: str = "sum") -> Work:
        """See `ProcessGroup.all_reduce`."""
        view, operation = self._view("array", array), self._operation(op)
        work = self._dist.all_reduce(view, operation, self._live(), async_op=True)
        return _TorchWork(self, work, view)

    def broadcast(self, array: Any, source: int = 0) -> Work:
        """See `ProcessGroup.broadcast`."""
        view, group = self._view("array", array), self._live()
        self._check_source(source)
        source = self._dist.get_global_rank(group, source)
        work = self._dist.broadcast(view, source, group, async_op=True)
        return _TorchWork(self, work, view)

    def all_gather(self, output: Any, array: Any) -> Work:
        """See `ProcessGroup.all_gather`."""
        target, view = self._view("output", output), self._view("array", array)
        self._check_gathered(target, view)
        # torch 2.13 renamed it.
        gather = getattr(self._dist, "all_gather_single", None) or self._dist.all_gather_into_tensor
        return _TorchWork(self, gather(target, view, self._live(), async_op=True), target, view)

    def barrier(self) -> None:
        """See `ProcessGroup.barrier`."""
        self._dist.barrier(self._live())

    def abort(self) -> None:
        """End gloo's connections after a failure, so that no other rank waits for this one.

        A collective operation that fails on one rank may leave others waiting for that rank: in a ring only the
        neighbours of a dead process lose a connection. ``ProcessGroup.abort`` leaves gloo's connections open (torch
        2.13); a receive whose time is up ends them.
        """
        for peer in {*range(self.size)} - {self.rank} if self._has_gloo else ():
            with suppress(RuntimeError, ValueError):  # also from a peer, or a group, that is gone
                group, byte = self._live(), self._torch.zeros(1, dtype=self._torch.uint8)
                source = self._dist.get_global_rank(group, peer)
                self._dist.irecv(byte, source, group, _NEVER_SENT).wait(_AT_ONCE)

    def __repr__(self) -> str:
        return f"TorchGroup({self.backend}, rank {self.rank} of {self.size})"


class _TorchWork:
    """torch's handle, with the tensors that the operation reads and writes."""

    def __init__(self, group: TorchGroup, work: Any, *tensors: Any) -> None:
        self._group, self._work, self._tensors = group, work, tensors

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
        except BaseException:
            self._group.abort()
            raise
        self._work = None
        # gloo's thread refers to the tensors for a moment longer. Were it the last to do so, it would need the
        # interpreter to release them, and abort the process if that is on its way out
        # (github.com/pytorch/pytorch/pull/179291).
        deadline = monotonic() + _RELEASE_SECONDS
        for tensor in (tensor for tensor in self._tensors if tensor.device.type == "cpu"):
            while tensor._use_count() > 1 and monotonic() < deadline:
                sleep(0)

    def test(self) -> bool:
        return self._work is None or bool(self._work.is_completed())
