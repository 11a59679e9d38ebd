"""torch.distributed as a `ProcessGroup`: gloo for memory of the CPU, NCCL for that of CUDA devices."""

from __future__ import annotations

import weakref
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

from sgdcore._arrays import as_tensor
from sgdcore._hints import needs
from sgdcore.distributed.groups.protocol import NOT_A_MEMBER, Engine, Work, contiguous

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
        # torch's annotations leave out some of what torch.distributed has.
        distributed: Any = dist
        self._torch, self._dist = torch, distributed
        # The group's threads and connections end with it: this must not keep a group alive that is destroyed.
        self._alive = weakref.ref(dist.group.WORLD if group is None else group)
        self._rank = dist.get_rank(group)
        if self._rank < 0:
            raise RuntimeError(NOT_A_MEMBER.format("group"))
        self._size = dist.get_world_size(group)
        self._backend = str(dist.get_backend(group))
        # The backend's name is "undefined" where the user gave none; the configuration names one for each device.
        self._has_gloo = "gloo" in str(distributed.get_backend_config(group))

    @property
    def backend(self) -> str:
        """The engine's name, such as ``"gloo"``."""
        return self._backend

    def _live(self) -> Any:
        """Return torch's group. None in its place would be whichever is the default one by now."""
        group = self._alive()
        with suppress(KeyError):
            if group is not None and self._dist.get_process_group_ranks(group):
                return group
        raise RuntimeError("the process group was destroyed; rebind to one that is initialised")

    def _view(self, argument: str, array: Any) -> Any:
        torch = self._torch
        if isinstance(array, torch.Tensor):
            if not array.is_contiguous():
                raise ValueError(
                    f"{argument}: expected a contiguous tensor, got strides {array.stride()}"
                )
            return array.detach()
        return as_tensor(contiguous(argument, array))

    def _all_reduce(self, view: Any, op: str) -> Work:
        reduction = self._dist.ReduceOp.SUM if op == "sum" else self._dist.ReduceOp.MAX
        work = self._dist.all_reduce(view, reduction, self._live(), async_op=True)
        return _TorchWork(self, work, view)

    def _broadcast(self, view: Any, source: int) -> Work:
        group = self._live()
        source = self._dist.get_global_rank(group, source)
        return _TorchWork(self, self._dist.broadcast(view, source, group, async_op=True), view)

    def _reduce_scatter(self, target: Any, view: Any) -> Work:
        scatter = self._newest("reduce_scatter_single", "reduce_scatter_tensor")
        work = scatter(target, view, self._dist.ReduceOp.SUM, self._live(), async_op=True)
        return _TorchWork(self, work, target, view)

    def _all_gather(self, target: Any, view: Any) -> Work:
        gather = self._newest("all_gather_single", "all_gather_into_tensor")
        return _TorchWork(self, gather(target, view, self._live(), async_op=True), target, view)

    def _newest(self, name: str, before: str) -> Any:
        """Return a function that torch 2.13 renamed."""
        return getattr(self._dist, name, None) or getattr(self._dist, before)

    def abort(self) -> None:
        """End gloo's connections after a failure, so that no other rank waits for this one.

        A collective operation that fails on one rank may leave others waiting for that rank: in a ring only the
        neighbours of a dead process lose a connection. ``ProcessGroup.abort`` leaves gloo's connections open (torch
        2.13); a receive whose time is up ends them.
        """
        if not self._has_gloo:
            return
        for peer in range(self._size):
            if peer != self._rank:
                with suppress(
                    RuntimeError, ValueError
                ):  # also from a peer, or a group, that is gone
                    group, byte = self._live(), self._torch.zeros(1, dtype=self._torch.uint8)
                    source = self._dist.get_global_rank(group, peer)
                    self._dist.irecv(byte, source, group, _NEVER_SENT).wait(_AT_ONCE)

    def barrier(self) -> None:
        """See `ProcessGroup.barrier`."""
        self._dist.barrier(self._live())

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
        for tensor in self._tensors:
            while (
                tensor.device.type == "cpu" and tensor._use_count() > 1 and monotonic() < deadline
            ):
                sleep(0)

    def test(self) -> bool:
        return self._work is None or bool(self._work.is_completed())
