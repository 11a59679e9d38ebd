"""Parts of rules in torch's operations, for tensors that have operations of their own instead of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["step_by_sign"]


def step_by_sign(parameter: Tensor, direction: Tensor, group: Mapping[str, Any]) -> None:
    """Decay a parameter by the group's ``weight_decay``, and move each element by its ``lr`` against a sign.

    Args:
        parameter: the tensor, which is updated in place.
        direction: the tensor whose signs are taken. A NaN has itself as its sign, where torch.sign gives 0.
        group: the hyperparameters.
    """
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    if weight_decay != 0:
        parameter.mul_(1 - lr * weight_decay)
    sign = torch.where(direction.isnan(), direction, direction.sign())
    parameter.add_(sign, alpha=-lr)
