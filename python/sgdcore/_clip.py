"""Clipping gradients in memory by their norm, as torch.nn.utils.clip_grad_norm_ does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from sgdcore import _core
from sgdcore._hyperparameters import float_of
from sgdcore.parameter import Parameter, ParameterBuffer

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    params: Parameter | ParameterBuffer | Iterable[Any],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale gradients in place, all by one factor, so that their norm is at most `max_norm`.

    Equations, over all elements g of all gradients::

        norm = sum(abs(g) ** norm_type) ** (1 / norm_type)     or max(abs(g)) if norm_type is infinite
        g = round(g * min(1, max_norm / (norm + 1e-6)))

    The norm and the factor are float64. The product is computed in float64 for gradients of float64, else in float32,
    with the factor rounded to that type; it is rounded once to the gradient's type. For norm_type 2 the norm is that of
    ``SGD(max_grad_norm=...)``, which scales the gradients within the step and does not rewrite them; a step alone needs
    no call of this function.

    Args:
        params: a `Parameter`, a `ParameterBuffer`, or an iterable of parameters and arrays. A parameter without a
            gradient is left out. An array counts as a gradient itself, as for ``step(grads=[...])``.
        max_norm: the largest norm; a number >= 0.
        norm_type: the order of the norm, a number; may be infinite. Default 2.
        error_if_nonfinite: raise if the norm is infinite or NaN. Default False: the factor is then 0 or NaN.

    Returns:
        The norm of the gradients before they were scaled.

    Raises:
        TypeError: if `params` holds something else, or an argument is no number.
        ValueError: if `max_norm` is negative or NaN, or a gradient is read-only, or on a device, or reaches an element
            twice. All are raised before anything is changed.
        RuntimeError: if the norm is not finite and `error_if_nonfinite` is true. Nothing is then changed.

    Example:
        >>> w = Parameter(np.zeros(2, np.float32))
        >>> w.grad = np.array([3, 4], np.float32)
        >>> clip_grad_norm_(w, max_norm=1.0)
        5.0
        >>> w.grad
        array([0.59999985, 0.7999998 ], dtype=float32)

    Source: torch.nn.utils.clip_grad_norm_, after Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent
    neural networks", ICML 2013.
    """
    limit, order = float_of("max_norm", max_norm), float_of("norm_type", norm_type)
    if not limit >= 0:
        raise ValueError(f"max_norm: expected a number >= 0, got {max_norm!r}")
    grads = _grads_of(params)
    norm = _norm(grads, order)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {order} for gradients from `params` is non-finite, so it cannot be clipped. "
            "To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    _core.scale_grads(grads, _core.clip_coefficient(limit, norm))
    return norm


def _grads_of(params: Any) -> list[Any]:
    if isinstance(params, Parameter | np.ndarray):
        params = [params]
    elif isinstance(params, ParameterBuffer):
        params = params.parameters()
    elif not isinstance(params, Iterable):
        raise TypeError(
            f"params: expected a Parameter, a ParameterBuffer or an iterable of parameters, got {type(params).__name__}"
        )
    grads = []
    for position, each in enumerate(params):
        if isinstance(each, Parameter):
            if each.grad is not None:
                grads.append(each.grad)
        elif isinstance(each, np.ndarray):
            grads.append(each)
        else:
            raise TypeError(
                f"params[{position}]: expected a Parameter or an array, got {type(each).__name__}"
            )
    return grads


def _norm(grads: list[Any], order: float) -> float:
    if order == 2:
        return math.sqrt(_core.squares_of(grads))
    parts = [_norm_of(np.asarray(grad), order) for grad in grads if np.size(grad)]
    return float(np.linalg.norm(parts, order)) if parts else 0.0


def _norm_of(grad: Any, order: float) -> float:
    """Return the norm of one gradient, in float64."""
    return float(np.linalg.norm(grad.astype(np.float64).ravel(), order))
