"""The table of what cannot be combined: the docs show it, and each row is refused by name."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import EMA, Polyak, _core
from sgdcore._combinations import REFUSED, Refusal, as_markdown
from sgdcore.device_array import DeviceArray
from sgdcore.distributed import LocalSGD, OuterSGD
from sgdcore.torch import _interface
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


class Elsewhere:
    """An attempt with each of some options: all but the last are seen to be refused, and the last one raises."""

    values: ClassVar = {"clip_value": 1.0, "max_grad_norm": 1.0, "skip_nonfinite": True}

    def __init__(self, names: str, attempt: Callable[[dict[str, Any]], Any], message: str) -> None:
        self.names, self.attempt, self.message = names.split(), attempt, message

    def __call__(self) -> None:
        *others, last = self.names
        for name in others:
            with pytest.raises((TypeError, ValueError), match=f"{name}.*{self.message}"):
                self.attempt({name: self.values[name]})
        self.attempt({last: self.values[last]})


class OwnOperations(torch.Tensor):
    """A tensor without memory, whose operations are those of another tensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(value: Any) -> Any:
            return value.inner if isinstance(value, OwnOperations) else value

        result = func(*map(inner, args), **{k: inner(v) for k, v in (kwargs or {}).items()})
        return args[0] if func.__name__.split(".")[0].endswith("_") else cls(result)


def step_of(make: Callable[[], torch.Tensor], **hyper: Any) -> Callable[[dict[str, Any]], None]:
    def attempt(options: dict[str, Any]) -> None:
        parameter = make()
        parameter.grad = torch.ones_like(parameter)
        sgdcore.torch.SGD([parameter], **hyper, **options).step()

    return attempt


def options_in_backward(options: dict[str, Any]) -> None:
    sgdcore.torch.step_in_backward(
        sgdcore.torch.SGD([torch.nn.Parameter(torch.ones(3))], **options)
    )


def of_a_distributed_tensor(options: dict[str, Any]) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        tensor = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
        parameter = torch.nn.Parameter(tensor)
        parameter.grad = tensor.clone()
        sgdcore.torch.SGD([parameter], **options).step()
    finally:
        dist.destroy_process_group()


def of_arrays(devices: tuple[int, ...], kind: Any, **more: Any) -> Callable[[dict[str, Any]], None]:
    """Return an attempt with an array on each of some simulated devices."""

    def attempt(options: dict[str, Any]) -> None:
        Simulated()
        try:
            parameters = []
            for device in devices:
                parameters.append(sgdcore.Parameter(DeviceArray.zeros((3,), "float32", device)))
                parameters[-1].grad = DeviceArray.zeros((3,), "float32", device)
            kind(parameters, **more, **options).step()
        finally:
            _core.use_runtime(None)

    return attempt


def sparse_on_a_device(options: dict[str, Any]) -> None:
    weights = torch.nn.Parameter(torch.zeros(3, 4))
    weights.grad = torch.zeros(3, 4).to_sparse_coo()
    optimizer = sgdcore.torch.SGD([weights], **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_interface, "device_index", lambda _: 0)
        optimizer._update_irregular(([], [], [], [], True), False, 1.0)


def uncounted(options: dict[str, Any]) -> None:
    on_device = of_arrays((0,), sgdcore.SGD, average=EMA())
    with pytest.raises(ValueError, match="skip_nonfinite: averages"):
        on_device(options)
    of_arrays((0,), sgdcore.ScheduleFreeSGD)(options)


NORM = "max_grad_norm skip_nonfinite"
NORM_OPTIONS = "`max_grad_norm`, `skip_nonfinite`"
CLIPPING = "`clip_value`, `max_grad_norm`, `skip_nonfinite`"


def refused(
    options: str, other: str, names: str, attempt: Callable[[dict[str, Any]], Any], message: str
) -> tuple[tuple[str, str], tuple[Callable[[], Any], str]]:
    return (options, other), (Elsewhere(names, attempt, message), message)


CLIPPING_ATTEMPTS = dict(
    [
        refused(
            NORM_OPTIONS, "`step_in_backward`", NORM, options_in_backward, "never has all gradients"
        ),
        refused(
            CLIPPING,
            "`differentiable=True`",
            "clip_value " + NORM,
            step_of(lambda: torch.ones(2, requires_grad=True), differentiable=True),
            "a differentiable step is torch's own",
        ),
        refused(
            "`clip_value`",
            "complex parameters",
            "clip_value",
            step_of(lambda: torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))),
            "complex numbers such as those of",
        ),
        refused(
            NORM_OPTIONS,
            "DTensors (`fully_shard`)",
            NORM,
            of_a_distributed_tensor,
            "other processes have parts of it",
        ),
        refused(
            NORM_OPTIONS,
            "tensors with operations instead of memory",
            NORM,
            step_of(lambda: OwnOperations(torch.ones(2))),
            "has operations instead of memory",
        ),
        refused(
            NORM_OPTIONS,
            "tensors without memory (meta, fake)",
            NORM,
            step_of(lambda: torch.nn.Parameter(torch.ones(2, device="meta"))),
            "it has no memory",
        ),
        refused(
            NORM_OPTIONS,
            "gradients on several devices",
            NORM,
            of_arrays((0, 1), sgdcore.SGD),
            "expected all gradients on one device",
        ),
        refused(
            "`skip_nonfinite`",
            "sparse gradients on a device",
            "skip_nonfinite",
            sparse_on_a_device,
            "rows of sparse gradients on a device",
        ),
        refused(
            "`skip_nonfinite`",
            "averages, or a rule that counts steps, on a device",
            "skip_nonfinite",
            uncounted,
            "cannot wait for a device's decision",
        ),
    ]
)


def halves(**group: Any) -> list[dict[str, Any]]:
    made = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    made.grad = torch.ones(3, dtype=torch.bfloat16)
    return [{"params": [made], **group}]


def precision_of_float32() -> None:
    sgdcore.torch.SGD(halves(), precision="split")
    with pytest.raises(TypeError, match="'split' is for parameters of dtype bfloat16"):
        sgdcore.SGD([np.ones(3, np.float16)], precision="split")
    sgdcore.torch.SGD(parameters(), precision="split")


def differentiable_precision() -> None:
    sgdcore.torch.SGD(halves(), precision="kahan", differentiable=True)


def irregular_precision() -> None:
    gaps = torch.ones(3, 2, dtype=torch.bfloat16)[:, :1].requires_grad_()
    gaps.grad = torch.ones_like(gaps)
    optimizer = sgdcore.torch.SGD([gaps], precision="split")
    optimizer.step()


def precision_on_a_device() -> None:
    Simulated()
    try:
        parameter = sgdcore.Parameter(DeviceArray.zeros((3,), "bfloat16"))
        parameter.grad = DeviceArray.zeros((3,), "bfloat16")
        sgdcore.SGD([parameter], precision="split").step()
    finally:
        _core.use_runtime(None)


def stochastic_in_backward() -> None:
    (group,) = halves()
    group["params"][0].grad = None
    optimizers = [
        sgdcore.torch.SGD(group["params"], precision=precision)
        for precision in ("split", "stochastic")
    ]
    with sgdcore.torch.step_in_backward(optimizers[0]):
        pass
    sgdcore.torch.step_in_backward(optimizers[1])


def local_halves() -> None:
    def run(group: Any) -> None:
        LocalSGD(sgdcore.torch.SGD(halves(), precision="split"), group, transactional=True)

    on_all(run)


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
    **CLIPPING_ATTEMPTS,
    ("`precision`", "a parameter of another dtype"): (precision_of_float32, "has float32"),
    ("`precision`", "`differentiable=True`"): (
        differentiable_precision,
        "differentiable: .*precision=",
    ),
    (
        "`precision`",
        "sparse gradients, views with gaps, subclasses with operations of their own",
    ): (irregular_precision, "precision: 'split' is for dense tensors"),
    ("`precision`", "a CUDA device"): (
        precision_on_a_device,
        "precision: split is for parameters on the CPU",
    ),
    ('`precision="stochastic"`', "`step_in_backward`"): (
        stochastic_in_backward,
        "precision: 'stochastic' rounds by",
    ),
    ('`precision="split"`, `"kahan"`', "`LocalSGD`'s `outer`, `wire_dtype`, `transactional`"): (
        local_halves,
        "transactional cannot go with precision='split'",
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
