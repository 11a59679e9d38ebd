"""Guesses of what users meant: hints for arguments of the wrong kind, warnings of what nothing reads or averages."""

from __future__ import annotations

import difflib
import gc
import sys
import warnings
from collections.abc import Container, Iterable, Iterator
from typing import Any

import numpy as np

from sgdcore import _core

__all__ = [
    "is_torch_module",
    "libraries_of",
    "parameter_hint",
    "params_hint",
    "warn_of_batch_norm",
    "warn_of_near_keys",
]

# Other libraries' names of hyperparameters whose spelling is too different to be found by similarity.
_ALIASES = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "lrate": "lr",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "mom": "momentum",
    "damp": "dampening",
    "nag": "nesterov",
}
_NEAR = 0.85  # difflib's ratio: one or two letters of a word


def libraries_of(value: object) -> set[str]:
    """Return the names of the packages that an object's class and its bases are from."""
    return {str(base.__module__).partition(".")[0] for base in type(value).__mro__}


def parameter_hint(value: Any) -> str:
    """Return a hint at what to give an optimizer instead of a value; begins with "; " unless it is empty."""
    libraries = libraries_of(value)
    if "torch" in libraries:
        if is_torch_module(value):
            return "; for torch's modules there is sgdcore.torch.SGD(module.parameters())"
        return "; for torch's tensors there is sgdcore.torch.SGD"
    if "sklearn" in libraries:
        return "; pass the estimator's arrays, such as [model.coef_, model.intercept_]"
    if hasattr(value, "__array__") or hasattr(value, "__dlpack__"):
        return (
            "; an optimizer updates arrays in place: pass [numpy.array(value)], a copy of your own"
        )
    return ""


def params_hint(value: Any) -> str:
    """Return such a hint for a value that was given as all parameters."""
    if isinstance(value, dict):
        return "; put a group in a list, or pass names with list(params.items())"
    is_parameter = isinstance(value, np.ndarray | _core.Parameter)
    if is_parameter or ("torch" not in libraries_of(value) and _core.is_on_device(value)):
        return "; put it in a list"
    return parameter_hint(value)


def is_torch_module(value: object) -> bool:
    """Tell whether something is a torch.nn.Module, without importing torch."""
    return "torch" in libraries_of(value) and callable(getattr(value, "parameters", None))


def warn_of_near_keys(keys: Iterable[Any], known: Container[str], hypers: Iterable[str]) -> None:
    """Warn of each key of a group that nothing reads and that is nearly a hyperparameter's name."""
    for key in keys:
        if isinstance(key, str) and key not in known:
            for meant in _near(key, list(hypers)):
                warnings.warn(
                    f"param_groups: nothing reads the key {key!r}; did you mean {meant!r}?",
                    stacklevel=_depth_of_caller(),
                )


def _near(key: str, hypers: list[str]) -> Iterator[str]:
    plain = key.lower().replace("-", "_").replace(" ", "_")
    alias = _ALIASES.get(plain)
    if alias in hypers:
        yield alias
    else:
        yield from difflib.get_close_matches(plain, hypers, n=1, cutoff=_NEAR)


def _depth_of_caller() -> int:
    """Return the `stacklevel`, as seen from the calling function, of the first frame outside the package."""
    depth = 1
    frame = sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith("sgdcore."):
        depth += 1
        frame = frame.f_back
    return depth


# Whether `warn_of_batch_norm` has warned in this process.
_warned = False


def warn_of_batch_norm(parameters: Iterable[Any]) -> None:
    """Warn, once in a process, if a module with these parameters has batch norm."""
    global _warned
    batch_norm = sys.modules.get("torch.nn.modules.batchnorm")
    if _warned or batch_norm is None:
        return
    own = {id(parameter) for parameter in parameters}
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, batch_norm.Module)}
    for module in [each for each in objects if type(each) in kinds]:
        norms = (each for each in module.modules() if isinstance(each, batch_norm._NormBase))
        averages = any(each.running_mean is not None for each in norms)
        if averages and any(id(p) in own for p in module.parameters()):
            _warned = True
            warnings.warn(
                "the model has batch norm, whose running statistics stay each rank's own: pass model=model, or "
                "buffers=model.buffers(), to average them with each round",
                stacklevel=3,
            )
            return
