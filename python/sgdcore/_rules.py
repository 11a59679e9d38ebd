"""The declarations of the core's update rules, which are headers in csrc/rules/."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from sgdcore import _core

__all__ = ["EXTRA_STATES", "Rule", "State", "rule_of"]


class State(NamedTuple):
    """A state: an array like the parameter that the optimizer keeps for it, for its rule or for an option.

    Attributes:
        number: its position in the rule's declaration, or the number of an option's state behind these.
        key: its key in a parameter's state.
        dtype_key: the key of a group that names the dtype of new states, or empty. Without a value they have the
            parameter's.
        start: what it is before the first step: "nothing", "zeros", or the "parameter".
    """

    number: int
    key: str
    dtype_key: str
    start: str = "nothing"


class Rule(NamedTuple):
    """What a rule declares.

    Attributes:
        name: the rule's name.
        numbers: the keys of its hyperparameters that are numbers.
        flags: the keys of its hyperparameters that are true or false.
        states: its states.
        modes: the keys of flags that the optimizer's methods set.
        counts: the keys of numbers that a step changes.
    """

    name: str
    numbers: tuple[str, ...]
    flags: tuple[str, ...]
    states: tuple[State, ...]
    modes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    def states_in(self, group: Mapping[str, Any]) -> tuple[list[State], bool]:
        """Return the states that take part in a group's steps, and whether steps skip elements whose gradient is zero.

        A skipped element keeps its value and its states.
        """
        in_use, skips = _core.states_in_use(self.name, dict(group))
        return [state for state in self.states if in_use[state.number]], skips


#: The states that options add to any rule's own.
EXTRA_STATES: tuple[State, ...] = tuple(State(*each) for each in _core.extra_states())


@cache
def rule_of(name: str) -> Rule:
    """Return the rule of that name."""
    hypers, states = _core.declaration(name)
    return Rule(
        name,
        numbers=tuple(key for key, kind in hypers if kind == "number"),
        flags=tuple(key for key, kind in hypers if kind == "flag"),
        states=tuple(State(i, *keys) for i, keys in enumerate(states)),
        modes=tuple(key for key, kind in hypers if kind == "mode"),
        counts=tuple(key for key, kind in hypers if kind in ("count", "sum")),
    )
