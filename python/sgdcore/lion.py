"""Lion: steps in the direction of the sign of an interpolation between momentum and gradient."""

from __future__ import annotations

from typing import Any, Unpack

from numpy.typing import DTypeLike

from sgdcore._arrays import Array
from sgdcore._hyperparameters import FROM_ZERO, PART, check_ranges
from sgdcore._options import Options
from sgdcore.optimizer import Optimizer, ParamsLike

__all__ = ["RANGES", "Lion"]

RANGES = {"lr": FROM_ZERO, "beta1": PART, "beta2": PART, "weight_decay": FROM_ZERO}


class Lion(Optimizer):
    r"""Lion: each element moves by the learning rate, in the direction of a sign.

    The sign is that of an interpolation between momentum and gradient. The weight decay is decoupled: it takes no part
    in the momentum.

    One step updates each parameter p, given its gradient g and momentum m, all of one shape::

        g = -g                                          if maximize
        c = fma(1 - beta1, g, round(beta1 * m))         m starts as zeros
        m = fma(1 - beta2, g, round(beta2 * m))
        p = fma(-lr, sign(c), round((1 - lr * weight_decay) * p))

    ``fma(x, y, z)`` is x * y + z, rounded once. The sign of 0 is 0, that of a NaN the NaN. Arithmetic is float64 if
    the parameter, its gradient or its momentum is stored as float64, else float32; at the end p and m are rounded to
    the dtypes they are stored in, once. `sgdcore.reference.lion_update` spells it out.

    Args:
        params: a `ParameterBuffer`; or an iterable of `Parameter` objects or arrays, of (name, parameter) pairs,
            or of dicts that define groups. An array has no place for its gradient: it gets one in each step, by
            ``step(grads=[...])``.
        lr: learning rate, >= 0, the length of an element's step; a number or an array of one element, read at each
            step. The paper takes a third to a tenth of AdamW's, and a weight_decay that is larger by the same factor.
            Default 1e-4.
        beta1: the part of the momentum in the direction of a step, >= 0 and < 1. Default 0.9.
        beta2: the part of the momentum that survives a step, >= 0 and < 1. Default 0.99.
        weight_decay: the part of the parameter that a step takes away, times lr; >= 0. Default 0.
        maximize: ascend instead of descend. Default False.
        exp_avg_dtype: the dtype of new momenta (float64, float32, float16 or bfloat16); default: the parameter's.
        **options: clip_value, which every optimizer takes; `sgdcore.Options` explains it.

    Raises:
        ValueError: if a hyperparameter is out of range.
        TypeError: if an argument is of the wrong kind.

    Warns:
        UserWarning: a group has a key that is nearly a hyperparameter's name, such as ``"learning_rate"``. Other keys
            are the user's own.

    Example:
        >>> import numpy as np
        >>> w = np.array([1.0, 2.0, 3.0])
        >>> optimizer = Lion([w], lr=0.5)
        >>> optimizer.step(grads=[np.array([0.1, -7.0, 0.0])])
        >>> w
        array([0.5, 2.5, 3. ])

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023 (arXiv 2302.06675), algorithm 2.
    The package lion-pytorch computes the same with a rounding after each product, and has the betas as a pair.
    """

    rule = "lion"

    def __init__(
        self,
        params: ParamsLike,
        lr: float | Array = 1e-4,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        exp_avg_dtype: DTypeLike | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "exp_avg_dtype": exp_avg_dtype,
        }
        self._normalize_group(defaults)
        super().__init__(params, defaults, options)

    def _normalize_group(self, group: dict[str, Any]) -> None:
        check_ranges(group, RANGES)
        super()._normalize_group(group)
