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
    """Return a state dict with more in it.

    Args:
        state_dict: the inner optimizer's; it is left as it is.
        prefix: of the added keys.
        numbers: what goes into the first param group.
        arrays: by name, for each parameter an array of its shape, or None.
    """
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
    """Return the inner optimizer's state dict, and the numbers and arrays that `add_to_state` added.

    Raises:
        ValueError: if an array has not its parameter's shape.
    """
    start = f"{prefix}."
    groups = [dict(group) for group in state_dict["param_groups"]]
    numbers = {
        key.removeprefix(start): group.pop(key)
        for group in groups[:1]
        for key in list(group)
        if key.startswith(start)
    }
    keys = [key for group in groups for key in group["params"]]
    position = {key: i for i, key in enumerate(keys)}
    state = {}
    arrays: dict[str, list[Any]] = {}
    for key, values in state_dict["state"].items():
        state[key] = {k: v for k, v in values.items() if not str(k).startswith(start)}
        if not state[key]:
            del state[key]
        for name in [k for k in values if str(k).startswith(start)]:
            i, value = position[key], values[name]
            expected = tuple(shaped(parameters.flats[i], parameters.data[i]).shape)
            if tuple(value.shape) not in (expected, tuple(parameters.data[i].shape)):
                raise ValueError(
                    f"state_dict['state'][{key!r}][{name!r}]: expected shape {expected}, the parameter's, "
                    f"got {tuple(value.shape)}"
                )
            found = arrays.setdefault(name.removeprefix(start), [None] * len(keys))
            found[i] = value
    return {**state_dict, "state": state, "param_groups": groups}, numbers, arrays
