"""One rank of a distributed test: python torch_worker.py SCENARIO RANK RANKS FILE.

Exits with an error if a check fails.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

import sgdcore
from torch_support import assert_same_bits, assert_same_training

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        optimizer.zero_grad()
        module(torch.randn(6, 8, generator=generator)).pow(2).mean().backward()
        optimizer.step()


def ddp() -> None:
    optimizers = []
    for make in (sgdcore.torch.SGD, torch.optim.SGD):
        module = torch.nn.parallel.DistributedDataParallel(model())
        optimizer = make(module.parameters(), foreach=False, **HYPER)
        train(module, optimizer)
        optimizers.append(optimizer)
    assert_same_training(*optimizers)


def zero() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    modules = []
    for make in (sgdcore.torch.SGD, torch.optim.SGD):
        module = torch.nn.parallel.DistributedDataParallel(model())
        optimizer = ZeroRedundancyOptimizer(
            module.parameters(), optimizer_class=make, foreach=False, **HYPER
        )
        train(module, optimizer)
        optimizer.consolidate_state_dict()
        modules.append(module)
    for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert_same_bits(ours, theirs)


def fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard

    optimizers = []
    for make in (sgdcore.torch.SGD, torch.optim.SGD):
        module = model()
        for layer in (module[0], module[2], module):
            fully_shard(layer)
        optimizer = make(module.parameters(), foreach=False, **HYPER)
        train(module, optimizer)
        optimizers.append(optimizer)
    for ours, theirs in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        assert_same_bits(ours.to_local(), theirs.to_local())
        momenta = [
            o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (ours, theirs), strict=True)
        ]
        assert momenta[0].placements == momenta[1].placements
        assert_same_bits(momenta[0].to_local(), momenta[1].to_local())


def checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    trained = []
    for source, target in (
        (sgdcore.torch.SGD, torch.optim.SGD),
        (torch.optim.SGD, sgdcore.torch.SGD),
    ):
        module, fresh = model(), model()
        fully_shard(module)
        fully_shard(fresh)
        first = source(module.parameters(), foreach=False, **HYPER)
        train(module, first)
        second = target(fresh.parameters(), foreach=False, **HYPER)
        fresh.load_state_dict(module.state_dict())
        # A copy, since torch.optim.SGD would go on to share the momentum buffers it is given.
        state = copy.deepcopy(get_optimizer_state_dict(module, first))
        set_optimizer_state_dict(fresh, second, state)
        train(module, first)
        train(fresh, second)
        trained += [list(module.parameters()), list(fresh.parameters())]
    for each in zip(*trained, strict=True):
        for p in each[1:]:
            assert_same_bits(p.to_local(), each[0].to_local())


if __name__ == "__main__":
    scenario, rank, ranks, path = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=int(rank), world_size=int(ranks)
    )
    {"ddp": ddp, "zero": zero, "fsdp2": fsdp2, "checkpoint": checkpoint}[scenario]()
    dist.barrier()  # so that neither takes the connection away from the other
    # Not by sys.exit: now and then gloo aborts a process that is on its way out, whatever it ran (torch 2.13).
    os._exit(0)
