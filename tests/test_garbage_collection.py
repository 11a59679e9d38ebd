"""Python's garbage collector may run at any allocation, also while an object of the core is being made."""

from __future__ import annotations

import subprocess
import sys

import pytest

# pybind11 lays out the first object of each type in a call that allocates, so each object here has a type of its own.
SCRIPT = """
import gc
import numpy as np
import sgdcore
from sgdcore import _core

makers = {
    "Parameter": lambda: (sgdcore.Parameter, (np.ones(3),)),
    "StateSlots": lambda: (_core.StateSlots, ("sgd", sgdcore.Parameter(np.ones(3)))),
    "Plan": lambda: (_core.Plan, ("sgd",)),
    "ParameterBuffer": lambda: (sgdcore.ParameterBuffer, ({"w": (3,)},)),
}
kind, arguments = makers[KIND]()
gc.set_threshold(1)
for _ in range(20):
    type("Own", (kind,), {})(*arguments)
print("made")
"""


@pytest.mark.parametrize("kind", ["Parameter", "StateSlots", "Plan", "ParameterBuffer"])
def test_a_collection_during_the_construction_of_an_object(kind: str) -> None:
    script = SCRIPT.replace("KIND", repr(kind))
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr


def test_a_collection_during_the_construction_of_a_plan_of_tensors() -> None:
    pytest.importorskip("torch")
    script = """
import gc, torch, sgdcore.torch
from sgdcore import _core
arguments = {}
made, _core.TorchPlan = _core.TorchPlan, lambda **given: arguments.update(given)
try:
    sgdcore.torch.SGD([torch.nn.Parameter(torch.ones(3))])
except AttributeError:
    pass
gc.set_threshold(1)
for _ in range(20):
    type("Own", (made,), {})(**arguments)
print("made")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr
