"""Whole training steps in torch: forward, backward, update and zero_grad, where the optimizer's share is what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sgdcore._arrays import Array
from sgdcore.bench.cases import HYPERS, Case

__all__ = ["IN_BACKWARD", "Training", "variants"]

IN_BACKWARD = "sgdcore.torch in backward"


def _mlp() -> tuple[Any, Any]:
    import torch

    nn = torch.nn
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), torch.randn(32, 64)


def _cnn() -> tuple[Any, Any]:
    import torch

    nn = torch.nn
    layers: list[torch.nn.Module] = []
    channels = 1
    for outputs in (16, 32, 32):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        channels = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10)), torch.randn(32, 1, 8, 8)


def _deep() -> tuple[Any, Any]:
    import torch

    nn = torch.nn
    layers = [layer for _ in range(24) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(32, 1024)


_MODELS = {"train-mlp": _mlp, "train-cnn": _cnn, "train-deep": _deep}


class Training:
    """A model and the optimizer that trains it; for `measure` the same as a Contender.

    Args:
        case: of a training workload.
        make: called with the parameters and the hyperparameters, returns the optimizer.
        inside: whether the optimizer steps inside the backward pass.
    """

    kind = "torch"

    def __init__(self, case: Case, make: Callable[..., Any], inside: bool = False) -> None:
        import torch

        import sgdcore.torch

        torch.manual_seed(0)
        self.hyper = HYPERS[case.hyper]
        self.model, self.inputs = _MODELS[case.workload]()
        self.optimizer = make(self.model.parameters(), **self.hyper)
        if inside:
            sgdcore.torch.step_in_backward(self.optimizer)
        self.params = list(self.model.parameters())

    def step(self) -> None:
        """Train for one step."""
        self.backward()
        self.update()

    def backward(self) -> None:
        """Compute the gradients."""
        self.model(self.inputs).square().mean().backward()

    def update(self) -> None:
        """Take the optimizer's step, and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load(self, index: int) -> None:
        """Do nothing: the gradients come from the backward pass."""

    def result(self) -> Iterable[Array]:
        """Return the parameters."""
        return [param.detach().numpy() for param in self.params]

    def gradients(self) -> Iterable[Array]:
        """Return what the backward pass left."""
        return [param.grad.numpy() for param in self.params]


def variants() -> dict[str, tuple[Callable[..., Any], bool]]:
    """Return, by name, how to make each optimizer, and whether it steps inside the backward pass."""
    import torch

    import sgdcore.torch

    sgd = torch.optim.SGD
    return {
        "sgdcore.torch": (sgdcore.torch.SGD, False),
        IN_BACKWARD: (sgdcore.torch.SGD, True),
        "torch loop": (partial(sgd, foreach=False), False),
        "torch foreach": (partial(sgd, foreach=True), False),
        "torch fused": (partial(sgd, fused=True), False),
    }
