"""Signum: steps in the direction of the momentum's sign."""

from __future__ import annotations

from typing import Any, Unpack

from numpy.typing import DTypeLike

from sgdcore._arrays import Array
from sgdcore._hyperparameters import FROM_ZERO, PART, check_ranges
from sgdcore._options import Options
from sgdcore.optimizer import Optimizer, ParamsLike

__all__ = ["RANGES", "Signum"]

RANGES = {"lr": FROM_ZERO, "momentum": PART, "weight_decay": FROM_ZERO}


class Signum(Optimizer):
    r"""Signum: each element moves by the learning rate, in the direction of its momentum's sign.

    Without momentum, this is signSGD. The weight decay is decoupled: it takes no part in the momentum.

    One step updates each parameter p, given its gradient g and momentum buffer b, all of one shape::

        g = -g                                          if maximize
        b = fma(1 - momentum, g, round(momentum * b))   if momentum != 0; b starts as zeros
        g = b                                           if momentum != 0
        p = fma(-lr, sign(g), round((1 - lr * weight_decay) * p))

    ``fma(x, y, z)`` is x * y + z, rounded once. The sign of 0 is 0, that of a NaN the NaN. Arithmetic is float64 if
    the parameter, its gradient or its momentum is stored as float64, else float32; at the end p and b are rounded to
    the dtypes they are stored in, once. `sgdcore.reference.signum_update` spells it out.

    Args:
        params: a `ParameterBuffer`; or an iterable of `Parameter` objects or arrays, of (name, parameter) pairs,
            or of dicts that define groups. An array has no place for its gradient: it gets one in each step, by
            ``step(grads=[...])``.
        lr: learning rate, >= 0, the length of an element's step; a number or an array of one element, read at each
            step. Default 1e-4.
        momentum: the part of the buffer that survives a step, >= 0 and < 1. Default 0.9.
        weight_decay: the part of the parameter that a step takes away, times lr; >= 0. Default 0.
        maximize: ascend instead of descend. Default False.
        momentum_dtype: the dtype of new momentum buffers (float64, float32, float16 or bfloat16); default: the
            parameter's.
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
        >>> optimizer = Signum([w], lr=0.5)
        >>> optimizer.step(grads=[np.array([0.1, -7.0, 0.0])])
        >>> w
        array([0.5, 2.5, 3. ])

    Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018 (arXiv 1802.04434),
    algorithms 1 and 2. The weight decay is that of algorithm 1 of Bernstein et al., "signSGD with Majority Vote is
    Communication Efficient and Fault Tolerant", ICLR 2019 (arXiv 1810.05291).
    """

    rule = "signum"

    def __init__(
        self,
        params: ParamsLike,
        lr: float | Array = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        momentum_dtype: DTypeLike | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "momentum_dtype": momentum_dtype,
        }
        self._normalize_group(defaults)
        super().__init__(params, defaults, options)

    def _normalize_group(self, group: dict[str, Any]) -> None:
        check_ranges(group, RANGES)
        super()._normalize_group(group)
