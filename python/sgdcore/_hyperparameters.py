"""Checks of hyperparameters as users give them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sgdcore import _core

__all__ = ["float_of"]


def float_of(name: str, value: Any) -> float:
    """Return a hyperparameter, a number or an array of one element, as a float.

    Raises:
        TypeError: if the value is no number.
        ValueError: if the array has another size, or a float cannot hold the number.
    """
    if type(value) is float:  # the usual case; the rest takes ten times as long
        return value
    if isinstance(value, np.ndarray):
        _core.require_plain(value, name)
        if value.size != 1:
            raise ValueError(
                f"{name}: expected a number or an array of one element, got shape {value.shape}"
            )
        value = value.item()
    try:
        if not isinstance(value, str | bytes):  # float() would parse these, and a step would not
            number = float(value)
            if math.isfinite(number) or math.isnan(number) or value == number:
                return number
            raise OverflowError  # a large Decimal becomes infinite
    except OverflowError:
        raise ValueError(
            f"{name}: expected a number that a float can hold, got {_core.repr_text(value)}"
        ) from None
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}: expected a number, got {_core.repr_text(value)}")
