"""Checks of arguments: each returns the value, or raises a TypeError or ValueError that names argument and value."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import numpy as np

from sgdcore._hyperparameters import float_of


def integer(value: Any) -> int | None:
    """Return an integer, NumPy's and torch's as well, as Python's; None for anything else."""
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        return None


def check_count(argument: str, value: Any, least: int, below: int | None = None) -> int:
    """Return an integer from `least` on and below `below`."""
    count = integer(value)
    if count is None:
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if count < least:
        raise ValueError(f"{argument}: expected at least {least}, got {value}")
    if below is not None and count >= below:
        raise ValueError(f"{argument}: expected less than {below}, got {value}")
    return count


def check_number(argument: str, value: Any, positive: bool = False) -> float:
    """Return a finite number of at least 0, or above 0 if it is to be `positive`."""
    number = float_of(argument, value)
    if not (math.isfinite(number) and (number > 0 if positive else number >= 0)):
        bound = "above 0" if positive else "of at least 0"
        raise ValueError(f"{argument}: expected a finite number {bound}, got {value}")
    return number


def check_choice(argument: str, value: Any, choices: Collection[str]) -> str:
    """Return one of some strings."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{argument}: expected one of {expected}, got {value!r}")
    return value
