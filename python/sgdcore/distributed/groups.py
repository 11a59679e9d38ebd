"""Process groups: one small protocol over the engines that move the bytes, torch.distributed and MPI.

Nothing here opens a connection: torch.distributed is initialised by its user, MPI by mpiexec. Every operation works in
place, on memory that the caller keeps; a NumPy array reaches torch.distributed, and a CPU tensor reaches MPI, as a
view.
"""

from __future__ import annotations

import functools
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np

from sgdcore._arrays import Array, as_tensor
from sgdcore.distributed._flat import dtype_name, is_torch

__all__ = [
    "Message",
    "MpiGroup",
    "PeerGroup",
    "ProcessGroup",
    "TorchGroup",
    "Work",
    "as_process_group",
    "break_off",
    "is_peer_group",
]

_OPERATIONS = ("sum", "max")
_LETTING_GO = 1.0  # seconds, of microseconds that it takes
_LAST_CHANCE = timedelta(seconds=0.1)  # for a message that is on its way when another one failed
# Between the tags of a message and of the byte behind it.
_BEHIND = 1 << 16
_NEVER_SENT, _COMBINED = 2 * _BEHIND, 2 * _BEHIND + 1  # tags
_WHOLE_BYTES = 16 << 10  # that leave in one piece, and so arrive whole or not at all
_KINDS = "{}: expected a NumPy array or a torch tensor, got {}"


class Work(Protocol):
    """An operation under way; the arrays it was given belong to it until it is done."""

    def wait(self) -> None:
        """Return when the operation is done on this rank; raise if it failed."""

    def test(self) -> bool:
        """Return whether it is done, without waiting. MPI makes progress only in here and in `wait`."""


@runtime_checkable
class ProcessGroup(Protocol):
    """The ranks that train together, and what they can do with arrays.

    An array is a contiguous NumPy array or torch tensor. All ranks call the same operations in the same order, with
    arrays of the same size and dtype; each returns at once, with a handle to wait on.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        dtypes: names of the dtypes that `all_reduce` adds up correctly.
    """

    @property
    def rank(self) -> int:
        """The number of this process."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """The number of ranks."""
        raise NotImplementedError

    @property
    def dtypes(self) -> frozenset[str]:
        """What `all_reduce` adds up correctly."""
        raise NotImplementedError

    def all_reduce(self, array: Any, op: str = "sum") -> Work:
        """Replace the array on each rank by the sum (or ``"max"``) over all ranks, equal in every bit on all."""

    def broadcast(self, array: Any, source: int = 0) -> Work:
        """Replace the array on each rank by that of the rank `source`."""

    def reduce_scatter(self, output: Any, array: Any) -> Work:
        """Give each rank its part of the sum: `array` is cut into `size` parts along its first axis."""

    def all_gather(self, output: Any, array: Any) -> Work:
        """Give each rank the arrays of all, one after the other in `output`."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""


class Message(Work, Protocol):
    """A message under way.

    After `wait` for one that is sent, the receiver's answer may be received in its place; that it has arrived is known
    when `PeerGroup.close_messages` returns.
    """

    def abandon(self) -> None:
        """Give it up, after a failure: from here on it touches no memory. The group may be of no use any more."""


@runtime_checkable
class PeerGroup(ProcessGroup, Protocol):
    """A process group whose ranks can also send each other messages.

    A message is one or more arrays, of which the receiver knows the sizes and dtypes. Those with the same tag from one
    rank to another are received in the order in which they were sent.
    """

    def can_send(self, array: Any) -> bool:
        """Return whether `send` and `receive` take an array on this device."""

    def open_messages(self) -> None:
        """Get ready for messages, before the first one; all ranks call it together. Later calls do nothing."""

    def close_messages(self) -> None:
        """Return when all messages have arrived; all ranks call it together, when they have waited for their own."""

    def combine(self, array: Any, op: str = "sum") -> None:
        """Do what `all_reduce` does, and wait. For a few numbers: it is sooner, and notices a rank that is gone."""

    def break_off(self) -> None:
        """Let no rank wait for what this one will not send any more, after a failure, where the engine can."""

    def send(self, arrays: Sequence[Any], target: int, tag: int) -> Message:
        """Send arrays to the rank `target`."""

    def receive(self, arrays: Sequence[Any], source: int, tag: int) -> Message:
        """Replace arrays by those that the rank `source` sent with this tag."""


class _Engine(ABC):
    """What the engines have in common: they check arguments alike, and then start an operation each in its way."""

    _rank: int
    _size: int

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return self._rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._size

    def all_reduce(self, array: Any, op: str = "sum") -> Work:
        """See `ProcessGroup.all_reduce`."""
        view = self._view("array", array)
        _check_operation(op)
        return self._all_reduce(view, op)

    def combine(self, array: Any, op: str = "sum") -> None:
        """See `PeerGroup.combine`."""
        view = self._view("array", array)
        _check_operation(op)
        self._combine(view, op)

    def broadcast(self, array: Any, source: int = 0) -> Work:
        """See `ProcessGroup.broadcast`."""
        view = self._view("array", array)
        if not 0 <= source < self.size:
            raise ValueError(f"source: expected a rank from 0 to {self.size - 1}, got {source}")
        return self._broadcast(view, source)

    def reduce_scatter(self, output: Any, array: Any) -> Work:
        """See `ProcessGroup.reduce_scatter`."""
        target, view = self._view("output", output), self._view("array", array)
        _check_sizes("array", view, "output", target, self.size)
        return self._reduce_scatter(target, view)

    def all_gather(self, output: Any, array: Any) -> Work:
        """See `ProcessGroup.all_gather`."""
        target, view = self._view("output", output), self._view("array", array)
        _check_sizes("output", target, "array", view, self.size)
        return self._all_gather(target, view)

    def send(self, arrays: Sequence[Any], target: int, tag: int) -> Message:
        """See `PeerGroup.send`."""
        return self._send([self._view("arrays", array) for array in arrays], target, tag)

    def receive(self, arrays: Sequence[Any], source: int, tag: int) -> Message:
        """See `PeerGroup.receive`."""
        return self._receive([self._view("arrays", array) for array in arrays], source, tag)

    @abstractmethod
    def can_send(self, array: Any) -> bool:
        """See `PeerGroup.can_send`."""

    @abstractmethod
    def open_messages(self) -> None:
        """See `PeerGroup.open_messages`."""

    @abstractmethod
    def close_messages(self) -> None:
        """See `PeerGroup.close_messages`."""

    @abstractmethod
    def break_off(self) -> None:
        """See `PeerGroup.break_off`."""

    @abstractmethod
    def _view(self, argument: str, array: Any) -> Any:
        """Return what the engine takes, over the same memory."""

    @abstractmethod
    def _all_reduce(self, view: Any, op: str) -> Work: ...

    def _combine(self, view: Any, op: str) -> None:
        self._all_reduce(view, op).wait()

    @abstractmethod
    def _broadcast(self, view: Any, source: int) -> Work: ...

    @abstractmethod
    def _reduce_scatter(self, target: Any, view: Any) -> Work: ...

    @abstractmethod
    def _all_gather(self, target: Any, view: Any) -> Work: ...

    @abstractmethod
    def _send(self, views: list[Any], target: int, tag: int) -> Message: ...

    @abstractmethod
    def _receive(self, views: list[Any], source: int, tag: int) -> Message: ...


# What the last `combine` on each of torch's groups sent. Nobody waits for it; a send that is dropped before it left
# would hold up those behind it, and as long as it is kept, so are the connections: it ends with the group.
_leaving: weakref.WeakKeyDictionary[Any, list[_TorchWork]] = weakref.WeakKeyDictionary()


class TorchGroup(_Engine):
    """A process group of torch.distributed: gloo for memory of the CPU, NCCL for that of CUDA devices.

    Args:
        group: what ``torch.distributed.new_group`` returned; None for all ranks.

    Raises:
        RuntimeError: if torch.distributed is not initialised, or this process is not in the group; from operations,
            once the group is destroyed, also where another one is the default group by then.
    """

    # What gloo and NCCL both add up; gloo's sums of 16-bit types round after each addition.
    dtypes = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32"})

    def __init__(self, group: Any = None) -> None:
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group first"
            )
        # torch's annotations leave out some of what torch.distributed has.
        distributed: Any = dist
        self._torch, self._dist = torch, distributed
        # Its threads and connections end with it: this must not keep a group alive that is destroyed.
        self._alive = weakref.ref(dist.group.WORLD if group is None else group)
        self._backend = str(dist.get_backend(group))
        self._rank = dist.get_rank(group)
        if self._rank < 0:
            raise RuntimeError("group: this process is not one of its ranks")
        self._size = dist.get_world_size(group)
        self._operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        self._additions: dict[str, Any] = {"sum": torch.add, "max": torch.maximum}
        self._others = [(self._rank + i) % self._size for i in range(1, self._size)]
        # torch 2.13 renamed them.
        names = ("all_gather_single", "reduce_scatter_single")
        if not hasattr(dist, names[0]):
            names = ("all_gather_into_tensor", "reduce_scatter_tensor")
        self._gather, self._scatter = (getattr(dist, name) for name in names)

    @property
    def backend(self) -> str:
        """The engine's name, such as ``"gloo"``."""
        return self._backend

    def _live(self) -> Any:
        """Return torch's group, which by None would be whichever is the default one by now."""
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
        return as_tensor(_contiguous(argument, array))

    def _all_reduce(self, view: Any, op: str) -> Work:
        work = self._dist.all_reduce(view, self._operations[op], self._live(), async_op=True)
        return _TorchWork(work, view, failed=self.break_off)

    def _broadcast(self, view: Any, source: int) -> Work:
        group = self._live()
        source = self._dist.get_global_rank(group, source)
        work = self._dist.broadcast(view, source, group, async_op=True)
        return _TorchWork(work, view, failed=self.break_off)

    def _reduce_scatter(self, target: Any, view: Any) -> Work:
        operation = self._operations["sum"]
        work = self._scatter(target, view, operation, self._live(), async_op=True)
        return _TorchWork(work, target, view, failed=self.break_off)

    def _all_gather(self, target: Any, view: Any) -> Work:
        work = self._gather(target, view, self._live(), async_op=True)
        return _TorchWork(work, target, view, failed=self.break_off)

    def can_send(self, array: Any) -> bool:
        """See `PeerGroup.can_send`: gloo sends memory of the CPU.

        Not where torch checks that all ranks started as many operations (``TORCH_DISTRIBUTED_DEBUG=DETAIL``): it counts
        messages, too, of which ranks may have different numbers.
        """
        return self._has_messages() and not (is_torch(array) and array.device.type != "cpu")

    def _has_messages(self) -> bool:
        return "gloo" in self.backend and self._dist.get_debug_level().name != "DETAIL"

    def open_messages(self) -> None:
        """See `PeerGroup.open_messages`: nothing."""

    def close_messages(self) -> None:
        """See `PeerGroup.close_messages`: who is here has received what was sent to it."""
        self.combine(self._byte())

    def break_off(self) -> None:
        """See `PeerGroup.break_off`: where a wait's time is up, gloo ends all connections."""
        if self._has_messages():
            for rank in self._others:
                with suppress(RuntimeError):  # at once, from a peer that is gone
                    [work] = self._start(self._dist.irecv, rank, _NEVER_SENT, self._byte())
                    work.abandon()
        with suppress(RuntimeError):
            _leaving.pop(self._live(), None)

    def _send(self, views: list[Any], target: int, tag: int) -> Message:
        return _TorchSent(self._start_message(self._dist.isend, target, tag, *views))

    def _receive(self, views: list[Any], source: int, tag: int) -> Message:
        return _TorchReceived(self._start_message(self._dist.irecv, source, tag, *views))

    def _combine(self, view: Any, op: str) -> None:
        """Send this rank's array to all, and add up everyone's in the order of the ranks.

        gloo's all-reduce takes longer, twice as many steps, and may wait until the group's timeout for a peer that is
        gone: it waits for sends, which gloo does not end then. Here only receives are waited for.
        """
        dist = self._dist
        everyone = [self._torch.empty_like(view) for _ in range(self._size)]
        own = everyone[self._rank].copy_(view)
        start = self._start if view.nbytes <= _WHOLE_BYTES else self._start_message
        try:
            arriving, leaving = [], []
            for rank in self._others:
                arriving += start(dist.irecv, rank, _COMBINED, everyone[rank])
            for rank in self._others:
                leaving += start(dist.isend, rank, _COMBINED, own)
            for work in arriving:
                work.wait()
        except BaseException:
            self.break_off()
            raise
        # Those of the call before have arrived: who did not have them would have sent nothing now.
        _leaving[self._live()] = leaving
        view.copy_(everyone[0])
        for values in everyone[1:]:
            self._additions[op](view, values, out=view)

    def _start(self, operation: Any, rank: int, tag: int, *tensors: Any) -> list[_TorchWork]:
        """Begin to send tensors to a rank, or to receive them, one after the other."""
        group = self._live()
        peer = self._dist.get_global_rank(group, rank)
        return [_TorchWork(operation(tensor, peer, group, tag), tensor) for tensor in tensors]

    def _start_message(
        self, operation: Any, rank: int, tag: int, *tensors: Any
    ) -> list[_TorchWork]:
        """Do so, and with a byte behind them, which is the first of what is returned."""
        works = self._start(operation, rank, tag, *tensors)
        return self._start(operation, rank, tag + _BEHIND, self._byte()) + works

    def _byte(self) -> Any:
        """Return what is sent to say that something is done."""
        return self._torch.zeros(1, dtype=self._torch.uint8)

    def barrier(self) -> None:
        """See `ProcessGroup.barrier`."""
        self._dist.barrier(self._live())

    def __repr__(self) -> str:
        return f"TorchGroup({self.backend}, rank {self.rank} of {self.size})"


class _TorchWork:
    """torch's handle, with the tensors that the operation reads and writes, and what to call if it fails.

    A collective operation that fails on one rank may leave others waiting for that one, though it lost its connection
    to another rank only, in a ring for instance.
    """

    def __init__(self, work: Any, *tensors: Any, failed: Callable[[], None] = lambda: None) -> None:
        self._work, self._tensors, self._failed = work, tensors, failed

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
        except BaseException:
            self._failed()
            raise
        self._work = None
        # gloo's thread refers to the tensors for a moment longer. Were it the last to do so, it would need the
        # interpreter to let go of them, and abort the process if that is on its way out
        # (github.com/pytorch/pytorch/pull/179291).
        deadline = monotonic() + _LETTING_GO
        for tensor in self._tensors:
            while (
                tensor.device.type == "cpu" and tensor._use_count() > 1 and monotonic() < deadline
            ):
                sleep(0)

    def test(self) -> bool:
        return self._work is None or bool(self._work.is_completed())

    def abandon(self) -> None:
        if self._work is not None:
            # Where it raises, gloo ends all connections, and with them what is under way.
            with suppress(RuntimeError):
                self._work.wait(_LAST_CHANCE)
            self._work = None


class _TorchSent:
    """A message of gloo's on its way, with a byte behind it.

    gloo does not end a send when the receiver is gone, so that a wait for it would last until the group's timeout. What
    was sent has arrived when the receiver sends something that it does not send before, or closes messages.
    """

    def __init__(self, works: list[_TorchWork]) -> None:
        self._works = works

    def wait(self) -> None:
        """Return at once: what the receiver sends in answer may be received where this message lies."""

    def test(self) -> bool:
        return True

    def abandon(self) -> None:
        """Do nothing: it only reads."""


class _TorchReceived:
    """A message of gloo's that is to come, and the byte behind it, which is waited for first.

    When the sender is gone, gloo ends the receives that have not begun, but not the one that it is reading: this byte
    does not begin before all of the message has arrived.
    """

    def __init__(self, works: list[_TorchWork]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def test(self) -> bool:
        return all(work.test() for work in self._works)

    def abandon(self) -> None:
        for work in self._works:
            work.abandon()


class MpiGroup(_Engine):
    """An mpi4py communicator.

    16-bit types are refused: MPI has none, and some implementations return garbage for them without an error.

    Args:
        comm: an mpi4py intracommunicator; None for ``MPI.COMM_WORLD``.

    Raises:
        RuntimeError: if MPI is not initialised.
    """

    dtypes = frozenset({"float64", "float32", "int64", "int32"})

    def __init__(self, comm: Any = None) -> None:
        from mpi4py import MPI

        if not MPI.Is_initialized() or MPI.Is_finalized():
            raise RuntimeError("MPI is not initialised")
        self._comm = MPI.COMM_WORLD if comm is None else comm
        if self._comm == MPI.COMM_NULL:
            raise RuntimeError("comm: this process is not one of its ranks")
        self._in_place = MPI.IN_PLACE
        self._operations = {"sum": MPI.SUM, "max": MPI.MAX}
        self._rank: int = self._comm.Get_rank()
        self._size: int = self._comm.Get_size()
        self._message_comm: Any = None

    def _view(self, argument: str, array: Any) -> Array:
        if is_torch(array):
            if array.device.type != "cpu":
                raise ValueError(
                    f"{argument}: expected a CPU tensor for MPI, got one on {array.device}"
                )
        elif not isinstance(array, np.ndarray):
            raise TypeError(_KINDS.format(argument, type(array).__name__))
        if dtype_name(array.dtype) not in self.dtypes:
            expected = ", ".join(sorted(self.dtypes))
            raise TypeError(
                f"{argument}: expected one of {expected} for MPI, got {dtype_name(array.dtype)}"
            )
        return _contiguous(argument, array.detach().numpy() if is_torch(array) else array)

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

    def can_send(self, array: Any) -> bool:
        """See `PeerGroup.can_send`: MPI sends memory of the CPU."""
        return not (is_torch(array) and array.device.type != "cpu")

    def open_messages(self) -> None:
        """See `PeerGroup.open_messages`: a communicator of their own keeps messages from the user's receives."""
        if self._message_comm is None:
            self._message_comm = _duplicate(self._comm)

    def close_messages(self) -> None:
        """See `PeerGroup.close_messages`: nothing, as MPI ends all ranks with one of them."""

    def break_off(self) -> None:
        """See `PeerGroup.break_off`: nothing, MPI has no such means, and ends a job with its first process."""

    def _send(self, views: list[Any], target: int, tag: int) -> Message:
        start = self._message_comm.Isend
        return _MpiMessage([_MpiWork(start(view, target, tag), view) for view in views], False)

    def _receive(self, views: list[Any], source: int, tag: int) -> Message:
        start = self._message_comm.Irecv
        return _MpiMessage([_MpiWork(start(view, source, tag), view) for view in views], True)

    def barrier(self) -> None:
        """See `ProcessGroup.barrier`."""
        self._comm.Barrier()

    def __repr__(self) -> str:
        return f"MpiGroup(rank {self.rank} of {self.size})"


@functools.cache
def _duplicate_key() -> int:
    """Return MPI's key of the attribute under which a communicator keeps its duplicate; that is freed with it."""
    from mpi4py import MPI

    def free(_comm: Any, _key: int, duplicate: Any) -> None:
        duplicate.Free()

    key: int = MPI.Comm.Create_keyval(delete_fn=free)
    return key


def _duplicate(comm: Any) -> Any:
    """Return a communicator of the same ranks, one for all groups over it: MPI has some thousands of them only."""
    duplicate = comm.Get_attr(_duplicate_key())
    if duplicate is None:
        duplicate = comm.Dup()
        comm.Set_attr(_duplicate_key(), duplicate)
    return duplicate


class _MpiWork:
    """MPI's request, with the arrays that the operation reads and writes."""

    def __init__(self, request: Any, *arrays: Array) -> None:
        self._request, self._arrays = request, arrays

    def wait(self) -> None:
        self._request.Wait()

    def test(self) -> bool:
        return bool(self._request.Test())

    def cancel(self) -> None:
        if not self.test():
            self._request.Cancel()
            self._request.Wait()


class _MpiMessage:
    """A message of MPI's, which writes to its arrays or only reads them."""

    def __init__(self, works: list[_MpiWork], writes: bool) -> None:
        self._works, self._writes = works, writes

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def test(self) -> bool:
        return all(work.test() for work in self._works)

    def abandon(self) -> None:
        for work in self._works if self._writes else ():
            work.cancel()


def is_peer_group(group: ProcessGroup) -> TypeGuard[PeerGroup]:
    """Return whether ranks can send each other messages; the protocol alone would look up member after member."""
    return isinstance(group, _Engine) or isinstance(group, PeerGroup)  # noqa: SIM101 (the order is what it is for)


def break_off(group: ProcessGroup) -> None:
    """Let no rank wait for this one, which will not do what they expect, where the engine can."""
    if is_peer_group(group):
        group.break_off()


def as_process_group(group: Any = None) -> ProcessGroup:
    """Return the process group that an object stands for, or the one that is initialised.

    Args:
        group: a `ProcessGroup`, a process group of torch.distributed, an mpi4py communicator; or None for all ranks of
            the one engine that is initialised in this process.

    Raises:
        TypeError: if it is none of these.
        RuntimeError: if it is None and no engine is initialised, or both are.

    Example:
        >>> as_process_group("gloo")
        Traceback (most recent call last):
        TypeError: group: expected a process group of torch.distributed, an mpi4py communicator or None, got 'gloo'
    """
    if group is None:
        return _initialised_group()
    if isinstance(group, ProcessGroup) and not isinstance(group, type):
        return group
    dist, mpi = sys.modules.get("torch.distributed"), sys.modules.get("mpi4py.MPI")
    if dist is not None and dist.is_available() and isinstance(group, dist.ProcessGroup):
        return TorchGroup(group)
    if mpi is not None and isinstance(group, mpi.Intracomm):
        return MpiGroup(group)
    raise TypeError(
        f"group: expected a process group of torch.distributed, an mpi4py communicator or None, got {group!r}"
    )


def _initialised_group() -> ProcessGroup:
    dist, mpi = sys.modules.get("torch.distributed"), sys.modules.get("mpi4py.MPI")
    has_torch = dist is not None and dist.is_available() and dist.is_initialized()
    has_mpi = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    if has_torch and has_mpi:
        raise RuntimeError(
            "group: both torch.distributed and MPI are initialised; say which with "
            "group=torch.distributed.group.WORLD or group=MPI.COMM_WORLD"
        )
    if has_torch:
        return TorchGroup()
    if has_mpi:
        return MpiGroup()
    raise RuntimeError(
        "group: no process group is initialised. With torch, start with torchrun and call "
        "torch.distributed.init_process_group('gloo'); with MPI, start with mpiexec and import mpi4py.MPI"
    )


def _contiguous(argument: str, array: Any) -> Array:
    if not isinstance(array, np.ndarray):
        raise TypeError(_KINDS.format(argument, type(array).__name__))
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(
            f"{argument}: expected a contiguous and writable array, got flags {array.flags}"
        )
    return array


def _check_operation(op: str) -> None:
    if op not in _OPERATIONS:
        raise ValueError(f"op: expected one of {', '.join(_OPERATIONS)}, got {op!r}")


def _elements(array: Any) -> int:
    return int(array.size if isinstance(array, np.ndarray) else array.numel())


def _check_sizes(whole_name: str, whole: Any, part_name: str, part: Any, size: int) -> None:
    if _elements(whole) != size * _elements(part):
        raise ValueError(
            f"{whole_name}: expected {size} times the elements of {part_name}, {size * _elements(part)}, "
            f"got {_elements(whole)}"
        )
    if whole.dtype != part.dtype:
        raise TypeError(
            f"{part_name}: expected dtype {whole.dtype}, that of {whole_name}, got {part.dtype}"
        )
