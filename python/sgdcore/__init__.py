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
from typing import TYPE_CHECKING, Any

from sgdcore._averages import EMA, Polyak
from sgdcore._clip import clip_grad_norm_
from sgdcore._core import __version__
from sgdcore._options import Options
from sgdcore.device_array import DeviceArray
from sgdcore.lion import Lion
from sgdcore.optimizer import Optimizer
from sgdcore.parameter import Parameter, ParameterBuffer
from sgdcore.runtime import build_info, get_isa, get_num_threads, set_isa, set_num_threads
from sgdcore.schedule_free_sgd import ScheduleFreeSGD
from sgdcore.sgd import SGD
from sgdcore.sgdw import SGDW
from sgdcore.signum import Signum

if TYPE_CHECKING:
    from sgdcore import distributed as distributed
    from sgdcore import reference as reference
    from sgdcore import torch as torch

# Imported at first use: most users need none of them, and two need more than NumPy.
_MODULES = ("distributed", "reference", "torch")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"sgdcore.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "EMA",
    "SGD",
    "SGDW",
    "DeviceArray",
    "Lion",
    "Optimizer",
    "Options",
    "Parameter",
    "ParameterBuffer",
    "Polyak",
    "ScheduleFreeSGD",
    "Signum",
    "__version__",
    "build_info",
    "clip_grad_norm_",
    "get_isa",
    "get_num_threads",
    "set_isa",
    "set_num_threads",
]
