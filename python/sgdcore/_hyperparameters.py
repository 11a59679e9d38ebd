"""Checks of hyperparameters as users give them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sgdcore import _core
from sgdcore._arrays import storage_dtype

__all__ = ["float_of", "normalize_sgd_group"]


def normalize_sgd_group(group: dict[str, Any]) -> None:
    """Put the hyperparameters that SGD and its kin have into the form that groups keep.

    Raises:
        ValueError: if one is out of range, in torch's words.
        TypeError: if one is of the wrong kind.
    """
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
