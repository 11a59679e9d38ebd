"""Random schedules of Local SGD: what each process of test_distributed_schedules.py does.

A seed stands for a training with 2 to 4 ranks: the options, how many steps each rank takes in each of its phases, the
failures of single ranks (exceptions, in and between steps; gradients that are no numbers), and a rank that joins late.
Each phase ends with `sync`, the last one with `finish`. Every rank that hears of a failure meets the others in a new
group.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import random
import signal
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch._dynamo  # or torch's first group would outlive its end
import torch.distributed as dist

import sgdcore
from sgdcore.distributed import LocalSGD, OuterSGD, RoundError, SlowMo, Stagewise

SHAPES = {"weight": (40, 30), "bias": (30,), "scale": ()}
GROUP_SECONDS = 20.0
LOST = "parameters are left in the middle"  # of a round without transactions: nobody is left to go on from


@dataclass(frozen=True)
class Failure:
    """What goes wrong on one rank before one of its steps."""

    phase: int
    rank: int
    step: int
    kind: str  # "between", "in the step", "not a number", "passed over"


@dataclass
class Schedule:
    """A training, the same on all ranks."""

    ranks: int
    joins: bool  # the last rank, at the second phase
    options: dict[str, Any]
    outer: Any
    level_every: int
    on_tensors: bool
    momentum: float
    steps: list[list[int]]  # by phase and rank
    failures: list[Failure] = field(default_factory=list)

    def members(self, phase: int) -> int:
        return self.ranks - (self.joins and phase == 0)

    def failure(self, phase: int, rank: int, step: int) -> str:
        found = [f.kind for f in self.failures if (f.phase, f.rank, f.step) == (phase, rank, step)]
        return found[0] if found else ""


def schedule_of(seed: int) -> Schedule:
    """Draw a training."""
    draw = random.Random(seed)
    ranks = draw.randint(2, 4)
    options = {
        "sync_every": draw.choice([1, 2, 3, 5, Stagewise({0: 1, 4: 3})]),
        "momentum_sync": draw.choice(["keep", "average", "reset"]),
        "wire_dtype": draw.choice([None, None, "bfloat16", "float16"]),
        "transactional": draw.random() < 0.6,
        "exclude_nonfinite": draw.random() < 0.3,
    }
    outer = draw.choice([None, None, SlowMo(0.5), OuterSGD(0.7, 0.5, nesterov=True)])
    phases = draw.randint(1, 3)
    joins = phases > 1 and ranks > 2 and draw.random() < 0.4
    steps = [[draw.randint(0, 9) for _ in range(ranks)] for _ in range(phases)]
    schedule = Schedule(
        ranks,
        joins,
        options,
        outer,
        draw.choice([0, 0, 1, 2, 3]),
        draw.random() < 0.5,
        draw.choice([0.0, 0.9]),
        steps,
    )
    for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
        phase = draw.randrange(phases)
        rank = draw.randrange(schedule.members(phase))
        if steps[phase][rank]:
            step = draw.randrange(steps[phase][rank])
            kind = draw.choice(["between", "in the step", "not a number", "passed over"])
            schedule.failures.append(Failure(phase, rank, step, kind))
    return schedule


class Planned(Exception):
    """A failure of the schedule."""


class Training:
    """One rank of a schedule."""

    def __init__(self, seed: int, rank: int, store: dist.Store) -> None:
        self.seed, self.rank, self.store = seed, rank, store
        self.plan = schedule_of(seed)
        rng = np.random.default_rng(seed)
        values = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
        hyper = {"lr": 0.05, "momentum": self.plan.momentum}
        self.inner: Any
        if self.plan.on_tensors:
            self.params: list[Any] = [
                torch.nn.Parameter(torch.tensor(value)) for value in values.values()
            ]
            self.inner = sgdcore.torch.SGD(self.params, **hyper)
        else:
            buffer = sgdcore.ParameterBuffer(values)
            self.params = list(buffer.values())
            self.inner = sgdcore.SGD(buffer, **hyper)
        self.local: LocalSGD | None = None
        self.done = self.taken = 0  # steps, of a phase and in all

    def arrays(self) -> list[Any]:
        return [p.detach().numpy() if self.plan.on_tensors else p.data for p in self.params]

    def run(self) -> str:
        """Train; returns what the parameters are in the end, or "lost"."""
        result = self._train()
        if result == "lost" and self.rank == 0:
            self.store.set(f"{self.seed} joins", "lost")
        return result

    def _train(self) -> str:
        for phase in range(len(self.plan.steps)):
            if self.rank >= self.plan.members(phase):
                # It joins at the next one, unless the others have nothing left to go on from.
                if self.store.get(f"{self.seed} joins") == b"lost":
                    return "lost"
                continue
            if phase == 1 and self.rank == 0:
                self.store.set(f"{self.seed} joins", "now")
            self.done = attempt = 0
            if phase == 0 or (self.plan.joins and phase == 1):
                self._leave()
                if not self._meet(phase, attempt):
                    return "lost"
            while not self._end_of(phase):
                self.done += 1  # a step that failed is not repeated
                self._leave()
                self._repair()
                attempt += 1
                assert attempt <= len(self.plan.failures), "a failure that does not end"
                if not self._meet(phase, attempt):
                    return "lost"
        assert all(np.isfinite(array).all() for array in self.arrays())
        digest = hashlib.sha256(b"".join(array.tobytes() for array in self.arrays()))
        return f"{digest.hexdigest()[:16]} after round {self.local.round if self.local else 0}"

    def _end_of(self, phase: int) -> bool:
        """Take the steps that are left of a phase, and end it; returns False if that failed."""
        assert self.local is not None
        try:
            while self.done < self.plan.steps[phase][self.rank]:
                self._step(phase, self.done)
                self.done += 1
            last = phase == len(self.plan.steps) - 1
            self.local.finish() if last else self.local.sync()
        except (RoundError, Planned):
            return False
        return True

    def _leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _meet(self, phase: int, attempt: int) -> bool:
        """Begin to train, or go on, in a new group; returns whether a rank's parameters are whole."""
        members = self.plan.members(phase)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"{self.seed}-{phase}-{attempt}", self.store),
            rank=self.rank,
            world_size=members,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        levels = None
        if self.plan.level_every:
            halves = [list(range(members))[:2], list(range(members))[2:]]
            groups = [dist.new_group(half) for half in halves if half]
            levels = [(groups[self.rank // 2], self.plan.level_every)]
        if self.local is None:
            self.local = LocalSGD(
                self.inner, outer=self.plan.outer, levels=levels, **self.plan.options
            )
            return True
        try:
            self.local.rebind(levels=levels)
        except RuntimeError as error:
            if LOST not in str(error) or self.plan.options["transactional"]:
                raise
            return False
        return True

    def _step(self, phase: int, number: int) -> None:
        assert self.local is not None
        kind = self.plan.failure(phase, self.rank, number)
        self.taken += 1
        grads = [
            0.1 * array + np.float32(np.sin(self.rank + self.taken)) for array in self.arrays()
        ]
        if kind == "not a number":
            grads[0][3, 5] = np.nan
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = torch.tensor(grad) if self.plan.on_tensors else np.asarray(grad, np.float32)
        if kind == "between":
            raise Planned
        if kind in ("in the step", "passed over"):
            with (
                contextlib.nullcontext() if kind == "in the step" else contextlib.suppress(Planned)
            ):
                self.local.step(self._fails)
        else:
            self.local.step()

    def _fails(self) -> Any:
        raise Planned

    def _repair(self) -> None:
        """Make values that are no numbers zero, as someone would who goes on after such a failure."""
        for array in self.arrays():
            np.nan_to_num(array, copy=False)
        for p in self.params:
            momentum = self.inner.state[p].get("momentum_buffer") if p in self.inner.state else None
            if momentum is not None:
                momentum = momentum.numpy() if self.plan.on_tensors else momentum
                np.nan_to_num(momentum, copy=False)


def work(port: int, rank: int, pipe: Connection) -> None:
    """Take part in one schedule after the other."""
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # where it hangs
    torch.set_num_threads(1)
    sgdcore.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        seed = pipe.recv()
        training = Training(seed, rank, store)
        try:
            result = training.run()
        except BaseException as error:  # noqa: BLE001 (the parent fails)
            import traceback

            result = "".join(traceback.format_exception(error))
        with contextlib.suppress(RuntimeError):
            training._leave()
        pipe.send(result)
