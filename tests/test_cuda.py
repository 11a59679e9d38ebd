"""On a CUDA device: ``python -m pytest -m cuda``. Everywhere else these are skipped, with the reason.

What has the CPU's bits there is what the CPU's tests compare with torch's loop.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sgdcore
from sgdcore.device_array import DeviceArray
from support import STORAGE_TYPES, numbers
from torch_support import HYPERS, assert_same_bits, momentum_of, parameter

_REASON = sgdcore.build_info()["cuda_reason"]
if not _REASON and not torch.cuda.is_available():
    _REASON = "this PyTorch was built without CUDA"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(bool(_REASON), reason=f"no CUDA device: {_REASON}"),
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3, 4), (7,), (2, 3, 3, 3), (9000,), (0, 4), (1,), (4, 1), (257, 129)]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Pair:
    """The same parameters on the device and on the CPU, each with an optimizer of ours."""

    def __init__(
        self,
        tensors: list[Tensor],
        group: Callable[[list[torch.nn.Parameter]], Any] = lambda params: params,
        device: str = "cuda",
        **hyper: Any,
    ) -> None:
        self.cpu = [torch.nn.Parameter(t.clone()) for t in tensors]
        self.cuda = [torch.nn.Parameter(t.to(device, copy=True)) for t in tensors]
        self.on_cpu = sgdcore.torch.SGD(group(self.cpu), **hyper)
        self.on_cuda = sgdcore.torch.SGD(group(self.cuda), **hyper)

    def give(self, grads: list[Tensor | None]) -> None:
        for p, q, grad in zip(self.cpu, self.cuda, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
            q.grad = None if grad is None else grad.to(q.device, copy=True)

    def step(self, grads: list[Tensor | None]) -> None:
        self.give(grads)
        self.on_cpu.step()
        self.on_cuda.step()

    def check(self) -> None:
        for i, (p, q) in enumerate(zip(self.cpu, self.cuda, strict=True)):
            assert_same_bits(q.detach().cpu(), p.detach(), f"parameter {i}")
            a, b = momentum_of(self.on_cuda, q), momentum_of(self.on_cpu, p)
            assert_same_bits(None if a is None else a.cpu(), b, f"momentum {i}")


def kernels_of(step: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a step starts."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    names = [event.name for event in found.events() if event.device_type == on_device]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_cpu(dtype: torch.dtype, hyper: dict[str, Any]) -> None:
    pair = Pair([random(i, *shape, dtype=dtype) for i, shape in enumerate(SHAPES)], **hyper)
    for step in range(4):
        pair.step([random(100 * step + i, *s, dtype=dtype) for i, s in enumerate(SHAPES)])
    pair.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum_dtype", DTYPES, ids=str)
def test_momentum_of_every_type(dtype: torch.dtype, momentum_dtype: torch.dtype) -> None:
    tensors = [random(i, *shape, dtype=dtype) for i, shape in enumerate(SHAPES)]
    pair = Pair(tensors, lr=0.1, momentum=0.9, nesterov=True, momentum_dtype=momentum_dtype)
    for step in range(3):
        pair.step([random(100 * step + i, *s, dtype=dtype) for i, s in enumerate(SHAPES)])
    pair.check()


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("of", ["parameters", "gradients"])
def test_memory_off_the_vectors(of: str, offset: int) -> None:
    """Views into one flat tensor, as in a bucket of gradients."""
    sizes = [1, 5, 30, 4096, 8192, 8193, 20_000]
    pair = Pair([random(i, n) for i, n in enumerate(sizes)], lr=0.1, momentum=0.9)
    flat = torch.zeros(sum(sizes) + offset, device="cuda")
    for step in range(3):
        pair.give([random(100 * step + i, n) for i, n in enumerate(sizes)])
        start = offset
        for n, p in zip(sizes, pair.cuda, strict=True):
            view = flat[start : start + n]
            start += n
            if of == "gradients":
                assert p.grad is not None
                p.grad = view.copy_(p.grad)
            else:
                p.data = view.copy_(p.data)
        pair.on_cpu.step()
        pair.on_cuda.step()
    pair.check()


def test_special_numbers() -> None:
    """Subnormal numbers are kept; infinities and NaNs come where they do on the CPU."""
    values = [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 3e38, float("inf"), float("-inf"), 1.0]
    grid = torch.tensor([[p, g] for p in values for g in values])
    pair = Pair([grid[:, 0].clone()], lr=1e-3, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        pair.step([grid[:, 1].clone()])
    for p, q in ((pair.cuda[0], pair.cpu[0]),):
        a, b = p.detach().cpu(), q.detach()
        assert torch.equal(a.isnan(), b.isnan())
        assert_same_bits(a.nan_to_num(), b.nan_to_num())


def test_strided_gradients_and_layouts() -> None:
    tensors = [
        random(1, 4, 7).t(),
        random(2, 2, 3, 4, 4).to(memory_format=torch.channels_last),
        random(3, 8, 4),
    ]
    pair = Pair(tensors, lr=0.1, momentum=0.9)
    for step in range(3):
        grads = [
            random(10 + step, 7, 4),
            random(20 + step, 2, 3, 4, 4),
            random(30 + step, 4, 8).t(),
        ]
        for params in (pair.cpu, pair.cuda):
            for p, grad in zip(params, grads, strict=True):
                p.grad = torch.empty_strided(grad.shape, grad.stride(), device=p.device).copy_(grad)
        pair.on_cpu.step()
        pair.on_cuda.step()
    pair.check()


def test_late_and_missing_gradients() -> None:
    shapes = [(4 + i % 7,) for i in range(30)]
    pair = Pair([random(i, *s) for i, s in enumerate(shapes)], lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(6):
        grads = [random(100 * step + i, *s) for i, s in enumerate(shapes)]
        pair.step(
            [grad if i <= 6 * step and (i + step) % 4 else None for i, grad in enumerate(grads)]
        )
    pair.check()


def test_one_kernel_for_all_tensors_and_groups() -> None:
    for count, apart in ((161, False), (465, True)):
        shapes = [(1 + i % 50, 3) for i in range(count)]
        pair = Pair(
            [random(i, *s) for i, s in enumerate(shapes)],
            (lambda params: [{"params": [p], "lr": 0.1} for p in params])
            if apart
            else (lambda p: p),
            lr=0.1,
            momentum=0.9,
        )
        pair.step([random(100 + i, *s) for i, s in enumerate(shapes)])
        pair.give([random(200 + i, *s) for i, s in enumerate(shapes)])
        pair.on_cpu.step()
        kernels = kernels_of(pair.on_cuda.step)
        assert len(kernels) == 1, kernels
        assert "step_kernel" in kernels[0]
        pair.check()


def test_cpu_and_device_in_one_optimizer() -> None:
    params = [torch.nn.Parameter(random(i, 50)) for i in range(4)]
    mixed = [
        torch.nn.Parameter(p.detach().to("cuda" if i % 2 else "cpu", copy=True))
        for i, p in enumerate(params)
    ]
    optimizers = [sgdcore.torch.SGD(each, lr=0.1, momentum=0.9) for each in (params, mixed)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, mixed, strict=True)):
            p.grad = random(10 * step + i, 50)
            q.grad = p.grad.to(q.device, copy=True)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(params, mixed, strict=True):
        assert_same_bits(q.detach().cpu(), p.detach())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices() -> None:
    pairs = [Pair([random(i, 1000)], device=f"cuda:{i}", lr=0.1, momentum=0.9) for i in range(2)]
    both = sgdcore.torch.SGD([pair.cuda[0] for pair in pairs], lr=0.1, momentum=0.9)
    for step in range(3):
        for i, pair in enumerate(pairs):
            pair.give([random(10 * step + i, 1000)])
            pair.on_cpu.step()
        both.step()
    for pair in pairs:
        assert_same_bits(pair.cuda[0].detach().cpu(), pair.cpu[0].detach())


def test_the_current_stream_is_used() -> None:
    """A step waits for what its stream holds, and other streams' work is not mixed up with it."""
    pair = Pair([random(1, 1 << 20)], lr=0.1, momentum=0.9)
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    for step in range(9):
        stream = streams[step % 3]
        stream.wait_stream(streams[step % 3 - 1])
        grad = random(10 + step, 1 << 20)
        pair.cpu[0].grad = grad
        with torch.cuda.stream(stream):
            torch.cuda._sleep(3_000_000)  # the gradient comes late
            pair.cuda[0].grad = grad.to("cuda", non_blocking=True)
            pair.on_cuda.param_groups[0]["lr"] = pair.on_cpu.param_groups[0]["lr"] = 0.1 / (
                1 + step
            )
            pair.on_cuda.step()
            pair.cuda[0].grad = None  # its memory goes back while the step is still to come
            torch.empty(1 << 20, device="cuda").fill_(float("nan"))
        pair.on_cpu.step()
    torch.cuda.synchronize()
    pair.check()


def test_the_host_does_not_wait() -> None:
    pair = Pair([random(1, 1000)], lr=torch.tensor(0.1, device="cuda"), momentum=0.9)
    pair.on_cuda.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
    pair.give([random(2, 1000)])
    pair.on_cuda.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            torch.cuda._sleep(100_000_000)
            done = torch.cuda.Event()
            done.record()
            pair.on_cuda.step()
            assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_many_steps_ahead_with_changing_numbers() -> None:
    pair = Pair([random(1, 5000), random(2, 77)], lr=0.1, momentum=0.9)
    pair.step([random(3, 5000), random(4, 77)])
    torch.cuda._sleep(200_000_000)
    for step in range(50):
        for optimizer in (pair.on_cpu, pair.on_cuda):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.95**step
            optimizer.step()
    torch.cuda.synchronize()
    pair.check()


def test_graph_of_a_whole_training_step() -> None:
    """Replayed with new inputs and a new learning rate, beside the same steps taken one by one."""
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).cuda()
    ]
    models.append(copy.deepcopy(models[0]))
    rates = [torch.tensor(0.1, device="cuda") for _ in models]
    optimizers = [
        sgdcore.torch.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
        for model, lr in zip(models, rates, strict=True)
    ]
    inputs = [torch.zeros(8, 16, device="cuda") for _ in models]

    def train(i: int) -> None:
        optimizers[i].zero_grad()
        models[i](inputs[i]).square().sum().backward()
        optimizers[i].step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(2):
            inputs[i].copy_(random(1, 8, 16))
            train(i)
    torch.cuda.current_stream().wait_stream(side)
    optimizers[0].zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        models[0](inputs[0]).square().sum().backward()
        optimizers[0].step()
    for step in range(6):
        for i in range(2):
            inputs[i].copy_(random(10 + step, 8, 16))
            rates[i].fill_(0.1 / (1 + step))
        graph.replay()
        train(1)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert_same_bits(p.detach(), q.detach(), f"replay {step}")
    # An ordinary step in between, and the graph once more.
    for i in range(2):
        train(i)
    optimizers[0].zero_grad(set_to_none=False)
    graph.replay()
    train(1)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), "after an ordinary step")


def test_a_capture_needs_momentum_buffers() -> None:
    p = parameter(random(1, 4).cuda(), random(2, 4).cuda())
    optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9)

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
            optimizer.step()

    with pytest.raises(RuntimeError, match="take a step before the capture"):
        capture()
    torch.cuda.synchronize()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_grad_scaler(dtype: torch.dtype) -> None:
    """Scale and found_inf stay on the device; steps with infinite gradients change nothing, a first one neither."""
    pair = Pair(
        [random(1, 9000, dtype=dtype), random(2, 33, dtype=dtype)],
        lr=0.1,
        momentum=0.9,
        dampening=0.5,
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=1000)
    for step in range(7):
        infinite = step in (0, 3)
        grads = [random(10 * step + i, *p.shape, dtype=dtype) for i, p in enumerate(pair.cpu)]
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(1, device="cuda"))  # starts its numbers
        for p, q, grad in zip(pair.cpu, pair.cuda, grads, strict=True):
            q.grad = (grad.float() * scale).to(dtype).cuda()
            p.grad = q.grad.cpu()
            if infinite:
                q.grad[0] = float("inf")
        if dtype == torch.float16:
            # GradScaler takes no float16 gradients of its own accord; ours takes what it would set.
            pair.on_cuda.grad_scale = torch.tensor(scale, device="cuda")
            pair.on_cuda.found_inf = torch.tensor(2.0 * infinite, device="cuda")
            pair.on_cuda.step()
            del pair.on_cuda.grad_scale, pair.on_cuda.found_inf
        else:
            scaler.step(pair.on_cuda)
            scaler.update()
        if not infinite:
            pair.on_cpu.grad_scale = torch.tensor(scale)
            pair.on_cpu.step()
            del pair.on_cpu.grad_scale
    pair.on_cuda.state_dict()
    pair.check()


def test_checkpoints_move_between_devices() -> None:
    pair = Pair([random(1, 40), random(2, 3, 3)], lr=0.1, momentum=0.9)
    pair.step([random(3, 40), random(4, 3, 3)])
    states = pair.on_cpu.state_dict(), pair.on_cuda.state_dict()
    pair.on_cuda.load_state_dict(copy.deepcopy(states[0]))
    pair.on_cpu.load_state_dict(copy.deepcopy(states[1]))
    pair.step([random(5, 40), random(6, 3, 3)])
    pair.check()


def test_model_moved_after_the_optimizer_was_made() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = sgdcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.cuda()  # before the first step: nothing to move but the parameters
    model(torch.ones(2, 4, device="cuda")).sum().backward()
    optimizer.step()
    model.cpu()
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="load_state_dict"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_memory_is_given_back() -> None:
    p = parameter(random(1, 1000).cuda(), random(2, 1000).cuda())
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.step()
        del optimizer
        gc.collect()
    torch.cuda.synchronize()
    assert before - torch.cuda.mem_get_info()[0] < 8 << 20


@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_buffer_without_torch(dtype: str) -> None:
    values = {
        "w": numbers(1, (300, 41), STORAGE_TYPES[dtype]),
        "b": numbers(2, (5,), STORAGE_TYPES[dtype]),
    }
    buffers = sgdcore.ParameterBuffer(values, device="cuda"), sgdcore.ParameterBuffer(values)
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    ours, cpu = (sgdcore.SGD(buffer, **hyper) for buffer in buffers)
    for step in range(3):
        grad = numbers(10 + step, (buffers[1].size,), STORAGE_TYPES[dtype])
        buffers[0].grad.assign(grad)
        buffers[1].grad[:] = grad
        ours.step(zero_grad=step == 2)
        cpu.step(zero_grad=step == 2)
    assert buffers[0].data.numpy().tobytes() == buffers[1].data.tobytes()
    assert not buffers[0].grad.numpy().astype(np.float64).any()


def test_tensors_share_memory_with_a_buffer() -> None:
    buffer = sgdcore.ParameterBuffer({"w": (3, 4)}, device="cuda")
    tensor = torch.from_dlpack(buffer["w"].data)
    assert tensor.is_cuda
    tensor.fill_(2.0)
    torch.cuda.synchronize()
    assert (buffer.data.numpy() == 2).all()
    assert DeviceArray.of(tensor).shape == (3, 4)


def test_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    value, grad = numbers(1, (300, 7)), numbers(2, (300, 7))
    ours, cpu = sgdcore.Parameter(cupy.asarray(value)), sgdcore.Parameter(value.copy())
    optimizers = [sgdcore.SGD([p], lr=0.1, momentum=0.9) for p in (ours, cpu)]
    with cupy.cuda.Stream():
        for step in range(3):
            cpu.grad = grad * np.float32(step + 1)
            ours.grad = cupy.asarray(grad) * np.float32(step + 1)
            for optimizer in optimizers:
                optimizer.step()
        assert (cupy.asnumpy(ours.data) == cpu.data).all()
    momentum = cupy.asarray(optimizers[0].state[ours]["momentum_buffer"])
    assert (cupy.asnumpy(momentum) == optimizers[1].state[cpu]["momentum_buffer"]).all()


@pytest.mark.skipif(
    not _REASON and torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 40 << 30,
    reason="needs 40 GB",
)
def test_more_elements_than_an_int32_counts() -> None:
    size = (1 << 31) + 12_345
    p = torch.nn.Parameter(torch.ones(size, device="cuda"))
    p.grad = torch.full((size,), 0.5, device="cuda")
    sgdcore.torch.SGD([p], lr=0.5).step()
    for part in (p.detach()[:10], p.detach()[-10:], p.detach()[(1 << 31) - 5 : (1 << 31) + 5]):
        assert (part == 0.75).all()
