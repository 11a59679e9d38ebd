"""Trains a CNN and a small transformer in bfloat16 on the digits, with each precision of the parameters.

Run ``python benchmarks/precision_digits.py [--seeds 5] [--epochs 20] [--plot FILE]``. Printed are the final losses and
accuracies on the held-out fifth, as means over the seeds and standard deviations between them. Each seed has its own
split, its own first parameters and its own order of the images, the same for all precisions. The learning rate falls to
zero along a cosine, so that the last updates are smaller than half a unit of bfloat16's last place.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sgdcore
from sgdcore.demo import load_digits

HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
BATCH = 64

METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any], torch.dtype]] = {
    "float32": (sgdcore.torch.SGD, {}, torch.float32),
    "split": (sgdcore.torch.SGD, {"precision": "split"}, torch.bfloat16),
    "kahan": (sgdcore.torch.SGD, {"precision": "kahan"}, torch.bfloat16),
    "stochastic": (sgdcore.torch.SGD, {"precision": "stochastic"}, torch.bfloat16),
    "plain bfloat16": (sgdcore.torch.SGD, {}, torch.bfloat16),
    "torch.optim.SGD, bfloat16": (torch.optim.SGD, {}, torch.bfloat16),
}


class Transformer(nn.Module):
    """The rows of an image are a sequence of eight tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width) * 0.1)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 64, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.view(-1, 8, 8)) + self.place
        logits: Tensor = self.head(self.layers(tokens).mean(1))
        return logits


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"CNN": cnn, "transformer": Transformer}


def train(model_name: str, method: str, seed: int, epochs: int) -> tuple[float, float]:
    """Return the training loss and the test accuracy at the end."""
    data = load_digits("float32", seed)
    make, options, dtype = METHODS[method]
    torch.manual_seed(seed)
    model = MODELS[model_name]().to(dtype)
    optimizer = make(model.parameters(), **HYPER, **options)
    images, tests = (torch.from_numpy(a).to(dtype) for a in (data.train_images, data.test_images))
    labels, test_labels = (torch.from_numpy(a) for a in (data.train_labels, data.test_labels))
    order = torch.Generator().manual_seed(seed)
    total, step = epochs * math.ceil(len(images) / BATCH), 0
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(images), generator=order), BATCH):
            optimizer.param_groups[0]["lr"] = (
                HYPER["lr"] * (1 + math.cos(math.pi * step / total)) / 2
            )
            loss = nn.functional.cross_entropy(model(images[chosen]).float(), labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    with torch.no_grad():
        final = float(nn.functional.cross_entropy(model(images).float(), labels))
        accuracy = float((model(tests).argmax(1) == test_labels).float().mean())
    return final, accuracy


def plot(results: dict[tuple[str, str], list[tuple[float, float]]], file: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(MODELS), figsize=(10, 3.2), layout="constrained")
    for axis, model in zip(axes, MODELS, strict=True):
        for i, method in enumerate(METHODS):
            losses = [loss for loss, _ in results[model, method]]
            axis.plot(losses, [i] * len(losses), "o", alpha=0.5)
            axis.plot([statistics.mean(losses)], [i], "k|", markersize=14)
        axis.set_yticks(range(len(METHODS)), list(METHODS) if axis is axes[0] else [])
        axis.set(title=model, xlabel="final training loss", ylim=(len(METHODS) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plot", metavar="FILE", help="draw the losses (needs matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; {options.seeds} seeds, {options.epochs} epochs, {HYPER}")
    print(f"{'model':12} {'parameters':26} {'training loss':>18} {'test accuracy, %':>18}")
    results: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for model in MODELS:
        for method in METHODS:
            found = [train(model, method, seed, options.epochs) for seed in range(options.seeds)]
            results[model, method] = found
            losses, accuracies = zip(*found, strict=True)
            spread = statistics.stdev if len(found) > 1 else lambda _: 0.0
            print(
                f"{model:12} {method:26} {statistics.mean(losses):10.4f} ± {spread(losses):.4f}"
                f" {100 * statistics.mean(accuracies):10.2f} ± {100 * spread(accuracies):.2f}",
                flush=True,
            )
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
