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
from sgdcore.distributed import LocalSGD, OuterSGD
from simulated import Simulated
from test_distributed_interrupts import ThreadGroup, on_all

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


def schedule_free_in_backward() -> None:
    model = [torch.nn.Parameter(torch.ones(3))]
    sgdcore.torch.step_in_backward(sgdcore.torch.ScheduleFreeSGD(model))


def lazy_schedule_free() -> None:
    optimizer = sgdcore.torch.ScheduleFreeSGD(parameters())
    with pytest.raises(ValueError, match="sparse_mode: ScheduleFreeSGD"):
        optimizer.add_param_group({"params": parameters(), "sparse_mode": "lazy"})
    sgdcore.torch.ScheduleFreeSGD([{"params": parameters(), "sparse_mode": "lazy"}])


def captured_schedule_free() -> None:
    device = Simulated()
    try:
        parameter = sgdcore.Parameter(DeviceArray.zeros((3,), "float32"))
        parameter.grad = DeviceArray.zeros((3,), "float32")
        optimizer = sgdcore.ScheduleFreeSGD([parameter])
        optimizer.step()
        device.capture(True)
        optimizer.step()
    finally:
        device.capture(False)
        _core.use_runtime(None)


def local_schedule_free(**options: Any) -> None:
    def run(group: ThreadGroup) -> None:
        LocalSGD(sgdcore.ScheduleFreeSGD([np.ones(3)]), group, **options)

    on_all(run)


def local_schedule_free_apart() -> None:
    for sync in ("keep", "reset"):
        with pytest.raises(ValueError, match="momentum_sync: ScheduleFreeSGD"):
            local_schedule_free(momentum_sync=sync)
    local_schedule_free()


def local_schedule_free_moved() -> None:
    refused: dict[str, Any] = {
        "outer": OuterSGD(0.5),
        "levels": [(None, 2)],
        "transactional": True,
        "exclude_nonfinite": True,
    }
    for option, value in refused.items():
        with pytest.raises(ValueError, match=f"{option}: cannot go with ScheduleFreeSGD"):
            local_schedule_free(momentum_sync="average", **{option: value})
    local_schedule_free(momentum_sync="average", transactional=True)


# Each attempts the combination of a row, by the row's option and what it cannot go with; and a part of the message.
ATTEMPTS: dict[tuple[str, str], tuple[Callable[[], Any], str]] = {
    ("`average`", "`ScheduleFreeSGD`"): (schedule_free_average, "average: ScheduleFreeSGD"),
    ("`average`", "`differentiable=True`"): (differentiable_average, "differentiable: .*average="),
    ("`average`", "`step_in_backward`"): (average_in_backward, "average= .* step_in_backward"),
    ("`average=Polyak()`", "a captured CUDA graph"): (captured_mean, "a captured graph"),
    ("`step_in_backward`", "`ScheduleFreeSGD`"): (
        schedule_free_in_backward,
        "step_in_backward: ScheduleFreeSGD",
    ),
    ('`sparse_mode="lazy"`', "`ScheduleFreeSGD`"): (
        lazy_schedule_free,
        "sparse_mode: ScheduleFreeSGD",
    ),
    ("a captured CUDA graph", "`ScheduleFreeSGD`"): (
        captured_schedule_free,
        "cannot be captured",
    ),
    ('`LocalSGD(momentum_sync="keep")`, `"reset"`', "`ScheduleFreeSGD`"): (
        local_schedule_free_apart,
        "momentum_sync: ScheduleFreeSGD",
    ),
    ("`LocalSGD`'s `outer`, `levels`, `transactional`, `exclude_nonfinite`", "`ScheduleFreeSGD`"): (
        local_schedule_free_moved,
        "transactional: cannot go with ScheduleFreeSGD",
    ),
}


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row.option} {row.other}")
def test_each_row_is_refused(row: Refusal) -> None:
    attempt, message = ATTEMPTS[row.option, row.other]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        attempt()


def test_no_attempt_is_without_a_row() -> None:
    assert ATTEMPTS.keys() == {(row.option, row.other) for row in REFUSED}


def test_the_docs_examples_run() -> None:
    result = doctest.testfile(str(DOCS / "options.md"), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_docs_show_the_table() -> None:
    assert as_markdown() in (DOCS / "options.md").read_text()
