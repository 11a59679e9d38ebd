"""Checks of arguments that several classes have."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from sgdcore.distributed._flat import dtype_name
from sgdcore.distributed.groups import ProcessGroup

__all__ = ["check_count", "check_wire", "integer"]

_WIRE_TYPES = ("float32", "float16", "bfloat16")


def check_count(argument: str, value: Any, least: int, below: int | None = None) -> int:
    """Return an integer from `least` on and below `below`; a TypeError or ValueError names the argument."""
    count = integer(value)
    if count is None:
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if count < least:
        raise ValueError(f"{argument}: expected at least {least}, got {value}")
    if below is not None and count >= below:
        raise ValueError(f"{argument}: expected less than {below}, got {value}")
    return count


def integer(value: Any) -> int | None:
    """Return an integer, NumPy's and torch's as well, as Python's; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_wire(wire_dtype: Any, group: ProcessGroup) -> str | None:
    """Return the name of a dtype that the group can add up; None for None."""
    if wire_dtype is None:
        return None
    try:
        name = dtype_name(wire_dtype)
    except TypeError:
        name = ""
    if name not in _WIRE_TYPES:
        expected = ", ".join(_WIRE_TYPES)
        raise TypeError(f"wire_dtype: expected one of {expected} or None, got {wire_dtype!r}")
    if name not in group.dtypes:
        able = ", ".join(sorted(group.dtypes))
        raise ValueError(f"wire_dtype: {group!r} cannot add up {name}, only {able}")
    return name
