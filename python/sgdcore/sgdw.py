"""Stochastic gradient descent with decoupled weight decay."""

from __future__ import annotations

from typing import Any, Unpack

from numpy.typing import DTypeLike

from sgdcore._arrays import Array
from sgdcore._hyperparameters import float_of
from sgdcore._options import Options
from sgdcore.optimizer import Optimizer, ParamsLike
from sgdcore.sgd import check_hyperparameters

__all__ = ["SGDW"]


class SGDW(Optimizer):
    r"""Stochastic gradient descent with momentum and decoupled weight decay.

    The decay shrinks the parameter by itself. It takes no part in the gradient or the momentum, as it does in `SGD`.

    One step updates each parameter p, given its gradient g and momentum buffer b, all of one shape::

        g = -g                                          if maximize
        p = round((1 - lr * weight_decay) * p)          if weight_decay != 0 and scale_decay_by_lr
        p = round((1 - weight_decay) * p)               if weight_decay != 0 and not scale_decay_by_lr
        b = g                                           if momentum != 0, on the parameter's first step
        b = fma(1 - dampening, g, round(momentum * b))  if momentum != 0, on later steps
        g = fma(momentum, b, g)                         if momentum != 0 and nesterov
        g = b                                           if momentum != 0 and not nesterov
        p = fma(-lr, g, p)

    ``fma(x, y, z)`` is x * y + z, rounded once. Arithmetic is float64 if the parameter, its gradient or its
    momentum is stored as float64, else float32; at the end p and b are rounded to the dtypes they are stored
    in, once. `sgdcore.reference.sgdw_update` spells it out.

    Args:
        params: a `ParameterBuffer`; or an iterable of `Parameter` objects or arrays, of (name, parameter) pairs,
            or of dicts that define groups. An array has no place for its gradient: it gets one in each step, by
            ``step(grads=[...])``.
        lr: learning rate, >= 0; a number or an array of one element, read at each step. Default 1e-3.
        momentum: the part of the buffer that survives a step, >= 0. Default 0.
        dampening: the part of the gradient that an existing buffer does not receive; any number but NaN. Default 0.
        weight_decay: the part of the parameter that a step takes away, times lr if `scale_decay_by_lr`; >= 0; default
            0.
        nesterov: use Nesterov's momentum; needs momentum > 0 and dampening 0. Default False.
        maximize: ascend instead of descend. Default False.
        scale_decay_by_lr: scale the decay by the learning rate, as timm's SGDW and torch.optim.AdamW do. If False, the
            decay is the paper's: a schedule has to scale ``weight_decay`` itself, beside ``lr``. Default True.
        momentum_dtype: the dtype of new momentum buffers (float64, float32, float16 or bfloat16); default: the
            parameter's.
        **options: clip_value, max_grad_norm and skip_nonfinite, which every optimizer takes; `sgdcore.Options`
            explains them.

    Raises:
        ValueError: if a hyperparameter is out of range, in torch's words.
        TypeError: if an argument is of the wrong kind.

    Warns:
        UserWarning: a group has a key that is nearly a hyperparameter's name, such as ``"learning_rate"``. Other keys
            are the user's own.

    Example:
        >>> import numpy as np
        >>> w = np.array([1.0, 2.0])
        >>> optimizer = SGDW([w], lr=0.5, weight_decay=0.5)
        >>> optimizer.step(grads=[np.array([1.0, 1.0])])
        >>> w
        array([0.25, 1.  ])

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv 1711.05101), algorithm 1.
    """

    rule = "sgdw"

    def __init__(
        self,
        params: ParamsLike,
        lr: float | Array = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        scale_decay_by_lr: bool = True,
        momentum_dtype: DTypeLike | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "scale_decay_by_lr": scale_decay_by_lr,
            "momentum_dtype": momentum_dtype,
        }
        self._normalize_group(defaults)
        super().__init__(params, defaults, options)

    def _normalize_group(self, group: dict[str, Any]) -> None:
        check_hyperparameters(group, float_of)
        super()._normalize_group(group)
