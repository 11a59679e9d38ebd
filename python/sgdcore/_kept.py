"""What an optimizer, of arrays or of tensors, keeps for its parameters: for those who average or move it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sgdcore._averages import AVERAGE
from sgdcore._precision import rest_of
from sgdcore._rules import State, rule_of
from sgdcore.sgd import SGD

__all__ = [
    "declared_states",
    "dtype_of_state",
    "has_masters",
    "masters_of",
    "require_no_counts",
    "set_masters",
]


def declared_states(optimizer: Any) -> dict[str, State]:
    """Return the rule's states, and the average if there is one, by their keys.

    An optimizer without a rule is torch.optim.SGD, or has no states that anybody knows of.
    """
    rule = rule_of(getattr(optimizer, "rule", SGD.rule))
    averages = (AVERAGE,) if getattr(optimizer, "average", None) else ()
    return {state.key: state for state in (*rule.states, *averages)}


def dtype_of_state(optimizer: Any, key: str, group: int) -> Any:
    """Return the storage type that the options say of new states in a group; None for the parameter's."""
    if key == AVERAGE.key:
        return optimizer._averages.dtype
    return optimizer.param_groups[group].get(declared_states(optimizer)[key].dtype_key)


def has_masters(optimizer: Any) -> bool:
    """Return whether parameters are kept in two halves."""
    return any(rest_of(group) is not None for group in optimizer.param_groups)


def masters_of(optimizer: Any) -> dict[int, Any]:
    """Return the float32 values of the parameters that are kept in two halves, by their positions among all."""
    halved = _halved(optimizer)
    return {position: optimizer._master(each, group) for position, each, group in halved}


def set_masters(optimizer: Any, values: Mapping[int, Any]) -> None:
    """Set the parameters that are kept in two halves to what `masters_of` returned, or to other values like that."""
    for position, parameter, group in _halved(optimizer):
        optimizer._set_master(parameter, group, values[position])


def _halved(optimizer: Any) -> Iterator[tuple[int, Any, Mapping[str, Any]]]:
    """Yield position, parameter and group of those that are kept in two halves."""
    start = 0
    for group in optimizer.param_groups:
        if rest_of(group) is not None:
            for i, parameter in enumerate(group["params"]):
                yield start + i, parameter, group
        start += len(group["params"])


def require_no_counts(optimizer: Any, given: Mapping[str, object]) -> None:
    """Raise a ValueError for options that cannot go with a rule that counts steps, as ScheduleFreeSGD does.

    Its states and its parameters belong together: what changes one of them alone, or takes steps back, is refused.
    """
    rule = getattr(optimizer, "rule", SGD.rule)
    if not rule_of(rule).counts:
        return
    name = type(optimizer).__name__
    if given["momentum_sync"]:
        raise ValueError(
            f"momentum_sync: {name} needs 'average', since its states follow its parameters"
        )
    for option, is_given in given.items():
        if is_given:
            raise ValueError(f"{option}: cannot go with {name}, whose states follow its parameters")
