"""sgdcore.torch.SGD against torch.optim.SGD itself: the numbers, the semantics, and torch's defects that it lacks."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import sgdcore
from processes import allow_fork, assert_daemons_let_python_end, in_fork, stepping
from sgdcore import reference
from sgdcore.torch import SGD, _interface
from sgdcore.torch import optimizer as optimizer_module
from torch_support import (
    HYPERS,
    Hyper,
    Pair,
    assert_same_bits,
    assert_same_training,
    bits,
    momentum_of,
    needs_torch_2_6,
    parameter,
    parameters,
)

FULL: Hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


@pytest.fixture(params=["exchange API", "attributes"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with both ways to read tensors: torch's DLPack C exchange API, and without it."""
    if request.param == "attributes":
        monkeypatch.setattr(optimizer_module, "exchange_api", lambda: None)
    elif _interface.exchange_api() is None:
        pytest.skip("this torch has no DLPack C exchange API")
    return str(request.param)


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """One of each layout: vectors around vector widths, a matrix, channels_last, transposed, 0-d, empty, large."""
    torch.manual_seed(seed)
    shapes = [(n,) for n in (1, 7, 8, 17, 33)] + [(3, 5), (2, 3, 4, 4), (), (0,), (40, 50)]
    result = [torch.randn(shape, dtype=dtype) for shape in shapes]
    result[6] = result[6].to(memory_format=torch.channels_last)
    result[9] = result[9].t()
    result.append(torch.randn(70_001, dtype=dtype))
    return result


def grads_for(values: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, dtype=v.dtype, generator=generator) for v in values]


# The numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hyper", HYPERS)
def test_bits_of_every_combination(hyper: Hyper, dtype: torch.dtype, reading: str) -> None:
    values = tensors(dtype)
    pair = Pair(values, **hyper)
    for step in range(6):
        grads: list[Any] = grads_for(values, step)
        if step in (0, 3):
            grads[step] = None  # a first gradient that comes late, and one that stays away once
        pair.step(grads)
    pair.check()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    values = [torch.randn(300_000), torch.randn(33), torch.randn(100_001)]
    sgdcore.set_num_threads(threads)
    try:
        pair = Pair(values, **FULL)
        for step in range(3):
            pair.step(grads_for(values, step))
        pair.check()
    finally:
        sgdcore.set_num_threads(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
@pytest.mark.parametrize("hyper", HYPERS)
def test_sixteen_bits_are_float32_arithmetic_with_one_rounding(
    hyper: Hyper, dtype: torch.dtype, momentum_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1003).to(dtype))
    optimizer = SGD([p], momentum_dtype=momentum_dtype, **hyper)
    value, buffer = p.detach().float(), None
    for step in range(5):
        grad = torch.randn(1003).to(dtype)
        p.grad = grad.clone()
        optimizer.step()
        # The reference computes in float32; rounding to the stored types is torch's.
        new_value, new_buffer = reference.sgd_update(
            value.numpy(), grad.float().numpy(), None if buffer is None else buffer.numpy(), **hyper
        )
        value = torch.from_numpy(np.asarray(new_value)).to(dtype).float()
        if new_buffer is not None:
            buffer = torch.from_numpy(np.asarray(new_buffer)).to(momentum_dtype or dtype).float()
        assert_same_bits(p, value.to(dtype), f"step {step}")
        if buffer is not None:
            assert_same_bits(momentum_of(optimizer, p), buffer.to(momentum_dtype or dtype))


@pytest.mark.parametrize("hyper", HYPERS)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.complex64, 2e-6), (torch.complex128, 2e-15)]
)
def test_complex_numbers_are_pairs_of_real_ones(
    hyper: Hyper, dtype: torch.dtype, rounding: float
) -> None:
    torch.manual_seed(0)
    values = [torch.randn(37, dtype=dtype), torch.randn(4, 5, dtype=dtype)]
    pair = Pair(values, **hyper)
    real = Pair([torch.view_as_real(v) for v in values], **hyper)
    for step in range(4):
        grads = grads_for(values, step)
        pair.step(grads)
        real.step([torch.view_as_real(g) for g in grads])
    for ours, theirs, as_real in zip(
        pair.ours_params, pair.torch_params, real.torch_params, strict=True
    ):
        assert_same_bits(torch.view_as_real(ours.detach()), as_real.detach())
        # torch's own complex arithmetic rounds once more than its real arithmetic.
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


def test_conjugated_and_negated_views() -> None:
    p = torch.nn.Parameter(torch.randn(4, dtype=torch.complex64))
    q = torch.nn.Parameter(p.detach().clone())
    grad = torch.randn(4, dtype=torch.complex64)
    p.grad, q.grad = grad.conj(), grad.conj().resolve_conj()
    for parameter_ in (p, q):
        SGD([parameter_], **FULL).step()
    assert_same_bits(p, q)
    imaginary = torch.randn(4, dtype=torch.complex64).conj().imag  # has the negative bit set
    assert imaginary.is_neg()
    r, s = parameter(torch.ones(4)), parameter(torch.ones(4))
    r.grad, s.grad = imaginary, imaginary.resolve_neg()
    for parameter_ in (r, s):
        SGD([parameter_], **FULL).step()
    assert_same_bits(r, s)


layouts = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])


@st.composite
def groups(draw: st.DrawFn) -> list[tuple[Hyper, list[tuple[torch.Tensor, list[torch.Tensor]]]]]:
    """Groups with their hyperparameters; each parameter with the gradients of three steps, in any layout."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)

    def array(shape: tuple[int, ...], layout: str) -> torch.Tensor:
        random = torch.randn(shape, dtype=dtype, generator=generator)
        if layout == "transposed":
            axes = list(range(len(shape)))[::-1]
            return random.permute(axes).contiguous().permute(axes)
        if layout == "strided" and shape:
            wide = torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=dtype)
            wide[..., ::2] = random
            return wide[..., ::2]
        if layout == "expanded" and shape:
            return random[:1].expand(shape) if shape[0] else random
        return random

    result = []
    for _ in range(draw(st.integers(1, 3))):
        hyper = dict(draw(st.sampled_from(HYPERS)))
        hyper["lr"] = draw(st.floats(0, 2, width=32))
        hyper["weight_decay"] = draw(st.sampled_from([0.0, 1e-4, 0.37]))
        params = []
        for _ in range(draw(st.integers(1, 4))):
            shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
            layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
            params.append((array(shape, layout), [array(shape, draw(layouts)) for _ in range(3)]))
        result.append((hyper, params))
    return result


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(groups())
def test_bits_of_any_shapes_strides_groups_and_hyperparameters(drawn: Any) -> None:
    optimizers = []
    for make in (SGD, lambda g: torch.optim.SGD(g, foreach=False)):
        made = []
        for hyper, params in drawn:
            leaves = []
            for value, _ in params:
                leaf = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                leaves.append(torch.nn.Parameter(leaf.copy_(value)))
            made.append({"params": leaves, **hyper})
        optimizers.append(make(made))
    for step in range(3):
        for optimizer in optimizers:
            for group, (_, params) in zip(optimizer.param_groups, drawn, strict=True):
                for p, (_, grads) in zip(group["params"], params, strict=True):
                    # torch's own bits differ for broadcast gradients: it rounds lr * g before adding it.
                    ours = optimizer is optimizers[0] or 0 not in grads[step].stride()
                    p.grad = grads[step] if ours else grads[step].contiguous()
            optimizer.step()
    assert_same_training(*optimizers)


# What torch's SGD trains


@pytest.mark.parametrize("reading_grad", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_another_type(dtype: torch.dtype, reading_grad: str) -> None:
    grad = torch.randn(100).to(getattr(torch, reading_grad))
    p = parameter(torch.randn(100).to(dtype), grad)
    before = p.detach().clone()
    optimizer = SGD([p], lr=0.1)
    optimizer.step()
    wide = torch.float64 if torch.float64 in (dtype, grad.dtype) else torch.float32
    expected, _ = reference.sgd_update(before.to(wide).numpy(), grad.to(wide).numpy(), None, lr=0.1)
    assert_same_bits(p, torch.from_numpy(np.asarray(expected)).to(dtype))


@pytest.mark.parametrize("hyper", HYPERS)
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_mean_what_they_mean_as_dense_ones(hyper: Hyper, coalesced: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(20, 3)
    p, q = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    ours, dense = SGD([p], **hyper), torch.optim.SGD([q], foreach=False, **hyper)
    for step in range(4):
        index = torch.tensor([[1, 5, 5, step]])
        grad = torch.sparse_coo_tensor(index, torch.randn(4, 3), (20, 3), check_invariants=False)
        if coalesced:
            grad = grad.coalesce()
        p.grad, q.grad = grad, grad.to_dense()
        ours.step()
        dense.step()
    assert_same_bits(p, q)
    assert_same_bits(momentum_of(ours, p), momentum_of(dense, q))


def test_lazy_sparse_steps_touch_only_the_rows_that_appear() -> None:
    values = torch.randn(10, 2)
    p = torch.nn.Parameter(values.clone())
    optimizer = SGD([p], **FULL, sparse_mode="lazy")
    rows = parameters([values[[2, 7]], values[[2]]])
    both = torch.optim.SGD([rows[0]], foreach=False, **FULL)
    grads = torch.randn(2, 2), torch.randn(2, 2)
    for grad in grads:
        p.grad = torch.sparse_coo_tensor(
            torch.tensor([[2, 7]]), grad, (10, 2), check_invariants=False
        )
        rows[0].grad = grad.clone()
        optimizer.step()
        both.step()
    assert_same_bits(p[[2, 7]], rows[0])
    others = [0, 1, 3, 4, 5, 6, 8, 9]
    assert_same_bits(p[others], values[others])
    momentum = momentum_of(optimizer, p)
    assert momentum is not None
    assert_same_bits(momentum[[2, 7]], momentum_of(both, rows[0]))
    assert not momentum[others].any()
    with pytest.raises(ValueError, match="sparse_mode: expected 'dense' or 'lazy', got 'row'"):
        SGD([p], sparse_mode="row")


def test_embedding_with_sparse_gradients_trains() -> None:
    embeddings = [torch.nn.Embedding(30, 4, sparse=sparse) for sparse in (True, False)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    optimizers = [
        SGD(embeddings[0].parameters(), **FULL),
        torch.optim.SGD(embeddings[1].parameters(), **FULL),
    ]
    for step in range(5):
        for embedding, optimizer in zip(embeddings, optimizers, strict=True):
            optimizer.zero_grad()
            embedding(torch.tensor([1, 1, step, 9])).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(embeddings[0].weight, embeddings[1].weight, rtol=0, atol=1e-7)


def test_data_swapped_between_steps() -> None:
    pair = Pair([torch.randn(50), torch.randn(5)], **FULL)
    for step in range(4):
        pair.step(grads_for(pair.ours_params, step))
        new = torch.randn(50)
        pair.ours_params[0].data, pair.torch_params[0].data = new.clone(), new.clone()
    kept = pair.ours_params[0].data
    pair.step(grads_for(pair.ours_params, 9))
    pair.check()
    assert kept.data_ptr() == pair.ours_params[0].data_ptr()


def test_swapped_data_is_not_kept_alive() -> None:
    p = parameter(torch.zeros(10), torch.ones(10))
    optimizer = SGD([p], **FULL)
    optimizer.step()
    optimizer.step()
    storage = weakref.ref(p.data.untyped_storage())
    old = p.data.untyped_storage()
    p.data = torch.ones(10)
    del old
    gc.collect()
    assert storage() is None


def test_tied_parameters_step_one_after_the_other(reading: str) -> None:
    start = torch.randn(40)
    trained = []
    for make in (SGD, torch.optim.SGD):
        base = start.clone()
        params = [torch.nn.Parameter(base[:30]), torch.nn.Parameter(base[10:])]
        optimizer = make(params, foreach=False, **FULL)
        for step in range(3):
            for p, grad in zip(params, grads_for([base[:30], base[10:]], step), strict=True):
                p.grad = grad
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(*trained)


def test_the_same_parameter_twice() -> None:
    trained = []
    for make in (SGD, torch.optim.SGD):
        p = parameter(torch.arange(5.0), torch.ones(5))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = make([p, p], foreach=False, **FULL)
        for _ in range(3):
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(*trained)


def test_a_gradient_that_is_the_parameter() -> None:
    trained = []
    for make in (SGD, torch.optim.SGD):
        p = parameter(torch.arange(5.0))
        optimizer = make([p], foreach=False, lr=0.1)
        p.grad = p.detach()
        for _ in range(3):
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(*trained)


def test_meta_parameters_get_their_state_and_no_more() -> None:
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    real = parameter(torch.zeros(3), torch.ones(3))
    optimizer = SGD([p, real], **FULL)
    optimizer.step()
    optimizer.step()
    momentum = momentum_of(optimizer, p)
    assert momentum is not None
    assert momentum.is_meta
    assert real.all()


def test_parameters_of_a_subclass_and_plain_tensors() -> None:
    class Named(torch.nn.Parameter):
        pass

    trained = []
    for make in (SGD, torch.optim.SGD):
        params = [Named(torch.arange(4.0)), torch.arange(3.0, requires_grad=True)]
        optimizer = make(params, foreach=False, **FULL)
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p.detach(), 0.1 * (step + 1))
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(*trained)


# Semantics


def test_step_returns_the_closures_loss_and_enables_gradients() -> None:
    p = parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss == 3
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))


def test_step_clears_the_gradients_in_the_same_pass(reading: str) -> None:
    p, q = (
        parameter(torch.zeros(40_000), torch.ones(40_000)),
        parameter(torch.zeros(3, 2), torch.ones(2, 3).t()),
    )
    optimizer = SGD([p, q], **FULL)
    for _ in range(3):
        grads = p.grad, q.grad
        optimizer.step(zero_grad=True)
        assert (p.grad, q.grad) == grads or (p.grad is grads[0] and q.grad is grads[1])
        assert not p.grad.any()
        assert not q.grad.any()
        p.grad.fill_(1)
        q.grad.fill_(1)
    assert len(set(p.tolist()) | set(q.flatten().tolist())) == 1


def test_hyperparameters_change_between_steps() -> None:
    pair = Pair(
        [torch.randn(9), torch.randn(4, 4)],
        lambda ps: [{"params": ps[:1]}, {"params": ps[1:], "lr": 0.5}],
        **FULL,
    )
    for step in range(6):
        for optimizer in (pair.ours, pair.torch):
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1 / (step + 1))
            optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.01) if step % 2 else 0.0
            optimizer.param_groups[1]["momentum"] = 0.0 if step == 2 else 0.8
            optimizer.param_groups[1]["nesterov"] = step != 2
        pair.step(grads_for(pair.ours_params, step))
    for optimizer, params in ((pair.ours, pair.ours_params), (pair.torch, pair.torch_params)):
        late = torch.nn.Parameter(torch.ones(3))
        params.append(late)
        optimizer.add_param_group({"params": late, "lr": 1.0})
    pair.step(grads_for(pair.ours_params, 7))
    pair.check()


def test_the_user_changes_and_replaces_momentum() -> None:
    pair = Pair([torch.randn(9), torch.randn(3, 4)], **FULL)
    pair.step(grads_for(pair.ours_params, 0))
    kept = momentum_of(pair.ours, pair.ours_params[0])
    pair.step(grads_for(pair.ours_params, 1))
    assert momentum_of(pair.ours, pair.ours_params[0]) is kept
    for optimizer, params in ((pair.ours, pair.ours_params), (pair.torch, pair.torch_params)):
        optimizer.state[params[0]]["momentum_buffer"].mul_(0.5)
        optimizer.state[params[1]]["momentum_buffer"] = torch.full((4, 3), 0.1).t()
    pair.step(grads_for(pair.ours_params, 2))
    for optimizer, params in ((pair.ours, pair.ours_params), (pair.torch, pair.torch_params)):
        optimizer.state[params[0]]["momentum_buffer"] = None
        del optimizer.state[params[1]]
    pair.step(grads_for(pair.ours_params, 3))
    pair.check()
    for optimizer, params in ((pair.ours, pair.ours_params), (pair.torch, pair.torch_params)):
        optimizer.state[params[0]]["momentum_buffer"].data = torch.ones(9)
    pair.step(grads_for(pair.ours_params, 4))
    pair.check()


def test_hooks_run_as_torchs_do() -> None:
    events: list[str] = []
    pair = Pair([torch.ones(3)], lr=0.1)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: events.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: events.append("global post")),
    ]
    for optimizer in (pair.ours, pair.torch):
        optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
        optimizer.register_step_post_hook(
            lambda o, args, kwargs: events.append(f"post {len(args)} {kwargs}")
        )
    try:
        pair.ours.step()
        ours = events.copy()
        events.clear()
        pair.torch.step()
    finally:
        for handle in handles:
            handle.remove()
    assert ours == events == ["global pre", "pre", "post 1 {}", "global post"]


def test_a_subclass_with_a_step_of_its_own_gets_each_hook_once() -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    events: list[str] = []
    p = parameter(torch.zeros(2), torch.ones(2))
    optimizer = Counting([p], lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
    assert optimizer.step(lambda: 3.0) == 3.0
    assert events == ["pre"]
    assert p.tolist() == [-0.5, -0.5]


def test_the_profiler_sees_the_step_under_torchs_label() -> None:
    p = parameter(torch.zeros(2), torch.ones(2))
    optimizer = SGD([p], lr=0.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_autograd_learns_of_the_update(reading: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.ones(3)
        version = p._version
        optimizer.step()
        assert p._version > version
    momentum = momentum_of(optimizer, p)
    assert momentum is not None
    version = momentum._version
    optimizer.step()
    assert momentum._version > version
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_without_gradients_are_left_alone() -> None:
    p, q = parameter(torch.ones(3), torch.ones(3)), parameter(torch.ones(3))
    optimizer = SGD([p, q], **FULL)
    version = q._version
    for _ in range(3):
        optimizer.step()
    assert q.tolist() == [1, 1, 1]
    assert q._version == version
    assert q not in optimizer.state


def test_nothing_is_kept_alive_after_the_optimizer_is_gone() -> None:
    p = parameter(torch.zeros(3), torch.ones(3))
    optimizer = SGD([p], **FULL)
    for _ in range(3):
        optimizer.step()
    refs = [weakref.ref(o) for o in (p, momentum_of(optimizer, p), p.grad, optimizer)]
    del p, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_step_in_backward_keeps_nothing_alive_either() -> None:
    p = parameter(torch.zeros(3))
    optimizer = SGD([p], **FULL)
    handle = sgdcore.torch.step_in_backward(optimizer)
    p.sum().backward()
    optimizer.step()
    refs = [weakref.ref(o) for o in (p, optimizer, handle)]
    del p, optimizer, handle
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_step_in_backward_names_the_parameter_that_is_wrong() -> None:
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer = sgdcore.torch.SGD(groups, lr=0.1, momentum=0.9)
    optimizer.state[parameters[2]]["momentum_buffer"] = torch.ones(5)
    sgdcore.torch.step_in_backward(optimizer)
    with pytest.raises(
        ValueError, match=r"param_groups\[1\]\['params'\]\[1\]: expected shape \(4,\)"
    ):
        parameters[2].sum().backward()


def test_step_in_backward_ends_with_its_optimizer() -> None:
    p = parameter([0.0])
    sgdcore.torch.step_in_backward(SGD([p], lr=0.5))
    gc.collect()
    p.sum().backward()
    assert p.item() == 0
    assert p.grad is not None
    assert p.grad.item() == 1


def test_differentiable_steps_are_recorded() -> None:
    results = []
    for make in (SGD, torch.optim.SGD):
        start = torch.ones(3, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        p.retain_grad()
        p.grad = (start * 2).detach().requires_grad_()
        grad = p.grad
        optimizer = make([p], lr=0.5, momentum=0.9, differentiable=True)
        optimizer.step()
        (p * p).sum().backward()
        results.append((p.detach(), grad.grad, start.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


@needs_torch_2_6
def test_one_group_of_torchs_arguments() -> None:
    p = parameter(torch.ones(3), torch.ones(3))
    for kwargs in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        optimizer = SGD([p], **kwargs)
        assert {k: optimizer.param_groups[0][k] for k in kwargs} == kwargs
        optimizer.step()
    assert isinstance(optimizer, torch.optim.SGD)
    named = SGD([("weight", p)], lr=0.1)
    assert named.param_groups[0]["param_names"] == ["weight"]
    assert "lr: 0.1" in repr(named)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": -1.0},
        {"momentum": -0.5},
        {"weight_decay": -1e-3},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        pytest.param({"lr": torch.ones(2)}, marks=needs_torch_2_6),
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
)
def test_invalid_hyperparameters_as_torch_words_them(kwargs: dict[str, Any]) -> None:
    messages = []
    for make in (SGD, torch.optim.SGD):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            make([parameter(torch.ones(2))], **kwargs)
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", None, [0.1], torch.ones(2), 1j], ids=repr)
def test_what_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        SGD([parameter(torch.ones(2))], **{name: value})
    if isinstance(value, torch.Tensor):
        assert (caught.type, str(caught.value)) == (ValueError, f"Tensor {name} must be 1-element")
    else:
        assert caught.type is TypeError
        assert str(caught.value) == f"{name}: expected a number, got {value!r}"


@needs_torch_2_6
def test_refusals_name_what_is_wrong_and_change_nothing() -> None:
    good = parameter(torch.ones(3), torch.ones(3))
    bad = parameter(torch.ones(3))
    optimizer = SGD([{"params": [("good", good), ("bad", bad)]}], **FULL)
    optimizer.step()
    kept = good.detach().clone()
    bad.grad = torch.ones(3)
    cases: list[tuple[Any, type[Exception], str]] = [
        ("lr", TypeError, r"param_groups\[0\]\['lr'\]: expected a number, got 'fast'"),
        ("buffer", ValueError, "momentum_buffer of parameter 'bad': expected shape"),
    ]
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(cases[0][1], match=cases[0][2]):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.state[bad]["momentum_buffer"] = torch.ones(4)
    with pytest.raises(cases[1][1], match=cases[1][2]):
        optimizer.step()
    optimizer.state[bad]["momentum_buffer"] = torch.ones(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="buffer of parameter 'bad': expected one of float64"):
        optimizer.step()
    optimizer.state[bad]["momentum_buffer"] = bad.data
    with pytest.raises(
        ValueError, match="parameter 'bad': expected a parameter and its momentum_buffer"
    ):
        optimizer.step()
    assert_same_bits(good, kept)
    with pytest.raises(TypeError, match=r"momentum_dtype: expected one of .*, got torch.int8"):
        SGD([good], momentum_dtype=torch.int8)


# Checkpoints


@pytest.mark.parametrize(
    "hyper", [FULL, {"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}]
)
@pytest.mark.parametrize("to_ours", [True, False])
def test_checkpoints_go_either_way(hyper: Hyper, to_ours: bool) -> None:
    values = tensors()
    pair = Pair(values, **hyper)
    for step in range(3):
        pair.step(grads_for(values, step))
    source, made = (pair.torch, pair.ours) if to_ours else (pair.ours, pair.torch)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)
    params = parameters([p.detach() for p in pair.ours_params])
    fresh = type(made)(params, lr=7.0, foreach=False)
    fresh.load_state_dict(checkpoint)
    for p, grad in zip(params, grads_for(values, 3), strict=True):
        p.grad = grad
    fresh.step()
    pair.step(grads_for(values, 3))
    assert_same_training(fresh, made)
    assert fresh.param_groups[0]["lr"] == hyper["lr"]


def test_momentum_dtype_survives_a_checkpoint() -> None:
    p = parameter(torch.ones(8, dtype=torch.bfloat16), torch.full((8,), 0.1, dtype=torch.bfloat16))
    optimizer = SGD([p], lr=0.1, momentum=0.9, momentum_dtype=torch.float32)
    optimizer.step()
    optimizer.step()
    expected = momentum_of(optimizer, p)
    for target in (
        SGD([parameter(p.detach().clone())], lr=0.1),
        SGD([parameter(p.detach().clone())], lr=0.1, momentum_dtype=torch.float32),
    ):
        target.load_state_dict(optimizer.state_dict())
        q = target.param_groups[0]["params"][0]
        assert_same_bits(momentum_of(target, q), expected)
        assert momentum_of(target, q) is not expected
    # A checkpoint of torch's has no momentum_dtype: this optimizer's counts.
    theirs = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    theirs.step()
    target = SGD([q], lr=0.1, momentum_dtype=torch.float32)
    target.load_state_dict(theirs.state_dict())
    assert momentum_of(target, q).dtype == torch.float32


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    p = parameter(torch.ones(8), torch.ones(8))
    optimizer = SGD([p], **FULL)
    optimizer.step()
    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {0: {"momentum_buffer": torch.ones(9)}}
    checkpoint["param_groups"][0]["lr"] = 99.0
    before = momentum_of(optimizer, p)
    lr = optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="expected a momentum_buffer of shape"):
        optimizer.load_state_dict(
            {**checkpoint, "param_groups": [{**checkpoint["param_groups"][0], "lr": 5.0}]}
        )
    assert momentum_of(optimizer, p) is before
    assert optimizer.param_groups[0]["lr"] == lr
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_train_on(way: str) -> None:
    p = parameter(torch.ones(8), torch.ones(8))
    optimizer = SGD([p], **FULL, momentum_dtype=torch.float64)
    optimizer.step()
    copied = (
        copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    )
    q = copied.param_groups[0]["params"][0]
    q.grad = torch.ones(8)
    copied.step()
    optimizer.step()
    assert_same_training(copied, optimizer)
    assert q is not p


# Defects of torch.optim.SGD 2.13, as measured there; each test shows what is right.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_sixteen_bit_steps_update_every_element(dtype: torch.dtype) -> None:
    """torch: with fused=True on the CPU, whole SIMD blocks stay as they were."""
    p = parameter(torch.ones(64, dtype=dtype), torch.ones(64, dtype=dtype))
    SGD([p], lr=0.5, fused=True).step()
    assert (p == 0.5).all()


def test_found_inf_on_the_first_step_leaves_no_state() -> None:
    """torch: fused stores an uninitialised momentum buffer, which the next step uses."""
    p = parameter(torch.ones(64), torch.full((64,), torch.inf))
    optimizer = SGD([p], **FULL, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state[p]


@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
def test_what_a_scaler_sets_is_an_attribute_like_others(name: str) -> None:
    """Of this optimizer only, and copies do not have it."""
    optimizer, other = (SGD([torch.ones(3, requires_grad=True)], lr=0.1) for _ in range(2))
    value = torch.tensor(1.0)
    assert not hasattr(optimizer, name)
    setattr(optimizer, name, value)
    assert getattr(optimizer, name) is value
    assert not hasattr(other, name)
    assert not hasattr(copy.deepcopy(optimizer), name)
    delattr(optimizer, name)
    assert getattr(optimizer, name, None) is None
    with pytest.raises(AttributeError, match=name):
        delattr(optimizer, name)


def test_found_inf_of_two_devices_skips_the_step() -> None:
    """torch: fused compares found_inf with 1; GradScaler adds up the devices' flags."""
    p = parameter(torch.ones(4), torch.full((4,), torch.inf))
    optimizer = SGD([p], lr=0.1)
    optimizer.found_inf = torch.tensor(2.0)
    optimizer.step()
    assert (p == 1).all()
    del optimizer.found_inf
    p.grad = torch.ones(4)
    optimizer.step()
    assert (p < 1).all()


def test_gradient_strides_unlike_the_parameters() -> None:
    """torch: fused=True on the CPU pairs the wrong elements, silently."""
    values = torch.randn(6, 5)
    pair = Pair([values], **FULL)
    for step in range(3):
        pair.step([torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).t()])
    pair.check()


def test_a_late_first_gradient() -> None:
    """torch: fused with momentum raises TypeError."""
    pair = Pair([torch.randn(5), torch.randn(6)], **FULL)
    pair.step([torch.ones(5), None])
    pair.step([torch.ones(5), torch.ones(6)])
    pair.check()


def test_nesterov_does_not_add_the_momentum_to_the_gradient() -> None:
    """torch: foreach without weight decay does."""
    p = parameter(torch.ones(4), torch.ones(4))
    optimizer = SGD([p], lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    for _ in range(3):
        optimizer.step()
    assert p.grad.tolist() == [1, 1, 1, 1]


def test_sparse_gradients_with_weight_decay_and_fused() -> None:
    """torch: weight decay raises with sparse gradients, and fused refuses them."""
    p = parameter(torch.ones(3, 2))
    p.grad = torch.sparse_coo_tensor(
        torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=False
    )
    SGD([p], lr=0.5, weight_decay=0.5, fused=True).step()
    assert p.tolist() == [[0.25, 0.25], [0.75, 0.75], [0.75, 0.75]]


def test_the_loss_scale_does_not_rewrite_the_gradient() -> None:
    """torch: fused writes the unscaled gradient back, an extra stream over memory."""
    p = parameter(torch.ones(4), torch.full((4,), 8.0))
    optimizer = SGD([p], lr=0.5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    assert p.tolist() == [0.5] * 4
    assert p.grad.tolist() == [8.0] * 4


def test_float32_momentum_of_bfloat16_parameters_is_not_cast_by_a_checkpoint() -> None:
    """torch: load_state_dict casts it to bfloat16."""
    p = parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    state["state"] = {0: {"momentum_buffer": torch.full((4,), 0.1)}}
    optimizer.load_state_dict(state)
    assert_same_bits(momentum_of(optimizer, p), torch.full((4,), 0.1))


def test_bfloat16_gradients_of_float32_parameters() -> None:
    """torch: refused by fused and foreach."""
    p = parameter(torch.ones(4), torch.full((4,), 0.5, dtype=torch.bfloat16))
    SGD([p], lr=0.5).step()
    assert p.tolist() == [0.75] * 4


def test_momentum_of_a_sixteen_bit_type_does_not_round_the_factor() -> None:
    """torch: foreach rounds momentum itself, 0.99 to 0.98828 in bfloat16."""
    p = parameter(torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16))
    optimizer = SGD([p], lr=0.0, momentum=0.99, momentum_dtype=torch.float32)
    optimizer.step()
    p.grad.zero_()
    for _ in range(300):
        optimizer.step()
    torch.testing.assert_close(
        momentum_of(optimizer, p), torch.full((4,), 0.99**300), rtol=1e-4, atol=0
    )


def test_a_tiny_learning_rate_updates_float16() -> None:
    """torch: rounds lr = 2e-8 to zero in float16."""
    p = parameter(
        torch.zeros(4, dtype=torch.float16), torch.full((4,), 1000.0, dtype=torch.float16)
    )
    SGD([p], lr=2e-8).step()
    assert bits(p).tolist() == bits(torch.full((4,), -2e-5, dtype=torch.float16)).tolist()


# What a review found


def test_a_gradient_that_stands_for_its_negative() -> None:
    p = parameter([0.0, 0.0, 0.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.5)
    p.grad = torch.tensor([1 + 2j, 3 + 4j, 5 + 6j]).conj().imag
    assert p.grad.is_neg()
    for step in (1, 2):
        optimizer.step()
        assert p.tolist() == [1.0 * step, 2.0 * step, 3.0 * step]


def test_a_cycle_through_a_hook_is_collected() -> None:
    p = parameter([1.0, 2.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    p.optimizer = optimizer  # type: ignore[attr-defined]
    gone = weakref.ref(p)
    del p, optimizer
    gc.collect()
    assert gone() is None


def test_groups_that_change_while_the_step_reads_them() -> None:
    class Clears(float):
        def __float__(self) -> float:
            optimizer.param_groups.clear()
            return 0.1

    p, q = parameter([1.0], torch.ones(1)), parameter([1.0], torch.ones(1))
    optimizer = sgdcore.torch.SGD([{"params": [p]}, {"params": [q]}], lr=0.1)
    optimizer.param_groups[1]["lr"] = Clears(0.1)
    with contextlib.suppress(ValueError):
        optimizer.step()


def test_another_default_device() -> None:
    p = parameter([1.0, 1.0], torch.ones(2))
    optimizer = sgdcore.torch.SGD([p], lr=0.5, momentum=0.5)
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()
    assert p.tolist() == [1 - 0.5 - 0.75] * 2


def test_a_scaler_and_another_default_device() -> None:
    p = parameter([0.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    with torch.device("meta"):
        scaler.step(optimizer)
    assert p.item() == -0.5


def test_a_failed_step_of_a_scaler_leaves_nothing_behind() -> None:
    p = parameter([0.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    hook = optimizer.register_step_post_hook(lambda *_: 1 / 0)
    scaler.scale(p.sum()).backward()
    with pytest.raises(ZeroDivisionError):
        scaler.step(optimizer)
    hook.remove()
    before = p.item()
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == before - 0.5


def test_a_scaler_and_a_differentiable_group() -> None:
    p = parameter([0.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.5)
    optimizer.param_groups[0]["differentiable"] = True
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert p.item() == -0.5


@pytest.mark.parametrize("change", ["load", "replace", "in place"])
def test_step_in_backward_reads_the_groups_as_they_are(change: str) -> None:
    p = parameter([0.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.5)
    sgdcore.torch.step_in_backward(optimizer)
    if change == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    elif change == "replace":
        optimizer.param_groups = [{**optimizer.param_groups[0]}]
    optimizer.param_groups[0]["lr"] = 1.0
    p.sum().backward()
    assert p.item() == -1
    optimizer.step()
    assert p.item() == -1
    assert p.grad is None


def test_step_in_backward_and_a_removed_parameter() -> None:
    p = parameter([0.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.5)
    sgdcore.torch.step_in_backward(optimizer)
    optimizer.param_groups.pop()
    p.sum().backward()
    assert p.item() == 0
    assert p.grad is not None


def test_step_in_backward_and_gradients_from_elsewhere() -> None:
    p, q = parameter([0.0]), torch.zeros(1)
    optimizer = sgdcore.torch.SGD([p, q], lr=0.5)
    sgdcore.torch.step_in_backward(optimizer)
    q.requires_grad_()  # after the hooks were registered
    (p + q).sum().backward()
    optimizer.step()
    assert p.item() == q.item() == -0.5


def test_step_in_backward_of_a_converted_model() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = sgdcore.torch.SGD(model.parameters(), lr=0.5)
    sgdcore.torch.step_in_backward(optimizer)
    model.double()
    before = model.bias.item()
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert model.bias.item() == before - 0.5


def test_loaded_state_of_what_is_no_parameter_is_kept() -> None:
    p = parameter([0.0])
    optimizer = sgdcore.torch.SGD([p], lr=0.5)
    state = optimizer.state_dict()
    state["state"][7] = {"momentum_buffer": torch.ones(3)}
    optimizer.load_state_dict(state)
    assert optimizer.state[7]["momentum_buffer"].tolist() == [1, 1, 1]


def test_an_expanded_parameter_is_refused_before_anything_changes() -> None:
    p, q = parameter([0.0], torch.ones(1)), torch.zeros(1).expand(3).requires_grad_()
    q.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\].*expanded"):
        sgdcore.torch.SGD([p, q], lr=0.5).step()
    assert p.item() == 0


def gaps(base: torch.Tensor) -> list[torch.Tensor]:
    return [base, base[::2], base[1:6:2], base[::2]]


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1, 3], [2, 1, 0]])
@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_parameters_with_gaps_that_share_memory(order: list[int], hyper: dict[str, Any]) -> None:
    results = []
    for kind in (SGD, torch.optim.SGD):
        base = torch.arange(8.0)
        params = [gaps(base)[i].detach().requires_grad_() for i in order]
        optimizer = kind(params, lr=0.1, foreach=False, **hyper)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.linspace(-1, 1, p.numel()) + i + step
            optimizer.step()
        results.append(base)
    assert_same_bits(results[0], results[1])


def test_sparse_gradients_of_parameters_that_share_memory() -> None:
    base = torch.zeros(4)
    p, q = base.detach().requires_grad_(), base.detach().requires_grad_()
    p.grad = torch.ones(4).to_sparse()
    q.grad = torch.ones(4)
    SGD([p, q], lr=0.5).step()
    assert base.tolist() == [-1.0] * 4


# What users may do that is unusual

MAY_BE_MISSING = ("differentiable", "momentum_dtype", "sparse_mode")


def stepped_by_hook(optimizer: torch.optim.Optimizer, *replaced: Any) -> Any:
    """Step with a pre-hook that returns these args and kwargs."""
    optimizer.register_step_pre_hook(lambda *_: replaced)
    return optimizer.step()


def test_a_pre_hook_may_name_another_optimizer() -> None:
    for make in (SGD, torch.optim.SGD):
        p, q = parameter([1.0], torch.ones(1)), parameter([1.0], torch.ones(1))
        stepped_by_hook(make([p], lr=0.5), (make([q], lr=0.25),), {})
        assert (p.item(), q.item()) == (1.0, 0.75)


@pytest.mark.parametrize("position", ["args", "kwargs"])
def test_a_pre_hook_may_add_a_closure(position: str) -> None:
    for make in (SGD, torch.optim.SGD):
        optimizer = make([parameter([1.0], torch.ones(1))], lr=0.5)
        as_args = position == "args"
        args = (optimizer, lambda: 3.0) if as_args else (optimizer,)
        assert stepped_by_hook(optimizer, args, {} if as_args else {"closure": lambda: 3.0}) == 3.0


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        pytest.param((), {}, r"pre-hook returned args .*: \(\)", id="no optimizer"),
        pytest.param((3,), {}, r"pre-hook returned args .*: \(3,\)", id="something else"),
        pytest.param((None, 1), {}, "positional argument", id="too many"),
        pytest.param((None,), {"closure": None}, "multiple values", id="closure twice"),
        pytest.param((), {"twice": True}, "unexpected keyword argument 'twice'", id="unknown"),
    ],
)
def test_what_a_pre_hook_must_not_return(args: Any, kwargs: Any, message: str) -> None:
    p = parameter([1.0], torch.ones(1))
    optimizer = SGD([p], lr=0.5)
    if "pre-hook" not in message:
        args = (optimizer, *args)
    with pytest.raises(TypeError, match=message):
        stepped_by_hook(optimizer, args, kwargs)
    assert p.item() == 1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_groups_of_a_users_own_making(momentum: float) -> None:
    """A tuple, of dicts that have only what torch's step reads."""
    results = []
    for make in (SGD, torch.optim.SGD):
        p = parameter([1.0], torch.ones(1))
        optimizer = make([p], lr=0.25, momentum=momentum)
        optimizer.param_groups = tuple(  # type: ignore[assignment]
            {name: value for name, value in group.items() if name not in MAY_BE_MISSING}
            for group in optimizer.param_groups
        )
        for _ in range(2):
            optimizer.step()
        results.append(p.item())
    assert results[0] == results[1] < 1


@pytest.mark.parametrize("make", [iter, lambda groups: None], ids=["iterator", "None"])
def test_groups_that_are_no_sequence_are_refused(make: Any) -> None:
    p = parameter([1.0], torch.ones(1))
    optimizer = SGD([p], lr=0.5)
    optimizer.param_groups = make(optimizer.param_groups)
    with pytest.raises(TypeError, match="param_groups: expected a list or another sequence of"):
        optimizer.step()
    assert p.item() == 1


def test_a_state_that_is_a_plain_dict() -> None:
    p = parameter([1.0], torch.ones(1))
    optimizer = SGD([p], lr=0.25, momentum=0.5)
    optimizer.state = {}  # type: ignore[assignment]
    for _ in range(2):
        optimizer.step()
    assert p.item() == 1 - 0.25 - 0.25 * 1.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "the state of .*: expected a dict, got None"),
        ({"momentum_buffer": 0.5}, "the momentum_buffer of .*: expected a tensor or None, got 0.5"),
    ],
    ids=["no dict", "a number as momentum"],
)
def test_a_state_of_another_kind_is_refused_before_anything_changes(
    values: Any, message: str
) -> None:
    good, bad = parameter([1.0], torch.ones(1)), parameter([1.0], torch.ones(1))
    optimizer = SGD([good, bad], lr=0.25, momentum=0.5)
    optimizer.state[bad] = values
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert (good.item(), bad.item(), list(optimizer.state)) == (1, 1, [bad])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_training_in_inference_mode(momentum: float) -> None:
    """Of a tensor that was made there, and has no version, and of one that was not."""
    results = []
    for make in (SGD, torch.optim.SGD):
        outside = parameter([1.0], torch.ones(1))
        with torch.inference_mode():
            inside = torch.ones(1)
            inside.grad = torch.ones(1)
            optimizer = make([outside, inside], lr=0.25, momentum=momentum)
            for _ in range(3):
                optimizer.step()
            copy.deepcopy(optimizer.state_dict())
            results.append((outside.item(), inside.item()))
    assert results[0] == results[1]


def test_fake_tensors_get_their_state_and_no_more() -> None:
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2)
        optimizer = SGD(model.parameters(), lr=0.5, momentum=0.5)
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        buffers = [momentum_of(optimizer, p) for p in model.parameters()]
    assert [type(b) for b in buffers] == [FakeTensor, FakeTensor]
    assert [b.shape for b in buffers if b is not None] == [(2, 3), (2,)]


def test_a_numbers_sparse_gradient() -> None:
    p = parameter(3.0, torch.tensor(2.0).to_sparse())
    SGD([p], lr=0.5).step()
    assert p.item() == 2


def test_hyperparameters_that_require_a_gradient() -> None:
    p = parameter([1.0], torch.ones(1))
    rate, decay = (torch.tensor(0.5, requires_grad=True) for _ in range(2))
    SGD([p], lr=rate, weight_decay=decay).step()
    assert p.item() == 1 - 0.5 * (1 + 0.5)


def unusual(kind: str) -> torch.Tensor:
    if kind == "freed memory":
        p = parameter([1.0], torch.ones(1))
        p.untyped_storage().resize_(0)
        return p
    if kind == "freed gradient":
        p = parameter([1.0], torch.ones(1))
        p.grad.untyped_storage().resize_(0)  # type: ignore[union-attr]
        return p
    p = torch.ones(1, 1)
    p = (p.to_sparse() if kind == "sparse" else p.to_mkldnn()).requires_grad_()
    p.grad = p.detach().clone()
    return p


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("freed memory", r"\['params'\]\[1\]: .* whose memory was freed"),
        ("freed gradient", r"the gradient of .*\['params'\]\[1\]: .* whose memory was freed"),
        ("sparse", r"\['params'\]\[1\]: expected a dense tensor, got one of layout .*sparse_coo"),
        ("mkldnn", r"\['params'\]\[1\]: expected a dense tensor, got one of layout .*_mkldnn"),
    ],
    ids=["freed memory", "freed gradient", "sparse", "mkldnn"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_tensors_that_cannot_be_updated_are_refused_before_anything_changes(
    kind: str, message: str, momentum: float
) -> None:
    good = parameter([1.0], torch.ones(1))
    optimizer = SGD([good, unusual(kind)], lr=0.5, momentum=momentum)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert good.item() == 1
    assert not optimizer.state


def test_tensors_of_a_transform_are_refused() -> None:
    p = parameter([1.0], torch.ones(1))
    optimizer = SGD([p], lr=0.5)

    def step(grad: torch.Tensor) -> torch.Tensor:
        p.grad = grad
        optimizer.step()
        return grad

    with pytest.raises(TypeError, match=r"the gradient of .*, got one inside of a transform"):
        torch.func.vmap(step)(torch.ones(2, 1))
    assert p.item() == 1


def test_a_step_inside_of_a_transform() -> None:
    """Over tensors that it does not know."""
    p = parameter([1.0], torch.ones(1))
    optimizer = SGD([p], lr=0.125)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        return x

    torch.func.vmap(step)(torch.ones(2, 1))
    assert p.item() == 1 - 0.125


def test_a_groups_own_momentum_dtype_survives_a_checkpoint_of_torchs() -> None:
    p = parameter(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    theirs = torch.optim.SGD([p], lr=0.5, momentum=0.5)
    theirs.step()
    group = {"params": [p], "momentum_dtype": torch.float32, "sparse_mode": "lazy"}
    ours = SGD([group], lr=0.5, momentum=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["momentum_dtype"] is torch.float32
    assert ours.param_groups[0]["sparse_mode"] == "lazy"
    assert ours.state[p]["momentum_buffer"].dtype is torch.float32


def test_a_state_may_be_set_in_part() -> None:
    p = parameter([1.0], torch.ones(1))
    optimizer = SGD([p], lr=0.25, momentum=0.5)
    optimizer.step()
    optimizer.__setstate__({"param_groups": optimizer.param_groups})
    optimizer.step()
    assert p.item() == 1 - 0.25 - 0.25 * 1.5


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_checkpoints_go_between_arrays_and_tensors(dtype: str) -> None:
    """With momentum of a dtype of its own, named as each library does; what is loaded is a copy."""
    values, grads = np.ones(5, np.float32), np.linspace(-1, 1, 5, dtype=np.float32)
    w, x = sgdcore.Parameter(values.copy()), torch.nn.Parameter(torch.from_numpy(values.copy()))
    ours = sgdcore.SGD([w], lr=0.1, momentum=0.9, momentum_dtype=dtype)
    theirs = sgdcore.torch.SGD([x], lr=0.1, momentum=0.9, momentum_dtype=getattr(torch, dtype))
    w.grad, x.grad = grads, torch.from_numpy(grads)
    ours.step()
    x.data.copy_(torch.from_numpy(w.data))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.param_groups[0]["momentum_dtype"] is getattr(torch, dtype)
    assert theirs.state[x]["momentum_buffer"].dtype is getattr(torch, dtype)
    for _ in range(3):
        ours.step()
        theirs.step()
    assert x.detach().numpy().tobytes() == w.data.tobytes()
    other = sgdcore.SGD([v := sgdcore.Parameter(w.data.copy())], lr=1.0)
    other.load_state_dict(theirs.state_dict())
    assert other.param_groups[0]["momentum_dtype"] == dtype
    v.grad = grads
    for optimizer in (ours, theirs, other):
        optimizer.step()
    assert x.detach().numpy().tobytes() == w.data.tobytes() == v.data.tobytes()


def test_verify_takes_sparse_gradients() -> None:
    """torch keeps their momentum sparse."""
    model = torch.nn.Sequential(torch.nn.Embedding(9, 3, sparse=True), torch.nn.Flatten())

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(4).reshape(2, 2) + number % 3, torch.tensor([0, 1])

    assert sgdcore.torch.verify(model, batch, steps=1).equal
    assert sgdcore.torch.verify(model, batch, steps=5).steps > 1


# --- Threads and processes ------------------------------------------------------------------------

IN_THREADS = """
import torch
import sgdcore.torch

def make():
    parameter = torch.nn.Parameter(torch.zeros(4_000_000))
    parameter.grad = torch.ones(4_000_000)
    optimizer = sgdcore.torch.SGD([parameter], lr=0.1, momentum=0.9)
    for _ in range(3):  # the first ones call functions of torch, which do not let Python end
        optimizer.step()
    return optimizer.step
"""


def test_daemon_threads_do_not_abort_the_end() -> None:
    assert_daemons_let_python_end(IN_THREADS)


@allow_fork
@pytest.mark.usefixtures("reading")
def test_child_steps_the_optimizer_that_another_thread_was_stepping() -> None:
    p = parameter(torch.zeros(3_000_000))
    p.grad, ones = torch.zeros(3_000_000), torch.ones(3_000_000)
    values = (
        p.detach().numpy()
    )  # torch's own functions may wait for threads that the child does not have
    optimizer = SGD([p], lr=1, momentum=0.5)

    def child() -> float:
        p.grad = ones
        optimizer.step()
        assert (values == values[0]).all()
        return float(values[0])

    with stepping(optimizer.step):
        for _ in range(5):
            assert in_fork(child) == -1


@pytest.mark.parametrize("rule", [sgdcore.torch.SGD, sgdcore.torch.SGDW, sgdcore.torch.Signum])
def test_steps_on_the_cpu_ask_cuda_nothing(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has asked CUDA anything cannot use it in a child that it forks."""

    def asked(*_: Any) -> Any:
        raise AssertionError("CUDA was asked")

    for name in ("is_available", "is_current_stream_capturing", "current_stream", "device_count"):
        monkeypatch.setattr(torch.cuda, name, asked)
    dense, gaps = torch.ones(4, requires_grad=True), torch.ones(4, 2)[:, 0].requires_grad_()
    complex_, table = (
        torch.ones(3, dtype=torch.complex64, requires_grad=True),
        torch.nn.EmbeddingBag(5, 3, sparse=True),
    )
    table(torch.tensor([[1, 2]])).sum().backward()
    for each in (dense, gaps, complex_):
        each.grad = torch.ones_like(each)
    others: list[Any] = [table.weight] if rule is sgdcore.torch.SGD else []
    groups = [{"params": [each]} for each in (dense, gaps, complex_, *others)]
    optimizer = rule(groups, lr=0.5, momentum=0.5)
    for _ in range(2):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert (dense.detach() < 0).all()
