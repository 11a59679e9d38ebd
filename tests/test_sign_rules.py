"""Signum and Lion: their bits against torch's operations, signs of special values, their checks, lion-pytorch.

Their bits against the oracle are compared in test_rules.py, as every rule's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore.torch._operations import step_by_sign
from support import STORAGE_TYPES, assert_same_bits, numbers

Hyper = dict[str, Any]

SIGNUM: list[Hyper] = [
    {"lr": 0.1, "momentum": momentum, "weight_decay": decay, "maximize": maximize}
    for momentum, decay, maximize in itertools.product([0.0, 0.9], [0.0, 0.01], [False, True])
]
LION: list[Hyper] = [
    {"lr": 0.1, "beta1": beta1, "beta2": beta2, "weight_decay": decay, "maximize": maximize}
    for beta1, beta2, decay, maximize in itertools.product(
        [0.0, 0.9], [0.0, 0.99], [0.0, 0.01], [False, True]
    )
]
SIZES = [0, 1, 7, 8, 9, 17, 33, 65, 1025]


def hyper_id(hyper: Hyper) -> str:
    return "-".join(f"{key}={value}" for key, value in hyper.items() if value)


def signum_by_torch(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, hyper: Hyper) -> None:
    g = -g if hyper["maximize"] else g
    if hyper["momentum"] != 0:
        g = m.mul_(hyper["momentum"]).add_(g, alpha=1 - hyper["momentum"])
    if hyper["weight_decay"] != 0:
        p.mul_(1 - hyper["lr"] * hyper["weight_decay"])
    p.add_(g.sign(), alpha=-hyper["lr"])


def lion_by_torch(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, hyper: Hyper) -> None:
    """As lion-pytorch does."""
    g = -g if hyper["maximize"] else g
    if hyper["weight_decay"] != 0:
        p.mul_(1 - hyper["lr"] * hyper["weight_decay"])
    direction = m.clone().mul_(hyper["beta1"]).add_(g, alpha=1 - hyper["beta1"])
    p.add_(direction.sign_(), alpha=-hyper["lr"])
    m.mul_(hyper["beta2"]).add_(g, alpha=1 - hyper["beta2"])


CASES: list[Any] = [
    *(pytest.param(sgdcore.Signum, signum_by_torch, h, id="signum-" + hyper_id(h)) for h in SIGNUM),
    *(pytest.param(sgdcore.Lion, lion_by_torch, h, id="lion-" + hyper_id(h)) for h in LION),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rule", "by_torch", "hyper"), CASES)
def test_equals_torchs_operations(
    rule: Any, by_torch: Callable[..., None], hyper: Hyper, dtype: str, isa: str
) -> None:
    starts = [numbers(i, (size,), dtype) for i, size in enumerate(SIZES)]
    params = [sgdcore.Parameter(start.copy()) for start in starts]
    optimizer = rule(params, **hyper)
    expected = [torch.from_numpy(start.copy()) for start in starts]
    momenta = [torch.zeros_like(p) for p in expected]
    for step in range(3):
        grads = [numbers(100 * step + i, (size,), dtype) for i, size in enumerate(SIZES)]
        optimizer.step(grads=grads)
        for p, grad, m in zip(expected, grads, momenta, strict=True):
            by_torch(p, torch.from_numpy(grad), m, hyper)
    for parameter, p, m in zip(params, expected, momenta, strict=True):
        assert_same_bits(parameter.data, p.numpy())
        for state in optimizer.state[parameter].values():
            assert_same_bits(state, m.numpy())


@pytest.mark.parametrize("rule", ["Signum", "Lion"])
@pytest.mark.parametrize("name", STORAGE_TYPES)
def test_signs_of_special_values(name: str, rule: str, isa: str) -> None:
    """A step of zero changes no bit, not even a zero's sign; a NaN stays one, where torch.sign gives 0."""
    dtype = STORAGE_TYPES[name]
    smallest = 2.0**-24 if name == "float16" else 1e-38
    grads = np.array([0.0, -0.0, 0.0, -0.0, np.inf, -np.inf, smallest, -smallest, np.nan], dtype)
    values = np.array([0.0, 0.0, -0.0, -0.0, 2, 2, 2, 2, 2], dtype)
    moved = np.array([1.5, 2.5, 1.5, 2.5], dtype)
    for copies in (1, 20):  # a tail alone, and vectors
        parameter = sgdcore.Parameter(np.tile(values, copies))
        optimizer = getattr(sgdcore, rule)([parameter], lr=0.5)
        optimizer.step(grads=[np.tile(grads, copies)])
        for each in parameter.data.reshape(copies, -1):
            assert_same_bits(each[:4], values[:4])
            assert_same_bits(each[4:8], moved)
            assert np.isnan(each[8])


@pytest.mark.parametrize("rule", ["Signum", "Lion"])
def test_an_infinite_parameter_stays(rule: str) -> None:
    w = np.array([np.inf, -np.inf])
    getattr(sgdcore, rule)([w], lr=0.1).step(grads=[np.ones(2)])
    np.testing.assert_array_equal(w, [np.inf, -np.inf])


def test_a_nan_is_kept_by_torchs_operations_too() -> None:
    parameter, direction = torch.zeros(3), torch.tensor([float("nan"), -2.0, 0.0])
    step_by_sign(parameter, direction, {"lr": 0.5, "weight_decay": 0.0})
    torch.testing.assert_close(parameter, torch.tensor([float("nan"), 0.5, 0.0]), equal_nan=True)


def test_a_decay_without_gradient_leaves_the_momentum() -> None:
    for rule in (sgdcore.Signum, sgdcore.Lion):
        w = np.array([1.0])
        optimizer: Any = rule([w], lr=0.5, weight_decay=0.5)
        for _ in range(2):
            optimizer.step(grads=[np.zeros(1)])
        assert w[0] == 0.75**2
        (state,) = optimizer.state.values()
        assert list(state.values()) == [0]


@pytest.mark.parametrize("name", STORAGE_TYPES)
def test_signsgd_has_no_state(name: str) -> None:
    parameter = sgdcore.Parameter(np.ones(9, STORAGE_TYPES[name]))
    optimizer = sgdcore.Signum([parameter], lr=0.5, momentum=0)
    optimizer.step(grads=[np.full(9, 7.0)])
    assert (parameter.data == 0.5).all()
    assert not optimizer.state


REFUSALS: list[tuple[str, Hyper, str]] = [
    ("Signum", {"lr": -1}, "lr: expected a number >= 0, got -1"),
    ("Signum", {"momentum": 1.0}, "momentum: expected a number >= 0 and < 1, got 1.0"),
    ("Signum", {"momentum": -0.5}, "momentum: expected a number >= 0 and < 1, got -0.5"),
    ("Signum", {"weight_decay": float("nan")}, "weight_decay: expected a number >= 0, got nan"),
    ("Lion", {"lr": float("nan")}, "lr: expected a number >= 0, got nan"),
    ("Lion", {"beta1": 1}, "beta1: expected a number >= 0 and < 1, got 1"),
    ("Lion", {"beta2": 1.5}, "beta2: expected a number >= 0 and < 1, got 1.5"),
    ("Lion", {"weight_decay": -0.1}, "weight_decay: expected a number >= 0, got -0.1"),
]


@pytest.mark.parametrize(("rule", "hyper", "message"), REFUSALS)
def test_refusals(rule: str, hyper: Hyper, message: str) -> None:
    for make, value in (
        (getattr(sgdcore, rule), np.ones(1)),
        (getattr(sgdcore.torch, rule), torch.ones(1, requires_grad=True)),
    ):
        for arguments in ([value], [{"params": [value], **hyper}]):
            with pytest.raises(ValueError, match=message):
                make(arguments, **(hyper if arguments[0] is value else {}))
        optimizer = make([value])
        other = value.copy() if isinstance(value, np.ndarray) else value.detach().clone()
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [other], **hyper})
        saved = optimizer.state_dict()
        saved["param_groups"][0].update(hyper)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        (key,) = hyper
        with pytest.raises(TypeError, match=f"{key}: expected a number, got 'x'"):
            make([value], **{key: "x"})


def test_the_state_of_adam_is_refused_by_its_other_key() -> None:
    """Adam's state has Lion's key exp_avg."""
    tensor = torch.nn.Parameter(torch.ones(3))
    tensor.grad = torch.ones(3)
    adam = torch.optim.Adam([tensor])
    adam.step()
    saved = adam.state_dict()
    saved["param_groups"] = sgdcore.torch.Lion([tensor]).state_dict()["param_groups"]
    for optimizer in (sgdcore.Lion([np.ones(3)]), sgdcore.torch.Lion([tensor])):
        with pytest.raises(ValueError, match="got the state of another optimizer: exp_avg_sq"):
            optimizer.load_state_dict(saved)


def test_lion_pytorch_takes_the_same_steps_to_rounding() -> None:
    package = pytest.importorskip("lion_pytorch")
    start = numbers(0, (1000,))
    params = [torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in range(2)]
    hyper = {"lr": 0.01, "weight_decay": 0.1}
    ours = sgdcore.torch.Lion(params[:1], **hyper, beta1=0.9, beta2=0.99)
    theirs = package.Lion(params[1:], **hyper, betas=(0.9, 0.99))
    for step in range(50):
        for each in params:
            each.grad = torch.from_numpy(numbers(step + 1, (1000,)))
        ours.step()
        theirs.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)
    momenta = ours.state[params[0]]["exp_avg"], theirs.state[params[1]]["exp_avg"]
    torch.testing.assert_close(*momenta, rtol=1e-6, atol=1e-6)
