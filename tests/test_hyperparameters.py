"""A step uses the hyperparameters that its groups hold when it begins, however they came to hold them.

A step does not read a dict again that has not changed, so that every way to change one is tried, for both front ends.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import _core
from sgdcore.reference import sgd_update
from sgdcore.torch import SGD as TorchSGD

Groups = list[dict[str, Any]]
Way = Callable[[Groups, float], Any]


def merged(groups: Groups, lr: float) -> None:
    groups[0] |= {"lr": lr}


def refilled(groups: Groups, lr: float) -> None:
    values = dict(groups[0])
    groups[0].clear()
    groups[0].update(values, lr=lr)


def set_again(groups: Groups, lr: float) -> None:
    del groups[0]["lr"]
    groups[0].setdefault("lr", lr)


def popped(groups: Groups, lr: float) -> None:
    items = list(iter(groups[0].items()))
    while groups[0]:
        groups[0].popitem()
    groups[0].update(items)
    groups[0]["lr"] = lr


def behind_many(groups: Groups, lr: float) -> None:
    for i in range(1000):  # which moves the dict's memory
        groups[0][f"own {i}"] = i
    groups[0]["lr"] = lr


def as_replaced_dict(kind: Callable[[dict[str, Any]], Any]) -> Way:
    def change(groups: Groups, lr: float) -> None:
        if lr == FIRST:
            groups[0] = kind(groups[0])
        groups[0]["lr"] = lr

    return change


def as_attributes(groups: Groups, lr: float) -> None:
    holder = HOLDERS.setdefault(id(groups), SimpleNamespace())
    if lr == FIRST:
        vars(holder).update(groups[0])
        groups[0] = vars(holder)
    holder.lr = lr


def in_place(groups: Groups, lr: float) -> None:
    if lr == FIRST:
        groups[0]["lr"] = np.zeros((), np.float64)
    groups[0]["lr"][...] = lr


def in_a_tensor(groups: Groups, lr: float) -> None:
    if lr == FIRST:
        groups[0]["lr"] = torch.zeros((), dtype=torch.float64)
    groups[0]["lr"].fill_(lr)


class Number:
    """A number that changes by itself."""

    value = 0.0

    def __float__(self) -> float:
        return self.value


def in_an_object(groups: Groups, lr: float) -> None:
    if lr == FIRST:
        groups[0]["lr"] = Number()
    groups[0]["lr"].value = lr


class OwnFloat(float):
    """A float, and yet something that its user may have changed."""

    value = 0.0

    def __float__(self) -> float:
        return self.value


def in_a_float(groups: Groups, lr: float) -> None:
    groups[0]["lr"] = OwnFloat(lr)


FIRST = 0.5
LRS = [FIRST, 0.25, 0.25, 2.0, 1.0, 0.0, 0.5]
HOLDERS: dict[int, SimpleNamespace] = {}
WAYS: dict[str, Way] = {
    "item": lambda groups, lr: groups[0].__setitem__("lr", lr),
    "update": lambda groups, lr: groups[0].update(lr=lr),
    "merged": merged,
    "refilled": refilled,
    "set again": set_again,
    "popped": popped,
    "behind many": behind_many,
    "other dict": lambda groups, lr: groups.__setitem__(0, {**groups[0], "lr": lr}),
    "other list": lambda groups, lr: groups.__setitem__(slice(None), [{**groups[0], "lr": lr}]),
    "ordered dict": as_replaced_dict(collections.OrderedDict),
    "default dict": as_replaced_dict(lambda values: collections.defaultdict(int, values)),
    "attributes": as_attributes,
    "array": in_place,
    "tensor": in_a_tensor,
    "object": in_an_object,
    "kind of float": in_a_float,
    "NumPy's number": lambda groups, lr: groups[0].__setitem__("lr", np.float32(lr)),
    "decimal digits": lambda groups, lr: groups[0].__setitem__("lr", int(4 * lr) or False),
}


def training(front_end: str, **hyper: Any) -> tuple[Any, Callable[[], float]]:
    """Return an optimizer of a number, whose gradient is 1, and what steps and returns by how much that changed it."""
    optimizer: Any
    if front_end == "NumPy":
        parameter = sgdcore.Parameter(np.zeros(1))
        parameter.grad = np.ones(1)
        optimizer = sgdcore.SGD([parameter], lr=1.0, **hyper)
    else:
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))  # type: ignore[assignment]
        parameter.grad = torch.ones(1, dtype=torch.float64)  # type: ignore[assignment]
        optimizer = TorchSGD([parameter], lr=1.0, **hyper)

    def step() -> float:
        before = float(parameter.data[0])
        optimizer.step()
        return before - float(parameter.data[0])

    return optimizer, step


@pytest.mark.parametrize("front_end", ["NumPy", "torch"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_uses_what_its_group_holds(way: str, front_end: str) -> None:
    optimizer, step = training(front_end)
    for lr in LRS:
        WAYS[way](optimizer.param_groups, lr)
        expected = float(int(4 * lr)) if way == "decimal digits" else lr
        assert step() == expected
        assert step() == expected


@pytest.mark.parametrize("front_end", ["NumPy", "torch"])
@pytest.mark.parametrize("key", ["momentum", "dampening", "weight_decay", "nesterov", "maximize"])
def test_every_hyperparameter_is_noticed(key: str, front_end: str) -> None:
    hyper: dict[str, Any] = {"momentum": 0.5}
    optimizer, step = training(front_end, **hyper)
    param, momentum = np.zeros(1), None
    flag = key in ("nesterov", "maximize")
    for value in [False, True, False, True] if flag else [0.5, 0.0, 0.25, 0.75]:
        optimizer.param_groups[0][key] = hyper[key] = value
        before = param
        param, momentum = sgd_update(param, np.ones(1), momentum, lr=1.0, **hyper)
        assert step() == (before - param)[0]


@pytest.mark.parametrize("front_end", ["NumPy", "torch"])
def test_groups_that_change_places_keep_their_own(front_end: str) -> None:
    optimizer, _ = training(front_end)
    parameter = optimizer.param_groups[0]["params"][0]
    make = type(parameter) if front_end == "NumPy" else torch.nn.Parameter
    second = make(parameter.data * 0)
    second.grad = parameter.grad * 1
    optimizer.add_param_group({"params": [second], "lr": 0.25})
    expected = [0.0, 0.0]
    for _ in range(3):
        for _ in range(2):
            optimizer.step()
            expected = [expected[0] - 1.0, expected[1] - 0.25]
            assert [float(parameter.data[0]), float(second.data[0])] == expected
        optimizer.param_groups.reverse()


@pytest.mark.parametrize("front_end", ["NumPy", "torch"])
def test_one_dict_in_two_optimizers(front_end: str) -> None:
    (one, step_one), (two, step_two) = training(front_end), training(front_end)
    shared = one.param_groups[0]
    two.param_groups[0] = shared
    for lr in LRS:
        shared["lr"] = lr
        assert step_one() == lr
    two.step()
    assert step_two() == 0  # the parameter of the other one


@pytest.mark.parametrize("front_end", ["NumPy", "torch"])
def test_a_missing_or_wrong_value_is_refused_and_the_next_one_taken(front_end: str) -> None:
    optimizer, step = training(front_end)
    group = optimizer.param_groups[0]
    for lr in LRS:
        group["lr"] = lr
        assert step() == lr
        del group["lr"]
        with pytest.raises(KeyError, match=r"param_groups\[0\] has no 'lr'"):
            step()
        group["lr"] = "much"
        with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\]: expected a number"):
            step()
        group["lr"] = lr
        assert step() == lr


@pytest.mark.parametrize("front_end", ["NumPy", "torch"])
def test_a_step_holds_no_group(front_end: str) -> None:
    optimizer, step = training(front_end)
    step()
    group = optimizer.param_groups[0]
    references = sys.getrefcount(group)
    step()
    assert sys.getrefcount(group) == references
    optimizer.param_groups[0] = {**group, "lr": 0.25}
    del group  # its memory may be the next dict's
    for lr in LRS:
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": lr}
        assert step() == lr


@pytest.mark.parametrize(("kind", "count"), [("Plan", 3), ("TorchPlan", 5)])
def test_what_the_core_is_called_with_is_checked(kind: str, count: int) -> None:
    plan = getattr(_core, kind)
    arguments = [[], None, False, 1.0, None][:count]
    with pytest.raises(TypeError, match="__init__ was not called"):
        plan.__new__(plan).run(*arguments)
    with pytest.raises(TypeError, match="descriptor 'run'"):
        plan.run(object(), *arguments)
    optimizer, _ = training("NumPy" if kind == "Plan" else "torch")
    with pytest.raises(TypeError, match=f"expected {count} arguments, got {count + 1}"):
        optimizer._plan.run(*arguments, None)
    with pytest.raises(TypeError, match="param_groups: expected a list"):
        optimizer._plan.run(None, *arguments[1:])
