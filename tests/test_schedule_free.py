"""Schedule-free SGD: what it counts, its two modes, its refusals, and the package schedulefree beside it.

Its bits against the oracle are compared in test_rules.py, as every rule's.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import _core, reference
from sgdcore.device_array import DeviceArray
from sgdcore.distributed import LocalSGD, OuterSGD
from simulated import Simulated
from support import STORAGE_TYPES, Array, assert_same_bits, numbers
from test_distributed_interrupts import ThreadGroup, on_all
from test_rules import Oracle, array_of, tensor_of

Hyper = dict[str, Any]

RULE = "schedule_free_sgd"
HYPERS: list[Hyper] = [
    {"lr": 0.1, "warmup_steps": warmup, "weight_decay": decay, "r": r, "weight_lr_power": power}
    for warmup, decay, r, power in itertools.product([0, 4], [0, 0.1], [0, 1.5], [0, 2, 0.5])
]
KINDS = ["numpy", "torch"]


class Trained:
    """A parameter and its optimizer, of arrays or of tensors."""

    def __init__(self, kind: str, start: Array, **hyper: Any) -> None:
        self.kind = kind
        if kind == "numpy":
            self.parameter: Any = sgdcore.Parameter(start.copy())
            self.optimizer: Any = sgdcore.ScheduleFreeSGD([self.parameter], **hyper)
        else:
            self.parameter = torch.nn.Parameter(tensor_of(start))
            self.optimizer = sgdcore.torch.ScheduleFreeSGD([self.parameter], **hyper)

    @property
    def group(self) -> Hyper:
        return self.optimizer.param_groups[0]

    @property
    def values(self) -> Array:
        return (
            self.parameter.data.copy() if self.kind == "numpy" else array_of(self.parameter).copy()
        )

    @values.setter
    def values(self, values: Array) -> None:
        if self.kind == "numpy":
            self.parameter.data[...] = values
        else:
            with torch.no_grad():
                self.parameter.copy_(tensor_of(values))

    @property
    def z(self) -> Array:
        z = self.optimizer.state[self.parameter]["z"]
        return z.copy() if self.kind == "numpy" else array_of(z).copy()

    def step(self, grad: Array, **kwargs: Any) -> None:
        if self.kind == "numpy":
            self.parameter.grad = grad
        else:
            self.parameter.grad = tensor_of(grad)
        self.optimizer.step(**kwargs)


def trained(kind: str, steps: int = 3, dtype: Any = np.float32, **hyper: Any) -> Trained:
    each = Trained(kind, numbers(0, (1025,), dtype), **{"lr": 0.1, **hyper})
    for step in range(steps):
        each.step(numbers(step + 1, (1025,), dtype))
    return each


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_bits_follow_the_oracle(kind: str, hyper: Hyper) -> None:
    each = Trained(kind, numbers(0, (65,)), **hyper)
    oracle = Oracle(RULE, numbers(0, (65,)), **hyper)
    for step in range(8):
        grad = numbers(step + 1, (65,))
        each.step(grad)
        oracle.step(grad)
        oracle.assert_counts(each.group)
        assert_same_bits(each.values, oracle.param)
        assert_same_bits(each.z, oracle.states[0])
        assert each.group["lr"] == 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_changed_between_steps_are_read(kind: str) -> None:
    """A group that nobody changes is not read again, and its counts still go on."""
    each = Trained(kind, numbers(0, (9,)), lr=0.1)
    oracle = Oracle(RULE, numbers(0, (9,)), lr=0.1)
    changes: dict[int, Hyper] = {2: {"lr": 0.3}, 4: {"k": 1, "weight_sum": 0.5}, 6: {"r": 2.0}}
    for step in range(9):
        for key, value in changes.get(step, {}).items():
            each.group[key] = oracle.hyper[key] = value
        grad = numbers(step + 1, (9,))
        each.step(grad)
        oracle.step(grad)
        oracle.assert_counts(each.group)
        assert_same_bits(each.values, oracle.param)


def test_groups_count_by_themselves_also_without_gradients() -> None:
    a, b = (sgdcore.Parameter(numbers(i, (3,))) for i in range(2))
    optimizer = sgdcore.ScheduleFreeSGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    a.grad = numbers(2, (3,))
    optimizer.step()
    optimizer.step()
    assert [group["k"] for group in optimizer.param_groups] == [2, 2]
    assert [group["lr_max"] for group in optimizer.param_groups] == [0.1, 0.5]
    assert_same_bits(b.data, numbers(1, (3,)))


def test_a_parameter_that_comes_later_starts_with_its_own_value() -> None:
    a, b = (sgdcore.Parameter(numbers(i, (3,))) for i in range(2))
    optimizer = sgdcore.ScheduleFreeSGD([a, b], lr=0.1)
    a.grad = numbers(2, (3,))
    optimizer.step()
    counted = {key: optimizer.param_groups[0][key] for key in ("k", "weight_sum", "lr_max")}
    b.grad = numbers(3, (3,))
    optimizer.step()
    oracle = Oracle(RULE, numbers(1, (3,)), lr=0.1, **counted)
    oracle.step(numbers(3, (3,)))
    assert_same_bits(b.data, oracle.param)
    assert_same_bits(optimizer.state[b]["z"], oracle.states[0])


# --- Steps that fail, or do not happen --------------------------------------------------------------


def assert_unchanged(each: Trained, change: Callable[[], object]) -> None:
    before = dict(each.group), each.values, each.z
    change()
    after = dict(each.group), each.values, each.z
    assert {k: v for k, v in before[0].items() if k != "params"} == {
        k: v for k, v in after[0].items() if k != "params"
    }
    assert_same_bits(after[1], before[1])
    assert_same_bits(after[2], before[2])


def test_a_step_that_fails_changes_no_count_and_its_retry_has_the_same_bits() -> None:
    each, other = trained("numpy"), trained("numpy")

    def fail() -> None:
        with pytest.raises(ValueError, match="shape"):
            each.optimizer.step(grads=[np.ones(3, np.float32)])

    assert_unchanged(each, fail)
    for one in (each, other):
        one.step(numbers(9, (1025,)))
    assert_same_bits(each.values, other.values)
    assert each.group["k"] == other.group["k"] == 4


def test_a_step_that_a_scaler_leaves_out_is_not_counted() -> None:
    each, other = trained("torch"), trained("torch")

    def skip() -> None:
        each.optimizer.found_inf, each.optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
        each.step(np.full(1025, np.inf, np.float32))
        del each.optimizer.found_inf, each.optimizer.grad_scale

    assert_unchanged(each, skip)
    each.optimizer.found_inf, each.optimizer.grad_scale = torch.tensor(0.0), torch.tensor(2.0)
    each.step(2 * numbers(9, (1025,)))
    del each.optimizer.found_inf, each.optimizer.grad_scale
    other.step(numbers(9, (1025,)))
    assert_same_bits(each.values, other.values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_left_out_for_its_gradients_is_not_counted(kind: str) -> None:
    each, other = trained(kind, skip_nonfinite=True), trained(kind)
    assert_unchanged(each, lambda: each.step(np.full(1025, np.inf, np.float32)))
    assert each.optimizer.skipped_steps == 1
    for one in (each, other):
        one.step(numbers(9, (1025,)))
    assert_same_bits(each.values, other.values)
    assert each.group["k"] == 4


def test_irregular_and_overlapping_tensors_are_counted_once() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    memory = torch.zeros(12)
    parts = [memory[:8], memory[4:]]  # these step one after the other
    gaps = torch.ones(4, 2)[:, 0]
    params = [torch.nn.Parameter(each) for each in (*parts, gaps, TwoTensor(gaps, gaps))]
    optimizer = sgdcore.torch.ScheduleFreeSGD(params, lr=0.1)
    for step in range(4):
        for each in params:
            each.grad = torch.ones_like(each)
        optimizer.step()
        assert optimizer.param_groups[0]["k"] == step + 1
        expected = reference.progress[RULE](lr=0.1, k=step, weight_sum=step * 0.1**2, lr_max=0.1)
        assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(expected["weight_sum"])


# --- The two modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("z_dtype", [None, "float32", "float64"])
@pytest.mark.parametrize("name", STORAGE_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_train_restores_every_bit(kind: str, name: str, z_dtype: str | None) -> None:
    each = trained(kind, dtype=STORAGE_TYPES[name], z_dtype=z_dtype)
    y, z = each.values, each.z
    each.optimizer.train()  # it is in training: nothing happens
    assert_same_bits(each.values, y)
    for _ in range(3):
        each.optimizer.eval()
        x = each.values
        assert_same_bits(x, reference.moved_toward(y, z, 1 - 1 / 0.9))
        each.optimizer.eval()  # it is in eval mode
        assert_same_bits(each.values, x)
        each.optimizer.train()
        assert_same_bits(each.values, y)
        assert_same_bits(each.z, z)
    assert list(each.optimizer.state[each.parameter]) == ["z"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_that_of_the_iterates(kind: str) -> None:
    """With float64 and weights that are all equal, x is the mean of all z but the first."""
    each = Trained(kind, numbers(0, (65,), np.float64), lr=0.1)
    iterates = []
    for step in range(20):
        each.step(numbers(step + 1, (65,), np.float64))
        iterates.append(each.z)
    each.optimizer.eval()
    np.testing.assert_allclose(each.values, np.mean(iterates, axis=0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_was_changed_in_eval_mode_is_taken_for_the_average(kind: str) -> None:
    each = trained(kind)
    each.optimizer.eval()
    x = each.values * np.float32(0.5)
    each.values = x
    each.optimizer.train()
    assert_same_bits(each.values, reference.moved_toward(x, each.z, 1 - 0.9))


@pytest.mark.parametrize("through", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_eval_mode_goes_on_with_the_same_bits(kind: str, through: str) -> None:
    each, other = trained(kind), trained(kind)
    each.optimizer.eval()
    again = Trained(kind, each.values, lr=1.0)
    if through == "state_dict":
        again.optimizer.load_state_dict(each.optimizer.state_dict())
    elif through == "pickle":
        again.optimizer = pickle.loads(pickle.dumps(each.optimizer))
    else:
        again.optimizer = copy.deepcopy(each.optimizer)
    again.parameter = again.optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="eval mode"):
        again.step(numbers(9, (1025,)))
    for one in (again, other):
        one.optimizer.train()
        one.step(numbers(9, (1025,)))
    assert_same_bits(again.values, other.values)
    assert_same_bits(again.z, other.z)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_eval_mode_is_refused_before_anything_is_changed(kind: str) -> None:
    each = trained(kind)
    each.optimizer.eval()

    def closure() -> float:
        raise AssertionError("called")

    def step() -> None:
        for kwargs in ({}, {"closure": closure}, {"zero_grad": True}):
            with pytest.raises(
                RuntimeError, match=r"param_groups\[0\]: the optimizer is in eval mode"
            ):
                each.step(np.ones(1025, np.float32), **kwargs)
            grad = each.parameter.grad
            assert (np.asarray(grad) == 1).all()

    assert_unchanged(each, step)


def test_parameters_without_a_step_stay_as_they_are() -> None:
    for kind in KINDS:
        each = Trained(kind, numbers(0, (3,)), lr=0.1)
        each.optimizer.eval()
        assert_same_bits(each.values, numbers(0, (3,)))
        each.optimizer.train()
        assert_same_bits(each.values, numbers(0, (3,)))


def test_buffers_and_other_layouts_have_the_same_average() -> None:
    values = {"a": numbers(0, (3, 5)), "b": numbers(1, (7,))}
    buffer = sgdcore.ParameterBuffer(values)
    optimizer = sgdcore.ScheduleFreeSGD(buffer, lr=0.1)
    buffer.grad[:] = numbers(2, (buffer.size,))
    optimizer.step()
    y = buffer.data.copy()
    optimizer.eval()
    assert (buffer.data == y).all()  # after one step x, y and z are one
    buffer.grad[:] = numbers(3, (buffer.size,))
    optimizer.train()
    optimizer.step()
    y = buffer.data.copy()
    optimizer.eval()
    assert not (buffer.data == y).any()
    optimizer.train()
    assert_same_bits(buffer.data, y)
    reordered = torch.nn.Parameter(
        tensor_of(numbers(0, (2, 3, 4, 5))).to(memory_format=torch.channels_last)
    )
    other = sgdcore.torch.ScheduleFreeSGD([reordered], lr=0.1)
    for step in range(2):
        reordered.grad = tensor_of(numbers(step, (2, 3, 4, 5)))
        other.step()
    before = reordered.detach().clone()
    other.eval()
    assert not torch.equal(reordered, before)
    other.train()
    assert torch.equal(reordered, before)


# --- Devices, simulated on the CPU ------------------------------------------------------------------


@pytest.fixture
def device() -> Iterator[Simulated]:
    yield Simulated()
    _core.use_runtime(None)


def test_modes_of_arrays_on_a_device(device: Simulated) -> None:
    array = DeviceArray.zeros((1025,), np.float32, 0)
    array.assign(numbers(0, (1025,)))
    parameter = sgdcore.Parameter(array)
    optimizer = sgdcore.ScheduleFreeSGD([parameter], lr=0.1)
    other = trained("numpy")
    for step in range(3):
        grad = DeviceArray.zeros((1025,), np.float32, 0)
        grad.assign(numbers(step + 1, (1025,)))
        optimizer.step(grads=[grad])
    for each in (optimizer, other.optimizer):
        each.eval()
    assert_same_bits(array.numpy(), other.values)
    for each in (optimizer, other.optimizer):
        each.train()
    assert_same_bits(array.numpy(), other.values)
    assert optimizer.param_groups[0]["k"] == 3


def test_a_device_does_not_decide_whether_a_step_counts(device: Simulated) -> None:
    array = DeviceArray.zeros((9,), np.float32, 0)
    optimizer = sgdcore.ScheduleFreeSGD([sgdcore.Parameter(array)], lr=0.1, skip_nonfinite=True)
    with pytest.raises(ValueError, match="skip_nonfinite: averages, and rules that count steps"):
        optimizer.step(grads=[DeviceArray.zeros((9,), np.float32, 0)])
    assert optimizer.param_groups[0]["k"] == 0


def test_a_step_is_not_captured(device: Simulated) -> None:
    array = DeviceArray.zeros((9,), np.float32, 0)
    optimizer = sgdcore.ScheduleFreeSGD([sgdcore.Parameter(array)], lr=0.1)
    optimizer.step(grads=[DeviceArray.zeros((9,), np.float32, 0)])
    device.capture(True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        optimizer.step(grads=[DeviceArray.zeros((9,), np.float32, 0)])
    device.capture(False)
    assert optimizer.param_groups[0]["k"] == 1
    optimizer.step(grads=[DeviceArray.zeros((9,), np.float32, 0)])
    assert optimizer.param_groups[0]["k"] == 2


# --- Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lr": -1}, "lr: expected a number >= 0, got -1"),
        ({"momentum": 0}, "momentum: expected a number > 0 and < 1, got 0"),
        ({"momentum": 1.0}, "momentum: expected a number > 0 and < 1, got 1.0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a number >= 0, got nan"),
        ({"warmup_steps": -1}, "warmup_steps: expected a number >= 0, got -1"),
        ({"r": -0.5}, "r: expected a number >= 0, got -0.5"),
        ({"weight_lr_power": -2}, "weight_lr_power: expected a number >= 0, got -2"),
    ],
)
def test_refusals(hyper: Hyper, message: str) -> None:
    for make, value in (
        (sgdcore.ScheduleFreeSGD, np.ones(1)),
        (sgdcore.torch.ScheduleFreeSGD, torch.ones(1, requires_grad=True)),
    ):
        with pytest.raises(ValueError, match=message):
            make([value], **hyper)  # type: ignore[operator]
        with pytest.raises(ValueError, match=message):
            make([{"params": [value], **hyper}])  # type: ignore[operator]


def test_an_average_is_refused() -> None:
    for make, value in (
        (sgdcore.ScheduleFreeSGD, np.ones(1)),
        (sgdcore.torch.ScheduleFreeSGD, torch.ones(1, requires_grad=True)),
    ):
        with pytest.raises(ValueError, match="average: ScheduleFreeSGD averages by itself"):
            make([value], average=sgdcore.EMA())  # type: ignore[operator]


def test_lazy_sparse_gradients_are_refused() -> None:
    parameter = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="sparse_mode: ScheduleFreeSGD averages all rows"):
        sgdcore.torch.ScheduleFreeSGD([{"params": [parameter], "sparse_mode": "lazy"}])


# --- The package schedulefree -----------------------------------------------------------------------


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_schedulefree_takes_the_same_steps_to_rounding(hyper: Hyper) -> None:
    package = pytest.importorskip("schedulefree")
    start = numbers(0, (257,), np.float64)
    params = [torch.nn.Parameter(tensor_of(start)) for _ in range(2)]
    ours = sgdcore.torch.ScheduleFreeSGD(params[:1], **hyper)
    theirs = package.SGDScheduleFree(params[1:], **hyper)
    for step in range(20):
        theirs.train()
        for each in params:
            each.grad = tensor_of(numbers(step + 1, (257,), np.float64))
        ours.step()
        theirs.step()
        if step % 5 == 4:
            torch.testing.assert_close(params[0], params[1], rtol=1e-12, atol=1e-12)
            ours.eval()
            theirs.eval()
            torch.testing.assert_close(params[0], params[1], rtol=1e-12, atol=1e-12)
            ours.train()
    for key in ("k", "weight_sum", "lr_max"):
        assert ours.param_groups[0][key] == pytest.approx(theirs.param_groups[0][key], rel=1e-14)


def test_a_checkpoint_of_schedulefree_loads() -> None:
    package = pytest.importorskip("schedulefree")
    parameter = torch.nn.Parameter(tensor_of(numbers(0, (65,), np.float64)))
    theirs = package.SGDScheduleFree([parameter], lr=0.1, warmup_steps=3)
    theirs.train()
    for step in range(3):
        parameter.grad = tensor_of(numbers(step + 1, (65,), np.float64))
        theirs.step()
    theirs.eval()
    own = torch.nn.Parameter(parameter.detach().clone())
    ours = sgdcore.torch.ScheduleFreeSGD([own])
    ours.load_state_dict(theirs.state_dict())
    for optimizer, each in ((ours, own), (theirs, parameter)):
        optimizer.train()
        each.grad = tensor_of(numbers(9, (65,), np.float64))
        optimizer.step()
    torch.testing.assert_close(own, parameter, rtol=1e-12, atol=1e-12)
    assert ours.param_groups[0]["k"] == 4


# --- Several workers --------------------------------------------------------------------------------


def test_local_sgd_averages_the_iterates_with_the_parameters() -> None:
    def run(group: ThreadGroup) -> tuple[Array, Array, Array, int]:
        params = [sgdcore.Parameter(numbers(i, (5,))) for i in range(2)]
        optimizer = sgdcore.ScheduleFreeSGD(params, lr=0.1)
        local = LocalSGD(optimizer, group, sync_every=2, momentum_sync="average")
        for step in range(4):
            params[0].grad = numbers(10 * group.rank + step, (5,))
            params[1].grad = numbers(3, (5,)) if group.rank == 0 else None
            local.step()
        y, z = (params[0].data.copy(), optimizer.state[params[0]]["z"].copy())
        missing = optimizer.state[params[1]]["z"].copy()
        return y, z, missing, optimizer.param_groups[0]["k"]

    first, second = on_all(run)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert_same_bits(a, b)
    assert first[3] == second[3] == 4
    assert abs(first[2]).min() > 0.1  # a z that a rank lacks is no zero


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "momentum_sync: ScheduleFreeSGD needs 'average'"),
        ({"momentum_sync": "reset"}, "momentum_sync: ScheduleFreeSGD needs 'average'"),
        ({"momentum_sync": "average", "outer": OuterSGD(0.5)}, "outer: cannot go with"),
        ({"momentum_sync": "average", "transactional": True}, "transactional: cannot go with"),
        ({"momentum_sync": "average", "exclude_nonfinite": True}, "exclude_nonfinite: cannot"),
    ],
)
def test_local_sgds_options_that_change_one_alone_are_refused(
    options: dict[str, Any], message: str
) -> None:
    def run(group: ThreadGroup) -> None:
        optimizer = sgdcore.ScheduleFreeSGD([np.ones(1)], lr=0.1)
        with pytest.raises(ValueError, match=message):
            LocalSGD(optimizer, group, **options)

    on_all(run)
