"""Lion, for torch parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from sgdcore._hyperparameters import check_ranges
from sgdcore._options import Options
from sgdcore.lion import RANGES
from sgdcore.torch._compile import not_compiled
from sgdcore.torch._operations import step_by_sign
from sgdcore.torch.optimizer import Optimizer, number_of

__all__ = ["Lion"]


class Lion(Optimizer):
    """Lion for torch parameters on the CPU and CUDA: each element moves by the learning rate, in a sign's direction.

    The sign is that of an interpolation between momentum and gradient. The weight decay is decoupled: it takes no part
    in the momentum.

    For each parameter p with gradient g and momentum m, all of one shape::

        g = -g                                          if maximize
        c = fma(1 - beta1, g, round(beta1 * m))         m starts as zeros
        m = fma(1 - beta2, g, round(beta2 * m))
        p = fma(-lr, sign(c), round((1 - lr * weight_decay) * p))

    ``fma(x, y, z)`` is x * y + z, rounded once. The sign of 0 is 0, that of a NaN the NaN. bfloat16 and float16 are
    computed in float32 and rounded once per stored value. Of complex numbers, real and imaginary parts are elements of
    their own. The bits are those of `sgdcore.Lion` over the same memory.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups, as in torch.
        lr: learning rate, >= 0, the length of an element's step; a number or a tensor of one element. On the
            parameters' CUDA device it is read there, also by a captured graph; so is weight_decay. The paper takes a
            third to a tenth of AdamW's, and a weight_decay that is larger by the same factor. Default 1e-4.
        beta1: the part of the momentum in the direction of a step, >= 0 and < 1. Default 0.9.
        beta2: the part of the momentum that survives a step, >= 0 and < 1. Default 0.99.
        weight_decay: the part of the parameter that a step takes away, times lr; a number or a tensor of one element,
            >= 0. Default 0.
        maximize: ascend instead of descend. Default False.
        exp_avg_dtype: type of new momenta, one of float64, float32, float16, bfloat16, or its name; the parameter's if
            None.
        sparse_mode: what a sparse gradient means. ``"dense"``: what the same gradient means as a dense tensor, so
            that weight decay and momentum act on all rows. ``"lazy"``: only the rows that it names are touched.
        **options: clip_value, which every optimizer takes; `sgdcore.Options` explains it.

    Raises:
        ValueError, TypeError: for hyperparameters out of range or of the wrong kind.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023 (arXiv 2302.06675), algorithm 2.
    The package lion-pytorch computes the same with a rounding after each product, and has the betas as a pair.
    """

    rule = "lion"

    @not_compiled
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        exp_avg_dtype: torch.dtype | str | None = None,
        sparse_mode: str = "dense",
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        own = {"exp_avg_dtype": exp_avg_dtype, "sparse_mode": sparse_mode}
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
        exp_avg = torch.zeros_like(parameter) if states[0] is None else states[0]
        beta1, beta2 = group["beta1"], group["beta2"]
        direction = (exp_avg * beta1).add_(grad, alpha=1 - beta1)
        exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
        step_by_sign(parameter, direction, group)
        return [exp_avg]
