"""The options of every optimizer, for arrays and torch's tensors: against torch's functions, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import sgdcore
import sgdcore.torch
from sgdcore.reference import sgd_update

SHAPES = [(3,), (16, 17), (1,), (0,), (2, 3, 5), (1025,), (40_000,)]
HYPERS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
}
KINDS = [
    sgdcore.SGD,
    sgdcore.SGDW,
    sgdcore.Lion,
    sgdcore.torch.SGD,
    sgdcore.torch.SGDW,
    sgdcore.torch.Lion,
]


def identity_of(kind: type) -> str:
    return f"{kind.__module__.removeprefix('sgdcore.')}.{kind.__name__}"


def tensors_of(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]


def special(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Put numbers that are no numbers, infinities and zeros of both signs into gradients."""
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0]
    grads[-1][: len(values)] = torch.tensor(values)
    return grads


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        torch.where(a.isnan(), 0, a.view(word)), torch.where(b.isnan(), 0, b.view(word))
    )


class Training:
    """Parameters that take steps with given gradients: those of torch, of sgdcore.torch, or arrays."""

    def __init__(self, make: Callable[[Any], Any], dtype: torch.dtype, front_end: str) -> None:
        self.front_end = front_end
        self.tensors = tensors_of(0, dtype)
        if front_end == "arrays":
            self.parameters = [sgdcore.Parameter(t.numpy()) for t in self.tensors]
        elif front_end == "buffer":
            buffer = sgdcore.ParameterBuffer(
                {str(i): t.numpy() for i, t in enumerate(self.tensors)}
            )
            self.parameters = buffer.parameters()
            self.tensors = [torch.from_numpy(p.data) for p in self.parameters]
        else:
            self.parameters = [torch.nn.Parameter(t) for t in self.tensors]
            self.tensors = [p.data for p in self.parameters]
        self.optimizer = make(self.parameters)

    def give(self, grads: list[torch.Tensor]) -> None:
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad.clone() if self.front_end == "torch" else grad.numpy().copy()


FRONT_ENDS = {
    "arrays": sgdcore.SGD,
    "buffer": sgdcore.SGD,
    "torch": sgdcore.torch.SGD,
}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
def test_clip_value_gives_the_bits_of_torch(
    hyper: dict[str, Any], dtype: torch.dtype, front_end: str
) -> None:
    ours = Training(lambda p: FRONT_ENDS[front_end](p, **hyper, clip_value=0.7), dtype, front_end)
    theirs = Training(lambda p: torch.optim.SGD(p, **hyper, foreach=False), dtype, "torch")
    for step in range(4):
        grads = tensors_of(step + 1, dtype)
        if step == 3:
            special(grads)
        ours.give(grads)
        theirs.give(grads)
        torch.nn.utils.clip_grad_value_(theirs.parameters, 0.7)
        ours.optimizer.step()
        theirs.optimizer.step()
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            assert same_bits(a, b)
        for parameter, grad in zip(ours.parameters, grads, strict=True):
            assert same_bits(torch.as_tensor(parameter.grad), grad)  # not rewritten


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_clip_value_of_16_bits_is_applied_in_float32(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    data, grad = (rng.standard_normal(5000).astype(dtype) for _ in range(2))
    limit = 0.3  # which no 16-bit type has
    clipped = np.clip(grad.astype(np.float32), np.float32(-limit), np.float32(limit))
    expected, _ = sgd_update(data, clipped, lr=0.1)
    sgdcore.SGD([data], lr=0.1, clip_value=limit).step(grads=[grad])
    assert data.tobytes() == expected.tobytes()


def test_clip_value_of_a_strided_gradient_and_its_clearing() -> None:
    rng = np.random.default_rng(0)
    data, grad = rng.standard_normal((60, 70)), rng.standard_normal((70, 60)).T
    expected = data - 0.5 * np.clip(grad, -0.25, 0.25)
    parameter = sgdcore.Parameter(data)
    parameter.grad = grad
    sgdcore.SGD([parameter], lr=0.5, clip_value=0.25).step(zero_grad=True)
    np.testing.assert_array_equal(data, expected)
    assert not grad.any()


def test_clip_value_acts_after_the_scale_is_undone() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = sgdcore.torch.SGD(parameters, lr=1.0, clip_value=2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = (parameters[0] * torch.tensor([1.0, -5.0, 3.0])).sum() + parameters[1].sum() * 0
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert parameters[0].tolist() == [-1.0, 2.0, -2.0]


def test_clip_value_in_the_backward_pass_and_its_changes() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = sgdcore.torch.SGD([parameter], lr=1.0)
    with sgdcore.torch.step_in_backward(optimizer):
        for limit, expected in [(None, -3.0), (2.0, -5.0), (0.5, -5.5), (None, -8.5)]:
            optimizer.clip_value = limit
            (parameter.sum() * 3).backward()
            optimizer.step()
            assert parameter.tolist() == [expected] * 2


def test_clip_value_of_sparse_rows() -> None:
    weights = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = sgdcore.torch.SGD([weights], lr=1.0, clip_value=1.5)
    rows = torch.tensor([[0, 2, 2]])
    values = torch.tensor([[1.0, 5.0], [1.0, 1.0], [1.0, -9.0]])
    weights.grad = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=True)
    optimizer.step()
    assert weights.tolist() == [[-1.0, -1.5], [0, 0], [-1.5, 1.5], [0, 0]]


@pytest.mark.parametrize("kind", KINDS, ids=identity_of)
def test_options_are_set_read_and_kept_by_copies(kind: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(2))] if "torch" in kind.__module__ else [np.ones(2)]
    plain = kind(params, lr=0.1)
    assert plain.clip_value is None
    assert b"lipping" not in pickle.dumps(plain)
    plain.clip_value = None
    assert plain._clipping is None
    optimizer = kind(params, lr=0.1, clip_value=np.float32(0.5))
    assert optimizer.clip_value == 0.5
    assert repr(optimizer) == repr(plain)
    assert optimizer.defaults == plain.defaults
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.clip_value == 0.5
        copied.clip_value = 1
        assert optimizer.clip_value == 0.5
        assert copied._plan.clipping.clip_value == 1
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.clip_value == optimizer._plan.clipping.clip_value == 0.5
    optimizer.clip_value = None
    assert optimizer.clip_value is None


@pytest.mark.parametrize("kind", KINDS, ids=identity_of)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clipvalue": 1}, TypeError, "__init__() got an unexpected keyword argument 'clipvalue'"),
        ({"clip_value": 0}, ValueError, "clip_value: expected a number > 0, or None for no limit, got 0"),
        ({"clip_value": -1.5}, ValueError, "clip_value: expected a number > 0, or None for no limit, got -1.5"),
        ({"clip_value": math.nan}, ValueError, "clip_value: expected a number > 0"),
        ({"clip_value": "1"}, TypeError, "clip_value: expected a number, got '1'"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(
    kind: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    params = [torch.nn.Parameter(torch.ones(2))] if "torch" in kind.__module__ else [np.ones(2)]
    with pytest.raises(error) as caught:
        kind(params, lr=0.1, **options)
    assert message in str(caught.value)


def test_what_clip_value_cannot_be_combined_with() -> None:
    complex_numbers = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_numbers.grad = torch.ones_like(complex_numbers)
    with pytest.raises(
        ValueError, match="clip_value: complex numbers such as those of param_groups"
    ):
        sgdcore.torch.SGD([complex_numbers], clip_value=1).step()
    recorded = torch.ones(2, requires_grad=True)
    recorded.grad = torch.ones(2)
    optimizer = sgdcore.torch.SGD([recorded], clip_value=1, differentiable=True)
    with pytest.raises(ValueError, match="clip_value: a differentiable step is torch's own"):
        optimizer.step()
