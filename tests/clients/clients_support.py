"""What the tests of training libraries share: one small task, the combinations, and the comparison of two runs.

Each library trains with sgdcore.torch.SGD and with torch.optim.SGD, and every loss and parameter is compared in its
bits. For 16-bit weights, where torch rounds after every operation, `OneRounding` takes torch.optim.SGD's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import sgdcore
from torch_support import assert_same_bits

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
EPOCHS = 3
# float16's largest gradients are beyond its range at first, so that a few steps are left out.
INITIAL_SCALE = 2.0**20

CLIPPING: dict[str, tuple[str, float] | None] = {
    "not clipped": None,
    "by norm": ("norm", 0.3),
    "by value": ("value", 0.02),
}
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


def combinations(test: Any) -> Any:
    """Run a test with each precision, way to clip, and number of batches that make a step."""
    for mark in (
        pytest.mark.parametrize("accumulate", [1, 2]),
        pytest.mark.parametrize("clip", CLIPPING.values(), ids=CLIPPING),
        pytest.mark.parametrize("precision", PRECISIONS),
        # The libraries', of what they find missing or outdated.
        pytest.mark.filterwarnings("ignore"),
    ):
        test = mark(test)
    return test


class Network(torch.nn.Module):
    """A classifier whose forward pass returns the loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        )

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = x.to(self.layers[0].weight.dtype)
        return {"loss": torch.nn.functional.cross_entropy(self.layers(x).float(), labels)}


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 8, generator=generator)
    labels = torch.randint(0, 4, (48,), generator=generator)
    return [{"x": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def batches() -> torch.utils.data.DataLoader[Any]:
    data: Any = examples()
    return torch.utils.data.DataLoader(data, batch_size=8)


def grad_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE)


@dataclass
class Run:
    """What one training run left behind."""

    model: torch.nn.Module
    scaler: torch.amp.GradScaler | None
    losses: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # learning rates after each step


class OneRounding(torch.optim.SGD):
    """SGD over 16-bit parameters as sgdcore promises it: torch.optim.SGD in float32, each stored value rounded once."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyper = {name: group[name] for name in HYPER}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_in_float32(parameter, hyper)
        return loss

    def _step_in_float32(self, parameter: Tensor, hyper: dict[str, float]) -> None:
        wide = torch.nn.Parameter(parameter.detach().float())
        assert parameter.grad is not None
        wide.grad = parameter.grad.float()
        optimizer = torch.optim.SGD([wide], foreach=False, **hyper)
        if parameter in self.state:
            optimizer.state[wide]["momentum_buffer"] = self.state[parameter][
                "momentum_buffer"
            ].float()
        optimizer.step()
        parameter.data.copy_(wide.detach())
        momentum = optimizer.state[wide]["momentum_buffer"]
        self.state[parameter]["momentum_buffer"] = momentum.to(parameter.dtype)


def assert_trains_as_torch(precision: str, train: Callable[[Any], Run]) -> None:
    """Train with each optimizer's class and compare the runs."""
    ours = train(sgdcore.torch.SGD)
    theirs = train(OneRounding if precision == "bf16-true" else torch.optim.SGD)
    assert len(ours.losses) == len(theirs.losses) == EPOCHS * 6
    for i, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        assert_same_bits(a, b, f"loss {i}")
    assert ours.rates == theirs.rates
    names = zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True)
    for (name, p), q in names:
        assert p.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
        assert_same_bits(p, q, name)
    changed = [
        not torch.equal(p.float(), q)
        for p, q in zip(ours.model.parameters(), Network().parameters(), strict=True)
    ]
    assert all(changed)
    assert (ours.scaler is not None) == (precision == "16-mixed")
    if ours.scaler is not None and theirs.scaler is not None:
        assert ours.scaler.get_scale() == theirs.scaler.get_scale() < INITIAL_SCALE
