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
_IDS = ("params", "param_names")  # of a param group, each process's own


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
    """Return what `take_settings` takes, of one rank; a TypeError on all ranks names what pickle refuses."""
    content = _pack(optimizer, parameters) if group.rank == source else b""
    # From a rank of this program.
    settings = pickle.loads(broadcast_bytes(group, parameters.flats[0], content, source))
    if isinstance(settings, TypeError):
        raise settings
    return settings


def _pack(optimizer: Any, parameters: Parameters) -> bytes:
    try:
        hyper = [
            {k: _pickled(f"param_groups[{i}][{k!r}]", v) for k, v in each.items() if k not in _IDS}
            for i, each in enumerate(optimizer.param_groups)
        ]
        kept = [
            {k: _pickled(f"the state of {label}: [{k!r}]", v) for k, v in each.items()}
            for label, p in zip(parameters.labels, parameters.all, strict=True)
            for each in [_kept_of(optimizer, p)]
        ]
    except TypeError as error:
        return pickle.dumps(error)
    return pickle.dumps((hyper, kept))


def _pickled(place: str, value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        message = f"{place}: it cannot be sent to the other ranks: {error}"
        raise TypeError(message) from error


def take_settings(optimizer: Any, parameters: Parameters, settings: Any) -> None:
    """Set what another rank shared."""
    hyper, kept = settings
    for own, theirs in zip(optimizer.param_groups, hyper, strict=True):
        for key, content in theirs.items():
            value = pickle.loads(content)
            if is_torch(own.get(key)):
                own[key].copy_(value)
            else:
                own[key] = value
    for parameter, theirs in zip(parameters.all, kept, strict=True):
        for key in _kept_of(optimizer, parameter).keys() - theirs.keys():
            del optimizer.state[parameter][key]
        for key, content in theirs.items():
            value, beside = pickle.loads(content)
            # The parameter's device may be another one here.
            optimizer.state[parameter][key] = value.to(parameter.device) if beside else value


def _kept_of(optimizer: Any, parameter: Any) -> dict[str, tuple[Any, bool]]:
    """Return a parameter's state without momentum; for each value whether it is a tensor beside the parameter."""
    kept = {}
    for key, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
        if key != "momentum_buffer":
            beside = is_torch(value) and value.device == parameter.device
            kept[key] = value.detach().cpu().clone() if is_torch(value) else value, beside
    return kept
