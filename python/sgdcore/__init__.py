"""Stochastic gradient descent in one fused pass over memory, on NumPy arrays.

>>> import numpy as np, sgdcore
>>> w = sgdcore.Parameter(np.ones((2, 3), np.float32))
>>> optimizer = sgdcore.SGD([w], lr=0.1, momentum=0.9)
>>> w.grad = np.full((2, 3), 0.5, np.float32)
>>> optimizer.step()
>>> w.data
array([[0.95, 0.95, 0.95],
       [0.95, 0.95, 0.95]], dtype=float32)
"""

from __future__ import annotations

import importlib
from typing import Any

from sgdcore._core import __version__
from sgdcore.optimizer import Optimizer
from sgdcore.parameter import Parameter, ParameterBuffer
from sgdcore.runtime import build_info, get_isa, get_num_threads, set_isa, set_num_threads
from sgdcore.sgd import SGD


def __getattr__(name: str) -> Any:
    """Import what needs more than NumPy, or is needed by few, when it is first used."""
    if name in ("torch", "distributed"):
        return importlib.import_module(f"sgdcore.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "SGD",
    "Optimizer",
    "Parameter",
    "ParameterBuffer",
    "__version__",
    "build_info",
    "get_isa",
    "get_num_threads",
    "set_isa",
    "set_num_threads",
]
