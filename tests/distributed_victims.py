"""Ranks that are killed: what one process of test_distributed_failures.py does.

Started from a fork server that has torch in memory already, so that a trial takes a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import sgdcore
from sgdcore.distributed import DataParallel, LocalSGD, RoundError, _traffic, as_process_group

ELEMENTS = 600_000  # some milliseconds for an average


def connect(store: dist.Store, name: str, rank: int, ranks: int, seconds: float) -> None:
    """Join a group; survivors leave the old one and meet under another name."""
    if dist.is_initialized():
        dist.destroy_process_group()
    prefixed = dist.PrefixStore(name, store)
    dist.init_process_group(
        "gloo", store=prefixed, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )


def optimizer_for(rank: int) -> Any:
    rng = np.random.default_rng(1)
    buffer = sgdcore.ParameterBuffer(
        {"w": rng.standard_normal(ELEMENTS).astype(np.float32), "b": (3,)}
    )
    return sgdcore.SGD(buffer, lr=0.1, momentum=0.9), buffer


def one_step(optimizer: Any, buffer: Any, rank: int, step: int) -> None:
    buffer.grad[:] = 0.1 * buffer.data + np.float32(rank + 1) / (step + 1)
    optimizer.step()


def momentum_of(optimizer: Any, buffer: Any) -> Any:
    return optimizer.state[buffer["w"]].get("momentum_buffer")


def survive(
    port: int,
    trial: str,
    rank: int,
    ranks: int,
    delay: float,
    options: dict[str, Any],
    pipe: Connection,
) -> None:
    """Train until a peer is gone, report what is left, go on without it, and report again."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    connect(store, f"{trial}-0", rank, ranks, options.pop("timeout", 10.0))
    how = options.pop("how", signal.SIGKILL)
    way = options.pop("way")
    if way == "messages":
        _traffic.MESSAGES_LEAST_TOTAL_BYTES, _traffic.MESSAGE_BYTES = 0, 100_000
    elif way == "to all":
        _traffic.COMBINED_MOST_BYTES = 4 * ELEMENTS + 1_000
    else:
        _traffic.MESSAGES_MOST_RANKS = 0
    optimizer, buffer = optimizer_for(rank)
    local = LocalSGD(optimizer, sync_every=2, **options)
    if rank == ranks - 1:
        dist.barrier()
        # From a thread, wherever the others are just then.
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(delay)
            os.kill(pid, how)
            os._exit(0)
    else:
        dist.barrier()
    kept = {0: (buffer.data.copy(), None)}
    report: dict[str, Any] = {"rank": rank}
    step = 0
    try:
        while True:
            one_step(local, buffer, rank, step)
            step += 1
            if local._step_in_round == 0:
                kept[local._round] = buffer.data.copy(), momentum_of(optimizer, buffer).copy()
                kept.pop(local._round - 2, None)
    except RoundError as error:
        report |= {"error": str(error), "round": error.round, "restored": error.restored}
        report["rounds"] = local._round
        data, momentum = kept[local._round]
        report["parameters are back"] = buffer.data.tobytes() == data.tobytes()
        own = momentum_of(optimizer, buffer)
        same = own is None if momentum is None else own.tobytes() == momentum.tobytes()
        report["momentum is back"] = same
    survivors = ranks - 1
    # Longer than the timeout before: gloo's own all-reduce may take so long to notice that a peer is gone.
    connect(store, f"{trial}-1", rank, survivors, 30.0)
    try:
        local.rebind()
    except RuntimeError as error:
        report["rebind"] = str(error)
        pipe.send(report)
        os._exit(0)
    report["rounds after rebind"] = local._round
    report["equal after rebind"] = _equal(buffer)
    if local._round in kept:
        report["at a round's end"] = buffer.data.tobytes() == kept[local._round][0].tobytes()
    for more in range(4):
        one_step(local, buffer, rank, step + more)
    report["went on"] = local._round - report["rounds after rebind"]
    report["equal in the end"] = _equal(buffer)
    report["finite"] = bool(np.isfinite(buffer.data).all())
    pipe.send(report)
    dist.barrier()
    os._exit(0)


def _equal(buffer: Any) -> bool:
    extremes = torch.from_numpy(np.concatenate([buffer.data, -buffer.data]))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, lowest = extremes.chunk(2)
    return bool(torch.equal(highest, -lowest))


def survive_data_parallel(
    port: int, trial: str, rank: int, ranks: int, delay: float, pipe: Connection
) -> None:
    """The same with synchronous SGD, whose parameters no failure touches."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    connect(store, f"{trial}-0", rank, ranks, 10.0)
    optimizer, buffer = optimizer_for(rank)
    data = DataParallel(optimizer)
    dist.barrier()
    report: dict[str, Any] = {"rank": rank}
    before = buffer.data.copy()
    for step in range(10**6):
        if rank == ranks - 1 and step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        before[:] = buffer.data
        try:
            one_step(data, buffer, rank, step)
        except RoundError as error:
            report |= {"error": str(error), "step": error.round}
            break
    report["parameters are untouched"] = before.tobytes() == buffer.data.tobytes()
    connect(store, f"{trial}-1", rank, ranks - 1, 10.0)
    data.rebind()
    report["equal after rebind"] = _equal(buffer)
    one_step(data, buffer, rank, 0)
    report["equal in the end"] = _equal(buffer)
    pipe.send(report)
    dist.barrier()
    os._exit(0)


def survive_in_backward(
    port: int, trial: str, rank: int, ranks: int, delay: float, pipe: Connection
) -> None:
    """A backward pass raises on rank 0, with part of its gradients sent to a group that ends meanwhile."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    connect(store, f"{trial}-0", rank, ranks, 10.0)
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    data = DataParallel(torch.optim.SGD([first, second], lr=0.1), slice_bytes=16)
    dist.barrier()
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    report: dict[str, Any] = {"rank": rank}

    def fails(gradient: torch.Tensor) -> None:
        raise MemoryError("out of memory")

    x = first * (1.0 + rank)
    if rank == 0:
        x.register_hook(fails)
    try:
        (x * second).sum().backward()  # type: ignore[no-untyped-call]
    except (MemoryError, RoundError) as error:
        report["error"] = str(error)
    report["sent"] = data._next
    connect(store, f"{trial}-1", rank, ranks - 1, 10.0)
    try:
        data.group.barrier()
    except RuntimeError as error:
        report["old group"] = str(error)
    data.rebind()
    data.zero_grad()
    (first * (1.0 + rank) * second).sum().backward()  # type: ignore[no-untyped-call]
    data.step()
    report["parameters"] = first.tolist() + second.tolist()
    pipe.send(report)
    dist.barrier()
    os._exit(0)


def wait_for_a_message(
    port: int, trial: str, rank: int, ranks: int, delay: float, lost: str, pipe: Connection
) -> None:
    """Send 400 MB between rank 0 and the last one, the sender or the receiver, which is killed; the other looks on."""
    connect(dist.TCPStore("127.0.0.1", port, is_master=False), trial, rank, ranks, 30.0)
    group: Any = as_process_group()
    arrays = [torch.zeros(10_000_000) for _ in range(10)]
    group.barrier()
    start, error, messages = time.perf_counter(), "", []
    ends = {0: ranks - 1, ranks - 1: 0}
    if rank in ends:
        sends = (lost == "sender") == (rank == ranks - 1)
        begin = group.send if sends else group.receive
        messages = [begin(pair, ends[rank], 5) for pair in zip(*[iter(arrays)] * 2, strict=True)]
        if rank == ranks - 1:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        for message in messages:
            message.wait()
        group.close_messages()
    except RuntimeError as failure:
        error = str(failure)
    pipe.send({"seconds": time.perf_counter() - start, "error": error})
    os._exit(0)
