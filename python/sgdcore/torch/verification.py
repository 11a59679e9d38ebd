"""A check for a user's own model: whether all bits are those of torch.optim.SGD, and the time of both."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgdcore import _core
from sgdcore.torch.sgd import SGD

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        steps: the number of steps taken.
        difference: None if every bit was equal; else the first difference, in words.
        torch_seconds, sgdcore_seconds: median time of ``optimizer.step()``.
    """

    steps: int
    difference: str | None
    torch_seconds: float
    sgdcore_seconds: float

    @property
    def equal(self) -> bool:
        """Whether parameters, momentum and losses were equal in every bit after every step."""
        return self.difference is None

    def __str__(self) -> str:
        bits = "every bit equal" if self.equal else f"first difference: {self.difference}"
        return (
            f"{self.steps} steps, {bits}; optimizer.step(): torch {self.torch_seconds * 1e6:.1f} us, "
            f"sgdcore {self.sgdcore_seconds * 1e6:.1f} us (medians), "
            f"{self.torch_seconds / self.sgdcore_seconds:.2f} times"
        )


def _default_loss(model: torch.nn.Module, batch: Any) -> Tensor:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise TypeError(
            f"batches: expected pairs of inputs and class indices, got a {type(batch).__name__}; pass a loss_fn(model, "
            "batch) for other batches"
        )
    inputs, targets = batch
    return torch.nn.functional.cross_entropy(model(inputs), targets)


def _numbered(batches: Callable[[int], Any] | Iterable[Any], steps: int) -> Iterator[Any]:
    """Yield a batch for each step; fewer from an iterator that ends."""
    if callable(batches):
        yield from map(batches, range(steps))
        return
    try:
        batches_now = iter(batches)
    except TypeError:
        raise TypeError(
            f"batches: expected a function of the step's number, or an iterable of batches, got {batches!r}"
        ) from None
    for number in range(steps):
        try:
            batch = next(batches_now)
        except StopIteration:
            # An iterable begins again; an iterator has no more batches.
            batches_now = iter(batches)
            try:
                batch = next(batches_now)
            except StopIteration:
                if number == 0:
                    raise ValueError(
                        f"batches: expected at least one batch, got {batches!r}"
                    ) from None
                return
        yield batch


def verify(
    model: torch.nn.Module,
    batches: Callable[[int], Any] | Iterable[Any],
    steps: int = 20,
    *,
    loss_fn: Callable[[torch.nn.Module, Any], Tensor] | None = None,
    params_fn: Callable[[torch.nn.Module], Iterable[Any]] | None = None,
    lr: float = 0.01,
    momentum: float = 0.9,
    **hyperparameters: Any,
) -> Verification:
    """Train two copies of a model side by side, with torch.optim.SGD(foreach=False) and with sgdcore.

    Both copies see the same batches and the same random numbers. The model itself is not changed. A model whose
    backward pass is not deterministic differs for reasons of its own: use torch.use_deterministic_algorithms.

    Args:
        model: any module with parameters on the CPU or CUDA devices.
        batches: an iterable of batches, such as a DataLoader, which is begun anew at its end; or a function that
            returns the batch of a step, given its number, from 0.
        steps: how many steps to take; fewer are taken if an iterator ends earlier.
        loss_fn: called with a model and a batch, for a scalar loss; if None, the batch is a pair of
            inputs and class indices, and the loss is the cross-entropy of the model's output.
        params_fn: called with a model, for the parameters or the parameter groups of its optimizer; if None, they
            are the model's parameters.
        lr: learning rate of both optimizers.
        momentum: momentum factor of both.
        **hyperparameters: further arguments of both.

    Returns:
        the first difference, if any, and the time of both.

    Raises:
        TypeError: if `batches` is neither iterable nor callable, `steps` is no integer, or a batch needs a `loss_fn`.
        ValueError: if `steps` is not positive, or there is no batch.
    """
    if not isinstance(steps, int):
        hint = "; a function for the loss is passed as loss_fn=" if callable(batches) else ""
        raise TypeError(f"steps: expected an integer, got {_core.repr_text(steps)}{hint}")
    if steps < 1:
        raise ValueError(f"steps: expected a positive number, got {steps}")
    loss_fn = loss_fn or _default_loss
    params_fn = params_fn or torch.nn.Module.parameters
    models = [copy.deepcopy(model), copy.deepcopy(model)]
    hyperparameters = {"lr": lr, "momentum": momentum, **hyperparameters}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(params_fn(models[0]), foreach=False, **hyperparameters),
        SGD(params_fn(models[1]), **hyperparameters),
    ]
    devices = sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)
    seconds: list[list[float]] = [[], []]
    difference = None
    taken = 0
    for number, batch in enumerate(_numbered(batches, steps)):
        losses = []
        for i, (copied, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            # Both copies draw the same random numbers.
            with torch.random.fork_rng(devices, enabled=i == 0):
                # A loss_fn may remove entries from its batch, so each copy of the model gets its own.
                loss = loss_fn(
                    copied, copy.copy(batch) if isinstance(batch, Mapping | list) else batch
                )
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            start = time.perf_counter()
            optimizer.step()
            seconds[i].append(time.perf_counter() - start)
        taken += 1
        difference = _difference(number, losses, models, optimizers)
        if difference is not None:
            break
    return Verification(taken, difference, *(statistics.median(each) for each in seconds))


def _difference(
    number: int,
    losses: list[Tensor],
    models: list[torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
) -> str | None:
    """Describe the first difference, or return None."""
    pairs = [("loss", losses[0], losses[1])]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        pairs.append((f"parameter '{name}'", a.detach(), b.detach()))
        buffers = [
            optimizer.state.get(p, {}).get("momentum_buffer")
            for optimizer, p in zip(optimizers, (a, b), strict=True)
        ]
        if buffers[0] is not None and buffers[1] is not None:
            pairs.append((f"momentum of '{name}'", buffers[0], buffers[1]))
        elif buffers[0] is not buffers[1]:
            return f"step {number}: only one has a momentum buffer of '{name}'"
    for what, expected, actual in pairs:
        unequal = ~(_bits(expected) == _bits(actual))
        if unequal.any():
            index = tuple(unequal.nonzero()[0].tolist())
            place = f"[{', '.join(map(str, index))}]" if index else ""
            return (
                f"step {number}, {what}{place}: torch {expected[index].item()!r}, sgdcore {actual[index].item()!r} "
                f"({int(unequal.sum())} of {unequal.numel()} elements)"
            )
    return None


def _bits(tensor: Tensor) -> Tensor:
    """Return the elements as integers, so that NaN equals NaN and -0.0 differs from 0.0."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:  # torch leaves such momentum after sparse gradients
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()]
    return tensor.contiguous().view(integer)
