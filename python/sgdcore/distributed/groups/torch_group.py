"""torch.distributed as a `ProcessGroup`: gloo for memory of the CPU, NCCL for that of CUDA devices."""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

from sgdcore._arrays import as_tensor
from sgdcore.distributed._flat import check_array, is_torch

_AT_ONCE = timedelta(milliseconds=1)
_NEVER_SENT = 2 << 16  # a tag
_RELEASE_SECONDS = 1.0  # of microseconds that it takes


class TorchGroup:
    """A process group of torch.distributed. Its `all_reduce` raises a RuntimeError once it is destroyed."""

    # What gloo and NCCL both add up; gloo's sums of 16-bit types round after each addition.
    dtypes = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32"})

    def __init__(self, group: Any) -> None:
        self._dist: Any = sys.modules["torch.distributed"]
        self.rank, self.size = self._dist.get_rank(group), self._dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("group: this process is not one of its ranks")
        # The group's threads and connections end with it: this must not keep a group alive that is destroyed.
        self._alive = weakref.ref(group)
        # A backend's name is "undefined" where the user gave none; the configuration names one for each device.
        self.backend = str(self._dist.get_backend_config(group))

    def _live(self) -> Any:
        """Return torch's group. None in its place would be whichever is the default one by now."""
        group = self._alive()
        with suppress(KeyError):
            if group is not None and self._dist.get_process_group_ranks(group):
                return group
        raise RuntimeError("the process group was destroyed; rebind to one that is initialised")

    def all_reduce(self, array: Any) -> _TorchWork:
        """See `ProcessGroup.all_reduce`."""
        check_array(array)
        tensor = array.detach() if is_torch(array) else as_tensor(array)
        work = self._dist.all_reduce(tensor, group=self._live(), async_op=True)
        return _TorchWork(self, work, tensor)

    def abort(self) -> None:
        """End gloo's connections after a failure, so that no other rank waits for this one.

        A collective that fails here may leave others waiting: in a ring only neighbours of a dead process lose a
        connection. ``ProcessGroup.abort`` leaves gloo's connections open (torch 2.13); a receive that is late ends
        them.
        """
        for peer in {*range(self.size)} - {self.rank} if "gloo" in self.backend else ():
            with suppress(RuntimeError, ValueError):  # also from a peer, or a group, that is gone
                group, byte = self._live(), sys.modules["torch"].zeros(1)
                source = self._dist.get_global_rank(group, peer)
                self._dist.irecv(byte, source, group, _NEVER_SENT).wait(_AT_ONCE)


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
        on_cpu = self._tensor.device.type == "cpu"
        while on_cpu and self._tensor._use_count() > 1 and monotonic() < deadline:
            sleep(0)
