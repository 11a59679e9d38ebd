"""What people change between two steps, at random: a step keeps its work list and must notice each change.

Every change is made to our optimizer and to torch's own; parameters are compared in every bit after each step, momentum
at the end, since our optimizer reads its momentum buffers' memory only after somebody has asked for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sgdcore
from sgdcore.torch import SGD, _interface
from sgdcore.torch import optimizer as optimizer_module
from torch_support import (
    access_without_cpp_functions,
    assert_same_bits,
    assert_same_training,
    momentum_of,
    parameter,
)

# Two of each, so that they can share gradients or memory; square, so that they can be transposed in place.
SHAPES: list[tuple[int, ...]] = [(4, 4), (4, 4), (6,), (6,), (1,), (), (0,), (3, 5)]


class Trainer:
    """One of the two optimizers, with its parameters in a fixed order and random numbers of its own."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], **hyper: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(self.random(shape)) for shape in SHAPES]
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 0.03}]
        self.optimizer = make(groups, **hyper)
        self.held: dict[int, dict[str, Any]] = {}  # states that were looked at once
        self.new_grads()

    def random(self, shape: Any) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def new_grads(self) -> None:
        for p in self.params:
            p.grad = self.random(p.shape)

    def momentum(self, index: int) -> Tensor | None:
        return momentum_of(self.optimizer, self.params[index])


# Each change acts on the parameter of an index.
CHANGES: dict[str, Callable[[Trainer, int], object]] = {}


def change(function: Callable[[Trainer, int], object]) -> Callable[[Trainer, int], object]:
    CHANGES[function.__name__] = function
    return function


@change
def new_gradients(t: Trainer, _: int) -> None:
    t.new_grads()


@change
def new_gradient(t: Trainer, i: int) -> None:
    t.params[i].grad = t.random(t.params[i].shape)


@change
def gradient_in_place(t: Trainer, i: int) -> None:
    if t.params[i].grad is not None:
        t.params[i].grad.mul_(0.5)


@change
def gradient_moves(t: Trainer, i: int) -> None:
    if t.params[i].grad is not None:
        t.params[i].grad.data = t.random(t.params[i].shape)


@change
def no_gradient(t: Trainer, i: int) -> None:
    t.params[i].grad = None


@change
def gradient_of_other_strides(t: Trainer, i: int) -> None:
    axes = tuple(reversed(range(t.params[i].ndim)))
    t.params[i].grad = t.random(t.params[i].shape[::-1]).permute(axes)


@change
def two_share_a_gradient(t: Trainer, i: int) -> None:
    j = i ^ 1
    if t.params[i].shape == t.params[j].shape:
        t.params[i].grad = t.params[j].grad


@change
def gradient_is_another_parameter(t: Trainer, i: int) -> None:
    j = i ^ 1
    if t.params[i].shape == t.params[j].shape:
        t.params[i].grad = t.params[j].detach()


@change
def data_moves(t: Trainer, i: int) -> None:
    t.params[i].data = t.random(t.params[i].shape)


@change
def data_moves_to_a_larger_memory(t: Trainer, i: int) -> None:
    t.params[i].data = t.random((2, *t.params[i].shape))[1]


@change
def two_share_memory(t: Trainer, i: int) -> None:
    j = i ^ 1
    if t.params[i].shape == t.params[j].shape:
        t.params[i].data = t.params[j].data


@change
def grows(t: Trainer, i: int) -> None:
    p = t.params[i]
    if p.ndim == 1:
        momentum = t.momentum(i)
        p.data = torch.cat([p.data, t.random(1)])
        p.grad = t.random(p.shape)
        if momentum is not None:
            longer = torch.cat([momentum, t.random(1)])
            t.optimizer.state[p]["momentum_buffer"] = longer


@change
def transposed_in_place(t: Trainer, i: int) -> None:
    with torch.no_grad():
        if t.params[i].ndim == 2 and len(set(t.params[i].shape)) == 1:
            t.params[i].t_()


@change
def shrinks(t: Trainer, i: int) -> None:
    p = t.params[i]
    if p.ndim == 1 and len(p) > 3:
        p.data = p.data[:-1]
        p.grad = t.random(p.shape)
        momentum = t.momentum(i)
        if momentum is not None:
            t.optimizer.state[p]["momentum_buffer"] = momentum[:-1]


@change
def state_is_looked_at(t: Trainer, i: int) -> None:
    t.held[i] = t.optimizer.state[t.params[i]]


@change
def momentum_moves(t: Trainer, i: int) -> None:
    momentum = t.held.get(i, {}).get("momentum_buffer")
    if momentum is not None:
        momentum.data = t.random(momentum.shape)


@change
def momentum_is_replaced(t: Trainer, i: int) -> None:
    state = t.held.get(i)
    if state and state["momentum_buffer"].shape == t.params[i].shape:
        state["momentum_buffer"] = t.random(t.params[i].shape)


@change
def momentum_is_deleted(t: Trainer, i: int) -> None:
    t.held.pop(i, None)
    t.optimizer.state.pop(t.params[i], None)


@change
def momentum_off_or_on(t: Trainer, i: int) -> None:
    group = t.optimizer.param_groups[i % 2]
    group["momentum"] = 0.9 if group["momentum"] == 0 else 0


@change
def learning_rate(t: Trainer, i: int) -> None:
    t.optimizer.param_groups[i % 2]["lr"] *= 0.7


@change
def other_order(t: Trainer, i: int) -> None:
    t.optimizer.param_groups[i % 2]["params"].reverse()


@change
def other_group(t: Trainer, i: int) -> None:
    first, second = (group["params"] for group in t.optimizer.param_groups[:2])
    if len(first) > 1:
        second.append(first.pop())


@change
def reloaded(t: Trainer, _: int) -> None:
    t.optimizer.load_state_dict(t.optimizer.state_dict())
    t.held.clear()


@change
def nothing(_t: Trainer, _i: int) -> None:
    pass


changes = st.lists(
    st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, len(SHAPES) - 1)), max_size=4
)


@pytest.mark.parametrize("reading", ["access", "C functions only", "attributes"])
@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    steps=st.lists(st.tuples(changes, st.booleans()), min_size=2, max_size=6),
    nesterov=st.booleans(),
)
def test_any_change_between_two_steps(
    reading: str, steps: list[tuple[list[tuple[str, int]], bool]], nesterov: bool
) -> None:
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    with pytest.MonkeyPatch.context() as patch:
        if reading == "attributes":
            patch.setattr(optimizer_module, "exchange_api", lambda: None)
        elif reading == "C functions only":
            patch.setattr(_interface, "_tensor_access", access_without_cpp_functions())
        ours = Trainer(SGD, **hyper)
    theirs = Trainer(torch.optim.SGD, foreach=False, **hyper)
    for made, zero_grad in steps:
        for name, index in made:
            for trainer in (ours, theirs):
                CHANGES[name](trainer, index)
        versions = [p._version for p in ours.params]
        # Clearing a gradient that is a parameter changes the parameter, too.
        cleared = [p.grad.data_ptr() for p in ours.params if zero_grad and p.grad is not None]
        ours.optimizer.step(zero_grad=zero_grad)
        theirs.optimizer.step()
        if zero_grad:
            theirs.optimizer.zero_grad(set_to_none=False)
        for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
            assert_same_bits(p, q, f"parameter {i}")
            assert_same_bits(p.grad, q.grad, f"gradient {i}")
            is_changed = p.grad is not None or p.data_ptr() in cleared
            assert (p._version > versions[i]) == is_changed, f"version of parameter {i}"
    assert_same_training(ours.optimizer, theirs.optimizer)


def test_a_parameter_takes_anothers_place() -> None:
    p, q, r = (parameter(torch.zeros(5), torch.ones(5)) for _ in range(3))
    optimizer = SGD([p, q], lr=1.0)
    optimizer.step()
    optimizer.step()
    versions = [q._version, r._version]
    optimizer.param_groups[0]["params"][1] = r
    optimizer.step()
    assert [x.tolist() for x in (p, q, r)] == [[-3] * 5, [-2] * 5, [-1] * 5]
    assert q._version == versions[0]
    assert r._version > versions[1]


def test_gradients_come_to_be_shared_while_they_are_cleared() -> None:
    p, q = (parameter(torch.zeros(5), torch.ones(5)) for _ in range(2))
    optimizer = SGD([p, q], lr=1.0)
    optimizer.step(zero_grad=True)
    optimizer.step(zero_grad=True)
    p.grad = q.grad = torch.ones(5)
    optimizer.step(zero_grad=True)
    assert [p.tolist(), q.tolist(), p.grad.tolist()] == [[-2] * 5, [-2] * 5, [0] * 5]


def test_parameters_come_to_share_memory(threads: None) -> None:
    # Large enough for two threads, each of which would have one of the two.
    size = 1 << 17
    sgdcore.set_num_threads(2)
    trained = []
    for make in (SGD, torch.optim.SGD):
        generator = torch.Generator().manual_seed(0)
        random = [torch.randn(size, generator=generator) for _ in range(4)]
        p, q = parameter(random[0], random[1]), parameter(random[2], random[3])
        optimizer = make([p, q], lr=0.1, momentum=0.9, foreach=False)
        optimizer.step()
        optimizer.step()
        p.data = q.data
        for _ in range(20):
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(*trained)


def test_momentum_is_read_anew_once_somebody_holds_it() -> None:
    p = parameter(torch.zeros(5), torch.ones(5))
    optimizer = SGD([p], lr=1.0, momentum=0.5)
    optimizer.step()
    optimizer.step()
    assert p.tolist() == [-2.5] * 5
    state = optimizer.state[p]
    optimizer.step()
    assert p.tolist() == [-4.25] * 5
    state["momentum_buffer"].data = torch.zeros(5)
    optimizer.step()
    assert p.tolist() == [-5.25] * 5
    assert state["momentum_buffer"].tolist() == [1] * 5
    version = state["momentum_buffer"]._version
    optimizer.step()
    assert state["momentum_buffer"]._version > version


@pytest.mark.parametrize(
    "get",
    [
        lambda optimizer: optimizer.state_dict()["state"][0],
        lambda optimizer: optimizer.__getstate__()["state"][optimizer.param_groups[0]["params"][0]],
        lambda optimizer: next(iter(optimizer.state.values())),
    ],
    ids=["state_dict", "getstate", "values"],
)
def test_every_way_to_the_momentum_counts_as_holding_it(get: Any) -> None:
    p = parameter(torch.zeros(5), torch.ones(5))
    optimizer = SGD([p], lr=1.0, momentum=0.5)
    for _ in range(3):
        optimizer.step()
    momentum = get(optimizer)["momentum_buffer"]
    momentum.data = torch.zeros(5)
    optimizer.step()
    assert momentum.tolist() == [1] * 5


def test_a_subclass_that_holds_the_state_before_it_is_made() -> None:
    class Holding(SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group)
            self.held = self.state

    p = parameter(torch.zeros(5), torch.ones(5))
    optimizer = Holding([p], lr=1.0, momentum=0.5)
    for _ in range(3):
        optimizer.step()
    optimizer.held[p]["momentum_buffer"] = torch.zeros(5)
    before = p.tolist()
    optimizer.step()
    assert p.tolist() == [x - 1 for x in before]


@pytest.mark.parametrize("strided", [False, True])
def test_a_cleared_gradient_leaves_its_graph(strided: bool) -> None:
    p = parameter(torch.ones(8)[::2] if strided else torch.ones(4))
    optimizer = SGD([p], lr=0.0, momentum=0.5)
    for _ in range(3):
        p.grad = torch.autograd.grad((p**3).sum(), p, create_graph=True)[0]
        optimizer.step(zero_grad=True)
        assert p.grad.grad_fn is None
        assert not p.grad.requires_grad
        assert p.grad.tolist() == [0] * 4


def test_a_single_element_becomes_negated() -> None:
    trained = []
    for make in (SGD, torch.optim.SGD):
        p, q = parameter(torch.ones(1), torch.ones(1)), parameter(torch.ones(3), torch.ones(3))
        optimizer = make([p, q], lr=0.1, momentum=0.9, foreach=False)
        for _ in range(3):
            optimizer.step()
        p.data = torch.tensor([3 + 4j]).conj().imag
        for _ in range(3):
            optimizer.step()
        optimizer.state[p]["momentum_buffer"].data = torch.tensor([1 + 2j]).conj().imag
        for _ in range(3):
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(*trained)


def test_what_is_removed_is_freed_by_an_unusual_step() -> None:
    p, removed = (parameter(torch.zeros(4), torch.ones(4)) for _ in range(2))
    optimizer = SGD([p, removed], lr=1.0, momentum=0.5)
    for _ in range(3):
        optimizer.step()
    p.data = torch.zeros(8)[::2]
    refs = [weakref.ref(removed), weakref.ref(optimizer.state[removed]["momentum_buffer"])]
    del optimizer.state[removed]
    optimizer.param_groups[0]["params"].pop()
    del removed
    optimizer.step()
    assert [ref() for ref in refs] == [None, None]
