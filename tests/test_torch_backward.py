"""step_in_backward where gradients are not complete at once, or not the parameter's alone: the result is torch's.

The expected result is always the same program with torch.optim.SGD, in every bit, or a refusal with nothing changed.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sgdcore.torch import SGD, step_in_backward
from torch_support import TORCH, assert_ranks_pass, assert_same_bits, assert_same_training

FULL: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
REENTRANT = pytest.mark.filterwarnings("ignore:step_in_backward:UserWarning")


class Network(torch.nn.Module):
    """Two layers, of which the programs below use some twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 6)
        self.second = torch.nn.Linear(6, 6)


def inputs(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 6, generator=generator).requires_grad_()


def assert_trains_as_torch(backward: Callable[[Network, torch.Tensor], None]) -> None:
    """Train with and without step_in_backward, one backward function, and compare parameters and momentum."""
    optimizers = []
    for make in (SGD, torch.optim.SGD):
        model = Network()
        optimizer = make(model.parameters(), foreach=False, **FULL)
        if make is SGD:
            step_in_backward(optimizer)
        for step in range(4):
            backward(model, inputs(step))
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_training(*optimizers)


# Parameters that come and go


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("before_the_step", [False, True])
@pytest.mark.parametrize("gone", [0, 1])
def test_a_removed_parameter_is_freed_at_once(
    gone: int, before_the_step: bool, momentum: float
) -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SGD(parameters, lr=0.1, momentum=momentum)
    step_in_backward(optimizer)
    for last in (False, True):
        sum(p.sum() for p in parameters).backward()
        if not (last and before_the_step):
            optimizer.step()
    state = optimizer.state.pop(parameters[gone], {})
    references = [weakref.ref(each) for each in (parameters[gone], *state.values())]
    del state
    gc.disable()
    try:
        del optimizer.param_groups[0]["params"][gone]
        del parameters[gone]
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()
    optimizer.step()
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    if not momentum:
        torch.testing.assert_close(parameters[0].detach(), torch.full((3,), 0.7))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_parameter_removed_before_the_step_takes_gradients_again(gone: int) -> None:
    """It lives on, as do those whose place in the group is another one now."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = SGD(parameters, lr=0.1)
    step_in_backward(optimizer)
    sum(p.sum() for p in parameters).backward()
    del optimizer.param_groups[0]["params"][gone]
    optimizer.step()
    assert [p.grad for p in parameters] == [None] * 3
    for _ in range(2):
        sum(p.sum() for p in parameters).backward()
        optimizer.step()
    for i, p in enumerate(parameters):
        assert (p.grad is None) == (i != gone)
        torch.testing.assert_close(p.detach(), torch.full((3,), 0.9 if i == gone else 0.7))


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("before_the_step", [False, True])
def test_parameters_can_be_swapped(before_the_step: bool, has_grad: bool) -> None:
    optimizers = []
    for make in (SGD, torch.optim.SGD):
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        # Without momentum, which here has heard of the gradient before the swap.
        optimizer = make(parameters, foreach=False, lr=0.1, weight_decay=0.1)
        if make is SGD:
            step_in_backward(optimizer)
        for step in range(4):
            sum(p.square().sum() for p in parameters).backward()
            if not before_the_step:
                optimizer.step()
            if step == 1:
                other = torch.nn.Parameter(torch.full((3,), 2.0))
                if has_grad:
                    other.grad = torch.ones(3)
                torch.utils.swap_tensors(parameters[0], other)
            if before_the_step:
                optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_training(*optimizers)


def test_hooks_of_parameters_that_are_gone_are_not_collected() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    handle = step_in_backward(optimizer)
    for _ in range(10):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        optimizer.param_groups.pop()
    assert len(handle._handles) <= 2


@pytest.mark.parametrize("named", [False, True])
def test_a_parameter_moved_to_a_group_of_its_own_steps_once(named: bool) -> None:
    if named and TORCH < (2, 6):
        pytest.skip("needs torch 2.6")
    optimizers = []
    for make in (SGD, torch.optim.SGD):
        model = Network()
        params: Any = list(model.named_parameters() if named else model.parameters())
        optimizer = make(params, foreach=False, **FULL)
        if make is SGD:
            handle = step_in_backward(optimizer)
        for step in range(6):
            if step in (2, 4):  # the first, then the one that was third
                group = optimizer.param_groups[0]
                moved: Any = group["params"].pop(step // 4)
                if named:
                    moved = (group["param_names"].pop(step // 4), moved)
                optimizer.add_param_group({"params": [moved], "lr": 0.03})
            model.second(model.first(inputs(step))).square().mean().backward()
            if make is SGD:
                assert all(type(p.grad) is not torch.Tensor for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_training(*optimizers)
    handle.remove()
    loss = model.second(model.first(inputs(7))).square().mean()
    loss.backward()


def test_a_parameter_handed_to_another_optimizer_that_steps_in_the_backward_pass() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    first, second = SGD([p], lr=0.1), SGD([torch.nn.Parameter(torch.ones(1))], lr=0.2)
    step_in_backward(first)
    step_in_backward(second)
    with pytest.raises(ValueError, match=r"param_groups\[1\].*: another optimizer steps in the"):
        second.add_param_group({"params": [p]})
    assert len(second.param_groups) == 1
    with pytest.raises(ValueError, match=r"param_groups\[0\].*: another optimizer steps in the"):
        step_in_backward(SGD([p], lr=0.1))
    first.param_groups.pop()
    second.add_param_group({"params": [p]})
    p.sum().backward()
    first.step()
    second.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
    assert p.grad is None


# Gradients of another kind


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, None),
    ],
)
def test_a_gradient_of_another_dtype_is_used_once(
    dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    p.grad_dtype = grad_dtype
    optimizer = SGD([p], lr=0.1)
    step_in_backward(optimizer)
    expected = torch.ones(3, dtype=torch.float64)
    for _ in range(2):
        p.sum().backward()
        expected = (expected - 0.1).to(dtype).double()
        torch.testing.assert_close(p.detach().double(), expected)
        assert "already used" in repr(p.grad)
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), expected)
        assert p.grad is None


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_a_grad_dtype_that_changes_between_rounds() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.25)
    step_in_backward(optimizer)
    for count, grad_dtype in enumerate((torch.float32, torch.float64, torch.float32), 1):
        p.grad_dtype = grad_dtype
        p.sum().backward()
        optimizer.step()
        assert p.tolist() == [1 - 0.25 * count] * 3


def test_a_placeholder_that_is_refused_leaves_no_gradient_to_use_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sgdcore.torch import backward

    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.25)
    step_in_backward(optimizer)

    class Wrong(backward._UsedGradient):
        @staticmethod
        def __new__(cls, parameter: torch.Tensor, grad: torch.Tensor) -> Any:
            return backward._UsedGradient.__new__(cls, parameter, torch.ones(2))

    monkeypatch.setattr(backward, "_UsedGradient", Wrong)
    with pytest.raises(RuntimeError):
        p.sum().backward()
    optimizer.step()
    assert p.tolist() == [0.75] * 3


@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_that_is_used_twice(sparse: bool) -> None:
    optimizers = []
    for make in (SGD, torch.optim.SGD):
        torch.manual_seed(0)
        table = torch.nn.Embedding(7, 3, sparse=sparse)
        optimizer = make(table.parameters(), lr=0.1, foreach=False)
        if make is SGD:
            step_in_backward(optimizer)
        for _ in range(3):
            (
                table(torch.tensor([0, 2])).sum() + table(torch.tensor([3, 5])).square().sum()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_training(*optimizers)


# Passes of which each adds to the gradients


def reentrant(function: Any, *args: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = checkpoint(function, *args, use_reentrant=True)
    return result


def not_reentrant(function: Any, *args: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = checkpoint(function, *args, use_reentrant=False)
    return result


class Nested(torch.autograd.Function):
    """Runs a function again in the backward pass, and a pass of its own over it, as checkpointing does elsewhere."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


def nested(function: Any, *args: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = Nested.apply(function, *args)
    return result


SHARED: dict[str, Callable[[Network, torch.Tensor, Any], torch.Tensor]] = {
    "used outside afterwards": lambda m, x, again: m.first(again(m.first, x)),
    "used outside before": lambda m, x, again: again(m.first, m.first(x)),
    "used around": lambda m, x, again: m.first(m.second(again(m.first, m.first(x)))),
    "in two segments": lambda m, x, again: again(m.first, again(m.first, m.second(x))),
    "in one segment twice": lambda m, x, again: again(lambda h: m.first(m.first(h)), x),
    "beside": lambda m, x, again: m.first(x) + again(m.first, x),
    "segments within segments": lambda m, x, again: m.first(
        again(lambda h: again(m.first, m.second(h)), x)
    ),
    "not shared": lambda m, x, again: m.second(again(m.first, x)),
}


@REENTRANT
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # torch's
@pytest.mark.parametrize("again", [reentrant, not_reentrant, nested])
@pytest.mark.parametrize("use", SHARED)
def test_checkpointing(use: str, again: Any) -> None:
    assert_trains_as_torch(lambda m, x: SHARED[use](m, x, again).square().mean().backward())


def test_reentrant_checkpointing_says_that_parameters_wait() -> None:
    model = Network()
    optimizer = SGD(model.parameters(), **FULL)
    step_in_backward(optimizer)
    with pytest.warns(UserWarning, match="CheckpointFunctionBackward runs a backward pass of its"):
        model.second(reentrant(model.first, inputs(0))).sum().backward()
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        model.second(reentrant(model.first, inputs(0))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.second(model.first(inputs(0))).sum().backward()
    assert all("already used" in repr(p.grad) for p in model.parameters())


def test_a_warning_that_is_an_error_comes_before_anything_is_changed() -> None:
    model = Network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SGD(model.parameters(), **FULL)  # kept: it would end with its last reference
    step_in_backward(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="use_reentrant=False"):
            model.first(reentrant(model.first, inputs(0))).sum().backward()
    for p, kept in zip(model.parameters(), before, strict=True):
        assert_same_bits(p.detach(), kept)


def test_not_reentrant_checkpointing_frees_the_gradients() -> None:
    model = Network()
    optimizer = SGD(model.parameters(), **FULL)  # kept: it would end with its last reference
    step_in_backward(optimizer)
    model.second(not_reentrant(model.first, inputs(0))).sum().backward()
    assert all("already used" in repr(p.grad) for p in model.parameters())


class Hidden(Nested):
    """The call of the nested pass cannot be seen in the node's code."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return _by_another_name(ctx, grad)


_by_another_name = Nested.backward


def hidden(function: Any, *args: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = Hidden.apply(function, *args)
    return result


@REENTRANT
@pytest.mark.parametrize("use", ["used outside before", "in two segments", "not shared"])
def test_a_hidden_nested_pass_is_found_inside_of_it(use: str) -> None:
    if use == "used outside before":  # the nested pass comes first
        assert_trains_as_torch(lambda m, x: SHARED[use](m, x, hidden).square().mean().backward())
    else:
        model = Network()
        optimizer = SGD(model.parameters(), **FULL)
        step_in_backward(optimizer)
        SHARED[use](model, inputs(0), hidden).sum().backward()
        optimizer.step()


@REENTRANT
def test_a_hidden_nested_pass_after_an_update_is_an_error() -> None:
    model = Network()
    optimizer = SGD(model.parameters(), **FULL)  # kept: it would end with its last reference
    step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="used and freed by step_in_backward"):
        model.first(hidden(model.first, inputs(0))).sum().backward()


def test_a_graph_that_is_kept_for_another_pass() -> None:
    def twice(model: Network, x: torch.Tensor) -> None:
        hidden = model.second(model.first(x))
        hidden.sum().backward(retain_graph=True)
        hidden.square().mean().backward()

    assert_trains_as_torch(twice)


def test_a_graph_that_is_kept_and_not_used_again() -> None:
    assert_trains_as_torch(
        lambda m, x: m.first(m.second(x)).square().mean().backward(retain_graph=True)
    )


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_of_which_gradients_are_taken() -> None:
    def penalised(model: Network, x: torch.Tensor) -> None:
        model.second(model.first(x).tanh()).square().mean().backward(create_graph=True)
        penalty = sum(p.grad.square().sum() for p in model.parameters())
        penalty.backward()
        for p in model.parameters():
            p.grad = p.grad.detach()

    assert_trains_as_torch(penalised)


def test_a_weight_that_is_used_twice() -> None:
    assert_trains_as_torch(lambda m, x: m.first(m.second(m.first(x))).square().mean().backward())
    assert_trains_as_torch(
        lambda m, x: (
            (m.first(x) + torch.nn.functional.linear(x, m.first.weight.t())).sum().backward()
        )
    )


def test_passes_over_parts_of_the_model() -> None:
    def parts(model: Network, x: torch.Tensor) -> None:
        model.first(x).square().mean().backward()
        model.second(x).square().mean().backward()

    assert_trains_as_torch(parts)


def test_a_second_pass_before_the_step_changes_nothing() -> None:
    model = Network()
    optimizer = SGD(model.parameters(), **FULL)
    step_in_backward(optimizer)
    model.second(model.first(inputs(0))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="accumulated with it"):
        model.second(model.first(inputs(1))).sum().backward()
    for p, kept in zip(model.parameters(), before, strict=True):
        assert_same_bits(p.detach(), kept)


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_a_compiled_model_steps_in_the_backward_pass() -> None:
    torch._dynamo.reset()
    model = Network()
    optimizer = SGD(model.parameters(), **FULL)
    step_in_backward(optimizer)
    compiled = torch.compile(lambda x: model.second(model.first(x)), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(inputs(0)).sum().backward()
    assert all("already used" in repr(p.grad) for p in model.parameters())


def test_threads_with_a_model_each() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def train(number: int, model: Network) -> list[torch.Tensor]:
        optimizer = SGD(model.parameters(), **FULL)
        step_in_backward(optimizer)
        again = reentrant if number % 2 else not_reentrant
        for step in range(20):
            model.first(again(model.first, inputs(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = train(0, Network())
        with ThreadPoolExecutor(4) as pool:
            for result in pool.map(train, range(8), [Network() for _ in range(8)]):
                for p, q in zip(result, expected, strict=True):
                    assert_same_bits(p, q)


# Several ranks


@pytest.mark.parametrize("scenario", ["backward_ddp", "backward_fsdp1", "backward_fsdp2"])
def test_two_processes(scenario: str, tmp_path: Path) -> None:
    assert_ranks_pass(scenario, tmp_path)
