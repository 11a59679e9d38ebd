"""``python -m sgdcore demo``: train a small neural network on real data with sgdcore.

Written to be read by someone who has a backward pass and wants sgdcore to do the update:

1. `MLP` keeps every weight in one `sgdcore.ParameterBuffer`; its backward pass writes the gradients
   straight into the buffer's views with ``out=``, so that nothing is copied between the two.
2. `train` is the usual loop: forward, loss, backward, ``optimizer.step()``. The learning rate is
   changed between steps through ``optimizer.param_groups``.
3. `compare_steps` sets sgdcore's update beside the same update in plain NumPy (`NumpySGD`), after
   checking that both give the same numbers.

``--distributed`` trains on several workers: demo_distributed.py, beside this, has the loop for that.
The rest is command line, progress and plot. scikit-learn (the data), matplotlib (the plot) and tqdm
(the progress bar) come with the extra ``[demo]``, imported only when the demo runs.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

import sgdcore
from sgdcore._hints import needs

Array = npt.NDArray[Any]
LossFunction = Callable[[Array, Array], tuple[float, Array]]

CLASSES = 10
# Standard deviation of the noise added to training images, whose pixels lie within 1 of each other.
# With so few images the network would otherwise learn them by heart; the held-out accuracy gains
# about one point.
NOISE = 0.3
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C: 128 + SIGINT


class DemoError(Exception):
    """The demo cannot go on: the message is for the user, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# -----------------------------------------------------------------------------
# The network, its losses and its training
# -----------------------------------------------------------------------------


class MLP:
    """A multi-layer perceptron: linear layers ``a @ w + b`` with ReLU between them.

    Args:
        sizes: Width of the input, of every hidden layer and of the output, e.g. ``(64, 128, 10)``.
        dtype: ``"float32"`` or ``"float64"``, for weights and gradients.
        rng: Draws the initial weights: normal with variance 2 / fan-in, which keeps the scale of
            the activations from layer to layer under ReLU (He et al. 2015,
            https://arxiv.org/abs/1502.01852). Biases start at 0.

    Example:
        >>> import numpy as np
        >>> model = MLP((3, 4, 2), "float64", np.random.default_rng(0))
        >>> outputs = model.forward(np.ones((5, 3)))[-1]
        >>> outputs.shape
        (5, 2)
    """

    def __init__(self, sizes: Sequence[int], dtype: str, rng: np.random.Generator) -> None:
        initial: dict[str, Array] = {}
        for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            weight = rng.normal(scale=math.sqrt(2 / fan_in), size=(fan_in, fan_out))
            initial[f"w{number}"] = weight.astype(dtype)
            initial[f"b{number}"] = np.zeros(fan_out, dtype)
        self.shapes = {name: array.shape for name, array in initial.items()}
        # All parameters in one piece of memory and all gradients in another, which one step then
        # goes through in one pass. The initial values are copied into it.
        self.parameters = sgdcore.ParameterBuffer(initial)
        self.layers = [
            (self.parameters[f"w{number}"], self.parameters[f"b{number}"])
            for number in range(1, len(sizes))
        ]

    def forward(self, inputs: Array) -> list[Array]:
        """Return the activations of all layers: first the inputs, last the outputs (no ReLU)."""
        activations = [inputs]
        for weight, bias in self.layers:
            outputs = activations[-1] @ weight.data
            outputs += bias.data
            if len(activations) < len(self.layers):
                np.maximum(outputs, 0, out=outputs)
            activations.append(outputs)
        return activations

    def backward(self, activations: Sequence[Array], delta: Array) -> None:
        """Write the gradient of the loss into the parameter buffer.

        Args:
            activations: What `forward` returned.
            delta: Gradient of the loss in the outputs, shape (batch, outputs).
        """
        for depth in reversed(range(len(self.layers))):
            weight, bias = self.layers[depth]
            inputs = activations[depth]
            # `out=` overwrites the old gradient, so there is nothing to clear between two steps. A
            # backward pass that adds up gradients (`+=`) would need `optimizer.zero_grad()` or
            # `optimizer.step(zero_grad=True)`.
            np.matmul(inputs.T, delta, out=weight.grad)
            np.sum(delta, axis=0, out=bias.grad)
            if depth > 0:
                delta = delta @ weight.data.T
                # These inputs left a ReLU: its slope is 1 where they are positive, else 0.
                delta *= inputs > 0


def cross_entropy(outputs: Array, labels: Array) -> tuple[float, Array]:
    """Return the batch mean of ``-log softmax(outputs)[label]`` and its gradient in the outputs.

    Args:
        outputs: Shape (batch, classes).
        labels: Class numbers, integers of shape (batch,).
    """
    rows = np.arange(len(labels))
    # Shifting a row leaves its softmax as it is, and keeps exp from overflowing.
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    delta = np.exp(shifted)
    total = delta.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, labels]))
    delta /= total
    delta[rows, labels] -= 1
    delta /= len(labels)
    return loss, delta


def mean_squared_error(outputs: Array, labels: Array) -> tuple[float, Array]:
    """Return the batch mean of ``|outputs - onehot(label)|**2 / 2`` and its gradient.

    The factor 1/2 gives the gradient the scale of `cross_entropy`'s, so that one learning rate
    suits both.

    Args:
        outputs: Shape (batch, classes).
        labels: Class numbers, integers of shape (batch,).
    """
    delta = outputs.copy()
    delta[np.arange(len(labels)), labels] -= 1
    loss = float(np.square(delta).sum()) / (2 * len(labels))
    delta /= len(labels)
    return loss, delta


LOSSES: dict[str, LossFunction] = {"cross-entropy": cross_entropy, "mse": mean_squared_error}


# How the learning rate falls: its factor as a function of the part of the training done, 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
    "none": lambda _: 1.0,
}


@dataclass(frozen=True)
class Digits:
    """Images, one flat row each, and their labels: a training part and a held-out test part."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load_digits(dtype: str, seed: int) -> Digits:
    """Return scikit-learn's 1797 handwritten digits, centred, a fifth of each class held out.

    Images of 8 x 8 pixels, bundled with scikit-learn: the test set of
    https://archive.ics.uci.edu/ml/datasets/Optical+Recognition+of+Handwritten+Digits
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(dtype)  # pixels are counts from 0 to 16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    # Inputs around 0 allow a larger learning rate. The mean is the training images': the test
    # images stay unseen.
    mean = train_images.mean(axis=0)
    return Digits(train_images - mean, train_labels, test_images - mean, test_labels)


@dataclass(frozen=True)
class Record:
    """The state of the network after `epoch` epochs, on all training and all test images."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float


@dataclass
class History:
    """The course of a training: one record before the first epoch and after each, and the time.

    `train` fills the history as it goes, so it is consistent whenever the training is interrupted.
    """

    records: list[Record] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def evaluate(model: MLP, data: Digits, loss_function: LossFunction, epoch: int) -> Record:
    """Return the record of the network's present state."""
    train_outputs = model.forward(data.train_images)[-1]
    test_outputs = model.forward(data.test_images)[-1]
    return Record(
        epoch,
        train_loss=loss_function(train_outputs, data.train_labels)[0],
        train_accuracy=float(np.mean(train_outputs.argmax(axis=1) == data.train_labels)),
        test_accuracy=float(np.mean(test_outputs.argmax(axis=1) == data.test_labels)),
    )


def train(
    model: MLP,
    optimizer: sgdcore.SGD,
    data: Digits,
    *,
    loss_function: LossFunction,
    schedule: Callable[[float], float],
    epochs: int,
    batch_size: int,
    rng: np.random.Generator,
    history: History,
    progress: Progress,
) -> None:
    """Train with mini-batches drawn anew each epoch, recording every epoch in `history`.

    Raises:
        DemoError: The loss is no longer finite.
    """
    base_lr = optimizer.param_groups[0]["lr"]
    count = len(data.train_labels)
    total_steps = epochs * math.ceil(count / batch_size)
    history.records.append(evaluate(model, data, loss_function, epoch=0))
    began = perf_counter()
    # Before the loss becomes non-finite, NumPy would warn about every overflow. The check below
    # reports it once.
    with np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(1, epochs + 1):
            order = rng.permutation(count)
            for first in range(0, count, batch_size):
                lr = base_lr * schedule(history.steps / total_steps)
                optimizer.param_groups[0]["lr"] = lr
                batch = order[first : first + batch_size]
                images = data.train_images[batch]
                images += NOISE * rng.standard_normal(images.shape, images.dtype.type)
                activations = model.forward(images)
                loss, delta = loss_function(activations[-1], data.train_labels[batch])
                check_finite(loss, epoch, lr)
                model.backward(activations, delta)
                optimizer.step()
                history.steps += 1
                history.seconds = perf_counter() - began
                progress.step()
            record = evaluate(model, data, loss_function, epoch)
            check_finite(record.train_loss, epoch, lr)
            history.records.append(record)
            progress.epoch(record)


def check_finite(loss: float, epoch: int, lr: float) -> None:
    """Raise a `DemoError` if the loss is infinite or no number."""
    if not math.isfinite(loss):
        raise DemoError(
            f"training diverged: the loss is {loss} in epoch {epoch} (learning rate {lr:.4g}); "
            "try a smaller --lr"
        )


# -----------------------------------------------------------------------------
# The same update in NumPy, and the time of both
# -----------------------------------------------------------------------------


class NumpySGD:
    """The update of `sgdcore.SGD` in plain NumPy, in place and without allocating, for comparison.

    With g the gradient and b the momentum of a parameter p, which starts as the first g::

        g = g + weight_decay * p
        b = momentum * b + (1 - dampening) * g
        p = p - lr * (g + momentum * b  if nesterov else  b)

    Args:
        parameters: Arrays to update.
        gradients: Their gradients, of the same shapes and dtypes.
        lr, momentum, dampening, weight_decay, nesterov: As for `sgdcore.SGD`.
    """

    def __init__(
        self,
        parameters: Sequence[Array],
        gradients: Sequence[Array],
        *,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
    ) -> None:
        self.parameters = parameters
        self.gradients = gradients
        self.lr = lr
        self.momentum = momentum
        self.dampening = dampening
        self.weight_decay = weight_decay
        self.nesterov = nesterov
        self.buffers: list[Array | None] = [None] * len(parameters)
        self.scratch = [(np.empty_like(p), np.empty_like(p)) for p in parameters]

    def step(self) -> None:
        """Update every parameter once."""
        for number, (p, g) in enumerate(zip(self.parameters, self.gradients, strict=True)):
            decayed, product = self.scratch[number]
            if self.weight_decay:
                np.multiply(p, self.weight_decay, out=decayed)
                decayed += g
                g = decayed
            if self.momentum:
                b = self.buffers[number]
                if b is None:
                    b = self.buffers[number] = g.copy()
                else:
                    b *= self.momentum
                    if self.dampening:
                        np.multiply(g, 1 - self.dampening, out=product)
                        b += product
                    else:
                        b += g
                if self.nesterov:
                    np.multiply(b, self.momentum, out=product)
                    product += g
                    g = product
                else:
                    g = b
            np.multiply(g, self.lr, out=product)
            p -= product


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of one step: sgdcore, NumPy array by array, NumPy on one flat array."""

    sgdcore: float
    numpy: float
    numpy_flat: float


def compare_steps(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    options: Mapping[str, Any],
    rng: np.random.Generator,
) -> StepTimes:
    """Check that sgdcore and NumPy agree on parameters of these shapes, then time a step of each.

    NumPy runs twice: over the separate arrays, as one writes it, and over all of them laid end to
    end, which spares it the calls per array. The contenders take turns, so that all see the same
    state of the machine; the median over the turns counts.

    Args:
        shapes: Name and shape of every parameter.
        dtype: ``"float32"`` or ``"float64"``.
        options: Hyperparameters of `sgdcore.SGD`.
        rng: Draws parameters and gradients.

    Raises:
        DemoError: sgdcore and NumPy give different parameters.
    """
    values = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    slopes = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}

    fused = sgdcore.ParameterBuffer(values)
    for name, slope in slopes.items():
        fused[name].grad = slope  # copied into the buffer
    optimizer = sgdcore.SGD(fused, **options)
    separate = NumpySGD([v.copy() for v in values.values()], list(slopes.values()), **options)
    flat_values, flat_slopes = (
        np.concatenate([array.ravel() for array in arrays.values()]) for arrays in (values, slopes)
    )
    flat = NumpySGD([flat_values.copy()], [flat_slopes], **options)

    for _ in range(3):  # the first step starts the momentum, the later ones continue it
        optimizer.step()
        separate.step()
        flat.step()
    ours = np.concatenate([fused[name].data.ravel() for name in shapes])
    tolerance = 100 * float(np.finfo(dtype).eps)
    for theirs in (np.concatenate([p.ravel() for p in separate.parameters]), flat.parameters[0]):
        if not np.allclose(
            ours, theirs, rtol=tolerance, atol=tolerance * float(np.abs(ours).max())
        ):
            difference = float(np.abs(ours - theirs).max())
            raise DemoError(
                f"sgdcore and NumPy disagree after three steps, by up to {difference:.3g}"
            )

    timers = [timeit.Timer(contender.step) for contender in (optimizer, separate, flat)]
    once = timers[1].timeit(1)
    calls = max(1, min(100, int(1e-3 / once)))  # a turn of a millisecond or more
    rounds = max(5, min(41, int(1 / (calls * once))))  # a second or so for each
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for timer, taken in zip(timers, times, strict=True):
            taken.append(timer.timeit(calls) / calls)
        # The gradient never changes here, so the parameters would grow until they overflow.
        for name, value in values.items():
            fused[name].data[...] = value
        for parameter, value in zip(separate.parameters, values.values(), strict=True):
            parameter[...] = value
        flat.parameters[0][...] = flat_values
    return StepTimes(*(float(np.median(taken)) for taken in times))


# -----------------------------------------------------------------------------
# Command line, progress and plot
# -----------------------------------------------------------------------------

Number = TypeVar("Number", int, float)


def _number(
    kind: Callable[[str], Number], meaning: str, accept: Callable[[Number], bool]
) -> Callable[[str], Number]:
    """Return an argparse type for numbers that `accept` takes; `meaning` names them in the message."""

    def read(text: str) -> Number:
        try:
            number = kind(text)
            good = accept(number)
        except ValueError:
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"must be {meaning}, got {text!r}")
        return number

    return read


_positive = _number(int, "a whole number of at least 1", lambda n: n >= 1)
# scikit-learn's seeds have 32 bits.
_seed = _number(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
_rate = _number(float, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
_fraction = _number(float, "a number of at least 0 and below 1", lambda x: 0 <= x < 1)


def _plot_path(text: str) -> Path:
    """Read the argument of ``--plot``. Refuse at once a path that cannot be written."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    # The file is opened, since permissions tell nothing for root or on a read-only disk. It is
    # opened to append, which leaves an existing file as it is.
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink(missing_ok=True)  # several ranks may do this at the same time
    except OSError as error:
        problem = f"must be writable, got {text!r} ({error.strerror})"
        raise argparse.ArgumentTypeError(problem) from error
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`. `main` takes the parsed arguments."""
    network = parser.add_argument_group("network and loss")
    network.add_argument(
        "--hidden",
        type=_positive,
        nargs="+",
        default=[128],
        metavar="WIDTH",
        help="width of each hidden layer (default: 128)",
    )
    network.add_argument(
        "--loss", choices=LOSSES, default="cross-entropy", help="default: %(default)s"
    )
    network.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=_positive, default=60, metavar="N", help="default: %(default)s"
    )
    training.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s"
    )
    training.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of split, initial weights, noise and order of the batches (default: %(default)s)",
    )
    training.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads of sgdcore (default: its own choice)",
    )
    workers = parser.add_argument_group("several workers")
    workers.add_argument(
        "--distributed",
        action="store_true",
        help="train on the ranks that torchrun or mpiexec started, each on its shard of the images "
        "with batches of its own",
    )
    workers.add_argument(
        "--sync-every",
        type=_positive,
        default=16,
        metavar="H",
        help="average the parameters of the ranks every H steps; 1: their gradients in each step "
        "(default: %(default)s)",
    )
    optimizer = parser.add_argument_group("optimizer (the arguments of sgdcore.SGD)")
    optimizer.add_argument(
        "--lr", type=_rate, default=0.2, metavar="RATE", help="learning rate (default: %(default)s)"
    )
    optimizer.add_argument(
        "--lr-decay",
        choices=SCHEDULES,
        default="cosine",
        help="to 0 along a cosine, in steps of a tenth at 1/2 and 3/4, or not at all "
        "(default: %(default)s)",
    )
    optimizer.add_argument(
        "--momentum", type=_fraction, default=0.9, metavar="M", help="default: %(default)s"
    )
    optimizer.add_argument(
        "--dampening", type=_fraction, default=0.0, metavar="D", help="default: %(default)s"
    )
    optimizer.add_argument(
        "--nesterov",
        action=argparse.BooleanOptionalAction,
        help="default: on where it is defined, which is with momentum and without dampening",
    )
    optimizer.add_argument(
        "--weight-decay", type=_rate, default=1e-4, metavar="W", help="default: %(default)s"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--plot",
        type=_plot_path,
        default="sgdcore-demo.png",
        metavar="PATH",
        help="PNG of loss and accuracy to write (default: %(default)s)",
    )
    output.add_argument(
        "--no-plot", dest="plot", action="store_const", const=None, help="write no PNG"
    )
    output.add_argument("--quiet", action="store_true", help="no progress, only the results")


def import_extras(plot: bool) -> None:
    """Import the packages that the demo needs beside NumPy, or say in one line how to install them."""
    modules = {"sklearn": "scikit-learn", "tqdm": "tqdm"}
    if plot:
        modules |= {"matplotlib.backends.backend_agg": "matplotlib"}
    for module, name in modules.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise DemoError(needs("the demo", name, "demo", error)) from error


class Progress:
    """Progress on standard error: a bar in a terminal, else a line every few epochs."""

    def __init__(self, epochs: int, steps: int, quiet: bool) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            # Without the name and the speed, loss and accuracy fit into 80 columns.
            bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
            file=sys.stderr,
            disable=quiet or not terminal,
        )
        self._lines = not quiet and not terminal
        self._epochs = epochs
        self._every = max(1, epochs // 8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def step(self) -> None:
        """Count one step."""
        self._bar.update()

    def epoch(self, record: Record) -> None:
        """Show the state after an epoch."""
        state = f"loss {record.train_loss:.4f}, test accuracy {100 * record.test_accuracy:.1f} %"
        self._bar.set_postfix_str(state)
        last = record.epoch == self._epochs
        if self._lines and (record.epoch % self._every == 0 or last):
            print(f"epoch {record.epoch}/{self._epochs}: {state}", file=sys.stderr, flush=True)


def write_plot(path: Path, history: History, title: str, loss_label: str) -> None:
    """Write a PNG with the loss (left) and the accuracies (right) over the epochs.

    Raises:
        DemoError: The file cannot be written.
    """
    # Figure and Agg canvas are made by hand: that needs no display, and leaves pyplot's global
    # state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)

    records = history.records
    left.plot([r.epoch for r in records], [r.train_loss for r in records], marker=".")
    left.set(title="Loss", ylabel=loss_label, yscale="log")

    # The accuracy before the first epoch is that of guessing. The curve would look flat on a scale
    # that includes it.
    records = history.records[1:] or history.records
    epochs = [r.epoch for r in records]
    right.plot(epochs, [r.train_accuracy for r in records], marker=".", label="training images")
    right.plot(epochs, [r.test_accuracy for r in records], marker=".", label="test images")
    right.set(title="Accuracy", ylabel="correctly classified")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)

    image = BytesIO()  # so that an interrupt or an error while drawing leaves no half a file
    figure.savefig(image, format="png", dpi=120)
    try:
        path.write_bytes(image.getvalue())
    except OSError as error:
        raise DemoError(f"cannot write the plot: {error}") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use `count` threads inside, if given, and the former number afterwards."""
    if count is None:
        yield
        return
    before = sgdcore.get_num_threads()
    sgdcore.set_num_threads(count)
    try:
        yield
    finally:
        sgdcore.set_num_threads(before)


def _say(line: str) -> None:
    """Print a result and flush, which keeps the order with the progress on standard error."""
    print(line, flush=True)


def _resolve_nesterov(args: argparse.Namespace) -> bool:
    """Return whether to use Nesterov momentum. By default it is used wherever it is defined."""
    defined = args.momentum > 0 and args.dampening == 0
    if args.nesterov and not defined:
        raise DemoError(
            "argument --nesterov: needs --momentum above 0 and --dampening 0, "
            f"got --momentum {args.momentum} and --dampening {args.dampening}",
            exit_code=2,
        )
    return defined if args.nesterov is None else bool(args.nesterov)


@dataclass(frozen=True)
class Workers:
    """The part of the demo that differs on several ranks."""

    rank: int
    size: int
    train: Callable[..., None]  # takes the place of `train`, with its arguments
    averaged: str  # what is averaged when


def run(args: argparse.Namespace, workers: Workers | None = None) -> int:
    """Train and report, alone or as one of several ranks, and return the exit code."""
    options = {
        "lr": args.lr,
        "momentum": args.momentum,
        "dampening": args.dampening,
        "weight_decay": args.weight_decay,
        "nesterov": _resolve_nesterov(args),
    }
    import_extras(plot=args.plot is not None)

    rng = np.random.default_rng(args.seed)
    data = load_digits(args.dtype, args.seed)
    sizes = (data.train_images.shape[1], *args.hidden, CLASSES)
    model = MLP(sizes, args.dtype, rng)
    optimizer = sgdcore.SGD(model.parameters, **options)
    network = f"MLP {'-'.join(map(str, sizes))}"
    what = f"{model.parameters.size:,} {args.dtype} parameters in {len(model.shapes)} arrays"
    if not args.quiet:
        _say(
            f"{network}, {what}, {args.loss} loss; "
            f"{len(data.train_labels)} digits to train on, {len(data.test_labels)} held out"
        )

    history = History()
    finished = _run_training(args, workers, model, optimizer, data, rng, history)
    _report_training(history, args.epochs, finished)
    if workers is None or workers.rank == 0:
        if finished:
            try:
                _report_steps(compare_steps(model.shapes, args.dtype, options, rng), what)
            except KeyboardInterrupt:
                finished = False
                _say("Interrupted while timing the optimizer step")
        if args.plot is not None:
            finished &= _report_plot(args.plot, history, network, args.loss)
    return 0 if finished else INTERRUPTED


def _run_training(
    args: argparse.Namespace,
    workers: Workers | None,
    model: MLP,
    optimizer: sgdcore.SGD,
    data: Digits,
    rng: np.random.Generator,
    history: History,
) -> bool:
    """Train and fill `history`. Return False if Ctrl-C ended the training.

    Raises:
        KeyboardInterrupt: Ctrl-C came before there was anything to report.
    """
    samples = len(data.train_labels)
    train_function: Callable[..., None] = train
    if workers is not None:
        samples = math.ceil(samples / workers.size)
        train_function = workers.train
        if not args.quiet:
            _say(
                f"{workers.size} ranks, {workers.averaged}; "
                f"each with {samples} digits in batches of {args.batch_size}"
            )
    steps = args.epochs * math.ceil(samples / args.batch_size)
    try:
        with Progress(args.epochs, steps, args.quiet) as progress:
            train_function(
                model,
                optimizer,
                data,
                loss_function=LOSSES[args.loss],
                schedule=SCHEDULES[args.lr_decay],
                epochs=args.epochs,
                batch_size=args.batch_size,
                rng=rng,
                history=history,
                progress=progress,
            )
    except KeyboardInterrupt:
        if not history.records:
            raise
        return False
    return True


def _report_training(history: History, epochs: int, finished: bool) -> None:
    last = history.records[-1]
    _say(
        f"{'Trained' if finished else 'Interrupted after'} {last.epoch} of {epochs} epochs "
        f"({history.steps} steps) in {history.seconds:.1f} s: "
        f"test accuracy {100 * last.test_accuracy:.1f} %, "
        f"training accuracy {100 * last.train_accuracy:.1f} %, loss {last.train_loss:.4f}"
    )


def _report_steps(times: StepTimes, what: str) -> None:
    isa = sgdcore.build_info()["isa"]
    threads = sgdcore.get_num_threads()
    limit = "1 thread" if threads == 1 else f"at most {threads} threads"
    _say(f"One optimizer step ({what}; {isa}, {limit}), median:")
    _say(f"  sgdcore                {1e6 * times.sgdcore:10.2f} us")
    for name, seconds in (
        ("NumPy, array by array", times.numpy),
        ("NumPy, one flat array", times.numpy_flat),
    ):
        _say(f"  {name}  {1e6 * seconds:10.2f} us  {seconds / times.sgdcore:6.1f} x sgdcore's time")


def _report_plot(path: Path, history: History, network: str, loss: str) -> bool:
    """Write the plot. Return False if Ctrl-C came meanwhile; only a second Ctrl-C prevents the plot."""
    title = f"{network} on handwritten digits, sgdcore.SGD"
    loss_label = f"{loss} on training images"
    finished = True
    try:
        write_plot(path, history, title, loss_label)
    except KeyboardInterrupt:
        finished = False
        write_plot(path, history, title, loss_label)
    _say(f"Plot: {path}")
    return finished


def main(args: argparse.Namespace, run: Callable[[argparse.Namespace], int] = run) -> int:
    """Run the demo with the arguments that `add_arguments` declares, and return the exit code.

    0: done; 1: an extra is missing, the training diverged, or the output could not be written; 2:
    arguments that do not go together; 130: interrupted by Ctrl-C, after a summary of what was done.
    """
    try:
        with _threads(args.threads):
            return run(args)
    except DemoError as error:
        print(f"sgdcore demo: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sgdcore demo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`head`, `less`) has left, so nothing can be reported. The buffered
        # text must not raise again when the interpreter flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
