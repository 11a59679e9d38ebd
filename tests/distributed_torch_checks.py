"""What the distributed tests check with torch's tensors, over gloo and MPI alike; see distributed_checks.py."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sgdcore
from distributed_checks import (
    GLOO,
    Context,
    Counting,
    addresses_of,
    as_array,
    assert_equal_on_all,
    averages_of_parameters_are_averaged_with_them,
    averages_under_data_parallel_are_equal_on_all_ranks,
    averaging,
    check,
    chunks_of,
    close,
    data_parallel_mean,
    h1_equals_synchronous,
    make,
    masters_are_averaged,
    momenta_of,
    momentum_that_some_ranks_lack,
    on_all,
    outer_step_of_one_is_averaging,
    params_of,
    put_gradient,
    refused,
    resuming,
    same_bits,
    told,
    train,
    values_of,
)
from sgdcore.distributed import DataParallel, LocalSGD, OuterSGD, RoundError, SlowMo

# Four MPI processes that all import torch take longer than they tell more than two.
TORCH = (*GLOO, "mpi-2")
KINDS: dict[str, dict[str, Any]] = {
    "sgdcore.torch": {"kind": "sgdcore.torch"},
    "torch.optim": {"kind": "torch.optim"},
}
for each in (
    averaging,
    h1_equals_synchronous,
    outer_step_of_one_is_averaging,
    momentum_that_some_ranks_lack,
    resuming,
    data_parallel_mean,
):
    check(TORCH, cases=KINDS)(each)
for each in (
    averages_of_parameters_are_averaged_with_them,
    averages_under_data_parallel_are_equal_on_all_ranks,
    masters_are_averaged,
):
    check(TORCH, cases={"sgdcore.torch": {"kind": "sgdcore.torch"}})(each)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 300),
        nn.ReLU(),
        nn.Linear(300, 3),
    )


def batch(rank: int, step: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(size, 2, 6, 6, generator=generator), torch.randint(
        3, (size,), generator=generator
    )


def backward(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(module(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def sgd(module: nn.Module, kind: str = "sgdcore.torch", **hyper: Any) -> torch.optim.Optimizer:
    cls = sgdcore.torch.SGD if kind == "sgdcore.torch" else torch.optim.SGD
    return cls(module.parameters(), **{"lr": 0.05, "momentum": 0.9, **hyper})


@check(TORCH)
def torch_optimizers_are_interchangeable(context: Context) -> None:
    """The same bits whichever does the steps."""
    for options in ({}, {"momentum_sync": "average", "outer": SlowMo(0.5)}):
        results = []
        for kind in KINDS:
            optimizer = make(kind)
            if kind == "torch.optim":
                optimizer.param_groups[0]["foreach"] = False
            train(context, LocalSGD(optimizer, sync_every=3, **options), 9)
            results.append(values_of(optimizer))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@check(GLOO)
def gradients_equal_those_of_torch_ddp(context: Context) -> None:
    ours, theirs = network(), nn.parallel.DistributedDataParallel(network())
    data = DataParallel(sgd(ours))
    other = sgd(theirs)
    for step in range(5):
        for module, optimizer in ((ours, data), (theirs, other)):
            optimizer.zero_grad()
            backward(module, *batch(context.rank, step))
        with chunks_of(64 << 10):
            data.average_gradients()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(p.grad, q.grad)
            assert q.grad is not None
        for optimizer in (data, other):
            nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p, q)
    assert_equal_on_all(context, list(ours.parameters()))


@check(TORCH)
def uneven_batches_are_weighted(context: Context) -> None:
    """As one process with all the examples."""
    module, reference = network(), network()
    data, single = DataParallel(sgd(module)), sgd(reference)
    for step in range(3):
        size = 2 + 3 * context.rank
        data.weight = size
        data.zero_grad()
        backward(module, *batch(context.rank, step, size))
        data.step()
        batches = [batch(rank, step, 2 + 3 * rank) for rank in range(context.size)]
        single.zero_grad()
        backward(reference, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
        single.step()
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        close(p, q)


@check(TORCH)
def parameters_unused_by_some_ranks(context: Context) -> None:
    """A branch that rank 0 does not take, one that none takes, and one frozen."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
            self.layers[3].requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[3](self.layers[0](x))
            return x if context.rank == 0 else self.layers[1](x)

    for wrapper in (DataParallel, LocalSGD):
        module = Branches()
        where = addresses_of(list(module.parameters()))
        kwargs = {"sync_every": 2} if wrapper is LocalSGD else {}
        optimizer = wrapper(sgd(module), **kwargs)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + context.rank))
            module(x).pow(2).mean().backward()
            optimizer.step()
        assert_equal_on_all(context, list(module.parameters()))
        assert addresses_of(list(module.parameters())) == where
        assert module.layers[2].weight.grad is None


@check(TORCH)
def a_step_without_a_backward_pass(context: Context) -> None:
    """On rank 0 no parameter gets a gradient; the others go on."""
    module = network()
    data = DataParallel(sgd(module))
    for step in range(3):
        data.zero_grad()
        if context.rank != 0:
            backward(module, *batch(context.rank, step))
        data.step()
    assert_equal_on_all(context, list(module.parameters()))
    assert_equal_on_all(context, momenta_of(data))


@check(TORCH)
def frozen_parameters_stay_at_home(context: Context) -> None:
    """Until they are unfrozen."""
    module, group = network(), Counting(context.group)
    module[3].requires_grad_(False)
    data = DataParallel(sgd(module), group)
    frozen = module[3].weight.numel() + module[3].bias.numel()
    counts = []
    for step in range(2):
        group.elements = 0
        backward(module, *batch(context.rank, step))
        data.step()
        counts.append(group.elements)
        module[3].requires_grad_(True)
    assert counts[1] - counts[0] == frozen
    assert_equal_on_all(context, list(module.parameters()))


@check(TORCH)
def finished_ranks_take_part(context: Context) -> None:
    module = network()
    with DataParallel(sgd(module)) as data:
        for step in range(2 + context.rank):
            data.zero_grad()
            backward(module, *batch(context.rank, step))
            data.step()
    assert_equal_on_all(context, list(module.parameters()))


@check(TORCH)
def one_rank_may_become_several(context: Context) -> None:
    """Alone nothing is averaged; with others it is."""
    alone = [context.split([rank]) for rank in range(context.size)][context.rank]
    module = network()
    data = DataParallel(sgd(module), alone)
    for step in range(2):
        data.zero_grad()
        backward(module, *batch(context.rank, step))
        data.average_gradients()
        assert (
            len(set(on_all(context, float(params_of(data)[0].grad.sum()))))
            == [context.size, 1][step]
        )
        data.step()
        if step == 0:
            data.rebind(context.group)
    assert_equal_on_all(context, list(module.parameters()))


@check(TORCH, cases=KINDS)
def grad_scaler(context: Context, kind: str) -> None:
    """A step that GradScaler leaves out on one rank is none of the round's; before the average, torch's bits."""
    module, reference = network(), network()
    local = LocalSGD(sgd(module, kind, foreach=False), sync_every=4)
    alone = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, foreach=False)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(7):
        for model, optimizer, scaler in zip(
            (module, reference), (local, alone), scalers, strict=True
        ):
            optimizer.zero_grad()
            x, y = batch(context.rank, step)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if step in (1, 3) and context.rank == 1:
                next(iter(model.parameters())).grad[0] = float("inf")
            if step == 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        if step < 3:
            for p, q in zip(module.parameters(), reference.parameters(), strict=True):
                assert same_bits(p, q), step
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert local.round == 1
    assert local.step_in_round == (1 if context.rank == 1 else 3)
    local.finish()
    assert_equal_on_all(context, list(module.parameters()))


@check(TORCH)
def grad_scaler_with_data_parallel(context: Context) -> None:
    """An overflow on one rank is one on all, once gradients are averaged, which comes before GradScaler looks."""
    module = network()
    data = DataParallel(sgd(module))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        data.zero_grad()
        x, y = batch(context.rank, step)
        if step == 2 and context.rank == 1:
            x = x * float("inf")
        scaler.scale(nn.functional.cross_entropy(module(x), y)).backward()
        data.average_gradients()
        scaler.step(data)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_equal_on_all(context, list(module.parameters()))
    assert all(p.isfinite().all() for p in module.parameters())


@check(TORCH, cases=KINDS)
def schedulers_closures_and_hooks(context: Context, kind: str) -> None:
    module = network()
    local = LocalSGD(sgd(module, kind), sync_every=2)
    assert isinstance(local, torch.optim.Optimizer)
    calls: list[str] = []
    local.register_step_pre_hook(lambda *_: calls.append("pre"))
    local.register_step_post_hook(lambda *_: calls.append("post"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(local, 1, gamma=0.5)
        for step in range(4):

            def closure(step: int = step) -> Tensor:
                local.zero_grad()
                return backward(module, *batch(context.rank, step))

            loss = local.step(closure)
            assert loss.item() > 0
            scheduler.step()
    assert calls == ["pre", "post"] * 4
    assert local.param_groups[0]["lr"] == 0.05 / 16
    assert local.optimizer.param_groups is local.param_groups
    assert local.round == 2
    assert_equal_on_all(context, list(module.parameters()))
    data = DataParallel(sgd(module, kind))
    before = values_of(data)
    loss = data.step(lambda: (data.zero_grad(), backward(module, *batch(context.rank, 0)))[1])
    assert loss.item() > 0
    assert not same_bits(before[0], params_of(data)[0])
    assert_equal_on_all(context, list(module.parameters()))


@check(TORCH)
def states_can_be_exchanged(context: Context) -> None:
    """With torch.save, weights only; and with the optimizer alone."""
    module = network()
    local = LocalSGD(
        sgd(module), sync_every=4, outer=SlowMo(0.5), transactional=True, momentum_sync="average"
    )
    for step in range(6):
        backward(module, *batch(context.rank, step))
        local.step()
    path = context.folder / f"state-{context.engine}-{context.size}-{context.rank}.pt"
    torch.save(local.state_dict(), path)
    state = torch.load(path, weights_only=True)
    LocalSGD(sgd(network()), sync_every=4, outer=SlowMo(0.5)).load_state_dict(state)
    sgd(network(), "torch.optim").load_state_dict(state)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled; save its state_dict\(\)"):
        copy.deepcopy(local)
    with pytest.raises(TypeError, match="optimizer: it is distributed already"):
        DataParallel(local)


@check(TORCH)
def layouts_in_memory(context: Context) -> None:
    """Parameters in one storage travel as one; channels_last and views stay in place; moved ones are found again."""
    module = network().to(memory_format=torch.channels_last)
    params = list(module.parameters())
    where = addresses_of(params)
    local = LocalSGD(sgd(module), sync_every=2)
    for step in range(2):
        backward(module, *batch(context.rank, step))
        local.step()
    assert addresses_of(params) == where
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_equal_on_all(context, params)

    module = network()
    params = list(module.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params), params)
    group = Counting(context.group)
    local = LocalSGD(sgd(module), group, sync_every=1)
    assert len(local._parameters.runs) == 1
    for p in params:  # taken apart again
        p.data = p.data.clone()
    backward(module, *batch(context.rank, 0))
    local.step()
    assert_equal_on_all(context, params)

    gaps = nn.Parameter(torch.zeros(4, 4)[:, :2])
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['params'\]\[0\]: expected memory without gaps"
    ):
        LocalSGD(torch.optim.SGD([gaps], lr=0.1))


@check(TORCH)
def gradients_of_other_layouts(context: Context) -> None:
    """Expanded, transposed, and of another dtype."""
    params = [nn.Parameter(torch.zeros(3, 4)) for _ in range(3)]
    data = DataParallel(torch.optim.SGD(params, lr=1.0))
    params[0].grad = torch.tensor(1.0 + context.rank).expand(3, 4)
    values = torch.arange(12.0).view(4, 3) * (1 + context.rank)
    params[1].grad = values.t()
    params[2].grad = torch.full((3, 4), float(context.rank))
    data.step()
    mean = (context.size + 1) / 2
    assert torch.equal(params[0].detach(), torch.full((3, 4), -mean))
    assert torch.equal(params[1].detach(), -mean * torch.arange(12.0).view(4, 3).t())
    assert torch.equal(params[2].detach(), torch.full((3, 4), 1 - mean))
    params[0].grad = torch.zeros(3, 4).to_sparse()
    with pytest.raises(RoundError, match="sparse"):
        data.step()


@check(GLOO, cases=KINDS | {"numpy": {"kind": "numpy flat"}})
def differences_are_what_is_compressed(context: Context, kind: str) -> None:
    """Small steps from large values survive a 16-bit wire."""
    for wire, bound in (("bfloat16", 2.0**-7), ("float16", 2.0**-10)):
        exact, rounded = make(kind, lr=1e-3), make(kind, lr=1e-3)
        for optimizer in (exact, rounded):
            for p in params_of(optimizer):
                p.data[...] += 100.0
        local = [LocalSGD(exact, sync_every=1), LocalSGD(rounded, sync_every=1, wire_dtype=wire)]
        start = values_of(exact)
        for _ in range(15):
            for optimizer in (exact, rounded):
                for p in params_of(optimizer):
                    value = as_array(p)
                    put_gradient(p, np.full(value.shape, 1.0 + context.rank / 7, value.dtype))
            for each in local:
                each.step()
        assert_equal_on_all(context, params_of(rounded))
        for ours, right, first in zip(values_of(rounded), values_of(exact), start, strict=True):
            # Rounding parameters near 100 to 8 bits would lose steps of 1e-3 altogether.
            moved = np.abs(right - first).min()
            assert np.abs(ours - right).max() < moved * bound + 15 * np.spacing(np.float32(100))


@check(["gloo-2"], cases=KINDS | {"numpy": {"kind": "numpy flat"}})
def what_the_wire_rounds_away_comes_later(context: Context, kind: str) -> None:
    """After many rounds the error is still one of a single round."""
    for wire, ulp in (("bfloat16", 2.0**-7), ("float16", 2.0**-10)):
        optimizer = make(kind, "float64", lr=1.0)
        local = LocalSGD(optimizer, sync_every=1, wire_dtype=wire)
        start = values_of(optimizer)
        # Between two numbers of the wire's type; the sum of two equal ones is exact.
        step = 2.0**-10 * (1 + 0.4 * ulp)
        for _ in range(20):
            for p in params_of(optimizer):
                put_gradient(p, np.full(as_array(p).shape, step))
            local.step()
        for value, first in zip(values_of(optimizer), start, strict=True):
            assert np.abs(value - (first - 20 * step)).max() < 2.0**-10 * ulp, wire


@check(TORCH)
def step_in_backward_after_wrapping_is_refused(context: Context) -> None:
    """Before a parameter has changed: the ranks would have stepped with gradients of their own."""
    module = network()
    data = DataParallel(sgd(module))
    with refused(context, ValueError, "cannot go with step_in_backward", *module.parameters()):
        sgdcore.torch.step_in_backward(data.optimizer)
    data.zero_grad()
    backward(module, *batch(context.rank, 0))
    data.step()
    assert_equal_on_all(context, list(module.parameters()))


class Embedded(nn.Module):
    """Whose gradients can be sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](self.embedding(x))
        return self.layers[1](x)


def _sparse(module: Embedded, data: Any) -> None:
    module.embedding.sparse = True


def _gaps(module: Embedded, data: Any) -> None:
    module.embedding.sparse = True  # the first error is told
    weight = module.layers[0].weight
    weight.data = torch.cat([weight.data, weight.data], 1)[:, :4]


def _no_memory(module: Embedded, data: Any) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError("out of memory \udcff")

    data._collect = fails


def _mended(module: Embedded, data: Any) -> None:
    module.embedding.sparse = False
    module.layers[0].weight.data = module.layers[0].weight.data.contiguous()
    vars(data).pop("_collect", None)


BAD: dict[str, dict[str, Any]] = {
    "sparse": {
        "spoil": _sparse,
        "own": RuntimeError,
        "match": "sparse",
    },
    "gaps": {"spoil": _gaps, "own": ValueError, "match": "expected memory without gaps"},
    "memory": {"spoil": _no_memory, "own": RoundError, "kind": "MemoryError", "match": "of memory"},
}


@check(["gloo-2", "mpi-2"], cases=BAD)
def an_error_of_one_rank_is_told_to_all(
    context: Context, spoil: Any, own: type[Exception], match: str, kind: str = ""
) -> None:
    """In the same step, which no rank takes; then all go on as if there had been none."""
    ours, theirs = Embedded(), Embedded()
    data, plain = DataParallel(sgd(ours)), DataParallel(sgd(theirs))

    def step(module: Embedded, optimizer: Any, number: int) -> None:
        optimizer.zero_grad()
        x = (torch.arange(4) + context.rank + number) % 6
        module(x).pow(2).sum().backward()
        with chunks_of(64):
            optimizer.step()

    for number in range(3):
        if context.rank == 1:
            spoil(ours, data)
        with told(context, own, match, *ours.parameters(), kind=kind):
            if spoil is _gaps and number == 2 and context.rank == 1:
                data.finish()
            else:
                step(ours, data, 9)
        _mended(ours, data)
        step(ours, data, number)
        step(theirs, plain, number)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert same_bits(p, q)
    assert_equal_on_all(context, list(ours.parameters()))


@check(GLOO, cases=KINDS)
def data_parallel_resumes(context: Context, kind: str) -> None:
    """From the inner optimizer's state, with the same bits."""

    def run(data: Any, first: int, last: int) -> None:
        for step in range(first, last):
            data.weight = 1 + (step + context.rank) % 3
            train(context, data, 1, first=step)

    unbroken = DataParallel(make(kind))
    run(unbroken, 0, 5)
    values, state = values_of(unbroken), copy.deepcopy(unbroken.state_dict())
    assert state.keys() == unbroken.optimizer.state_dict().keys()
    run(unbroken, 5, 8)
    resumed = DataParallel(make(kind, seed=5))
    for p, value in zip(params_of(resumed), values, strict=True):
        p.data.copy_(torch.from_numpy(value))
    resumed.load_state_dict(state)
    run(resumed, 5, 8)
    for a, b in zip(params_of(resumed), params_of(unbroken), strict=True):
        assert same_bits(a, b)


@check(GLOO)
def momenta_in_another_order(context: Context) -> None:
    """torch.optim lays momentum out as the first gradient was, which may differ between ranks."""
    gradient = torch.arange(12.0).reshape(3, 4)
    transposed = gradient.t().contiguous().t()

    def step(optimizer: Any) -> None:
        optimizer.param_groups[0]["params"][0].grad = (
            transposed if context.rank == 0 else gradient
        ).clone()
        optimizer.step()

    inner = torch.optim.SGD([nn.Parameter(torch.zeros(3, 4))], lr=0.1, momentum=0.9)
    step(LocalSGD(inner, sync_every=1, momentum_sync="average"))
    assert torch.equal(momenta_of(inner)[0], gradient)

    inner = torch.optim.SGD([nn.Parameter(torch.zeros(3, 4))], lr=0.1, momentum=0.9)
    step(inner)
    data = DataParallel(inner)
    if context.rank == 0:
        inner.state[params_of(inner)[0]]["momentum_buffer"] = transposed.clone()
        step(data)
    data.finish()
    close(momenta_of(inner)[0], 1.9 * gradient)


OPTIMIZERS: dict[str, Any] = {
    "sgdcore.torch": {"build": lambda p: sgdcore.torch.SGD(p, lr=0.1, momentum=0.9)},
    "SGD": {"build": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    "Adam": {"build": lambda p: torch.optim.Adam(p, lr=0.1)},
}


@check(GLOO, cases=OPTIMIZERS)
def all_go_on_alike_after_an_uneven_end(context: Context, build: Any) -> None:
    """With the state, whatever it is, and the learning rate of the rank with the most steps."""
    p = nn.Parameter(torch.ones(5))
    data = DataParallel(build([p]))
    schedule = torch.optim.lr_scheduler.StepLR(data, 1, 0.5)
    counts = [context.rank + 1, 2, 2]
    for count in counts:
        for _ in range(count):
            data.zero_grad()
            ((context.rank + 1) * p * p).sum().backward()  # type: ignore[no-untyped-call]
            data.step()
            schedule.step()
        data.finish()
        assert_equal_on_all(context, [p])
        assert len(set(on_all(context, data.param_groups[0]["lr"]))) == 1
    assert data.param_groups[0]["lr"] == 0.1 * 0.5 ** (context.size + 4)


@check(GLOO)
def state_that_the_first_rank_lacks_goes(context: Context) -> None:
    p = nn.Parameter(torch.ones(5))
    adam = torch.optim.Adam([p], lr=0.1 + context.rank, foreach=False)
    if context.rank > 0:
        p.grad = torch.ones(5)
        adam.step()
    data = DataParallel(adam)
    assert data.param_groups[0]["lr"] == 0.1
    assert not adam.state[p]
    p.grad = torch.full((5,), float(context.rank))
    data.step()
    assert_equal_on_all(context, [p, adam.state[p]["exp_avg"], adam.state[p]["step"]])


@check(GLOO)
def gradients_of_frozen_parameters_are_averaged(context: Context) -> None:
    """As any others: optimizers step with them, and ranks that have none take the same step."""
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    trained = nn.Parameter(torch.ones(3))
    data = DataParallel(sgdcore.torch.SGD([frozen, trained], lr=1.0))
    trained.grad = torch.ones(3)
    frozen.grad = torch.full((3,), float(context.size)) if context.rank == 0 else None
    data.step()
    assert frozen.tolist() == trained.tolist() == [0.0] * 3


@check(GLOO)
def parameters_that_were_moved(context: Context) -> None:
    """What ``p.data = ...`` did after wrapping holds from then on."""
    p = nn.Parameter(torch.zeros(4))
    data = DataParallel(torch.optim.SGD([p], lr=0.25))
    p.data = torch.ones(4)
    for _ in range(2 if context.rank == 0 else 1):
        data.zero_grad()
        (p * p).sum().backward()  # type: ignore[no-untyped-call]
        p.data = p.data.clone()
        data.step()
    data.finish()
    assert p.tolist() == [0.25] * 4
    assert_equal_on_all(context, [p])

    # In the middle of a backward pass: what travels is gradients, wherever the parameters are.
    results = []
    for move in (True, False):
        first, second = (nn.Parameter(torch.ones(4)) for _ in range(2))
        data = DataParallel(sgdcore.torch.SGD([first, second], lr=0.25))
        for _ in range(2):
            data.zero_grad()
            x = first * (1.0 + context.rank)
            if move:
                x.register_hook(lambda _, q=second: setattr(q, "data", q.data.clone()))
            (x * second).sum().backward()  # type: ignore[no-untyped-call]
            data.step()
        assert_equal_on_all(context, [first, second])
        results.append([first.tolist(), second.tolist()])
    assert results[0] == results[1]

    results = []
    for move in (True, False):
        q = nn.Parameter(torch.zeros(4))
        local = LocalSGD(torch.optim.SGD([q], lr=0.1), sync_every=1, outer=OuterSGD(1.0, 0.9))
        if move:
            q.data = torch.full((4,), 100.0)
        else:
            q.data.fill_(100.0)
        for _ in range(3):
            q.grad = torch.ones(4)
            local.step()
        results.append(q.tolist())
    assert results[0] == results[1]


@check(TORCH)
def layouts_that_changed_on_one_rank_are_refused(context: Context) -> None:
    """By all ranks, at the next average: elements of different places would be added up."""
    wrappers: list[Any] = [
        DataParallel,
        lambda o: LocalSGD(o, sync_every=1),
        lambda o: LocalSGD(o, sync_every=9, levels=[(context.group, 1)]),
    ]
    for wrap in wrappers:
        module = network()
        optimizer = wrap(sgd(module))
        if context.rank == 0:
            module.to(memory_format=torch.channels_last)
        match = "changed since they were wrapped"
        with refused(context, RoundError, match):
            backward(module, *batch(context.rank, 0))
            optimizer.step()
        module.to(memory_format=torch.contiguous_format)
        optimizer.zero_grad()
        backward(module, *batch(context.rank, 1))
        optimizer.step()
        assert_equal_on_all(context, list(module.parameters()))


@check(TORCH)
def neighbours_in_memory_on_one_rank_are_refused(context: Context) -> None:
    """What lies side by side travels together, which ranks have to do alike."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    local = LocalSGD(torch.optim.SGD(params, lr=0.1), sync_every=1)
    if context.rank == 0:
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params), params)
    with refused(context, RoundError, "layout in memory .*; on rank 1: .*layout in memory "):
        local.step()


@check(TORCH)
def parameters_that_overlap_on_one_rank_are_told_to_all(context: Context) -> None:
    """At the next average, which overwrites nothing; each element of theirs would be averaged twice at once."""
    level = {"sync_every": 4, "levels": [(context.group, 2)]}
    for options in ({}, {"transactional": True}, {"outer": OuterSGD(1.0)}, level):
        p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
        optimizer = torch.optim.SGD([p, q], lr=0.5)
        local = LocalSGD(optimizer, **{"sync_every": 2, **options})
        p.grad = q.grad = torch.ones(4)
        local.step()
        if context.rank == 1:
            q.data = p.data
        match = r"rank 1 failed with ValueError: params: .*\[0\] and .*\[1\] overlap in memory"
        with pytest.raises(RoundError, match=match) as caught:
            local.step()
        assert caught.value.restored == ("transactional" in options and context.rank != 1)
        q.data = q.data.clone()
        local.rebind(context.group)
        assert_equal_on_all(context, [p, q])
        if "transactional" in options:
            assert p.tolist() == q.tolist() == [1.0] * 4
        for _ in range(2):
            local.step()
        local.sync()
        assert_equal_on_all(context, [p, q])

    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    data = DataParallel(torch.optim.SGD([p, q], lr=0.5))
    p.grad = q.grad = torch.ones(4)
    if context.rank == 1:
        q.data = p.data
    with told(context, ValueError, "overlap in memory", p, q):
        data.step()


@check(GLOO)
def torch_groups_take_bfloat16_arrays(context: Context) -> None:
    array = np.full(5, 1.0 + context.rank, sgdcore._arrays.storage_dtype("bfloat16"))
    address = array.ctypes.data
    context.group.all_reduce(array).wait()
    assert array.astype(np.float32).tolist() == [context.size * (context.size + 1) / 2] * 5
    assert array.ctypes.data == address


@check(["mpi-2"])
def sixteen_bit_tensors_are_refused_by_mpi(context: Context) -> None:
    tensor = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"array: expected one of .* for MPI, got bfloat16"):
        context.group.all_reduce(tensor)
    assert torch.equal(tensor, torch.ones(4, dtype=torch.bfloat16))
    # Parameters of such a type are averaged in float32.
    parameter = nn.Parameter(torch.full((4,), 1.0 + context.rank, dtype=torch.bfloat16))
    local = LocalSGD(torch.optim.SGD([parameter], lr=1.0), sync_every=1)
    parameter.grad = torch.full((4,), float(context.rank), dtype=torch.bfloat16)
    local.step()
    assert parameter.tolist() == [1 - (context.size - 1) / 2] * 4


@check(TORCH)
def versions_are_counted(context: Context) -> None:
    """Autograd hears of what an average changes: on every rank."""
    p = nn.Parameter(torch.ones(3))
    for size in (100, 1_000_000):  # copied into a bucket, and sent from where it is
        params = [nn.Parameter(torch.ones(size)) for _ in range(2)]
        local = LocalSGD(sgdcore.torch.SGD(params, lr=0.1), sync_every=9)
        for p in params:
            p.grad = torch.ones(size)
        local.step()
        losses = [(p * p).sum() for p in params]
        versions = [p._version for p in params]
        local.sync()
        assert all(p._version > version for p, version in zip(params, versions, strict=True))
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    outer = LocalSGD(sgdcore.torch.SGD([p], lr=0.1), sync_every=1, outer=OuterSGD(1.0))
    outer.step()
    assert_equal_on_all(context, [p])


@check(TORCH)
def hooks_after_wrapping_see_this_ranks_gradients(context: Context) -> None:
    """What a hook does to a gradient, clipping for instance, is what is averaged, whole."""
    module = network()
    data = DataParallel(sgd(module, lr=1.0, momentum=0.0))

    def clip(p: Any) -> None:
        p.grad.clamp_(-1e-3, 1e-3)

    for p in module.parameters():
        p.register_post_accumulate_grad_hook(clip)
    references = [network() for _ in range(context.size)]
    for rank, reference in enumerate(references):
        backward(reference, *batch(rank, 0))
    start = values_of(data)
    backward(module, *batch(context.rank, 0))
    data.step()
    for i, (p, first) in enumerate(zip(module.parameters(), start, strict=True)):
        own = [list(r.parameters())[i].grad for r in references]
        clipped = [gradient.clamp(-1e-3, 1e-3) for gradient in own if gradient is not None]
        close(p, first - as_array(sum(clipped) / context.size))
    assert_equal_on_all(context, list(module.parameters()))


CHECKPOINTED: dict[str, dict[str, Any]] = {
    "plain": {"wrap": LocalSGD, "options": {"sync_every": 4}},
    "outer": {"wrap": LocalSGD, "options": {"sync_every": 4, "outer": OuterSGD(0.7, 0.9)}},
    "transactional": {"wrap": LocalSGD, "options": {"sync_every": 4, "transactional": True}},
    "data parallel": {"wrap": DataParallel, "options": {}},
}


@check(GLOO, cases=CHECKPOINTED)
def torchs_checkpoint_api(context: Context, wrap: Any, options: dict[str, Any]) -> None:
    """Looking changes nothing, takes no step, and what was saved trains on with the same bits."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    first, second = network(), network(1)
    unbroken, resumed = wrap(sgd(first), **options), wrap(sgd(second), **options)
    before = values_of(unbroken)
    empty = get_optimizer_state_dict(first, unbroken)
    assert not empty["state"] or wrap is LocalSGD
    assert all(same_bits(a, b) for a, b in zip(params_of(unbroken), before, strict=True))
    assert all(p.grad is None for p in first.parameters())
    assert not unbroken.optimizer.state

    def run(module: nn.Module, optimizer: Any, start: int, stop: int) -> None:
        for step in range(start, stop):
            optimizer.zero_grad()
            backward(module, *batch(context.rank, step))
            optimizer.step()

    run(first, unbroken, 0, 6)
    before = values_of(unbroken)
    state = copy.deepcopy(get_optimizer_state_dict(first, unbroken))
    assert all(same_bits(a, b) for a, b in zip(params_of(unbroken), before, strict=True))
    second.load_state_dict(first.state_dict())
    set_optimizer_state_dict(second, resumed, state)
    assert resumed.state_dict()["param_groups"] == unbroken.state_dict()["param_groups"]
    for module, optimizer in ((first, unbroken), (second, resumed)):
        run(module, optimizer, 6, 11)
        optimizer.finish()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert same_bits(p, q)
    assert_equal_on_all(context, params_of(resumed))


def normalised(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


@check(TORCH, cases={"model": {"whole": True}, "buffers": {"whole": False}})
def batch_norm_and_frozen_layers(context: Context, whole: bool) -> None:
    """Statistics are averaged, what is frozen is rank 0's, and ranks evaluate alike."""
    for wrap in (lambda o, **k: LocalSGD(o, sync_every=2, **k), DataParallel):
        module = normalised(context.rank)
        frozen = module[0].requires_grad_(False)
        trained = [p for p in module.parameters() if p.requires_grad]
        inner = sgdcore.torch.SGD(trained, lr=0.1)
        given = {"model": module} if whole else {"buffers": module.buffers()}
        optimizer = wrap(inner, **given)
        if whole:
            assert_equal_on_all(context, list(frozen.parameters()))
            assert optimizer._parameters.labels[0] == "parameter '1.weight'"
        generator = torch.Generator().manual_seed(context.rank)
        for _ in range(4):
            optimizer.zero_grad()
            module(torch.randn(8, 4, generator=generator) + context.rank).pow(2).sum().backward()
            optimizer.step()
        assert_equal_on_all(context, list(module.buffers()))
        assert module[1].num_batches_tracked == 4
        if whole:
            module.eval()
            assert_equal_on_all(context, [module(torch.ones(2, 4))])


@check(["gloo-2"])
def batch_norm_that_nobody_averages_is_warned_of_once(context: Context) -> None:
    from sgdcore import _mistakes

    _mistakes._warned = False
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.warns(UserWarning, match="the model has batch norm.*pass model=model"):
        LocalSGD(sgd(module))
    LocalSGD(sgd(module))
    _mistakes._warned = False
    LocalSGD(sgd(module), model=module)
    LocalSGD(sgd(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))))
    assert not _mistakes._warned


@check(GLOO)
def what_cannot_be_wrapped_is_refused_by_name(context: Context) -> None:
    import torch.distributed as dist

    p = nn.Parameter(torch.zeros(2))
    for cls in (LocalSGD, DataParallel):
        with refused(context, TypeError, "optimizer: LBFGS evaluates its closure", p):
            cls(torch.optim.LBFGS([p]))
        with refused(context, TypeError, "model: expected a torch.nn.Module or None, got 3", p):
            cls(torch.optim.SGD([p], lr=0.1), model=3)
    alone = dist.new_group([0])
    if context.rank > 0:
        for call in (
            lambda: LocalSGD(torch.optim.SGD([p], lr=0.1), alone),
            lambda: LocalSGD(torch.optim.SGD([p], lr=0.1), levels=[(alone, 2)]),
        ):
            with refused(context, RuntimeError, "group: this process is not one of its ranks", p):
                call()
