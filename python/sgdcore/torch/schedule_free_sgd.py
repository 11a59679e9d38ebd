"""Schedule-free stochastic gradient descent, for torch parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from sgdcore._options import Options
from sgdcore.reference import schedule_free_numbers
from sgdcore.schedule_free_sgd import PROGRESS, check_schedule_free, refuse_averages
from sgdcore.torch._compile import not_compiled
from sgdcore.torch.optimizer import Optimizer, number_of

__all__ = ["ScheduleFreeSGD"]


class ScheduleFreeSGD(Optimizer):
    """Schedule-free SGD for torch parameters on the CPU and CUDA: an average takes the place of a schedule.

    There are three sequences: SGD's iterates z, their weighted average x, and y between the two, where the gradients
    are taken. In training the parameters hold y, and the state holds z. `eval` makes the parameters x, for an
    evaluation or to save the model, and `train` makes them y again. The optimizer begins in training; a step in eval
    mode is refused.

    One step first computes for each group, in float64, from the numbers k, weight_sum and lr_max of the group::

        lr = lr * (k + 1) / warmup_steps                if k + 1 < warmup_steps
        lr_max = max(lr_max, lr)
        weight = (k + 1)**r * lr_max**weight_lr_power
        weight_sum = weight_sum + weight
        c = weight / weight_sum
        k = k + 1

    The step keeps the last four in the group: a checkpoint has them, a step that fails or is left out changes none.
    ``group["lr"]`` stays as it is. Then, for each parameter y with gradient g and iterate z, all of one shape::

        g = -g                                          if maximize
        g = fma(weight_decay, y, g)                     if weight_decay != 0
        y = fma(c, round(z - y), y)                     if c < 0.5; z starts as y
        y = fma(c - 1, round(z - y), z)                 if c >= 0.5
        y = fma(lr * (momentum * (1 - c) - 1), g, y)
        z = fma(-lr, g, z)

    ``fma(x, y, z)`` is x * y + z, rounded once. bfloat16 and float16 are computed in float32 and rounded once per
    stored value. The bits are those of `sgdcore.ScheduleFreeSGD` over the same memory.

    The numbers of a step are computed on the host: a learning rate on a device is waited for, as is a GradScaler's
    ``found_inf``, and a step is not captured in a CUDA graph.

    Batch normalization: the statistics that a model collects in training are those of y. Before an evaluation, call
    `eval` and let the model see some batches in its training mode.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups, as in torch.
        lr: learning rate, >= 0; a number or a tensor of one element. Default 1.0. A larger one than SGD's with a
            schedule is usually best, by 10 to 50 times.
        momentum: where between z and x gradients are taken, > 0 and < 1. Default 0.9.
        weight_decay: L2 penalty at y, a number or a tensor of one element, >= 0. On the parameters' CUDA device it is
            read there. Default 0.
        warmup_steps: the number of steps over which the learning rate grows linearly, >= 0. Default 0.
        r: the power of the step's number in its weight in the average, >= 0. Default 0.
        weight_lr_power: the power of the largest learning rate so far in the weight, >= 0. Default 2.
        maximize: ascend instead of descend. Default False.
        z_dtype: type of new z, one of float64, float32, float16, bfloat16, or its name; the parameter's if None. z
            moves by single steps, which 16 bits often round away.
        **options: clip_value, which every optimizer takes; `sgdcore.Options` explains it.

    Raises:
        ValueError, TypeError: for hyperparameters out of range or of the wrong kind, or if there is an `average`.
        RuntimeError: by `step`, in eval mode.

    Source: Defazio et al., "The Road Less Scheduled", NeurIPS 2024 (arXiv 2405.15682), in the form of the package
    schedulefree, whose checkpoints load. Its optimizer begins in eval mode, writes the decayed gradient to ``.grad``,
    and rounds each product; here the optimizer begins in training, and `train` restores y in every bit.
    """

    rule = "schedule_free_sgd"

    @not_compiled
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0,
        warmup_steps: float = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        *,
        maximize: bool = False,
        z_dtype: torch.dtype | str | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "maximize": maximize,
            **PROGRESS,
        }
        refuse_averages(options)
        super().__init__(params, defaults, {"z_dtype": z_dtype}, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_schedule_free(group, number_of)
        super()._check_group(group)
        if group.get("sparse_mode", "dense") != "dense":
            raise ValueError(
                "sparse_mode: ScheduleFreeSGD averages all rows in each step; expected 'dense', got "
                f"{group['sparse_mode']!r}"
            )

    @torch.no_grad()
    @not_compiled
    def eval(self) -> None:
        """Make the parameters the average x, for an evaluation or to save the model. In eval mode nothing happens.

        ::

            x = round(y + round((1 - 1 / momentum) * round(z - y)))

        Each parameter's y is kept in its state, under the key ``"y"``, until `train` is called. Parameters that have
        taken no step stay as they are.
        """
        for group in self.param_groups:
            if group["train_mode"]:
                weight = 1 - 1 / float(group["momentum"])
                for parameter in group["params"]:
                    state = self._state.get(parameter, {})
                    if "z" in state:
                        state["y"] = parameter.detach().clone()
                        parameter.copy_(_moved_toward(parameter, state["z"], weight))
                group["train_mode"] = False

    @torch.no_grad()
    @not_compiled
    def train(self) -> None:
        """Make the parameters y again, for further steps. In training nothing happens.

        y is what it was when `eval` was called, in every bit. A parameter that has another value than `eval` gave it,
        such as a loaded one, is taken for x, and ``y = round(x + round((1 - momentum) * round(z - x)))``.
        """
        for group in self.param_groups:
            if not group["train_mode"]:
                momentum = float(group["momentum"])
                for parameter in group["params"]:
                    state = self._state.get(parameter, {})
                    if "z" in state:
                        y, z = state.pop("y", None), state["z"]
                        if y is None or not _same(parameter, _moved_toward(y, z, 1 - 1 / momentum)):
                            y = _moved_toward(parameter, z, 1 - momentum)
                        parameter.copy_(y)
                group["train_mode"] = True

    @staticmethod
    def by_operations(
        parameter: Tensor, grad: Tensor, states: list[Tensor | None], group: dict[str, Any]
    ) -> list[Tensor | None]:
        """Update a tensor by torch's operations; see `Optimizer.by_operations`."""
        numbers = schedule_free_numbers(**group)
        lr, c = numbers["lr"], numbers["c"]
        grad = -grad if group["maximize"] else grad
        if group["weight_decay"] != 0:
            grad = grad.add(parameter, alpha=float(group["weight_decay"]))
        z = parameter.detach().clone() if states[0] is None else states[0]
        parameter.add_(z - parameter, alpha=c)
        parameter.add_(grad, alpha=lr * (group["momentum"] * (1 - c) - 1))
        z.add_(grad, alpha=-lr)
        return [z]


def _moved_toward(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Return `reference.moved_toward` of tensors. Its operations round alike on every device."""
    wide = torch.float64 in (start.dtype, end.dtype) or start.dtype == torch.complex128
    compute = torch.float64 if wide else torch.float32
    if start.is_complex():
        compute = torch.complex128 if wide else torch.complex64
    a, b = start.to(compute), end.to(compute)
    return (a + (b - a) * weight).to(start.dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal, where a NaN equals a NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
