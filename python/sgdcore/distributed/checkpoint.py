"""What the wrappers add to an optimizer's state dict.

Arrays go into the state of their parameter, in the parameter's shape, and numbers into the first param group, all with
a prefix. There torch's checkpoint API keeps them, and they are independent of the parameters' order in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgdcore.distributed._flat import shaped
from sgdcore.distributed.parameters import Parameters

__all__ = ["add_to_state", "split_state"]


def add_to_state(
    state_dict: dict[str, Any],
    prefix: str,
    numbers: Mapping[str, float],
    arrays: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Return a copy of a state dict with numbers, and with arrays or None for each parameter, in it."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    groups[0] |= {f"{prefix}.{name}": value for name, value in numbers.items()}
    state = dict(state_dict["state"])
    for name, values in arrays.items():
        for i, value in enumerate(values):
            if value is not None:
                state[i] = {**state.get(i, {}), f"{prefix}.{name}": value}
    return {**state_dict, "state": state, "param_groups": groups}


def split_state(
    state_dict: Mapping[str, Any], prefix: str, parameters: Parameters
) -> tuple[dict[str, Any], dict[str, float], dict[str, list[Any]]]:
    """Return the state dict as it was before `add_to_state`, the numbers, and the arrays, whose shapes are checked."""
    start = f"{prefix}."
    groups = [dict(group) for group in state_dict["param_groups"]]
    added = [key for group in groups[:1] for key in group if key.startswith(start)]
    numbers = {key.removeprefix(start): groups[0].pop(key) for key in added}
    keys = [key for group in groups for key in group["params"]]
    positions = {key: i for i, key in enumerate(keys)}
    state: dict[Any, Any] = {}
    arrays: dict[str, list[Any]] = {}
    for key, values in state_dict["state"].items():
        for name, value in values.items():
            if not str(name).startswith(start):
                state.setdefault(key, {})[name] = value
                continue
            i = positions[key]
            expected = tuple(shaped(parameters.flats[i], parameters.data[i]).shape)
            if tuple(value.shape) not in (expected, tuple(parameters.data[i].shape)):
                raise ValueError(
                    f"state_dict['state'][{key!r}][{name!r}]: expected shape {expected}, the parameter's, "
                    f"got {tuple(value.shape)}"
                )
            arrays.setdefault(name.removeprefix(start), [None] * len(keys))[i] = value
    return {**state_dict, "state": state, "param_groups": groups}, numbers, arrays
