"""What an optimizer keeps beside parameters and momentum, from one rank to all: hyperparameters, Adam's moments."""

from __future__ import annotations

import pickle
from typing import Any

from sgdcore.distributed._flat import is_torch
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.header import broadcast_bytes
from sgdcore.distributed.parameters import Parameters

__all__ = ["hyperparameters", "numbers_of", "share_settings", "take_settings"]

_NUMBERS = (int, float, bool)


def numbers_of(optimizer: Any) -> list[tuple[int, str, float]]:
    """Return the hyperparameters that are numbers: the group's position, the name, the value."""
    return [
        (i, name, value if type(value) in _NUMBERS else float(value))
        for i, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if type(value) in _NUMBERS or (is_torch(value) and value.numel() == 1)
    ]


def hyperparameters(optimizer: Any) -> str:
    """Return the hyperparameters that are numbers as text, one a line."""
    return "\n".join(f"param_groups[{i}][{name!r}] = {v!r}" for i, name, v in numbers_of(optimizer))


def share_settings(group: ProcessGroup, optimizer: Any, parameters: Parameters, source: int) -> Any:
    """Return one rank's hyperparameters, and what its optimizer keeps beside momentum, such as Adam's moments.

    Raises:
        TypeError: on all ranks, naming what pickle does not take.
    """
    content = _pickled_settings(optimizer, parameters) if group.rank == source else b""
    # From a rank of this program.
    settings = pickle.loads(broadcast_bytes(group, parameters.flats[0], content, source))
    if isinstance(settings, TypeError):
        raise settings
    return settings


def _pickled_settings(optimizer: Any, parameters: Parameters) -> bytes:
    """Return what `share_settings` sends: the settings, or the error that all ranks raise."""
    hyper = [
        {k: v for k, v in each.items() if k not in ("params", "param_names")}
        for each in optimizer.param_groups
    ]
    kept = [_kept_of(optimizer, p) for p in parameters.all]
    try:
        return pickle.dumps((hyper, kept))
    except Exception as error:  # noqa: BLE001 (pickle raises whatever the objects do)
        named = [(f"param_groups[{i}]", each) for i, each in enumerate(hyper)]
        named += [(f"the state of {parameters.labels[i]}: ", each) for i, each in enumerate(kept)]
        bad = (f"{name}[{k!r}]" for name, each in named for k, v in each.items() if not _pickles(v))
        place = next(bad, "optimizer")
        return pickle.dumps(TypeError(f"{place}: it cannot be sent to the other ranks: {error}"))


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # noqa: BLE001 (as above)
        return False
    return True


def take_settings(optimizer: Any, parameters: Parameters, settings: Any) -> None:
    """Set what another rank shared."""
    hyper, kept = settings
    for own, theirs in zip(optimizer.param_groups, hyper, strict=True):
        for key, value in theirs.items():
            if is_torch(own.get(key)):
                own[key].copy_(value)
            else:
                own[key] = value
    for parameter, values in zip(parameters.all, kept, strict=True):
        for key in _kept_of(optimizer, parameter).keys() - values.keys():
            del optimizer.state[parameter][key]
        for key, (value, beside) in values.items():
            if is_torch(value) and beside:  # the parameter's device may be another one here
                value = value.to(parameter.device)
            optimizer.state[parameter][key] = value


def _kept_of(optimizer: Any, parameter: Any) -> dict[str, tuple[Any, bool]]:
    """Return a parameter's state without momentum; for each value whether it is where the parameter is."""
    if parameter not in optimizer.state:
        return {}
    return {
        key: (
            value.detach().cpu().clone() if is_torch(value) else value,
            is_torch(value) and value.device == parameter.device,
        )
        for key, value in optimizer.state[parameter].items()
        if key != "momentum_buffer"
    }
