"""Averages of tensors by torch's operations, where the core does not move them in the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sgdcore._averages import AVERAGE, Averages
from sgdcore.torch import _interface

__all__ = ["copied", "copy_into", "move"]


def move(
    averages: Averages, parameters: Iterable[Tensor], state: dict[Any, Any], weight: float
) -> None:
    """Move the averages of parameters towards them, as the core does. A parameter without one gets a copy of itself.

    Args:
        averages: the optimizer's averages.
        parameters: the parameters, as they are after the step.
        state: the optimizer's state.
        weight: the part of the distance.
    """
    with torch.no_grad():
        for parameter in parameters:
            values = state[parameter]
            average = values.get(AVERAGE.key)
            if average is None:
                values[AVERAGE.key] = _first(parameter, averages.dtype)
                continue
            a, p = _real(average), _real(parameter)
            if a.dtype == p.dtype and a.dtype in (torch.float32, torch.float64):
                a.lerp_(p, weight)
            else:
                wide = torch.float64 in (a.dtype, p.dtype)
                compute = torch.float64 if wide else torch.float32
                a.copy_(a.to(compute).lerp_(p.to(compute), weight))


def _first(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a parameter's first average, a copy of it."""
    if dtype is not None and parameter.is_complex():
        dtype = dtype.to_complex()
    if type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        copy = parameter.detach().clone()
        return copy if dtype is None else copy.to(dtype)
    return _interface.empty_like(parameter, dtype).copy_(parameter).detach()


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a real one; of a conjugate, a copy."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor."""
    return tensor.detach().clone()


def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor, rounding them to its dtype."""
    with torch.no_grad():
        tensor.copy_(values)
