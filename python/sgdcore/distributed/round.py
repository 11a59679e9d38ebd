"""A round of Local SGD: how far it is, what it started from, and how both are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgdcore.distributed._flat import copied, copy_all, zeros_like
from sgdcore.distributed.parameters import Buffers, Parameters

_PREFIX = "local_sgd."  # in state dicts


@dataclass
class Round:
    """Counts the steps of a round; all but `broken` is saved."""

    number: int = 0  # the rounds completed; equal on all ranks
    steps: int = 0  # taken when this round began; equal on all ranks
    active: int = 0  # this rank's own steps in this round
    position: int = 0  # the steps of this round that this rank has taken or passed over
    period: int = 0  # the steps that this round is to have; 0 as long as that is unknown
    last_period: int = 0  # the steps of the last round
    # The parameters are in the middle of an average, or were left there. Set before they are overwritten, and cleared
    # as the last thing that a round does, so that it holds wherever an exception, or an interrupt, ends that.
    broken: bool = False

    def begin(self) -> None:
        """Begin the round, or begin it again: forget its steps."""
        self.position = self.active = self.period = 0


class Anchor:
    """Copies of the parameters at the end of the last round if `valid`, and of states and buffers if it `keeps_all`."""

    def __init__(self, data: Sequence[Any], keeps_all: bool) -> None:
        self.values = [zeros_like(each) for each in data]
        self.states: dict[str, list[Any]] = {}
        self.valid = False
        self._buffers: list[Any] = []
        self._keeps_all = keeps_all

    def take(self, parameters: Parameters, buffers: Buffers) -> None:
        """Copy the parameters, which are equal on all ranks."""
        copy_all(self.values, parameters.data)
        if self._keeps_all:
            self.keep(parameters.states(), buffers)
        self.valid = True

    def keep(self, states: Mapping[str, Sequence[Any]], buffers: Buffers) -> None:
        """Copy states, into the memory of older copies where that fits, and buffers."""
        for key, arrays in states.items():
            copies = self.states.setdefault(key, [None] * len(arrays))
            for i, array in enumerate(arrays):
                if array is None or copies[i] is None or copies[i].dtype != array.dtype:
                    copies[i] = copied(array)
                else:
                    copies[i][...] = array
        self._buffers = buffers.copies()

    def restore(self, parameters: Parameters, buffers: Buffers) -> None:
        """Bring parameters, states and buffers back to the end of the last round."""
        copy_all(parameters.data, self.values)
        parameters.restore_states(self.states)
        buffers.restore(self._buffers)


def add_to_state(
    state_dict: Mapping[str, Any],
    numbers: Mapping[str, Any],
    arrays: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Return a copy of a state dict with numbers, and arrays or None for each parameter, in it.

    They are in the state of their parameter and in the first param group, where torch's checkpoint API keeps them.
    """
    first, *others = state_dict["param_groups"]
    first = {**first, **{f"{_PREFIX}{name}": value for name, value in numbers.items()}}
    state = dict(state_dict["state"])
    for name, values in arrays.items():
        for i, value in enumerate(values):
            if value is not None:
                state[i] = {**state.get(i, {}), f"{_PREFIX}{name}": value}
    return {**state_dict, "state": state, "param_groups": [first, *others]}


def split_state(
    state_dict: Mapping[str, Any], parameters: Parameters
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[Any]]]:
    """Return the state dict as it was before `add_to_state`, the numbers, and the arrays, whose shapes are checked."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    added = [name for name in groups[0] if name.startswith(_PREFIX)]
    numbers = {name.removeprefix(_PREFIX): groups[0].pop(name) for name in added}
    keys = [key for group in groups for key in group["params"]]
    state = {key: dict(values) for key, values in state_dict["state"].items()}
    arrays: dict[str, list[Any]] = {}
    for i, key in enumerate(keys):
        for name in [n for n in state.get(key, ()) if str(n).startswith(_PREFIX)]:
            value = state[key].pop(name)
            expected, got = tuple(parameters.data[i].shape), tuple(value.shape)
            if got != expected:
                raise ValueError(
                    f"state_dict['state'][{key!r}][{name!r}]: expected shape {expected}, the parameter's, got {got}"
                )
            arrays.setdefault(name.removeprefix(_PREFIX), [None] * len(keys))[i] = value
    inner = {key: values for key, values in state.items() if values}
    return {**state_dict, "state": inner, "param_groups": groups}, numbers, arrays
