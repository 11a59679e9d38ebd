"""sgdcore.torch.SGD under what people use torch.optim.SGD with: schedulers, scalers, wrappers, compilers, checkpoints.

The expected result is always the same program with torch.optim.SGD, in every bit.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import lr_scheduler, swa_utils

import sgdcore
from sgdcore.torch import SGD, step_in_backward, verify
from torch_support import assert_ranks_pass, assert_same_bits, assert_same_training, momentum_of

FULL: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
MAKERS: list[Any] = [SGD, torch.optim.SGD]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    inputs, targets = batch(step)
    return torch.nn.functional.cross_entropy(model(inputs), targets)


def both(train: Callable[[torch.nn.Module, Any], Any], **kwargs: Any) -> None:
    """Run a training function with each optimizer; compare parameters, momentum and what it returns."""
    optimizers, results = [], []
    for make in MAKERS:
        model = network()
        # Deep copies, since schedulers change a tensor lr in place.
        hyper = copy.deepcopy({**FULL, **kwargs})
        optimizer = make(model.parameters(), foreach=False, **hyper)
        results.append(train(model, optimizer))
        optimizers.append(optimizer)
    assert_same_training(*optimizers)
    assert results[0] == results[1]


# Networks on real data


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


class Transformer(torch.nn.Module):
    """Reads an image as a sequence of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(8, 16)
        self.position = torch.nn.Parameter(torch.zeros(8, 16))
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.embedding(images.squeeze(1)) + self.position)
        return self.head(hidden.mean(1))


def convolutional() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 10),
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small lose time to torch's second thread, much of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make_network", [convolutional, Transformer])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"weight_decay": 1e-3},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 1e-3},
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "maximize": True},
        {"maximize": True},
    ],
)
def test_500_steps_on_digits(
    hyper: dict[str, Any], make_network: Callable[[], torch.nn.Module], dtype: torch.dtype
) -> None:
    images, labels = digits()
    images = images.to(dtype).unsqueeze(1)
    sign = -1 if hyper.get("maximize") else 1
    torch.manual_seed(0)
    start = make_network().to(dtype)
    optimizers, losses = [], []
    for make in MAKERS:
        torch.manual_seed(1)
        model = make_network().to(dtype)
        model.load_state_dict(start.state_dict())
        optimizer = make(model.parameters(), lr=0.05, foreach=False, **hyper)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 500)
        curve = []
        for step in range(500):
            rows = torch.arange(16 * step, 16 * step + 16) % len(images)
            optimizer.zero_grad()
            loss = sign * torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            scheduler.step()
            curve.append(loss.detach())
        optimizers.append(optimizer)
        losses.append(torch.stack(curve))
    assert_same_training(*optimizers)
    assert_same_bits(losses[0], losses[1])
    assert sign * losses[0][-50:].mean() < sign * losses[0][:50].mean()


# Schedulers

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def test_every_scheduler_is_listed() -> None:
    torchs = {
        name
        for name in lr_scheduler.__all__
        if name not in ("LRScheduler",) and isinstance(getattr(lr_scheduler, name), type)
    }
    assert torchs <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, tensor_lr: bool) -> None:
    def train(model: torch.nn.Module, optimizer: Any) -> list[float]:
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for step in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            scheduler.step(*([loss.detach()] if name == "ReduceLROnPlateau" else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SequentialLR's own, of its epoch argument
        both(train, lr=torch.tensor(0.1) if tensor_lr else 0.1)


# Mixed precision, clipping, averaging


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    def train(model: torch.nn.Module, optimizer: Any) -> float:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step in (0, 4):
                model[0].weight.grad[1, 2] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            assert bool(momentum_of(optimizer, model[0].weight) is None) == (step == 0)
        return scaler.get_scale()

    both(train)


class CountingScaler(torch.amp.GradScaler):
    """Asks through a method of its own, as the scaler of sharded models does."""

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        return super().step(optimizer, *args, **kwargs)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("make_scaler", [torch.amp.GradScaler, CountingScaler])
def test_only_a_grad_scaler_hears_that_the_step_takes_the_scale(
    make_scaler: Any, scheduled: bool
) -> None:
    """Trainers clip gradients only if the attribute is false, and then unscale them first."""
    model = network()
    optimizer = SGD(model.parameters(), **FULL)
    if scheduled:  # which replaces `step`
        lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is False
    scaler = make_scaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 0)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is False
    for p, scaled in zip(model.parameters(), grads, strict=True):
        assert_same_bits(p.grad, scaled)  # the step undid the scale, in its pass


@pytest.mark.parametrize("scheduled", [False, True])
def test_who_replaces_step_sees_whether_it_is_left_out(scheduled: bool) -> None:
    """As accelerate does: it moves its scheduler on only where the scaler called `step`."""
    calls = []
    for make in MAKERS:
        model = network()
        optimizer = make(model.parameters(), foreach=False, **FULL)
        if scheduled:
            lr_scheduler.ExponentialLR(optimizer, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        called = []

        def counted(step: Any = optimizer.step, called: list[int] = called) -> None:
            called.append(1)
            step()

        original = optimizer.step
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i)).backward()
            if i in (0, 2):
                model[0].weight.grad[0, 0] = torch.inf
            optimizer.step = counted
            scaler.step(optimizer)
            optimizer.step = original
            called.append(0)
            scaler.update()
        calls.append((called, [p.detach().clone() for p in model.parameters()]))
    assert calls[0][0] == calls[1][0] == [0, 1, 0, 0, 1, 0]
    for ours, theirs in zip(calls[0][1], calls[1][1], strict=True):
        assert_same_bits(ours, theirs)


def test_a_loss_scale_that_is_no_power_of_two() -> None:
    def train(model: torch.nn.Module, optimizer: Any) -> None:
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=1000.0, growth_factor=3.0, growth_interval=1
        )
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()

    both(train)


def test_found_inf_clears_the_gradients_if_asked() -> None:
    model = network()
    optimizer = SGD(model.parameters(), **FULL)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    model[0].weight.grad[0, 0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer, zero_grad=True)
    for p, kept in zip(model.parameters(), before, strict=True):
        assert_same_bits(p.detach(), kept)
        assert not p.grad.any()


def test_clipping() -> None:
    def train(model: torch.nn.Module, optimizer: Any) -> None:
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()

    both(train)


def test_averaged_models() -> None:
    def train(model: torch.nn.Module, optimizer: Any) -> list[float]:
        average = swa_utils.AveragedModel(model)
        moving = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            average.update_parameters(model)
            moving.update_parameters(model)
        return [float(p.detach().sum()) for m in (average, moving) for p in m.parameters()]

    both(train)


def test_model_and_optimizer_saved_and_loaded() -> None:
    model = network()
    optimizer = SGD(model.parameters(), **FULL)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network()
    other.load_state_dict(saved["model"])
    resumed = SGD(other.parameters(), lr=1.0)
    resumed.load_state_dict(saved["optimizer"])
    for m, o in ((model, optimizer), (other, resumed)):
        o.zero_grad()
        loss_of(m, 3).backward()
        o.step()
    assert_same_training(resumed, optimizer)


# Compilers


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_training(inside: bool) -> None:
    def train(model: torch.nn.Module, optimizer: Any) -> None:
        def forward_backward(inputs: torch.Tensor, targets: torch.Tensor) -> None:
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            if inside:
                optimizer.step()

        compiled = torch.compile(forward_backward, backend="aot_eager")
        for step in range(4):
            optimizer.zero_grad()
            compiled(*batch(step))
            if not inside:
                optimizer.step()

    torch._dynamo.reset()
    model = network()
    ours = SGD(model.parameters(), **FULL)
    train(model, ours)
    eager = network()
    theirs = torch.optim.SGD(eager.parameters(), foreach=False, **FULL)
    for step in range(4):
        theirs.zero_grad()
        loss_of(eager, step).backward()
        theirs.step()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Several processes


@pytest.mark.parametrize("scenario", ["ddp", "zero", "fsdp2", "checkpoint"])
def test_two_processes(scenario: str, tmp_path: Path) -> None:
    assert_ranks_pass(scenario, tmp_path)


# Steps in the backward pass


@pytest.mark.parametrize("groups", [1, 4])
def test_step_in_backward_trains_the_same(groups: int) -> None:
    optimizers = []
    for inside in (True, False):
        model = network()
        params = list(model.parameters())
        grouped: Any = params if groups == 1 else [{"params": [p]} for p in params]
        optimizer = SGD(grouped, **FULL)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        handle = step_in_backward(optimizer) if inside else None
        for step in range(6):
            if step == 4 and handle is not None:
                handle.remove()
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        optimizers.append(optimizer)
    assert_same_training(*optimizers)


def test_step_in_backward_frees_the_gradients_and_refuses_their_use() -> None:
    model = network()
    optimizer = SGD(model.parameters(), **FULL)
    storages = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: storages.append(StorageWeakRef(p.grad.untyped_storage()))
        )
    with step_in_backward(optimizer):
        loss_of(model, 0).backward()
        assert len(storages) == 4
        assert all(storage.expired() for storage in storages)
        for p in model.parameters():
            assert "already used" in repr(p.grad)
        with pytest.raises(RuntimeError, match="used and freed by step_in_backward"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="used and freed by step_in_backward"):
            loss_of(model, 1).backward()  # accumulation
        for p, kept in zip(model.parameters(), before, strict=True):
            assert_same_bits(p.detach(), kept)
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        loss_of(model, 1).backward()
        optimizer.zero_grad()
        loss_of(model, 2).backward()
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        with pytest.raises(RuntimeError, match="GradScaler cannot be used with step_in_backward"):
            scaler.step(optimizer)
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, 3).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_step_in_backward_of_a_late_group_and_refusals() -> None:
    model = network()
    optimizer = SGD(model[0].parameters(), **FULL)
    handle = step_in_backward(optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    before = model[2].weight.detach().clone()
    loss_of(model, 0).backward()
    assert (model[2].weight != before).any()
    with pytest.raises(ValueError, match="already steps in the backward pass"):
        step_in_backward(optimizer)
    handle.remove()
    handle.remove()
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match="some parameters have gradients"):
        step_in_backward(optimizer)
    with pytest.raises(TypeError, match=r"expected an optimizer of sgdcore\.torch"):
        step_in_backward(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]


# The check for everyone


def test_verify_finds_equal_bits() -> None:
    model = torch.nn.Sequential(network(), torch.nn.Dropout(0.3))
    before = [p.detach().clone() for p in model.parameters()]
    report = verify(model, batch, steps=10, weight_decay=0.01, nesterov=True)
    assert report.equal
    assert report.steps == 10
    assert "every bit equal" in str(report)
    for p, kept in zip(model.parameters(), before, strict=True):
        assert_same_bits(p.detach(), kept)
    with pytest.raises(ValueError, match="steps: expected a positive number, got 0"):
        verify(model, batch, steps=0)
    with pytest.raises(TypeError, match=r"steps: expected an integer, got .*; .* loss_fn="):
        verify(model, lambda model, batch: torch.zeros(()), [batch(0)])  # type: ignore[arg-type]


def rows(count: int) -> torch.utils.data.TensorDataset:
    torch.manual_seed(1)
    return torch.utils.data.TensorDataset(
        torch.randn(count, 8), torch.randint(0, 4, (count,)), torch.rand(count)
    )


def columns(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The loss of batches that are dicts, which it takes apart, as many models do."""
    targets = batch.pop("targets")
    loss: torch.Tensor = torch.nn.functional.cross_entropy(model(**batch), targets)
    return loss


def collate_dict(samples: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    inputs, targets, _ = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"input": inputs, "targets": targets}


def pairs_of(count: int) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(*rows(count).tensors[:2])


DataLoader = torch.utils.data.DataLoader

BATCHES: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    # How to make them, what verify needs to know of them, and how many steps they are for.
    "a loader": (lambda: DataLoader(pairs_of(40), batch_size=8, shuffle=True), {}, 12),
    "a short loader": (lambda: DataLoader(pairs_of(8), batch_size=8), {}, 12),
    "a list of tuples": (lambda: [batch(i) for i in range(3)], {}, 12),
    "a list of lists": (lambda: [list(batch(i)) for i in range(3)], {}, 12),
    "an iterator": (lambda: (batch(i) for i in range(3)), {}, 3),
    "dicts": (
        lambda: DataLoader(rows(40), batch_size=8, collate_fn=collate_dict),
        {"loss_fn": columns},
        12,
    ),
    "triples": (
        lambda: DataLoader(rows(40), batch_size=8),
        {
            "loss_fn": lambda model, b: (
                torch.nn.functional.cross_entropy(model(b[0]), b[1], reduction="none") * b[2]
            ).mean()
        },
        12,
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_verify_takes_any_iterable_of_batches(name: str) -> None:
    make, further, steps = BATCHES[name]
    report = verify(network(), make(), steps=12, **further)
    assert (report.difference, report.steps) == (None, steps)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (
            3,
            TypeError,
            "batches: expected a function of the step's number, or an iterable .* got 3",
        ),
        ([], ValueError, r"batches: expected at least one batch, got \[\]"),
        ([{"inputs": 1, "targets": 2}], TypeError, "pairs of .* got a dict; pass a loss_fn"),
        ([(1, 2, 3)], TypeError, "pairs of .* got a tuple; pass a loss_fn"),
    ],
)
def test_verify_refuses_other_batches(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify(network(), batches)


def test_verify_takes_parameter_groups() -> None:
    seen = []

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        seen.append(model)
        body, head = model[0], model[2]
        return [
            {"params": body.parameters(), "lr": 0.5, "weight_decay": 0.1},
            {"params": [head.weight], "momentum": 0.0},
        ]

    model = network()
    report = verify(model, batch, steps=10, params_fn=groups)
    assert report.equal
    assert len(seen) == 2
    assert model not in seen


def test_verify_reports_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    step = sgdcore.torch.SGD.step
    count = 0

    def wrong(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        result = step(self, *args)
        if count == 3:
            with torch.no_grad():
                p = self.param_groups[0]["params"][2]
                p[1, 5] = torch.nextafter(p[1, 5], torch.tensor(torch.inf))
        return result

    monkeypatch.setattr(sgdcore.torch.SGD, "step", wrong)
    report = verify(network(), batch, steps=10)
    assert not report.equal
    assert report.steps == 3
    assert report.difference.startswith("step 2, parameter '2.weight'[1, 5]: torch ")
    assert report.difference.endswith("(1 of 64 elements)")
