"""Parameters that are tensor subclasses with operations of their own: stepped by torch's code, beside the others."""

from __future__ import annotations

import copy
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from sgdcore.torch import SGD, step_in_backward
from torch_support import HYPERS, Hyper, assert_same_bits

Optimizer = torch.optim.Optimizer


class Wrapped(Tensor):
    """A wrapper that cannot be flattened: it only forwards operations to the tensor it holds."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        plain = torch.utils._pytree.tree_map(inner, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if func._schema.name[-1] == "_":
            return args[0]
        return cls(result) if isinstance(result, Tensor) else result


def values(tensor: Tensor) -> list[Tensor]:
    """What memory there is behind a tensor."""
    if isinstance(tensor, TwoTensor):
        return [tensor.a, tensor.b]
    return [tensor.inner if isinstance(tensor, Wrapped) else tensor.detach()]


def parameters(kind: type) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(5, 3, generator=generator) for _ in range(3))
    special = TwoTensor(a, b) if kind is TwoTensor else Wrapped(a)
    return [torch.nn.Parameter(special), torch.nn.Parameter(c)]


def train(optimizer: Optimizer, params: list[torch.nn.Parameter], steps: int) -> None:
    for _ in range(steps):
        for p in params:
            (p * p).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(ours: Optimizer, theirs: Optimizer) -> None:
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for p, q in pairs:
        assert type(p) is type(q)
        momenta = [o.state.get(x, {}).get("momentum_buffer") for o, x in ((ours, p), (theirs, q))]
        assert type(momenta[0]) is type(momenta[1])
        for x, y in ((p, q), tuple(momenta)):
            if x is not None:
                for one, other in zip(values(x), values(y), strict=True):
                    assert_same_bits(one, other)


@pytest.mark.parametrize("kind", [TwoTensor, Wrapped])
@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_steps_as_torch_does(hyper: Hyper, kind: type) -> None:
    trained = []
    for make in (SGD, torch.optim.SGD):
        params = parameters(kind)
        optimizer = make(params, **hyper)
        train(optimizer, params, 3)
        trained.append(optimizer)
    assert_same(*trained)


@pytest.mark.parametrize("source", [SGD, torch.optim.SGD])
@pytest.mark.parametrize("target", [SGD, torch.optim.SGD])
def test_state_dicts_go_either_way(source: type[Optimizer], target: type[Optimizer]) -> None:
    results = []
    for first, second in ((source, target), (torch.optim.SGD, torch.optim.SGD)):
        params = parameters(TwoTensor)
        optimizer = first(params, lr=0.1, momentum=0.9)  # type: ignore[call-arg]
        train(optimizer, params, 2)
        other = second(params, lr=0.1, momentum=0.9)  # type: ignore[call-arg]
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, params, 2)
        results.append(other)
    assert_same(*results)


def test_in_the_backward_pass() -> None:
    trained = []
    for make in (SGD, torch.optim.SGD):
        params = parameters(TwoTensor)
        optimizer = make(params, lr=0.1, momentum=0.9)
        if isinstance(optimizer, SGD):
            step_in_backward(optimizer)
        train(optimizer, params, 3)
        trained.append(optimizer)
    assert_same(*trained)


@pytest.mark.parametrize("overflow", [False, True])
def test_under_a_grad_scaler(overflow: bool) -> None:
    trained = []
    for make in (SGD, torch.optim.SGD):
        params = parameters(TwoTensor)
        optimizer = make(params, lr=0.1, momentum=0.9)
        for p in params:
            p.grad = torch.ones_like(p) * 4
        if isinstance(optimizer, SGD):
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor(float(overflow))
        else:
            for p in params:
                p.grad = torch.ones_like(p)
        if isinstance(optimizer, SGD) or not overflow:
            optimizer.step()
        trained.append(optimizer)
    assert_same(*trained)


def test_momentum_dtype() -> None:
    params = parameters(TwoTensor)
    optimizer = SGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.float64)
    train(optimizer, params, 2)
    assert {optimizer.state[p]["momentum_buffer"].dtype for p in params} == {torch.float64}
