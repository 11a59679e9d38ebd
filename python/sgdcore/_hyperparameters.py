"""Checks of hyperparameters as users give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sgdcore import _core

__all__ = ["FROM_ZERO", "PART", "Range", "check_ranges", "float_of"]

# A hyperparameter's lowest value and the one that it stays below. An infinite upper end belongs to the range.
Range = tuple[float, float]
FROM_ZERO: Range = (0, math.inf)
PART: Range = (0, 1)


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


def check_ranges(
    group: Mapping[str, Any],
    ranges: Mapping[str, Range],
    number_of: Callable[[str, Any], Any] = float_of,
) -> None:
    """Check that the hyperparameters of a group are in their ranges. A NaN is in no range.

    Args:
        group: has hyperparameters; a key that it lacks is not checked.
        ranges: the ranges by the hyperparameters' keys.
        number_of: returns a hyperparameter, given its name and value, as something that compares with numbers.

    Raises:
        TypeError: if a hyperparameter is no number.
        ValueError: if a hyperparameter is out of range. Both name it.
    """
    for key, (low, end) in ranges.items():
        if key not in group:
            continue
        number = number_of(key, group[key])
        if not (number >= low and (number < end or end == math.inf)):
            below = "" if end == math.inf else f" and < {end}"
            raise ValueError(f"{key}: expected a number >= {low}{below}, got {group[key]}")
