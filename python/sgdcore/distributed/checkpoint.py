"""What the wrappers add to an optimizer's state dict.

Arrays go into the state of their parameter, in the parameter's shape, and numbers into the first param group, all with
a prefix. There torch's checkpoint API keeps them, and they are independent of the parameters' order in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgdcore.distributed.parameters import Parameters


def add_to_state(
    state_dict: Mapping[str, Any],
    prefix: str,
    numbers: Mapping[str, Any],
    arrays: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Return a copy of a state dict with numbers, and with arrays or None for each parameter, in it."""
    first, *others = state_dict["param_groups"]
    first = {**first, **{f"{prefix}.{name}": value for name, value in numbers.items()}}
    state = dict(state_dict["state"])
    for name, values in arrays.items():
        for i, value in enumerate(values):
            if value is not None:
                state[i] = {**state.get(i, {}), f"{prefix}.{name}": value}
    return {**state_dict, "state": state, "param_groups": [first, *others]}


def split_state(
    state_dict: Mapping[str, Any], prefix: str, parameters: Parameters
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[Any]]]:
    """Return the state dict as it was before `add_to_state`, the numbers, and the arrays, whose shapes are checked."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    added = [name for name in groups[0] if name.startswith(f"{prefix}.")]
    numbers = {name.removeprefix(f"{prefix}."): groups[0].pop(name) for name in added}
    positions = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
    state: dict[Any, Any] = {}
    arrays: dict[str, list[Any]] = {}
    for key, values in state_dict["state"].items():
        for name, value in values.items():
            if not str(name).startswith(f"{prefix}."):
                state.setdefault(key, {})[name] = value
                continue
            i = positions[key]
            expected, got = tuple(parameters.data[i].shape), tuple(value.shape)
            if got != expected:
                raise ValueError(
                    f"state_dict['state'][{key!r}][{name!r}]: expected shape {expected}, the parameter's, got {got}"
                )
            kept = arrays.setdefault(name.removeprefix(f"{prefix}."), [None] * len(positions))
            kept[i] = value
    return {**state_dict, "state": state, "param_groups": groups}, numbers, arrays
