"""Checks of a state dict before it is loaded, for arrays and torch's tensors alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sgdcore import _core
from sgdcore._rules import Rule

__all__ = ["check_layout", "refuse_other_optimizers"]

# Keys that only the state dicts of torch's other optimizers have: hyperparameters, and entries of a parameter's state.
_OTHER_HYPERPARAMETERS = frozenset(
    ("alpha", "betas", "eps", "etas", "lambd", "lr_decay", "max_iter", "rho")
)
_OTHER_STATE = frozenset(("acc_delta", "exp_avg", "exp_avg_sq", "exp_inf", "row_var", "square_avg"))


def check_layout(state_dict: Any) -> None:
    """Raise if something is not laid out as an optimizer's state dict. The values are not checked.

    Raises:
        TypeError: if the state dict or one of its parts is of the wrong kind.
        KeyError: if "state" or "param_groups" is missing.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    for key, kind in {"state": Mapping, "param_groups": list | tuple}.items():
        if key not in state_dict:
            raise KeyError(
                f"state_dict: expected a key {key!r}, got {_shortened(state_dict)}{_hint(state_dict)}"
            )
        if not isinstance(state_dict[key], kind):
            expected = "a mapping" if kind is Mapping else "a list"
            raise TypeError(
                f"state_dict[{key!r}]: expected {expected}, got {type(state_dict[key]).__name__}"
            )
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise TypeError(
                f"state_dict['param_groups'][{i}]: expected a mapping with a list 'params', "
                f"got {_core.repr_text(group)}"
            )


def refuse_other_optimizers(state_dict: Mapping[str, Any], name: str, rule: Rule) -> None:
    """Raise if a well laid out state dict is that of another optimizer than the one with that name and rule.

    Users may add keys to groups and states. The keys of torch's other optimizers are refused.

    Raises:
        ValueError: naming the keys that the optimizer does not have.
    """
    own = {
        *rule.numbers,
        *rule.flags,
        *rule.modes,
        *rule.counts,
        *(state.key for state in rule.states),
    }
    keys = ", ".join(state.key for state in rule.states)
    for i, group in enumerate(state_dict["param_groups"]):
        others = sorted(_OTHER_HYPERPARAMETERS.intersection(group) - own)
        if others and not all(key in group for key in rule.numbers):
            raise ValueError(
                f"state_dict['param_groups'][{i}]: expected {name}'s hyperparameters, got those of another optimizer: "
                f"{', '.join(others)}"
            )
    for key, values in state_dict["state"].items():
        others = (
            sorted(_OTHER_STATE.intersection(values) - own) if isinstance(values, Mapping) else []
        )
        if others:
            raise ValueError(
                f"state_dict['state'][{_core.repr_text(key)}]: expected {name}'s {keys}, "
                "got the state of another optimizer: "
                f"{', '.join(others)}"
            )


def _shortened(keys: Iterable[Any]) -> str:
    """Return the keys as a list, and of many keys the first few."""
    names = list(keys)
    return repr(names) if len(names) <= 8 else f"{names[:8]!r} and {len(names) - 8} more"


def _hint(state_dict: Mapping[Any, Any]) -> str:
    """Return what the mapping seems to be, for the end of a message."""
    for key, value in state_dict.items():
        if isinstance(value, Mapping) and "param_groups" in value:
            return f"; state_dict[{key!r}] has it"
    if state_dict and all(hasattr(value, "shape") for value in state_dict.values()):
        return "; a model's own state dict is for the model to load"
    return ""
