"""Stochastic gradient descent with momentum, as torch.optim.SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from numpy.typing import DTypeLike

from sgdcore._arrays import Array
from sgdcore._hyperparameters import float_of
from sgdcore._options import Options
from sgdcore.optimizer import Optimizer, ParamsLike

__all__ = ["SGD", "check_hyperparameters"]


class SGD(Optimizer):
    r"""Stochastic gradient descent, optionally with momentum, Nesterov's too.

    One step updates each parameter p, given its gradient g and momentum buffer b, all of one shape::

        g = -g                                          if maximize
        g = fma(weight_decay, p, g)                     if weight_decay != 0
        b = g                                           if momentum != 0, on the parameter's first step
        b = fma(1 - dampening, g, round(momentum * b))  if momentum != 0, on later steps
        g = fma(momentum, b, g)                         if momentum != 0 and nesterov
        g = b                                           if momentum != 0 and not nesterov
        p = fma(-lr, g, p)

    ``fma(x, y, z)`` is x * y + z, rounded once. Arithmetic is float64 if the parameter, its gradient or its
    momentum is stored as float64, else float32; at the end p and b are rounded to the dtypes they are stored
    in, once. float32 and float64 results equal ``torch.optim.SGD(foreach=False)`` in every bit.
    `sgdcore.reference` spells it out.

    Args:
        params: a `ParameterBuffer`; or an iterable of `Parameter` objects or arrays, of (name, parameter) pairs,
            or of dicts that define groups. An array has no place for its gradient: it gets one in each step, by
            ``step(grads=[...])``.
        lr: learning rate, >= 0; a number or an array of one element, read at each step.
        momentum: the part of the buffer that survives a step, >= 0.
        dampening: the part of the gradient that an existing buffer does not receive; any number but NaN.
        weight_decay: L2 penalty, >= 0.
        nesterov: use Nesterov's momentum; needs momentum > 0 and dampening 0.
        maximize: ascend instead of descend.
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
        >>> w = np.array([1.0, 2.0])
        >>> optimizer = SGD([w], lr=0.5)
        >>> optimizer.step(grads=[np.array([1.0, 1.0])])
        >>> w
        array([0.5, 1.5])

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
    in the form that torch.optim.SGD gave it.
    """

    rule = "sgd"

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
            "momentum_dtype": momentum_dtype,
        }
        self._normalize_group(defaults)
        super().__init__(params, defaults, options)

    def _normalize_group(self, group: dict[str, Any]) -> None:
        check_hyperparameters(group, float_of)
        super()._normalize_group(group)


def check_hyperparameters(
    group: Mapping[str, Any], number_of: Callable[[str, Any], Any], *, nan_is_valid: bool = False
) -> None:
    """Check the hyperparameters of SGD and SGDW, for arrays and tensors alike.

    Args:
        group: has the hyperparameters.
        number_of: returns a hyperparameter, given its name and value, as something that compares with numbers.
        nan_is_valid: whether NaN counts as in range, as in torch.

    Raises:
        ValueError: if a hyperparameter is out of range, in torch's words.
    """

    def is_negative(number: Any) -> bool:
        return bool(number < 0) if nan_is_valid else not number >= 0

    keys = ("lr", "momentum", "dampening", "weight_decay")
    lr, momentum, dampening, weight_decay = (number_of(key, group[key]) for key in keys)
    if is_negative(lr):
        raise ValueError(f"Invalid learning rate: {group['lr']}")
    if is_negative(momentum):
        raise ValueError(f"Invalid momentum value: {group['momentum']}")
    if is_negative(weight_decay):
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if not nan_is_valid and math.isnan(dampening):
        raise ValueError(f"Invalid dampening value: {group['dampening']}")
    if group["nesterov"] and (momentum <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
