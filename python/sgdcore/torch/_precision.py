"""The values of tensors that are kept in a precision of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sgdcore._precision import MASTER_LOW, rest_of
from sgdcore.torch import _interface

__all__ = ["master", "new_rest", "set_master"]


def master(parameter: Tensor, group: Mapping[str, Any], values: Mapping[str, Any]) -> Tensor:
    """Return the values of a parameter in float32, or in float64 if that is its dtype, as a new tensor.

    Args:
        parameter: the parameter.
        group: its group.
        values: its state.
    """
    seen = parameter.detach()
    wide = torch.float64 if seen.dtype == torch.float64 else torch.float32
    rest = rest_of(group)
    kept = None if rest is None else values.get(rest.key)
    if kept is None:
        return seen.to(wide, copy=True)
    if rest is MASTER_LOW:
        upper = seen.view(torch.int16).to(torch.int32) << 16
        joined: Tensor = (upper + kept.to(torch.int32)).view(torch.float32)
        return joined
    return torch.add(seen.to(wide), kept.to(wide))


def set_master(
    parameter: Tensor, group: Mapping[str, Any], state: dict[str, Any], values: Tensor
) -> None:
    """Set a parameter to values in float32, as a step would store them."""
    rest = rest_of(group)
    wide = values.detach().to(device=parameter.device, dtype=torch.float32)
    if rest is None:
        parameter.copy_(wide)
        return
    kept = state[rest.key] = new_rest(parameter, group)
    if rest is MASTER_LOW or parameter.dtype == torch.bfloat16:
        parameter.copy_(_nearest(wide))
    else:
        parameter.copy_(wide)
    if rest is MASTER_LOW:
        kept.copy_(_kept_bits(wide).to(torch.int16))
    else:
        lost = wide - parameter.float()
        lost = torch.where(lost.isfinite(), lost, 0.0)
        kept.copy_(_nearest(lost) if kept.dtype == torch.bfloat16 else lost)


def _kept_bits(wide: Tensor) -> Tensor:
    """Return the bits of float32 values, without the one of a NaN that rounding would make a zero."""
    bits = wide.contiguous().view(torch.int32)
    return torch.where(bits & 0x7FFF8000 == 0x7FFF8000, bits & ~0x8000, bits)


def _nearest(wide: Tensor) -> Tensor:
    """Return the nearest bfloat16, ties away from zero."""
    return ((_kept_bits(wide) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def new_rest(parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the second half of a parameter that has lost nothing yet."""
    dtype = torch.int16 if rest_of(group) is MASTER_LOW else None
    return _interface.empty_like(parameter, dtype).zero_()
