"""sgdcore.torch.SGD on CUDA devices that are simulated on the CPU: tensors that claim to be on one.

torch without CUDA has no tensors there, so sgdcore's view of a tensor's device is replaced: it depends on the tensor's
shape alone, so that a gradient and a momentum buffer are where their parameter is. tests/test_cuda.py is for true ones.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sgdcore
from sgdcore import _core
from sgdcore.torch import _interface
from sgdcore.torch import backward as backward_module
from sgdcore.torch import optimizer as optimizer_module
from simulated import Simulated
from support import STORAGE_TYPES, numbers
from test_rules import (
    RULES,
    TORCH_CLASSES,
    Oracle,
    assert_tensor_follows,
    full_setting,
    states_in_use,
    tensor_of,
)
from torch_support import (
    HYPERS,
    Pair,
    assert_same_bits,
    assert_same_training,
    momentum_of,
    parameter,
)

# By the length of the last axis: what is 5 long is on the CPU, what is 6 long on device 1, all else on device 0.
DEVICES = {5: -1, 6: 1}


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


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


SHAPES = [(3, 4), (7,), (2, 3, 3, 3), (9000,), (0, 4), (1,), (4, 1)]


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_the_same_bits_as_torchs_loop(device: Simulated, hyper: dict[str, Any]) -> None:
    pair = Pair([random(i, *shape) for i, shape in enumerate(SHAPES)], **hyper)
    for step in range(3):
        before = device["launches"]
        pair.step([random(100 * step + i, *shape) for i, shape in enumerate(SHAPES)])
        assert device["launches"] == before + 1
    pair.check()


def test_one_launch_for_all_groups_and_each_device(device: Simulated) -> None:
    shapes = [(4 + i % 5,) for i in range(60)]
    pair = Pair(
        [random(i, *shape) for i, shape in enumerate(shapes)],
        lambda params: [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(params)],
        momentum=0.9,
    )
    for step in range(3):
        before = device["launches"], device["copies"]
        grads = [random(100 * step + i, *shape) for i, shape in enumerate(shapes)]
        pair.step([None if (i + step) % 7 == 0 else grad for i, grad in enumerate(grads)])
        assert device["launches"] == before[0] + 2  # devices 0 and 1; the rest is on the CPU
        assert device["copies"] <= before[1] + 2
    pair.check()


def test_nothing_is_uploaded_or_allocated_while_nothing_changes(device: Simulated) -> None:
    p = parameter(random(1, 100), random(2, 100))
    optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.step()
    before = {what: device[what] for what in ("copies", "allocations", "launches")}
    for _ in range(5):
        optimizer.step()
    assert device["copies"] == before["copies"]
    assert device["allocations"] == before["allocations"]
    assert device["launches"] == before["launches"] + 5
    for _ in range(5):
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
    assert device["copies"] == before["copies"] + 5
    assert device["allocations"] == before["allocations"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.float64], ids=str)
def test_short_types_have_the_bits_of_the_cpu(
    device: Simulated, dtype: torch.dtype, momentum_dtype: torch.dtype | None
) -> None:
    # The first of each pair is on a device, the second, of the same numbers, on the CPU.
    pairs = [
        (random(i, 35, dtype=dtype), random(i, 35, dtype=dtype).reshape(7, 5)) for i in range(3)
    ]
    params = [[parameter(pair[i].clone()) for pair in pairs] for i in range(2)]
    optimizers = [
        sgdcore.torch.SGD(p, lr=0.1, momentum=0.9, nesterov=True, momentum_dtype=momentum_dtype)
        for p in params
    ]
    for step in range(3):
        for p, q in zip(*params, strict=True):
            p.grad = random(10 + step, 35, dtype=dtype)
            q.grad = p.grad.reshape(7, 5).clone()
        before = device["launches"]
        optimizers[1].step()
        assert device["launches"] == before
        optimizers[0].step()
        assert device["launches"] == before + 1
    for p, q in zip(*params, strict=True):
        assert_same_bits(p.detach(), q.detach().reshape(35))
        momenta = momentum_of(optimizers[0], p), momentum_of(optimizers[1], q)
        assert momenta[0] is not None
        assert momenta[1] is not None
        assert_same_bits(momenta[0], momenta[1].reshape(35))


def test_unusual_tensors(device: Simulated) -> None:
    """Transposed and strided gradients, views with gaps, parameters that share memory."""
    base = random(1, 8, 4)
    tensors = [
        random(2, 4, 7).t(),
        base,
        random(3, 2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]
    pair = Pair(tensors, lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        grads = [
            random(10 + step, 7, 4),
            random(20 + step, 4, 8).t(),
            random(30 + step, 2, 3, 4, 4),
        ]
        for params in (pair.ours_params, pair.torch_params):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone() if step else grad.clone(memory_format=torch.contiguous_format)
        pair.ours.step()
        pair.torch.step()
    pair.check()
    gap = [torch.nn.Parameter(random(4, 6, 8)[:, ::2]) for _ in range(2)]
    optimizers = [
        sgdcore.torch.SGD([gap[0]], lr=0.1, momentum=0.9),
        torch.optim.SGD([gap[1]], lr=0.1, momentum=0.9, foreach=False),
    ]
    for step in range(3):
        for p, optimizer in zip(gap, optimizers, strict=True):
            p.grad = random(40 + step, 6, 4)
            optimizer.step()
    assert_same_training(*optimizers)


def test_numbers_on_the_device(device: Simulated) -> None:
    """A learning rate that is a tensor is read by the device, and by the host only for parameters there."""
    shapes = [(3, 4), (5,)]
    pair = Pair([random(i, *shape) for i, shape in enumerate(shapes)], momentum=0.9)

    class OnDevice(Tensor):
        """Shares its memory as a tensor on a device does."""

        reads = 0

        def __dlpack_device__(self) -> tuple[int, int]:  # type: ignore[override]
            return 2, 0

        def __dlpack__(self, **kwargs: Any) -> Any:
            assert kwargs.pop("stream") == -1
            return self.as_subclass(Tensor).__dlpack__(**kwargs)

        def item(self) -> Any:
            OnDevice.reads += 1
            return self.as_subclass(Tensor).item()

    lr = torch.tensor(0.1).as_subclass(OnDevice)
    pair.ours.param_groups[0]["lr"] = lr
    for step in range(3):
        with torch.no_grad():
            lr.as_subclass(Tensor).mul_(0.7)
        pair.torch.param_groups[0]["lr"] = float(lr.as_subclass(Tensor))
        pair.step([random(10 * step + i, *shape) for i, shape in enumerate(shapes)])
    pair.check()
    assert OnDevice.reads > 0
    pair.ours.param_groups[0]["params"].pop()  # the one on the CPU
    pair.ours_params[0].grad = random(1, 3, 4)
    OnDevice.reads = 0
    pair.ours.step()
    assert OnDevice.reads == 0


class Scaler:
    """Sets on an optimizer what a GradScaler sets for one step."""

    def __init__(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        self.optimizer = optimizer
        self.scale, self.found_inf = torch.tensor(scale), torch.tensor(0.0)

    def step(self, **kwargs: Any) -> None:
        self.optimizer.grad_scale = self.scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.optimizer.step(**kwargs)
        del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("zero_grad", [False, True], ids=["", "zero_grad"])
@pytest.mark.parametrize("skipped", ["none", "first", "later", "both"])
def test_loss_scaling_stays_on_the_device(
    device: Simulated,
    skipped: str,
    zero_grad: bool,
    dampening: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = [(3, 4), (20_000,), (7,)]
    scale = 65536.0
    pair = Pair(
        [random(i, *s) for i, s in enumerate(shapes)], lr=0.1, momentum=0.9, dampening=dampening
    )
    scaler = Scaler(pair.ours, scale)

    def forbidden(self: Tensor) -> float:
        raise AssertionError("the host waits for the device")

    for step in range(5):
        skip = (step in (0, 1) and skipped in ("first", "both")) or (
            step == 3 and skipped in ("later", "both")
        )
        grads = [random(10 * step + i, *shape) for i, shape in enumerate(shapes)]
        for i, grad in enumerate(grads):
            pair.ours_params[i].grad = grad * scale
            pair.torch_params[i].grad = grad.clone()
        scaler.found_inf.fill_(2.0 if skip else 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "__float__", forbidden)
            patch.setattr(Tensor, "item", forbidden)
            scaler.step(zero_grad=zero_grad)
        if not skip:
            pair.torch.step()
        for p in pair.ours_params:
            assert p.grad is not None
            assert p.grad.any() != zero_grad
        if step == 0:
            # A checkpoint has no momentum that does not exist.
            saved = copy.deepcopy(pair.ours).state_dict()["state"]
            assert (len([v for v in saved.values() if "momentum_buffer" in v]) == 0) == skip
    pair.ours.state_dict()
    pair.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_first_steps_of_every_rule_that_the_device_skips_leave_no_state(
    device: Simulated, rule: str, dtype: str
) -> None:
    """The states' memory holds NaNs, which no step may read."""
    size, hyper = 20_000, full_setting(rule)
    start = numbers(0, (size,), STORAGE_TYPES[dtype])
    parameter = torch.nn.Parameter(tensor_of(start))
    optimizer = TORCH_CLASSES[rule]([parameter], **hyper)
    oracle = Oracle(rule, start, **hyper)
    scaler = Scaler(optimizer, 1.0)
    keys = [state.key for state in states_in_use(rule, hyper)]
    for step in range(5):
        grad = numbers(step + 1, (size,), STORAGE_TYPES[dtype])
        parameter.grad = tensor_of(grad)
        scaler.found_inf.fill_(float(step in (0, 1, 3)))
        scaler.step()
        if step == 0:
            found = optimizer._state.get(parameter, {})
            assert not found or set(found) == set(keys)  # what the host counts, it awaits
            for state in found.values():
                state.fill_(float("nan"))
        if step not in (0, 1, 3):
            oracle.step(grad)
    assert_tensor_follows(optimizer, parameter, oracle)
    oracle.assert_counts(optimizer.param_groups[0])


def test_loss_scaling_of_tensors_with_gaps(device: Simulated) -> None:
    """They go through copies in each step, and their momentum may be empty at any of the first."""
    gap = [torch.nn.Parameter(random(4, 6, 8)[:, ::2]) for _ in range(2)]
    ours = sgdcore.torch.SGD([gap[0]], lr=0.1, momentum=0.9, dampening=0.5)
    theirs = torch.optim.SGD([gap[1]], lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    scaler = Scaler(ours, 1.0)
    for step in range(4):
        for p in gap:
            p.grad = random(40 + step, 6, 4)
        scaler.found_inf.fill_(float(step < 2))
        scaler.step()
        if step >= 2:
            theirs.step()
    assert_same_training(ours, theirs)


def test_checkpoint_after_a_step_that_did_not_happen(device: Simulated) -> None:
    pair = Pair([random(1, 4)], lr=0.1, momentum=0.9, dampening=0.5)
    scaler = Scaler(pair.ours, 1.0)
    pair.ours_params[0].grad = random(2, 4)
    scaler.found_inf.fill_(1.0)
    scaler.step()
    file = io.BytesIO()
    torch.save(pair.ours.state_dict(), file)
    file.seek(0)
    pair.ours.load_state_dict(torch.load(file))
    for step in range(2):
        pair.step([random(10 + step, 4)])
    pair.check()


def test_a_momentum_buffer_of_ones_own_is_no_empty_one(device: Simulated) -> None:
    """It takes the place of one that the device left empty, and has no flags."""
    pair = Pair([random(1, 4)], lr=0.1, momentum=0.9, dampening=0.5)
    scaler = Scaler(pair.ours, 1.0)
    pair.ours_params[0].grad = random(2, 4)
    scaler.found_inf.fill_(1.0)
    scaler.step()
    for optimizer, params in ((pair.ours, pair.ours_params), (pair.torch, pair.torch_params)):
        optimizer.state[params[0]]["momentum_buffer"] = random(3, 4)
    for step in range(2):
        pair.step([random(10 + step, 4)])
    pair.check()


def test_a_capture_before_the_first_step_is_refused(
    device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = parameter(random(1, 4), random(2, 4))
    before = p.detach().clone()
    optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(_interface, "is_capturing", lambda: True)
        patch.setattr(Tensor, "is_cpu", property(lambda _: False))
        with pytest.raises(
            RuntimeError, match=r"no momentum_buffer yet.*take a step before the capture"
        ):
            optimizer.step()
        assert_same_bits(p.detach(), before)
    optimizer.step()


def test_a_model_that_was_moved_after_its_first_step(
    device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = parameter(random(1, 3, 5), random(2, 3, 5))
    optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9)
    optimizer.step()
    momentum = momentum_of(optimizer, p)
    monkeypatch.setattr(_interface, "device_index", lambda t: -1 if t is momentum else 0)
    monkeypatch.setattr(Tensor, "device", property(lambda t: "cpu" if t is momentum else "cuda:0"))
    with pytest.raises(
        ValueError,
        match=r"momentum_buffer of .*on cuda:0, where .* got one on cpu.*load_state_dict",
    ):
        optimizer.step()


def test_update_in_the_backward_pass(device: Simulated) -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = sgdcore.torch.SGD(models[0].parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, foreach=False)
    with sgdcore.torch.step_in_backward(ours):
        for step in range(3):
            for model, optimizer in zip(models, (ours, theirs), strict=True):
                model(random(step, 2, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_same_training(ours, theirs)
    assert device["launches"] > 0


def test_without_cuda_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = sgdcore.build_info()["cuda_reason"]
    if not reason:
        pytest.skip("CUDA can be used here")
    monkeypatch.setattr(_interface, "device_index", lambda _: 0)
    monkeypatch.setattr(optimizer_module, "exchange_api", lambda: None)
    p = parameter(random(1, 4), random(2, 4))
    before = p.detach().clone()
    for momentum in (0.0, 0.9):
        optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=momentum)
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        assert "CUDA cannot be used: " + reason in str(caught.value)
        assert "param_groups[0]['params'][0]" in str(caught.value)
    assert_same_bits(p.detach(), before)


# --- The norm of the gradients ----------------------------------------------------------------------


@pytest.fixture
def norm_device(device: Simulated, monkeypatch: pytest.MonkeyPatch) -> Simulated:
    monkeypatch.setattr(_interface, "new_result", lambda _: torch.zeros(4, dtype=torch.float64))
    return device


ON_DEVICE = [(3, 4), (7,), (2, 3, 3, 3), (9000,), (0, 4), (1,), (30_000, 2)]


def beside_the_cpu(
    dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], Any, list[Tensor], Any]:
    """Return parameters on a device and the same ones on the CPU, each with an optimizer."""
    tensors = [random(i, *shape, dtype=dtype) for i, shape in enumerate(ON_DEVICE)]
    ours = [parameter(t.clone()) for t in tensors]
    others = [parameter(torch.empty(t.numel(), 5, dtype=dtype)) for t in tensors]  # on the CPU
    for other, t in zip(others, tensors, strict=True):
        other.data = torch.zeros(t.numel(), 5, dtype=dtype)
        other.data[:, 0] = t.flatten()
    return (
        ours,
        sgdcore.torch.SGD(ours, **options),
        others,
        sgdcore.torch.SGD(others, **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip_value", [None, 0.7])
@pytest.mark.parametrize("max_norm", [float("inf"), 1e6, 3.0])
def test_the_norm_and_the_step_have_the_bits_of_the_cpu(
    norm_device: Simulated, max_norm: float, clip_value: float | None, dtype: torch.dtype
) -> None:
    options = {"max_grad_norm": max_norm, "clip_value": clip_value, "lr": 0.1, "momentum": 0.9}
    ours, on_device, others, on_cpu = beside_the_cpu(dtype, **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, others, strict=True)):
            p.grad = random(100 * step + i, *p.shape, dtype=dtype)
            if step == 3 and i == 3:
                p.grad[17] = float("inf")
            q.grad = torch.zeros_like(q)
            q.grad[:, 0] = p.grad.flatten()
        before = norm_device["launches"]
        on_device.step()
        assert norm_device["launches"] == before + 3
        on_cpu.step()
        norm = on_device.grad_norm
        assert isinstance(norm, Tensor)
        assert norm.item() == on_cpu.grad_norm
        for p, q in zip(ours, others, strict=True):
            assert_same_bits(p.detach().flatten(), q.detach()[:, 0])


@pytest.mark.parametrize("zero_grad", [False, True])
def test_steps_are_left_out_on_the_device(norm_device: Simulated, zero_grad: bool) -> None:
    options = {"skip_nonfinite": True, "lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours, on_device, others, on_cpu = beside_the_cpu(torch.float32, **options)
    skipped = 0
    for step, bad in enumerate([True, False, True, False]):  # also the first one
        grads = [random(100 * step + i, *p.shape) for i, p in enumerate(ours)]
        if bad:
            grads[3][8999] = float("nan")
        for p, q, grad in zip(ours, others, grads, strict=True):
            p.grad, q.grad = grad.clone(), torch.zeros_like(q)
            q.grad[:, 0] = grad.flatten()
        on_device.step(zero_grad=zero_grad)
        on_cpu.step(zero_grad=zero_grad)
        skipped += bad
        assert on_device.skipped_steps == on_cpu.skipped_steps == skipped
        for p, q, grad in zip(ours, others, grads, strict=True):
            assert_same_bits(p.detach().flatten(), q.detach()[:, 0])
            assert p.grad is not None
            assert_same_bits(p.grad, torch.zeros_like(grad) if zero_grad else grad)
    for p, q in zip(ours, others, strict=True):
        momentum = momentum_of(on_device, p)
        other = momentum_of(on_cpu, q)
        assert momentum is not None
        assert other is not None
        assert_same_bits(momentum.flatten(), other[:, 0])


def test_nothing_is_uploaded_for_the_norm_while_nothing_changes(norm_device: Simulated) -> None:
    p = parameter(random(1, 100), random(2, 100))
    optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9, max_grad_norm=1.0)
    for _ in range(3):
        optimizer.step()
    before = {what: norm_device[what] for what in ("copies", "allocations", "launches")}
    for _ in range(5):
        optimizer.step()
    assert norm_device["copies"] == before["copies"]
    assert norm_device["allocations"] == before["allocations"]
    assert norm_device["launches"] == before["launches"] + 15


def test_the_norm_of_unscaled_gradients_on_the_device(norm_device: Simulated) -> None:
    p = parameter(torch.zeros(2), torch.tensor([30.0, -40.0]))
    optimizer = sgdcore.torch.SGD([p], lr=1.0, max_grad_norm=1.0)
    for found_inf, expected in [(0.0, 5.0), (1.0, 5.0)]:
        optimizer.grad_scale = torch.tensor([10.0])
        optimizer.found_inf = torch.tensor([found_inf])
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-6)
        assert p[0].item() == pytest.approx(-0.6, rel=1e-5)
        assert p.grad is not None
        p.grad.mul_(2)


def test_gradients_on_several_devices_have_no_norm(norm_device: Simulated) -> None:
    params = [parameter(torch.zeros(n), torch.ones(n)) for n in (4, 6)]
    optimizer = sgdcore.torch.SGD(params, lr=1.0, max_grad_norm=1.0)
    with pytest.raises(
        ValueError, match="max_grad_norm, skip_nonfinite: expected all gradients on one device"
    ):
        optimizer.step()
    assert not params[0].any()
