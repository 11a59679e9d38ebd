"""Stochastic gradient descent with momentum, as torch.optim.SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype
from sgdcore.optimizer import Loss, Optimizer, ParamsLike

__all__ = ["SGD", "float_of"]


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
        super().__init__(params, defaults)

    @overload
    def step(
        self, closure: None = None, *, grads: Sequence[Any] | None = None, zero_grad: bool = False
    ) -> None: ...
    @overload
    def step(
        self,
        closure: Callable[[], Loss],
        *,
        grads: Sequence[Any] | None = None,
        zero_grad: bool = False,
    ) -> Loss: ...
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: Sequence[Any] | None = None,
        zero_grad: bool = False,
    ) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: called first, if given, to compute loss and gradients; its value is returned.
            grads: gradients to use instead of the parameters' own: a list, tuple or other sequence of one array or
                None for each parameter, in order.
            zero_grad: clear each gradient in the same pass, right after it was used.

        Raises:
            TypeError, ValueError: if a hyperparameter is not a number, a gradient does not fit, or arrays overlap
                in memory; if there are no gradients and the optimizer was given arrays only.
            KeyError: if a group lacks a hyperparameter.
            RuntimeError: if the optimizer is stepping in another thread.

        All of them are raised before anything is changed.
        """
        if closure is None and not self._step_pre_hooks and not self._step_post_hooks:
            # The usual call: one call into the core and nothing else.
            if not self._run_plan(self.param_groups, grads, zero_grad):
                self._run(grads, zero_grad)
            return None
        return self._step_with_hooks(closure, {"grads": grads, "zero_grad": zero_grad})

    def _normalize_group(self, group: dict[str, Any]) -> None:
        lr, momentum = float_of("lr", group["lr"]), float_of("momentum", group["momentum"])
        dampening = float_of("dampening", group["dampening"])
        weight_decay = float_of("weight_decay", group["weight_decay"])
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {group['lr']}")
        if not momentum >= 0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if math.isnan(dampening):
            raise ValueError(f"Invalid dampening value: {group['dampening']}")
        if group["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if group.get("momentum_dtype") is not None:
            # By name: a checkpoint then needs neither NumPy nor ml_dtypes to be read.
            group["momentum_dtype"] = storage_dtype(group["momentum_dtype"], "momentum_dtype").name


def float_of(name: str, value: Any) -> float:
    """Return a hyperparameter, a number or an array of one element, as a float.

    Raises:
        TypeError: if it is no number.
        ValueError: if the array has another size, or a float cannot hold the number.
    """
    if isinstance(value, np.ndarray):
        _core.require_plain(value, name)
        if value.size != 1:
            raise ValueError(
                f"{name}: expected a number or an array of one element, got shape {value.shape}"
            )
        value = value.item()
    try:
        if not isinstance(value, str | bytes):  # which float() would parse, but a step does not
            number = float(value)
            if math.isfinite(number) or math.isnan(number) or value == number:
                return number
            raise OverflowError  # as a Decimal, which becomes infinite
    except OverflowError:
        raise ValueError(
            f"{name}: expected a number that a float can hold, got {_core.repr_text(value)}"
        ) from None
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}: expected a number, got {_core.repr_text(value)}")
