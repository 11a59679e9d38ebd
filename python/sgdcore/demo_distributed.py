"""``python -m sgdcore demo --distributed``: the demo's training on several workers.

`train_on_shards` is the demo's loop with the changes for several ranks:

1. The optimizer is wrapped: `LocalSGD` averages the parameters every H steps, `DataParallel` the gradients in each
   step.
2. A `ShardSampler` says which images are this rank's, in place of a permutation of all.
3. The parameters are made equal before the network is evaluated.

Every rank runs everything. Only the first one prints.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from time import perf_counter, sleep

import numpy as np

import sgdcore
from sgdcore import demo
from sgdcore._hints import needs
from sgdcore.distributed import (
    DataParallel,
    LocalSGD,
    ProcessGroup,
    RoundError,
    ShardSampler,
    as_process_group,
)

# Variables by which launchers tell a process its rank: torchrun; MPICH and its derivatives; Open MPI.
_TORCHRUN, _MPIEXEC = "TORCHELASTIC_RUN_ID", ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def train_on_shards(
    model: demo.MLP,
    optimizer: sgdcore.SGD,
    data: demo.Digits,
    *,
    loss_function: demo.LossFunction,
    schedule: Callable[[float], float],
    epochs: int,
    batch_size: int,
    rng: np.random.Generator,
    history: demo.History,
    progress: demo.Progress,
    group: ProcessGroup,
    sync_every: int,
    seed: int,
) -> None:
    """Train as `sgdcore.demo.train` does, each rank with mini-batches of its shard of the images.

    Raises:
        DemoError: The loss is no longer finite, on every rank after the same epoch.
    """
    base_lr = optimizer.param_groups[0]["lr"]
    workers = (
        DataParallel(optimizer, group)
        if sync_every == 1
        else LocalSGD(optimizer, group, sync_every=sync_every)
    )
    sampler = ShardSampler(data.train_images, seed=seed, group=group)
    noise = rng.spawn(group.size)[group.rank]
    total_steps = epochs * math.ceil(len(sampler) / batch_size)
    history.records.append(demo.evaluate(model, data, loss_function, epoch=0))
    began = perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(1, epochs + 1):
            sampler.set_epoch(epoch)
            try:
                for batch in sampler.batches(batch_size):
                    lr = base_lr * schedule(history.steps / total_steps)
                    optimizer.param_groups[0]["lr"] = lr
                    images = data.train_images[batch]
                    images += demo.NOISE * noise.standard_normal(images.shape, images.dtype.type)
                    activations = model.forward(images)
                    _, delta = loss_function(activations[-1], data.train_labels[batch])
                    model.backward(activations, delta)
                    workers.step()
                    history.steps += 1
                    history.seconds = perf_counter() - began
                    progress.step()
                if isinstance(workers, LocalSGD):
                    workers.sync()
            except RoundError:
                # Where parameters are no longer finite, training has diverged.
                record = demo.evaluate(model, data, loss_function, epoch)
                demo.check_finite(record.train_loss, epoch, lr)
                raise
            record = demo.evaluate(model, data, loss_function, epoch)
            # Checked once an epoch: if a rank left in between, the others would wait for it in the next average.
            demo.check_finite(record.train_loss, epoch, lr)
            history.records.append(record)
            progress.epoch(record)


def run(args: argparse.Namespace) -> int:
    """Join the other ranks and run the demo with them, and return the exit code."""
    with _join(plot=args.plot is not None) as group:
        workers = _workers(args, group)
        code = demo.run(args, workers) if group.rank == 0 else _run_silently(args, workers)
        if code == demo.INTERRUPTED:
            # The other ranks may be waiting for this one, where Ctrl-C does not reach them.
            if group.rank > 0:
                sleep(1)  # the first rank reports meanwhile how far it came
            raise KeyboardInterrupt
        return code


def _workers(args: argparse.Namespace, group: ProcessGroup) -> demo.Workers:
    averaged = f"parameters averaged every {args.sync_every} steps"
    if args.sync_every == 1:
        averaged = "gradients averaged in each step"
    train = partial(train_on_shards, group=group, sync_every=args.sync_every, seed=args.seed)
    return demo.Workers(group.rank, group.size, train, averaged)


def _run_silently(args: argparse.Namespace, workers: demo.Workers) -> int:
    silent = argparse.Namespace(**{**vars(args), "quiet": True, "plot": None})
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            return demo.run(silent, workers)
        except demo.DemoError as error:  # the first rank reports it
            return error.exit_code


@contextmanager
def _join(plot: bool) -> Iterator[ProcessGroup]:
    """Use the engine of the launcher that started this process, after importing the demo's extras.

    Raises:
        DemoError: There was no launcher, or something is not installed.
    """
    try:
        if _TORCHRUN in os.environ:
            try:
                import torch.distributed as dist
            except ImportError as error:
                raise ImportError(needs("torchrun's launch", "torch", "torch", error)) from error
            demo.import_extras(plot)
            dist.init_process_group("gloo")
            yield as_process_group(dist.group.WORLD)
            dist.destroy_process_group()
        elif any(name in os.environ for name in _MPIEXEC):
            with _join_mpi(plot) as group:
                yield group
        else:
            raise demo.DemoError(
                "argument --distributed: needs a launcher, such as\n"
                "  torchrun --standalone --nproc-per-node 2 -m sgdcore demo --distributed\n"
                "  mpiexec -n 2 python -m sgdcore demo --distributed",
                exit_code=2,
            )
    except ImportError as error:
        raise demo.DemoError(f"--distributed: {error}") from error


@contextmanager
def _join_mpi(plot: bool) -> Iterator[ProcessGroup]:
    """Use MPI. An exception on one rank ends all ranks, as with torchrun: the others would wait for ever."""
    try:
        from mpi4py import MPI
        from mpi4py.run import set_abort_status
    except ImportError as error:
        raise ImportError(needs("mpiexec's launch", "mpi4py", "mpi", error)) from error

    joined = False
    try:
        demo.import_extras(plot)
        joined = True
        yield as_process_group(MPI.COMM_WORLD)
    except BaseException as error:
        # After joining, either all ranks raise a DemoError, or the first rank does when all are done.
        if not (joined and isinstance(error, demo.DemoError)):
            set_abort_status(error)  # takes effect when this process ends, after its message
        raise
