"""SGD with decoupled weight decay: its bits against torch's operations, its checks, checkpoints of SGD.

Its bits against the oracle are compared in test_rules.py, as every rule's.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore

Hyper = dict[str, Any]

HYPERS: list[Hyper] = [
    {
        "lr": 0.1,
        "weight_decay": decay,
        "scale_decay_by_lr": scaled,
        "maximize": maximize,
        **momentum,
    }
    for decay, scaled, maximize, momentum in itertools.product(
        [0.0, 0.01],
        [True, False],
        [False, True],
        [
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "dampening": 0.3},
            {"momentum": 0.9, "nesterov": True},
        ],
    )
]
SIZES = [0, 1, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 129, 1023, 1024, 1025, 4099, 65_537]


def hyper_id(hyper: Hyper) -> str:
    return "-".join(f"{key}={value}" for key, value in hyper.items() if value)


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.tobytes() == expected.tobytes()


def torch_step(
    p: torch.Tensor, g: torch.Tensor, b: torch.Tensor | None, hyper: Hyper
) -> torch.Tensor | None:
    """Update `p` in place by torch's own operations, as timm's SGDW does; return the momentum buffer."""
    g = -g if hyper["maximize"] else g
    if hyper["weight_decay"] != 0:
        scale = hyper["lr"] if hyper["scale_decay_by_lr"] else 1.0
        p.mul_(1 - scale * hyper["weight_decay"])
    momentum = hyper.get("momentum", 0)
    if momentum != 0:
        if b is None:
            b = g.clone()
        else:
            b.mul_(momentum).add_(g, alpha=1 - hyper.get("dampening", 0))
        g = g.add(b, alpha=momentum) if hyper.get("nesterov") else b
    p.add_(g, alpha=-hyper["lr"])
    return b


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hyper", HYPERS, ids=hyper_id)
def test_equals_torchs_operations(hyper: Hyper, dtype: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=size).astype(dtype) for size in SIZES]
    params = [sgdcore.Parameter(start.copy()) for start in starts]
    optimizer = sgdcore.SGDW(params, **hyper)
    expected = [torch.from_numpy(start.copy()) for start in starts]
    buffers: list[torch.Tensor | None] = [None] * len(starts)
    for _ in range(3):
        grads = [rng.normal(size=size).astype(dtype) for size in SIZES]
        optimizer.step(grads=grads)
        for i, grad in enumerate(grads):
            buffers[i] = torch_step(expected[i], torch.from_numpy(grad), buffers[i], hyper)
    for parameter, p, b in zip(params, expected, buffers, strict=True):
        assert_same_bits(parameter.data, p.numpy())
        if b is not None:
            assert_same_bits(optimizer.state[parameter]["momentum_buffer"], b.numpy())


def test_the_decay_takes_no_part_in_the_momentum() -> None:
    """With a gradient of zero the momentum stays zero, and each step takes away the same part of the parameter."""
    w = np.array([1.0])
    optimizer = sgdcore.SGDW([w], lr=0.5, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        optimizer.step(grads=[np.zeros(1)])
    assert w[0] == 0.75**2
    (state,) = optimizer.state.values()
    assert state["momentum_buffer"][0] == 0


def test_a_schedule_of_the_learning_rate_scales_the_decay_or_not() -> None:
    for scaled, left in ((True, 1.0), (False, 0.5)):
        w = np.array([1.0])
        optimizer = sgdcore.SGDW([w], lr=1.0, weight_decay=0.5, scale_decay_by_lr=scaled)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step(grads=[np.ones(1)])
        assert w[0] == left


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ],
)
def test_refusals(hyper: Hyper, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sgdcore.SGDW([np.ones(1)], **hyper)
    with pytest.raises(ValueError, match=message):
        sgdcore.SGDW([{"params": [np.ones(1)], **hyper}])


def test_a_group_without_the_flag_is_refused_by_name() -> None:
    optimizer = sgdcore.SGDW([np.ones(1)])
    del optimizer.param_groups[0]["scale_decay_by_lr"]
    with pytest.raises(KeyError, match=r"param_groups\[0\] has no 'scale_decay_by_lr'"):
        optimizer.step(grads=[np.ones(1)])


def test_steps_of_sgds_checkpoint_keep_its_momentum() -> None:
    """A state dict of SGD lacks the flag; the optimizer's own default stays."""
    parameter = sgdcore.Parameter(np.ones(3))
    sgd = sgdcore.SGD([parameter], lr=0.1, momentum=0.9)
    sgd.step(grads=[np.ones(3)])
    optimizer = sgdcore.SGDW([parameter], scale_decay_by_lr=False)
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["scale_decay_by_lr"] is False
    assert_same_bits(optimizer.state[parameter]["momentum_buffer"], np.ones(3))
