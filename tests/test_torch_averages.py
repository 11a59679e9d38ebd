"""Averages of tensors: against torch's AveragedModel, on every path that a step over tensors takes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

import sgdcore
from sgdcore import EMA, Polyak, _core
from sgdcore.torch import _interface
from sgdcore.torch import backward as backward_module
from sgdcore.torch import optimizer as optimizer_module
from simulated import Simulated
from test_averages import Oracle
from test_torch_devices import DEVICES, Scaler

KINDS = [EMA(0.9), EMA(0.3), Polyak()]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (17,), (1025,), (60, 1100), (4, 3, 2, 2)]


def torch_average(kind: EMA | Polyak) -> Any:
    return get_ema_multi_avg_fn(kind.decay) if isinstance(kind, EMA) else get_swa_multi_avg_fn()


def random(seed: int, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Compare in every bit, but for NaNs."""
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


class Both:
    """The same parameters under our optimizer, and under torch's with AveragedModel."""

    def __init__(self, tensors: list[Tensor], kind: EMA | Polyak, **hyper: Any) -> None:
        self.kind = kind
        self.params = [torch.nn.Parameter(t.clone()) for t in tensors]
        self.theirs = torch.nn.ParameterList([t.detach().clone() for t in tensors])
        self.model = AveragedModel(self.theirs, multi_avg_fn=torch_average(kind))
        self.torch = torch.optim.SGD(self.theirs.parameters(), foreach=False, **hyper)
        self.ours = sgdcore.torch.SGD(self.params, average=kind, **hyper)

    def step(self, grads: list[Tensor | None]) -> None:
        for p, q, grad in zip(self.params, self.theirs.parameters(), grads, strict=True):
            p.grad = grad
            q.grad = None if grad is None else grad.clone()
        self.ours.step()
        self.torch.step()
        self.model.update_parameters(self.theirs)

    def check(self) -> None:
        for i, (p, q, average) in enumerate(
            zip(self.params, self.theirs.parameters(), self.model.parameters(), strict=True)
        ):
            assert same(p.detach(), q.detach()), f"parameter {i}"
            assert same(self.ours.state[p]["average"], average.detach()), f"average {i}"


def train(both: Both, steps: range) -> None:
    for step in steps:
        both.step(
            [
                None if (i + step) % 3 == 0 else random(100 * step + i, p.shape, p.dtype)
                for i, p in enumerate(both.params)
            ]
        )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages_equal_averaged_model(
    dtype: torch.dtype, kind: EMA | Polyak, momentum: float
) -> None:
    if isinstance(kind, Polyak) and dtype == torch.float64:
        pytest.skip("torch rounds 1 / (n + 1) to float32 there")
    both = Both(
        [random(i, s, dtype) for i, s in enumerate(SHAPES)], kind, lr=0.1, momentum=momentum
    )
    train(both, range(6))
    both.check()
    # In the steps after the first ones nothing is left to Python.
    assert both.ours._run_unobserved(both.ours.param_groups, both.ours._state, False) is True


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_tensors_that_the_core_cannot_read(kind: EMA | Polyak) -> None:
    both = Both([random(i, (6, 4)) for i in range(4)], kind, lr=0.1, momentum=0.9)
    both.params[1].data = random(1, (6, 8))[:, ::2]  # gaps
    both.theirs[1].data.copy_(both.params[1].data)
    both.params[2].data = random(2, (4, 6)).t()
    both.theirs[2].data.copy_(both.params[2].data)
    train(both, range(6))
    both.check()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_parameters_that_share_memory_are_averaged_as_the_step_leaves_them(
    kind: EMA | Polyak,
) -> None:
    tensors = [random(0, (40,)), random(1, (3,))]
    params = [torch.nn.Parameter(t.clone()) for t in tensors]
    params.append(torch.nn.Parameter(params[0].detach()))
    optimizer = sgdcore.torch.SGD(params, lr=0.1, average=kind)
    oracle = Oracle(kind)
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = random(10 * step + i, p.shape)
        optimizer.step()
        oracle.step(params[0].detach().numpy())
    for p in (params[0], params[2]):
        assert np.array_equal(optimizer.state[p]["average"].numpy(), oracle.average)


@pytest.mark.parametrize("mode", ["lazy", "dense"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_sparse_gradients(kind: EMA | Polyak, momentum: float, mode: str) -> None:
    """All rows take part in the average, those without a gradient too."""
    parameter = torch.nn.Parameter(random(0, (6, 3)))
    optimizer = sgdcore.torch.SGD(
        [parameter], lr=0.1, momentum=momentum, sparse_mode=mode, average=kind
    )
    oracle = Oracle(kind)
    for step in range(5):
        indices = torch.tensor([[step % 6, 2, 2]])
        parameter.grad = torch.sparse_coo_tensor(
            indices, random(step, (3, 3)), parameter.shape, check_invariants=True
        )
        optimizer.step()
        oracle.step(parameter.detach().numpy())
    assert np.array_equal(optimizer.state[parameter]["average"].numpy(), oracle.average)


def test_complex_parameters() -> None:
    parameter = torch.nn.Parameter(random(0, (5,), torch.complex64))
    optimizer = sgdcore.torch.SGD([parameter], lr=0.1, average=EMA(0.9))
    oracle = Oracle(EMA(0.9))
    for step in range(3):
        parameter.grad = random(step, (5,), torch.complex64)
        optimizer.step()
        oracle.step(torch.view_as_real(parameter.detach()).numpy())
    average = optimizer.state[parameter]["average"]
    assert average.dtype == torch.complex64
    assert np.array_equal(torch.view_as_real(average).numpy(), oracle.average)


@pytest.mark.parametrize("average", [None, torch.float32, "float64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gaps", [False, True], ids=["", "gaps"])
def test_storage_types(dtype: torch.dtype, average: Any, gaps: bool) -> None:
    """Python's way has the core's bits."""
    start = random(0, (1100, 2), torch.float64).to(dtype)
    parameter = torch.nn.Parameter(start[:, 0] if gaps else start[:, 0].clone())
    optimizer = sgdcore.torch.SGD(
        [parameter], lr=0.1, momentum=0.9, average=EMA(0.9), average_dtype=average
    )
    array = start[:, 0].clone()
    plain = torch.nn.Parameter(array)
    expected: Any = None
    theirs = sgdcore.torch.SGD([plain], lr=0.1, momentum=0.9)
    stored = {None: dtype, "float64": torch.float64}.get(average, torch.float32)
    compute = torch.float64 if stored == torch.float64 else torch.float32
    for step in range(4):
        for p in (parameter, plain):
            p.grad = random(step, p.shape, torch.float64).to(dtype)
        optimizer.step()
        theirs.step()
        if expected is None:
            expected = plain.detach().clone().to(stored)
        else:
            moved = torch.lerp(expected.to(compute), plain.detach().to(compute), 1 - 0.9)
            expected = moved.to(stored)
    assert same(optimizer.state[parameter]["average"], expected)


# Steps that are skipped


def test_a_step_that_grad_scaler_skips_does_not_average() -> None:
    for kind in KINDS:
        parameter = torch.nn.Parameter(random(0, (50,)))
        optimizer = sgdcore.torch.SGD([parameter], lr=0.1, average=kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        oracle = Oracle(kind)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale((parameter * random(step, (50,))).sum()).backward()
            if step in (0, 3):
                assert parameter.grad is not None
                parameter.grad[7] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if step not in (0, 3):
                oracle.step(parameter.detach().numpy())
        assert np.array_equal(optimizer.state[parameter]["average"].numpy(), oracle.average)


# Devices


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    simulated = Simulated()
    monkeypatch.setattr(
        _interface, "device_index", lambda t: DEVICES.get(t.shape[-1] if t.dim() else 0, 0)
    )
    monkeypatch.setattr(_interface, "on_device", lambda tensor, _: tensor)
    monkeypatch.setattr(_interface, "current_stream", lambda _: 0)
    for module in (optimizer_module, backward_module):
        monkeypatch.setattr(module, "exchange_api", lambda: None)
    yield simulated
    _core.use_runtime(None)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_devices(device: Simulated, kind: EMA | Polyak) -> None:
    shapes = [(3, 4), (7,), (9000,), (0, 4), (1,), (2, 5), (3, 6)]
    both = Both([random(i, s) for i, s in enumerate(shapes)], kind, lr=0.1, momentum=0.9)
    train(both, range(4))
    both.check()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_steps_that_the_device_skips(device: Simulated, kind: EMA | Polyak) -> None:
    parameter = torch.nn.Parameter(random(0, (20_000,)))
    optimizer = sgdcore.torch.SGD([parameter], lr=0.1, momentum=0.9, average=kind)
    scaler = Scaler(optimizer, 1.0)
    oracle = Oracle(kind)
    for step in range(7):
        parameter.grad = random(step, (20_000,))
        scaler.found_inf.fill_(float(step in (0, 1, 4)))
        scaler.step()
        if step not in (0, 1, 4):
            oracle.step(parameter.detach().numpy())
    assert np.array_equal(optimizer.state[parameter]["average"].numpy(), oracle.average)


# The block, and batch norm


def test_averaged_and_batch_norm() -> None:
    """The documented recipe: the statistics are those of the averaged parameters inside, and come back."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
    )
    data = [random(i, (16, 4)) for i in range(4)]
    optimizer = sgdcore.torch.SGD(model.parameters(), lr=0.1, average=EMA(0.5))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    update_bn(data, averaged)
    before = copy.deepcopy(model.state_dict())
    with optimizer.averaged():
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        update_bn(data, model)
        model.eval()
        averaged.eval()
        assert torch.equal(model(data[0]), averaged(data[0]))
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_averaged_tells_autograd_of_its_writes() -> None:
    parameter = torch.nn.Parameter(random(0, (5,)))
    optimizer = sgdcore.torch.SGD([parameter], lr=0.1, average=EMA(0.5))
    parameter.grad = random(1, (5,))
    optimizer.step()
    loss = parameter.square().sum()
    with optimizer.averaged():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def refuse_inside(optimizer: Any, saved: Any) -> None:
    for call in (
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(saved),
        lambda: copy.deepcopy(optimizer),
        lambda: optimizer.averaged().__enter__(),
    ):
        with pytest.raises(RuntimeError, match="averages"):
            call()
    raise ZeroDivisionError


def test_what_is_refused_inside_of_averaged() -> None:
    parameter = torch.nn.Parameter(random(0, (5,)))
    optimizer = sgdcore.torch.SGD([parameter], lr=0.1, average=EMA(0.5))
    parameter.grad = random(1, (5,))
    optimizer.step()
    saved = optimizer.state_dict()
    values = parameter.detach().clone()
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        refuse_inside(optimizer, saved)
    assert torch.equal(parameter, values)
    optimizer.step()


# What does not go together


def test_what_does_not_go_with_averages() -> None:
    parameter = torch.nn.Parameter(random(0, (5,)))
    with pytest.raises(ValueError, match=r"differentiable: .* average="):
        sgdcore.torch.SGD([parameter], lr=0.1, differentiable=True, average=EMA())
    optimizer = sgdcore.torch.SGD([parameter], lr=0.1, average=EMA())
    with pytest.raises(ValueError, match="average= cannot go with step_in_backward"):
        sgdcore.torch.step_in_backward(optimizer)


# Checkpoints


def made(kind: EMA | Polyak | None, tensors: list[Tensor]) -> Any:
    params = [torch.nn.Parameter(t.detach().clone()) for t in tensors]
    return sgdcore.torch.SGD(params, lr=0.1, momentum=0.9, average=kind)


def through_a_file(both: Both) -> Any:
    file = io.BytesIO()
    torch.save(both.ours.state_dict(), file)
    file.seek(0)
    other = made(both.kind, both.params)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def copied(both: Both) -> Any:
    return copy.deepcopy(both.ours)


def pickled(both: Both) -> Any:
    return pickle.loads(pickle.dumps(both.ours))


@pytest.mark.parametrize("way", [through_a_file, copied, pickled])
@pytest.mark.parametrize("kind", [*KINDS, Polyak(5)], ids=repr)
def test_training_goes_on_with_the_same_bits(way: Any, kind: EMA | Polyak) -> None:
    both = Both([random(i, s) for i, s in enumerate(SHAPES)], kind, lr=0.1, momentum=0.9)
    train(both, range(4))
    other = way(both)
    train(both, range(4, 8))
    params = [p for group in other.param_groups for p in group["params"]]
    for step in range(4, 8):
        for i, p in enumerate(params):
            p.grad = None if (i + step) % 3 == 0 else random(100 * step + i, p.shape)
        other.step()
    for p, q in zip(params, both.params, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(other.state[p]["average"], both.ours.state[q]["average"])


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_checkpoints_of_arrays_tensors_and_torch(kind: EMA | Polyak) -> None:
    both = Both([random(i, s) for i, s in enumerate(SHAPES)], kind, lr=0.1, momentum=0.9)
    train(both, range(4))
    saved = both.ours.state_dict()
    arrays = sgdcore.SGD(
        [p.detach().clone().numpy() for p in both.params], lr=0.1, momentum=0.9, average=kind
    )
    arrays.load_state_dict(saved)
    other = made(kind, both.params)
    other.load_state_dict(arrays.state_dict())
    for p, q in zip(both.params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(other.state[q]["average"], both.ours.state[p]["average"])
    assert "average" not in other.param_groups[0]
    plain = torch.optim.SGD([p.detach().clone() for p in both.params], lr=0.1, momentum=0.9)
    plain.load_state_dict(saved)
    other.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("own", [None, *KINDS], ids=repr)
@pytest.mark.parametrize("kind", KINDS[1:], ids=repr)
def test_checkpoints_of_other_averages_are_refused(
    kind: EMA | Polyak, own: EMA | Polyak | None
) -> None:
    both = Both([random(0, (5,))], kind, lr=0.1, momentum=0.9)
    train(both, range(1, 3))
    optimizer = made(own, both.params)
    if type(kind) is type(own):
        optimizer.load_state_dict(both.ours.state_dict())
        return
    with pytest.raises(ValueError, match=r"\['average'\]: the checkpoint has averages of the kind"):
        optimizer.load_state_dict(both.ours.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", [EMA(0.9), Polyak()], ids=repr)
def test_checkpoints_by_torchs_functions(kind: EMA | Polyak, flatten: bool) -> None:
    """A flattened state dict has no place for a mean's number of steps, and is refused."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = sgdcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9, average=kind)
        made.append((model, optimizer))
    (model, optimizer), (other, loaded) = made
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if flatten and isinstance(kind, Polyak):
        with pytest.raises(ValueError, match="torch's flattened state dicts drop them"):
            set_optimizer_state_dict(other, loaded, saved, options=options)
        return
    set_optimizer_state_dict(other, loaded, saved, options=options)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["average"], loaded.state[q]["average"])
    if isinstance(kind, Polyak):
        assert loaded.state_dict()["param_groups"][0]["average_steps"] == 3


def test_a_checkpoint_without_averages_begins_them_anew() -> None:
    both = Both([random(0, (5,))], Polyak(), lr=0.1, momentum=0.9)
    saved = made(None, both.params).state_dict()
    train(both, range(1, 3))
    both.ours.load_state_dict(saved)
    [parameter] = both.params
    parameter.grad = random(1, (5,))
    both.ours.step()
    assert torch.equal(both.ours.state[parameter]["average"], parameter)
