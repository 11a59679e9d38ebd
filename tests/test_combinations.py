"""The table of what cannot be combined: the docs show it, and each row is refused by name."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import EMA, Polyak, _core
from sgdcore._combinations import REFUSED, Refusal, as_markdown
from sgdcore.device_array import DeviceArray
from simulated import Simulated

DOCS = Path(__file__).parents[1] / "docs"


def parameters() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.ones(3))]
    made[0].grad = torch.ones(3)
    return made


def schedule_free_average() -> None:
    with pytest.raises(ValueError, match="average: ScheduleFreeSGD averages by itself"):
        sgdcore.torch.ScheduleFreeSGD(parameters(), average=EMA())
    sgdcore.ScheduleFreeSGD([np.ones(3)], average=EMA())


def differentiable_average() -> None:
    optimizer = sgdcore.torch.SGD(parameters(), average=EMA())
    with pytest.raises(ValueError, match=r"differentiable: .* average="):
        optimizer.add_param_group({"params": parameters(), "differentiable": True})
    sgdcore.torch.SGD(parameters(), differentiable=True, average=EMA())


def average_in_backward() -> None:
    sgdcore.torch.step_in_backward(
        sgdcore.torch.SGD([torch.nn.Parameter(torch.ones(3))], average=EMA())
    )


def captured_mean() -> None:
    device = Simulated()
    try:
        parameter = sgdcore.Parameter(DeviceArray.zeros((3,), "float32"))
        parameter.grad = DeviceArray.zeros((3,), "float32")
        constant = sgdcore.SGD([parameter], average=EMA())
        mean = sgdcore.SGD([parameter], average=Polyak())
        for optimizer in (constant, mean):
            optimizer.step()
        device.capture(True)
        constant.step()
        mean.step()
    finally:
        device.capture(False)
        _core.use_runtime(None)


# Each attempts the combination of a row, by the row's option and what it cannot go with; and a part of the message.
ATTEMPTS: dict[tuple[str, str], tuple[Callable[[], Any], str]] = {
    ("`average`", "`ScheduleFreeSGD`"): (schedule_free_average, "average: ScheduleFreeSGD"),
    ("`average`", "`differentiable=True`"): (differentiable_average, "differentiable: .*average="),
    ("`average`", "`step_in_backward`"): (average_in_backward, "average= .* step_in_backward"),
    ("`average=Polyak()`", "a captured CUDA graph"): (captured_mean, "a captured graph"),
}


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row.option} {row.other}")
def test_each_row_is_refused(row: Refusal) -> None:
    attempt, message = ATTEMPTS[row.option, row.other]
    with pytest.raises((ValueError, TypeError), match=message):
        attempt()


def test_no_attempt_is_without_a_row() -> None:
    assert ATTEMPTS.keys() == {(row.option, row.other) for row in REFUSED}


def test_the_docs_examples_run() -> None:
    result = doctest.testfile(str(DOCS / "options.md"), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_docs_show_the_table() -> None:
    assert as_markdown() in (DOCS / "options.md").read_text()
