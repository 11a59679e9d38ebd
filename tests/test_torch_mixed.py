"""Unusual parameters beside usual ones: those that are as usual go to the core the usual way, whatever others are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgdcore.torch import SGD, _irregular
from torch_support import assert_same_bits, momentum_of

USUAL = 5


class Plain(torch.nn.Parameter):
    """A subclass that changes nothing about its memory."""


def sparse(size: int = 6, repeat: bool = True) -> Tensor:
    index = torch.tensor([[4, 1, 4, 4] if repeat else [4, 1, 2, 0]])
    return torch.sparse_coo_tensor(index, torch.randn(4, 3), (size, 3), check_invariants=False)


def complex_one() -> list[tuple[torch.nn.Parameter, Tensor]]:
    return [
        (
            torch.nn.Parameter(torch.randn(4, dtype=torch.complex64)),
            torch.randn(4, dtype=torch.complex64).conj(),
        )
    ]


def with_gaps() -> list[tuple[torch.nn.Parameter, Tensor]]:
    return [(torch.nn.Parameter(torch.randn(4, 2)[:, 0]), torch.randn(4))]


def of_a_subclass() -> list[tuple[torch.nn.Parameter, Tensor]]:
    return [(Plain(torch.randn(4)), torch.randn(4))]


def sharing() -> list[tuple[torch.nn.Parameter, Tensor]]:
    memory = torch.randn(8)
    return [
        (torch.nn.Parameter(memory), torch.randn(8)),
        (torch.nn.Parameter(memory[2:6]), torch.randn(4)),
        (torch.nn.Parameter(memory[:3]), memory[5:]),
    ]


def its_own_gradient() -> list[tuple[torch.nn.Parameter, Tensor]]:
    memory = torch.randn(8)
    return [(torch.nn.Parameter(memory[:6]), memory[2:])]


def with_sparse_gradient() -> list[tuple[torch.nn.Parameter, Tensor]]:
    return [(torch.nn.Parameter(torch.randn(6, 3)), sparse(repeat=False).coalesce())]


# And how many parameters Python code prepares in a step.
KINDS: dict[str, tuple[Callable[[], list[tuple[torch.nn.Parameter, Tensor]]], int]] = {
    "complex": (complex_one, 1),
    "gaps": (with_gaps, 1),
    "subclass": (of_a_subclass, 0),
    "sharing": (sharing, 0),
    "its own gradient": (its_own_gradient, 0),
    "sparse": (with_sparse_gradient, 0),
}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The parameters that Python code has prepared."""
    found: list[Tensor] = []
    prepare = _irregular._prepare

    def noting(*args: Any) -> Any:
        found.append(args[5])
        return prepare(*args)

    monkeypatch.setattr(_irregular, "_prepare", noting)
    return found


def mixed(make: Callable[[], list[tuple[torch.nn.Parameter, Tensor]]]) -> list[torch.nn.Parameter]:
    """Usual parameters around unusual ones, all with gradients."""
    torch.manual_seed(1)
    usual = [torch.nn.Parameter(torch.randn(3)) for _ in range(USUAL)]
    for p in usual:
        p.grad = torch.randn(3)
    unusual = make()
    for p, grad in unusual:
        p.grad = grad
    return [*usual[:2], *(p for p, _ in unusual), *usual[2:]]


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_unusual_go_through_python(
    kind: str, momentum: float, zero_grad: bool, prepared: list[Tensor]
) -> None:
    if kind == "its own gradient" and not momentum:
        pytest.skip("torch refuses it")
    make, count = KINDS[kind]
    ours, theirs = mixed(make), mixed(make)
    a, b = SGD(ours, 0.1, momentum), torch.optim.SGD(theirs, 0.1, momentum, foreach=False)
    for step in range(3):
        prepared.clear()
        before = [p._version for p in ours]
        a.step(zero_grad=zero_grad and step == 2)
        b.step()
        if zero_grad and step == 2:
            b.zero_grad(set_to_none=False)
        assert all(p._version > version for p, version in zip(ours, before, strict=True))
        if not zero_grad:
            assert len(prepared) == count
        for p, q in zip(ours, theirs, strict=True):
            if kind == "complex" and p.is_complex():
                torch.testing.assert_close(p, q)
            else:
                assert_same_bits(p, q)
    if zero_grad:
        for p in ours:
            assert p.grad is not None
            assert not p.grad.to_dense().any()


def test_a_first_step_makes_only_momentum_buffers(prepared: list[Tensor]) -> None:
    ours, theirs = mixed(with_gaps), mixed(with_gaps)
    a, b = SGD(ours, 0.1, 0.9), torch.optim.SGD(theirs, 0.1, 0.9, foreach=False)
    for optimizer in (a, b):
        optimizer.step()
    assert len(prepared) == 1
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(momentum_of(a, p), momentum_of(b, q))


def test_new_momentum_has_the_groups_dtype(prepared: list[Tensor]) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    groups = [{"params": [p], "momentum_dtype": torch.float32}, {"params": [q]}]
    optimizer = SGD(groups, 0.1, momentum=0.9)
    optimizer.step()
    assert not prepared
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert optimizer.state[q]["momentum_buffer"].dtype == torch.bfloat16


def test_a_step_after_a_collection_is_as_any_other(prepared: list[Tensor]) -> None:
    params = mixed(list)
    optimizer = SGD(params, 0.1, 0.9)
    optimizer.step()
    for _ in range(3):
        gc.collect()
        assert optimizer._run_unobserved(optimizer.param_groups, optimizer._state, False) is True
    assert not prepared


def test_nothing_is_changed_where_one_is_refused() -> None:
    params = mixed(with_gaps)
    refused = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    refused.grad = torch.ones(3, dtype=torch.complex64)
    params.append(refused)
    optimizer = SGD(params, 0.1, 0.9, momentum_dtype="float16")
    before = [p.detach().clone() for p in params]
    with pytest.raises(TypeError, match=r"momentum_dtype: .* param_groups\[0\]\['params'\]\[6\]"):
        optimizer.step()
    assert not optimizer.state
    for p, value in zip(params, before, strict=True):
        assert_same_bits(p, value)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_unusual_parameter_overlaps_a_usual_one(momentum: float) -> None:
    """All that share memory step in their order, as in torch's loop."""

    def make() -> list[torch.nn.Parameter]:
        torch.manual_seed(2)
        memory = torch.randn(12)
        params = [
            torch.nn.Parameter(t) for t in (torch.randn(3), memory[:4], memory[2::2], memory[3:6])
        ]
        for p in params:
            p.grad = torch.randn(p.shape)
        return params

    ours, theirs = make(), make()
    a, b = SGD(ours, 0.1, momentum), torch.optim.SGD(theirs, 0.1, momentum, foreach=False)
    for _ in range(3):
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(p, q)


def test_what_was_unusual_is_usual_again(prepared: list[Tensor]) -> None:
    params = mixed(with_gaps)
    optimizer = SGD(params, 0.1, 0.9)
    for _ in range(2):
        optimizer.step()
    params[2].data = params[2].detach().clone()
    optimizer.state[params[2]]["momentum_buffer"] = torch.zeros(4)
    prepared.clear()
    optimizer.step()
    assert not prepared
    params[0].data = torch.randn(6)[::2]
    optimizer.step()
    assert [id(p) for p in prepared] == [id(params[0])]


@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "hyper", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}]
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_sparse_gradients_in_the_core(
    mode: str, dtype: torch.dtype, hyper: dict[str, Any], dimensions: int, prepared: list[Tensor]
) -> None:
    """Rows that are named several times get the sum in the gradient's type, added up in order."""
    torch.manual_seed(3)
    index = torch.randint(0, 3, (dimensions, 20))
    p = torch.nn.Parameter(torch.randn(4, 3, 5, dtype=dtype))
    q = torch.nn.Parameter(p.detach().clone())
    a = SGD([p], 0.1, sparse_mode=mode, **hyper)
    b = SGD([q], 0.1, **hyper)
    for _ in range(3):
        shape = (20, *p.shape[dimensions:])
        values = torch.randn(shape, dtype=dtype)
        grad = torch.sparse_coo_tensor(index, values, p.shape, check_invariants=False)
        p.grad, q.grad = grad, torch.zeros_like(q)
        untouched = torch.ones(p.shape, dtype=torch.bool)
        for at, row in zip(index.T.tolist(), values, strict=True):
            q.grad[tuple(at)] += row
            untouched[tuple(at)] = False
        before = p.detach().clone()
        prepared.clear()
        a.step()
        b.step()
        assert not prepared
        if mode == "lazy":
            assert_same_bits(p[untouched], before[untouched])
            q.data[untouched] = p.detach()[untouched]
            if momentum_of(b, q) is not None:
                b.state[q]["momentum_buffer"][untouched] = momentum_of(a, p)[untouched]  # type: ignore[index]
        assert_same_bits(p, q)


@pytest.mark.parametrize("at", [-7, 6, 100])
def test_a_sparse_gradient_beyond_the_parameter(at: int) -> None:
    p = torch.nn.Parameter(torch.ones(6, 3))
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    p.grad = torch.sparse_coo_tensor(
        torch.tensor([[2]]), torch.ones(1, 3), (6, 3), check_invariants=False
    )
    p.grad._indices()[0, 0] = at
    optimizer = SGD([other, p], 0.1)
    with pytest.raises((IndexError, RuntimeError)):
        optimizer.step()
    assert other.detach().tolist() == [1, 1]


def test_a_sparse_gradient_of_memory_that_others_write() -> None:
    """The values of one gradient are another parameter, whose step comes first."""
    values = torch.full((2, 3), 2.0)
    p, q = torch.nn.Parameter(values), torch.nn.Parameter(torch.ones(6, 3))
    p.grad = torch.ones(2, 3)
    q.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 4]]), values, (6, 3), is_coalesced=True, check_invariants=False
    )
    SGD([p, q], lr=0.5).step()
    assert p.detach().unique().tolist() == [1.5]
    assert q.detach()[:, 0].tolist() == [0.25, 1, 1, 1, 0.25, 1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_distributed_tensors_go_by_their_part(tmp_path: Path, prepared: list[Tensor]) -> None:
    distributed = torch.distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))

        def make() -> list[torch.nn.Parameter]:
            torch.manual_seed(4)
            params = [
                torch.nn.Parameter(distribute_tensor(torch.randn(4, 2), mesh, [Shard(i % 2)]))
                for i in range(3)
            ]
            for p in params:
                p.grad = distribute_tensor(torch.randn(4, 2), mesh, p.placements)
            return params

        ours, theirs = make(), make()
        a, b = SGD(ours, 0.1, 0.9), torch.optim.SGD(theirs, 0.1, 0.9, foreach=False)
        for step in range(3):
            prepared.clear()
            if step == 2:  # placed in another way: Python code brings it to the parameter's
                for p in (ours[0], theirs[0]):
                    p.grad = p.grad.redistribute(mesh, [Replicate()])
            version = ours[1]._version
            a.step()
            b.step()
            assert len(prepared) == (step == 2)
            assert ours[1]._version > version
            for p, q in zip(ours, theirs, strict=True):
                assert_same_bits(p.to_local(), q.to_local())
                momentum = momentum_of(a, p)
                assert type(momentum) is type(p)
                assert_same_bits(momentum.to_local(), momentum_of(b, q).to_local())
    finally:
        distributed.destroy_process_group()
