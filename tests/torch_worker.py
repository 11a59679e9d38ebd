"""One rank of a distributed test: python torch_worker.py SCENARIO RANK RANKS FILE.

Exits with an error if a check fails.
"""

from __future__ import annotations

import copy
import gc
import os
import re
import sys
from typing import Any

import pytest
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


def backward_ddp() -> None:
    """step_in_backward and DDP refuse each other, whichever comes first, with nothing changed."""
    from torch.nn.parallel import DistributedDataParallel as DDP

    kinds: list[dict[str, Any]] = [
        {},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
    ]
    for options in kinds:
        module = model()
        ddp = DDP(module, **options)
        refuses_wrapped(module, sgdcore.torch.SGD(module.parameters(), **HYPER))
        with ddp.no_sync():
            refuses_wrapped(module, sgdcore.torch.SGD(ddp.module.parameters(), **HYPER))
        train(ddp, sgdcore.torch.SGD(module.parameters(), **HYPER))  # as without

        module = model()
        optimizer = sgdcore.torch.SGD(module.parameters(), **HYPER)
        handle = sgdcore.torch.step_in_backward(optimizer)
        refused(
            module, "DistributedDataParallel: parameter '0.weight' is up", DDP, module, **options
        )
        handle.remove()
        DDP(module, **options)

    # A part of the model, either way round.
    module = model()
    optimizer = sgdcore.torch.SGD(module.parameters(), **HYPER)
    handle = sgdcore.torch.step_in_backward(optimizer)
    refused(module, "DistributedDataParallel: parameter 'weight' is up", DDP, module[2])
    handle.remove()
    ddp = DDP(module[2])
    names = list(module.named_parameters())
    refuses_wrapped(module, sgdcore.torch.SGD(names, **HYPER), "parameter '2.weight'")
    # A group that comes later.
    optimizer = sgdcore.torch.SGD(module[0].parameters(), **HYPER)
    sgdcore.torch.step_in_backward(optimizer)
    refused(
        module,
        r"param_groups[1]['params'][0] cannot be updated in the backward pass: DistributedData",
        optimizer.add_param_group,
        {"params": module[2].parameters()},
    )
    assert len(optimizer.param_groups) == 1
    # Which is no hindrance to a model of its own beside it, nor to an optimizer that is gone.
    ddp = DDP(model())
    module[0](torch.ones(2, 8)).sum().backward()
    assert "already used" in repr(module[0].weight.grad)
    del optimizer
    gc.collect()
    module[0].weight.grad = module[0].bias.grad = None
    DDP(module[0])
    # What DDP leaves out is the optimizer's.
    module = model()
    DDP._set_params_and_buffers_to_ignore_for_model(module, ["2.weight", "2.bias"])
    sgdcore.torch.step_in_backward(sgdcore.torch.SGD(module[2].parameters(), **HYPER))
    ddp = DDP(module)
    ddp(torch.ones(2, 8)).sum().backward()
    assert "already used" in repr(module[2].weight.grad)


def refused(module: torch.nn.Module, message: str, call: Any, *args: Any, **kwargs: Any) -> None:
    """Expect a ValueError with the message in it, and the module's parameters as they were."""
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*args, **kwargs)
    for p, kept in zip(module.parameters(), before, strict=True):
        assert_same_bits(p.detach(), kept)
        assert p.grad is None


def refuses_wrapped(
    module: torch.nn.Module,
    optimizer: sgdcore.torch.SGD,
    label: str = "param_groups[0]['params'][0]",
) -> None:
    message = f"{label} cannot be updated in the backward pass: DistributedDataParallel averages"
    refused(module, message, sgdcore.torch.step_in_backward, optimizer)
    assert optimizer._in_backward is None
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


def backward_fsdp1() -> None:
    """Parameters of FullyShardedDataParallel are refused; those that it takes later step as without."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(module: torch.nn.Module, use_orig_params: bool) -> torch.nn.Module:
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=cpu)

    for original in (False, True):
        module = wrap(model(), original)
        optimizer = sgdcore.torch.SGD(module.parameters(), **HYPER)
        message = "['params'][0] cannot be updated in the backward pass: FullyShardedDataParallel"
        refused(module, message, sgdcore.torch.step_in_backward, optimizer)
    modules = []
    for in_backward in (True, False):
        module = model()
        optimizer = sgdcore.torch.SGD(module.parameters(), **HYPER)
        if in_backward:
            sgdcore.torch.step_in_backward(optimizer)
        module = wrap(module, True)
        train(module, optimizer)
        modules.append(module)
    for ours, theirs in zip(*(m.parameters() for m in modules), strict=True):
        assert_same_bits(ours, theirs)


def backward_fsdp2() -> None:
    """fully_shard runs hooks with the averaged gradients: the numbers are those of separate steps."""
    from torch.distributed.fsdp import fully_shard

    for accumulate in (False, True):
        modules = []
        for in_backward in (True, False):
            module = model()
            for layer in (module[0], module[2], module):
                fully_shard(layer)
            optimizer = sgdcore.torch.SGD(module.parameters(), **HYPER)
            if in_backward:
                sgdcore.torch.step_in_backward(optimizer)
            for step in range(4):
                if accumulate:
                    module.set_requires_gradient_sync(step % 2 == 1)
                generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
                module(torch.randn(6, 8, generator=generator)).pow(2).mean().backward()
                if accumulate and step % 2 == 0:
                    continue
                if in_backward:
                    assert all("already used" in repr(p.grad) for p in module.parameters())
                optimizer.step()
                optimizer.zero_grad()
            modules.append(module)
        for ours, theirs in zip(*(m.parameters() for m in modules), strict=True):
            assert_same_bits(ours.to_local(), theirs.to_local())


SCENARIOS = {
    each.__name__: each
    for each in (ddp, zero, fsdp2, checkpoint, backward_ddp, backward_fsdp1, backward_fsdp2)
}

if __name__ == "__main__":
    scenario, rank, ranks, path = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=int(rank), world_size=int(ranks)
    )
    SCENARIOS[scenario]()
    dist.barrier()  # so that neither takes the connection away from the other
    # Not by sys.exit: now and then gloo aborts a process that is on its way out, whatever it ran (torch 2.13).
    os._exit(0)
