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
from sgdcore.distributed import DataParallel, LocalSGD, RoundError

ELEMENTS = 600_000  # some milliseconds for an average


def connect(
    store: dist.Store,
    name: str,
    rank: int,
    ranks: int,
    seconds: float,
    backend: str | None = "gloo",
) -> None:
    """Join a group; survivors leave the old one and meet under another name."""
    if dist.is_initialized():
        dist.destroy_process_group()
    prefixed = dist.PrefixStore(name, store)
    dist.init_process_group(
        backend, store=prefixed, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
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
    seconds, backend = options.pop("timeout", 10.0), options.pop("backend", "gloo")
    connect(store, f"{trial}-0", rank, ranks, seconds, backend)
    how = options.pop("how", signal.SIGKILL)
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
            if local.step_in_round == 0:
                kept[local.round] = buffer.data.copy(), momentum_of(optimizer, buffer).copy()
                kept.pop(local.round - 2, None)
    except RoundError as error:
        report |= {"error": str(error), "round": error.round, "restored": error.restored}
        report["rounds"] = local.round
        data, momentum = kept[local.round]
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
    report["rounds after rebind"] = local.round
    report["equal after rebind"] = _equal(buffer)
    if local.round in kept:
        report["at a round's end"] = buffer.data.tobytes() == kept[local.round][0].tobytes()
    for more in range(4):
        one_step(local, buffer, rank, step + more)
    report["went on"] = local.round - report["rounds after rebind"]
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
