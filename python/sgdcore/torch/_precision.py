"""The values of tensors that are kept in a precision of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sgdcore._precision import MASTER_LOW, rest_of
from sgdcore.torch import _interface

__all__ = ["master", "new_rest"]


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


def new_rest(parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the second half of a parameter that has lost nothing yet."""
    dtype = torch.int16 if rest_of(group) is MASTER_LOW else None
    return _interface.empty_like(parameter, dtype).zero_()
