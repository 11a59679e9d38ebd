"""Training in torch, where the optimizer is what differs.

Timed are whole steps, of forward, backward, update and zero_grad; or the optimizer's step alone, which finds the
caches, the gradients and the heap as the backward pass leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sgdcore._arrays import Array
from sgdcore.bench.cases import HYPERS, Case

__all__ = ["IN_BACKWARD", "StepInTraining", "Training", "of", "variants"]

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


def _resnet50() -> tuple[Any, Any]:
    """ResNet-50 (He et al., 2016, arXiv 1512.03385; stride in the 3 x 3 convolutions), for small images."""
    import torch

    nn = torch.nn

    def convolution(inputs: int, outputs: int, width: int, stride: int = 1) -> list[Any]:
        pad = width // 2
        return [
            nn.Conv2d(inputs, outputs, width, stride, pad, bias=False),
            nn.BatchNorm2d(outputs),
        ]

    class Bottleneck(nn.Module):
        def __init__(self, inputs: int, planes: int, stride: int) -> None:
            super().__init__()
            outputs = 4 * planes
            narrow = [*convolution(inputs, planes, 1), nn.ReLU()]
            narrow += [*convolution(planes, planes, 3, stride), nn.ReLU()]
            self.residual = nn.Sequential(*narrow, *convolution(planes, outputs, 1))
            same = inputs == outputs
            self.shortcut = nn.Sequential(
                *([] if same else convolution(inputs, outputs, 1, stride))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.residual(x) + self.shortcut(x))

    layers = [*convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, planes, 2 if block == 0 and planes > 64 else 1))
            inputs = 4 * planes
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*layers), torch.randn(8, 3, 32, 32)


_MODELS = {
    "train-mlp": _mlp,
    "train-cnn": _cnn,
    "train-deep": _deep,
    "step-resnet50": _resnet50,
}


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


class StepInTraining(Training):
    """A training of which the optimizer's step alone is timed; `load` does the rest."""

    def step(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()

    def load(self, index: int) -> None:  # noqa: ARG002
        """Compute new gradients."""
        self.optimizer.zero_grad()
        self.backward()


def of(case: Case, make: Callable[..., Any], inside: bool) -> Training:
    """Return what is timed in a case of a training workload; see `Training` for the arguments."""
    return (StepInTraining if case.is_step_alone else Training)(case, make, inside)


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
