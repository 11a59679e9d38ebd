"""One rank of test_torch_ddp.py, started by torchrun: python ddp_worker.py FOLDER.

Trains every case of CASES twice in DistributedDataParallel, with sgdcore.torch.SGD and with torch.optim.SGD, compares
all bits, and writes what became of each case to FOLDER/RANK.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import sgdcore
from torch_support import assert_same_training, bits

STEPS = 7
HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


def power_sgd() -> PowerSGDState:
    # Compressed from the third step on.
    return PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)


def bfloat16_over_gloo(
    group, bucket
):  # torch refuses annotations that are strings, as they are here
    """By its own name torch takes the hook for NCCL only."""
    return bf16_compress_hook(group, bucket)


Hook = tuple[Callable[[], Any], Callable[..., Any]]
HOOKS: dict[str, Hook] = {
    "bfloat16": (lambda: None, bfloat16_over_gloo),
    "float16": (lambda: None, fp16_compress_hook),
    "PowerSGD": (power_sgd, powerSGD_hook),
}


@dataclass(frozen=True)
class Case:
    """How DistributedDataParallel is set up, and what is done around it."""

    hook: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1  # backward passes of a step; all but the last one within no_sync()
    clip: float | None = None
    set_to_none: bool = True


SETUPS = {
    "plain": Case(),
    "views": Case(options={"gradient_as_bucket_view": True}),
    "views zeroed": Case(options={"gradient_as_bucket_view": True}, set_to_none=False),
    "static graph": Case(options={"static_graph": True}),
    "unused layer": Case(options={"find_unused_parameters": True}),
    "accumulated": Case(accumulate=3),
    "views accumulated": Case(options={"gradient_as_bucket_view": True}, accumulate=3),
    "clipped": Case(clip=0.05),
    "views clipped accumulated": Case(
        options={"gradient_as_bucket_view": True}, accumulate=2, clip=0.05
    ),
}
CASES = {
    f"{setup}, {hook}" if hook else setup: Case(
        hook, case.options, case.accumulate, case.clip, case.set_to_none
    )
    for setup, case in SETUPS.items()
    for hook in ("", *HOOKS)
    # DistributedDataParallel tells which parameters were unused in a collective of its own. powerSGD_hook starts its
    # later collectives on gloo's threads, so that the ranks' orders may differ, and gloo aborts (torch 2.13).
    if not (hook == "PowerSGD" and "find_unused_parameters" in case.options)
}


class Network(torch.nn.Module):
    """Some layers, batch norm among them, of which one takes part in every other step only."""

    def __init__(self, sometimes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.BatchNorm1d(40))
        self.extra = torch.nn.Linear(40, 40)
        self.last = torch.nn.Linear(40, 4)
        self.sometimes, self.passes = sometimes, 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(values))
        self.passes += 1
        if not self.sometimes or self.passes % 2:
            hidden = torch.relu(self.extra(hidden))
        return self.last(hidden)


def train(case: Case, make: Any) -> Any:
    """Return an optimizer that has trained."""
    # 2 KB a bucket: several of them, as with a large network. Under gloo powerSGD_hook hangs with more than one.
    options = {"bucket_cap_mb": 1 if case.hook == "PowerSGD" else 2 / 1024, **case.options}
    network = Network("find_unused_parameters" in options)
    model = DistributedDataParallel(network, **options)
    if case.hook:
        state, hook = HOOKS[case.hook]
        model.register_comm_hook(state(), hook)
    optimizer = make(network.parameters(), foreach=False, **HYPER)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=case.set_to_none)
        for part in range(case.accumulate):
            generator = torch.Generator().manual_seed(10 * step + part + 1000 * dist.get_rank())
            last = part == case.accumulate - 1
            with nullcontext() if last else model.no_sync():
                output = model(torch.randn(6, 8, generator=generator))
                output.pow(2).mean().backward()
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), case.clip)
        optimizer.step()
    return optimizer


def digest(optimizer: Any) -> str:
    """Stand for all bits of the parameters."""
    params = optimizer.param_groups[0]["params"]
    return hashlib.sha256(b"".join(bits(p).numpy().tobytes() for p in params)).hexdigest()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, dict[str, str]] = {}
    for name, case in CASES.items():
        ours = train(case, sgdcore.torch.SGD)
        theirs = train(case, torch.optim.SGD)
        results[name] = {"parameters": digest(ours), "error": ""}
        try:
            assert_same_training(ours, theirs)
        except AssertionError:
            results[name]["error"] = traceback.format_exc()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    # Not by sys.exit: now and then gloo aborts a process that is on its way out (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
