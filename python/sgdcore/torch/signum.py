"""Signum, for torch parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from sgdcore._hyperparameters import check_ranges
from sgdcore._options import Options
from sgdcore.signum import RANGES
from sgdcore.torch._compile import not_compiled
from sgdcore.torch._operations import step_by_sign
from sgdcore.torch.optimizer import Optimizer, number_of

__all__ = ["Signum"]


class Signum(Optimizer):
    """Signum for torch parameters on the CPU and CUDA: steps in the direction of the momentum's sign.

    Without momentum, this is signSGD. The weight decay is decoupled: it takes no part in the momentum.

    For each parameter p with gradient g and momentum buffer b, all of one shape::

        g = -g                                          if maximize
        b = fma(1 - momentum, g, round(momentum * b))   if momentum != 0; b starts as zeros
        g = b                                           if momentum != 0
        p = fma(-lr, sign(g), round((1 - lr * weight_decay) * p))

    ``fma(x, y, z)`` is x * y + z, rounded once. The sign of 0 is 0, that of a NaN the NaN. bfloat16 and float16 are
    computed in float32 and rounded once per stored value. Of complex numbers, real and imaginary parts are elements of
    their own. The bits are those of `sgdcore.Signum` over the same memory.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups, as in torch.
        lr: learning rate, >= 0, the length of an element's step; a number or a tensor of one element. On the
            parameters' CUDA device it is read there, also by a captured graph; so is weight_decay. Default 1e-4.
        momentum: the part of the buffer that survives a step, >= 0 and < 1. Default 0.9.
        weight_decay: the part of the parameter that a step takes away, times lr; a number or a tensor of one element,
            >= 0. Default 0.
        maximize: ascend instead of descend. Default False.
        momentum_dtype: type of new momentum buffers, one of float64, float32, float16, bfloat16, or its name; the
            parameter's if None.
        sparse_mode: what a sparse gradient means. ``"dense"``: what the same gradient means as a dense tensor, so
            that weight decay and momentum act on all rows. ``"lazy"``: only the rows that it names are touched.
        **options: clip_value, which every optimizer takes; `sgdcore.Options` explains it.

    Raises:
        ValueError, TypeError: for hyperparameters out of range or of the wrong kind.

    Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018 (arXiv 1802.04434),
    algorithms 1 and 2. The weight decay is that of algorithm 1 of Bernstein et al., "signSGD with Majority Vote is
    Communication Efficient and Fault Tolerant", ICLR 2019 (arXiv 1810.05291).
    """

    rule = "signum"

    @not_compiled
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        sparse_mode: str = "dense",
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        own = {"momentum_dtype": momentum_dtype, "sparse_mode": sparse_mode}
        super().__init__(params, defaults, own, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_ranges(group, RANGES, number_of)
        super()._check_group(group)

    @staticmethod
    def by_operations(
        parameter: Tensor, grad: Tensor, states: list[Tensor | None], group: dict[str, Any]
    ) -> list[Tensor | None]:
        """Update a tensor by torch's operations; see `Optimizer.by_operations`."""
        grad = -grad if group["maximize"] else grad
        (buffer,), momentum = states, group["momentum"]
        if momentum != 0:
            buffer = torch.zeros_like(parameter) if buffer is None else buffer
            grad = buffer.mul_(momentum).add_(grad, alpha=1 - momentum)
        step_by_sign(parameter, grad, group)
        return [buffer]
