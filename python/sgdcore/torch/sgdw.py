"""Stochastic gradient descent with decoupled weight decay, for torch parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from sgdcore._options import Options
from sgdcore.sgd import check_hyperparameters
from sgdcore.torch._compile import not_compiled
from sgdcore.torch.optimizer import Optimizer, number_of
from sgdcore.torch.sgd import SGD

__all__ = ["SGDW"]


class SGDW(Optimizer):
    """Stochastic gradient descent with momentum and decoupled weight decay, for torch parameters on the CPU and CUDA.

    The decay shrinks the parameter by itself. It takes no part in the gradient or the momentum, as it does in `SGD`.

    For each parameter p with gradient g and momentum buffer b, all of one shape::

        g = -g                                          if maximize
        p = round((1 - lr * weight_decay) * p)          if weight_decay != 0 and scale_decay_by_lr
        p = round((1 - weight_decay) * p)               if weight_decay != 0 and not scale_decay_by_lr
        b = g                                           if momentum != 0, on the parameter's first step
        b = fma(1 - dampening, g, round(momentum * b))  if momentum != 0, on later steps
        g = fma(momentum, b, g)                         if momentum != 0 and nesterov
        g = b                                           if momentum != 0 and not nesterov
        p = fma(-lr, g, p)

    ``fma(x, y, z)`` is x * y + z, rounded once. bfloat16 and float16 are computed in float32 and rounded once per
    stored value. The bits are those of `sgdcore.SGDW` over the same memory.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups, as in torch.
        lr: learning rate, a number or a tensor of one element. On the parameters' CUDA device it is read there, also
            by a captured graph; so is weight_decay. Default 1e-3.
        momentum: the part of the buffer that survives a step, >= 0. Default 0.
        dampening: the part of the gradient that an existing buffer does not receive. Default 0.
        weight_decay: the part of the parameter that a step takes away, times lr if `scale_decay_by_lr`; a number or a
            tensor of one element, >= 0. Default 0.
        nesterov: use Nesterov's momentum; needs a momentum and no dampening. Default False.
        maximize: ascend instead of descend. Default False.
        scale_decay_by_lr: scale the decay by the learning rate, as timm's SGDW and torch.optim.AdamW do. If False, the
            decay is the paper's: a schedule has to scale ``weight_decay`` itself, beside ``lr``. Default True.
        momentum_dtype: type of new momentum buffers, one of float64, float32, float16, bfloat16, or its name; the
            parameter's if None.
        sparse_mode: what a sparse gradient means. ``"dense"``: what the same gradient means as a dense tensor, so
            that weight decay and momentum act on all rows. ``"lazy"``: only the rows that it names are touched.
        **options: clip_value, max_grad_norm and skip_nonfinite, which every optimizer takes; `sgdcore.Options`
            explains them.

    Raises:
        ValueError, TypeError: for hyperparameters out of range, worded as torch does.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv 1711.05101), algorithm 1.
    """

    rule = "sgdw"

    @not_compiled
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        scale_decay_by_lr: bool = True,
        momentum_dtype: torch.dtype | str | None = None,
        sparse_mode: str = "dense",
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "scale_decay_by_lr": scale_decay_by_lr,
        }
        check_hyperparameters(defaults, number_of, nan_is_valid=True)
        own = {"momentum_dtype": momentum_dtype, "sparse_mode": sparse_mode}
        super().__init__(params, defaults, own, options)

    @staticmethod
    def by_operations(
        parameter: Tensor, grad: Tensor, states: list[Tensor | None], group: dict[str, Any]
    ) -> list[Tensor | None]:
        """Update a tensor by torch's operations; see `Optimizer.by_operations`."""
        if group["weight_decay"] != 0:
            scale = group["lr"] if group["scale_decay_by_lr"] else 1
            parameter.mul_(1 - scale * group["weight_decay"])
        return SGD.by_operations(parameter, grad, states, {**group, "weight_decay": 0})
