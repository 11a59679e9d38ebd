"""How 16-bit parameters are kept: what groups say of it, for arrays and torch's tensors alike."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from sgdcore import _core
from sgdcore._rules import EXTRA_STATES, State

__all__ = [
    "COMPENSATION",
    "MASTER_LOW",
    "PRECISION_KEYS",
    "PRECISION_STATES",
    "STEPS_TAKEN",
    "check_precision",
    "precision_defaults",
    "rest_of",
]

#: The precisions, and the storage types of the parameters that each is for.
DTYPES = {
    "split": ("bfloat16",),
    "kahan": ("bfloat16", "float16"),
    "stochastic": ("bfloat16", "float16"),
}
#: The keys of a group.
PRECISION_KEYS = ("precision", "seed")

#: The 16 bits that a split parameter lacks, and what its rounding lost of a parameter under kahan.
MASTER_LOW: State = next(state for state in EXTRA_STATES if state.key == "master_low")
COMPENSATION: State = next(state for state in EXTRA_STATES if state.key == "compensation")
PRECISION_STATES: tuple[State, ...] = (MASTER_LOW, COMPENSATION)

#: The key, in the state of a parameter, of the number of steps that it has taken with stochastic rounding.
STEPS_TAKEN = "steps_taken"


def rest_of(group: Mapping[str, Any]) -> State | None:
    """Return the state that holds the second half of a group's parameters; None if there is none."""
    return {"split": MASTER_LOW, "kahan": COMPENSATION}.get(group.get("precision") or "")


def precision_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer's options say of its groups' precision."""
    return {key: options[key] for key in PRECISION_KEYS if options.get(key) is not None}


def check_precision(
    group: dict[str, Any], defaults: Mapping[str, Any], parameters: Iterable[tuple[str, str]]
) -> None:
    """Check a group's precision. Keys without a value are removed, unless they set aside a default.

    Args:
        group: has "precision" and "seed", or lacks them.
        defaults: the optimizer's.
        parameters: a label and the dtype's name of each parameter of the group.

    Raises:
        ValueError: if the precision is unknown, or the seed is out of range.
        TypeError: if the seed is no integer, or the dtype of a parameter does not fit the precision.
    """
    for key in PRECISION_KEYS:
        if key in group and group[key] is None and defaults.get(key) is None:
            del group[key]
    precision, seed = group.get("precision"), group.get("seed")
    if seed is not None:
        try:
            number = operator.index(seed)
        except TypeError:
            raise TypeError(f"seed: expected an integer, got {_core.repr_text(seed)}") from None
        if not 0 <= number < 1 << 64:
            raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
        group["seed"] = number
    if precision is None:
        return
    if not isinstance(precision, str) or precision not in DTYPES:
        known = ", ".join(map(repr, DTYPES))
        raise ValueError(
            f"precision: expected one of {known}, or None, got {_core.repr_text(precision)}"
        )
    for label, dtype in parameters:
        if dtype not in DTYPES[precision]:
            raise TypeError(
                f"precision: {precision!r} is for parameters of dtype {' or '.join(DTYPES[precision])}, "
                f"and {label} has {dtype}"
            )
