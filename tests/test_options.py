"""The options of every optimizer, for arrays and torch's tensors: against torch's functions, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sgdcore
import sgdcore.torch
from sgdcore import _core
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
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm: expected a number > 0, or None for no limit, got 0"),
        ({"max_grad_norm": [1, 2]}, TypeError, "max_grad_norm: expected a number"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite: expected True or False, got 1"),
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


# --- The norm ---------------------------------------------------------------------------------------


def exact_norm(grads: list[Any]) -> float:
    """Return the norm of the exact sum of the squares, rounded to float64."""
    elements = chain.from_iterable(np.asarray(g, np.float64).ravel().tolist() for g in grads)
    total = sum((Fraction(x) ** 2 for x in elements), Fraction(0))
    return math.sqrt(total)  # which is rounded to float64 first


def ulps_between(a: float, b: float) -> int:
    return abs(int(np.float64(a).view(np.int64)) - int(np.float64(b).view(np.int64)))


def norm_of(grads: list[Any], **options: Any) -> float:
    parameters = [sgdcore.Parameter(np.zeros(g.shape, g.dtype)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer = sgdcore.SGD(parameters, lr=0.0, max_grad_norm=math.inf, **options)
    optimizer.step()
    norm = optimizer.grad_norm
    assert norm is not None
    return norm


rng = np.random.default_rng(0)


def spread(size: int, dtype: Any = np.float32) -> Any:
    """Return numbers of all magnitudes."""
    limits = (-140, 120) if np.dtype(dtype) == np.float32 else (-440, 480)
    return np.ldexp(rng.standard_normal(size), rng.integers(*limits, size)).astype(dtype)


def falling(size: int) -> Any:
    """Return numbers each of whose squares is half an ulp of the sum of those before: plain sums keep none."""
    values = np.full(size, 2.0**-27 * 1.0001, np.float32)
    values[0] = 1
    return values


def normal(size: int) -> list[Any]:
    return [rng.standard_normal(size).astype(np.float32)]


SIZES = (2, 15, 16, 17, 1023, 1024, 1025, 32767, 32768, 32769, 300_000)
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float64, np.float16]
NORMS: dict[str, Callable[[], list[Any]]] = {
    "nothing": lambda: [np.zeros(0, np.float32)],
    "zeros": lambda: [np.zeros(2000, np.float32)],
    "one": lambda: [np.float32([-3])],
    **{f"size {n}": partial(normal, n) for n in SIZES},
    "float64": lambda: [rng.standard_normal(50_000)],
    "float16": lambda: [rng.standard_normal(50_001).astype(np.float16)],
    "bfloat16": lambda: [rng.standard_normal(50_001).astype(ml_dtypes.bfloat16)],
    "many": lambda: [rng.standard_normal(n % 9).astype(np.float32) for n in range(3000)],
    "all dtypes": lambda: [rng.standard_normal(500 + i).astype(d) for i, d in enumerate(4 * DTYPES)],
    "spread": lambda: [spread(20_000)],
    "spread, ascending": lambda: [np.sort(np.abs(spread(20_000)))],
    "spread, descending": lambda: [np.sort(np.abs(spread(20_000)))[::-1].copy()],
    "spread float64": lambda: [spread(20_000, np.float64)],
    "falling": lambda: [falling(40_000)],
    "subnormal": lambda: [(rng.integers(-9, 9, 5000) * 2.0**-149).astype(np.float32)],
    "small float64": lambda: [rng.standard_normal(5000) * 2.0**-440],
    "large float64": lambda: [rng.standard_normal(5000) * 2.0**500],
    "largest float32": lambda: [np.full(5000, np.finfo(np.float32).max)],
    "strided": lambda: [rng.standard_normal((70, 90)).astype(np.float32).T, rng.standard_normal((50, 60))[::2, ::-3]],
    "broadcast": lambda: [np.broadcast_to(np.float32(0.1), (3000,))],
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_is_that_of_the_exact_sum(name: str) -> None:
    grads = NORMS[name]()
    assert ulps_between(norm_of(grads), exact_norm(grads)) <= 1


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_has_one_value_for_all_instruction_sets_threads_and_layouts(name: str) -> None:
    grads = NORMS[name]()
    norms = set()
    threads = sgdcore.get_num_threads()
    try:
        for isa in sgdcore.build_info()["isa_available"]:
            for count in (1, 2, 3, 7):
                sgdcore.set_isa(isa)
                sgdcore.set_num_threads(count)
                norms.add(norm_of(grads))
    finally:
        sgdcore.set_isa(None)
        sgdcore.set_num_threads(threads)
    assert len(norms) == 1
    flat = {dtype: [g for g in grads if g.dtype == dtype] for dtype in {g.dtype for g in grads}}
    joined = [np.concatenate([g.ravel() for g in of]) for of in flat.values()]
    assert norm_of(joined) in norms
    assert norm_of([np.asfortranarray(g) for g in grads]) in norms
    tensors = [torch.nn.Parameter(torch.zeros(g.shape, dtype=TORCH[g.dtype.name])) for g in grads]
    for tensor, grad in zip(tensors, grads, strict=True):
        words = {2: np.int16, 4: np.int32, 8: np.int64}[grad.dtype.itemsize]
        tensor.grad = torch.from_numpy(np.ascontiguousarray(grad).view(words)).view(tensor.dtype)
    optimizer = sgdcore.torch.SGD(tensors, lr=0.0, max_grad_norm=math.inf)
    optimizer.step()
    assert optimizer.grad_norm in norms


TORCH = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_norm_of_anything(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.float16]))
    numbers = st.floats(
        allow_nan=False, allow_infinity=False, width=8 * np.dtype(dtype).itemsize
    ).filter(lambda x: x == 0 or 1e-130 < abs(x) < 1e140)
    grads = [np.array(data.draw(st.lists(numbers, max_size=40)), dtype) for _ in range(count)]
    assert ulps_between(norm_of(grads), exact_norm(grads)) <= 1


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("max_norm", [1e9, 150.0, 3.0, 1e-7, math.inf])
@pytest.mark.parametrize("clip_value", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
def test_max_grad_norm_gives_the_bits_of_torch_given_the_norm(
    hyper: dict[str, Any],
    dtype: torch.dtype,
    clip_value: float | None,
    max_norm: float,
    front_end: str,
) -> None:
    options = {"max_grad_norm": max_norm, "clip_value": clip_value}
    ours = Training(lambda p: FRONT_ENDS[front_end](p, **hyper, **options), dtype, front_end)
    theirs = Training(lambda p: torch.optim.SGD(p, **hyper, foreach=False), dtype, "torch")
    for step in range(5):
        grads = tensors_of(step + 1, dtype)
        if step == 3:
            grads = [100 * grad for grad in grads]
        if step == 4:
            special(grads)
        ours.give(grads)
        theirs.give(grads)
        ours.optimizer.step()
        norm = torch.tensor(ours.optimizer.grad_norm, dtype=torch.float64)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(theirs.parameters, clip_value)
        torch.nn.utils.clip_grads_with_norm_(theirs.parameters, max_norm, norm)
        theirs.optimizer.step()
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            assert same_bits(a, b)
        total = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters])
        if step < 3 and max_norm == 1e9:
            assert float(total) == pytest.approx(ours.optimizer.grad_norm, rel=1e-5)
        for parameter, grad in zip(ours.parameters, grads, strict=True):
            assert same_bits(torch.as_tensor(parameter.grad), grad)  # not rewritten


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("zero_grad", [False, True], ids=["keep", "clear"])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(
    zero_grad: bool, value: float, front_end: str
) -> None:
    def make(parameters: Any) -> Any:
        return FRONT_ENDS[front_end](parameters, lr=0.1, momentum=0.9, skip_nonfinite=True)

    run = Training(make, torch.float32, front_end)
    plain = Training(
        lambda p: FRONT_ENDS[front_end](p, lr=0.1, momentum=0.9), torch.float32, front_end
    )
    skipped = 0
    for step, bad in enumerate([True, False, True, True, False]):
        grads = tensors_of(step)
        if bad:
            grads[4][1, 2, 3] = value
        before = [t.clone() for t in run.tensors]
        run.give(grads)
        run.optimizer.step(zero_grad=zero_grad)
        skipped += bad
        assert run.optimizer.skipped_steps == skipped
        norm = run.optimizer.grad_norm
        assert norm is not None
        assert math.isfinite(norm) != bad
        if bad:
            for a, b in zip(run.tensors, before, strict=True):
                assert same_bits(a, b)
        else:
            plain.give(grads)
            plain.optimizer.step()
        for a, b in zip(run.tensors, plain.tensors, strict=True):
            assert same_bits(a, b)
        for parameter, grad in zip(run.parameters, grads, strict=True):
            now = torch.as_tensor(parameter.grad)
            assert same_bits(now, torch.zeros_like(now) if zero_grad else grad)


def test_a_sum_that_overflows_is_no_gradient_that_is_not_finite() -> None:
    data = np.ones(3)
    optimizer = sgdcore.SGD([data], lr=1.0, skip_nonfinite=True)
    optimizer.step(grads=[np.array([1e300, 1.0, -1e300])])
    assert data.tolist() == [1 - 1e300, 0.0, 1 + 1e300]
    assert optimizer.grad_norm == math.inf
    assert optimizer.skipped_steps == 0


def test_infinite_elements_count_before_they_are_limited() -> None:
    data = np.ones(3, np.float32)
    optimizer = sgdcore.SGD([data], lr=1.0, skip_nonfinite=True, clip_value=2.0)
    optimizer.step(grads=[np.float32([math.inf, 1, 1])])
    assert data.tolist() == [1, 1, 1]
    assert optimizer.grad_norm == math.sqrt(6)
    assert optimizer.skipped_steps == 1


def test_the_norm_of_a_step_with_grads_and_of_all_groups() -> None:
    arrays = [np.zeros(3, np.float32), np.zeros((2, 2)), np.zeros(1, np.float32)]
    groups = [{"params": arrays[:1]}, {"params": arrays[1:], "lr": 1.0}]
    optimizer = sgdcore.SGD(groups, lr=0.5, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    optimizer.step(grads=[np.float32([3, 0, 0]), None, np.float32([4])])
    assert optimizer.grad_norm == 5.0
    factor = np.float32(1 / (5 + 1e-6))
    assert arrays[0][0] == np.float32(-0.5) * (np.float32(3) * factor)
    assert arrays[2][0] == -(np.float32(4) * factor)
    optimizer.max_grad_norm = None
    optimizer.step(grads=[None, np.ones((2, 2)), None])
    assert optimizer.grad_norm == 5.0
    assert arrays[1].tolist() == [[-1, -1], [-1, -1]]


def test_the_norm_under_a_grad_scaler_is_of_unscaled_gradients() -> None:
    def run(scale: float, overflow: bool = False) -> tuple[Any, list[float]]:
        parameter = torch.nn.Parameter(torch.zeros(2))
        optimizer = sgdcore.torch.SGD([parameter], lr=1.0, max_grad_norm=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for factor in (1.0, math.inf if overflow else 1.0):
            optimizer.zero_grad()
            scaler.scale((parameter * torch.tensor([3.0, -4.0])).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        return optimizer, parameter.tolist()

    expected = 2 * float(np.float32(4) * np.float32(1 / (5 + 1e-6)))
    for scale in (1.0, 1024.0, 3.0):
        optimizer, values = run(scale)
        assert optimizer.grad_norm == pytest.approx(5.0, rel=1e-6)
        assert values[1] == pytest.approx(expected, rel=1e-6)
    optimizer, values = run(1024.0, overflow=True)
    assert values[1] == expected / 2
    assert optimizer.grad_norm == 5.0
    assert optimizer.skipped_steps == 0


def test_the_norm_is_of_regular_and_irregular_parameters() -> None:
    dense = torch.nn.Parameter(torch.zeros(3))
    rows = torch.nn.Parameter(torch.zeros(4, 2))
    numbers = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    gaps = torch.nn.Parameter(torch.zeros(6)[::2])
    optimizer = sgdcore.torch.SGD([dense, rows, numbers, gaps], lr=1.0, momentum=0.5)
    optimizer.max_grad_norm = 1.0
    for step in range(3):
        dense.grad = torch.tensor([1.0, 2.0, 0.0])
        rows.grad = torch.sparse_coo_tensor(
            torch.tensor([[1, 3, 1]]), torch.ones(3, 2), (4, 2), check_invariants=True
        )
        numbers.grad = torch.tensor([2 + 1j, 1j])
        gaps.grad = torch.tensor([0.0, 3.0, 0.0])
        before = dense.detach().clone()
        optimizer.step()
        # 1 + 4, two rows of 2 * 4 and 2 * 1, 4 + 1 + 1, 9
        assert optimizer.grad_norm == math.sqrt(5 + 8 + 2 + 6 + 9)
        if step == 0:
            factor = np.float32(1 / (math.sqrt(30) + 1e-6))
            assert (before - dense)[1].item() == np.float32(2) * factor
            assert -gaps[1].item() == np.float32(3) * factor
            assert -numbers[0].real.item() == np.float32(2) * factor
            assert -rows[1, 0].item() == np.float32(2) * factor
    optimizer.skip_nonfinite = True
    dense.grad[0] = math.nan
    kept = [p.detach().clone() for p in (dense, rows, numbers, gaps)]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, (dense, rows, numbers, gaps), strict=True))
    assert optimizer.skipped_steps == 1


def test_a_first_step_that_is_left_out_leaves_no_state() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = sgdcore.torch.SGD([parameter], lr=1.0, momentum=0.5, skip_nonfinite=True)
    for value in (math.nan, 1.0):
        parameter.grad = torch.tensor([1.0, value])
        version = parameter._version
        optimizer.step()
        assert (parameter in optimizer.state) == (value == 1)
        assert (parameter._version > version) == (value == 1)
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [1, 1]


def test_shared_memory_steps_in_sequence_by_one_factor() -> None:
    memory = torch.zeros(4)
    parameters = [torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[1:])]
    optimizer = sgdcore.torch.SGD(parameters, lr=1.0, max_grad_norm=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    factor = np.float32(1 / (math.sqrt(6) + 1e-6))
    assert optimizer.grad_norm == math.sqrt(6)
    assert memory.tolist() == [-factor, -factor - factor, -factor - factor, -factor]


def test_closures_and_hooks_come_before_the_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = sgdcore.torch.SGD([parameter], lr=1.0, max_grad_norm=1.0)
    parameter.grad = torch.zeros(2)
    optimizer.register_step_pre_hook(lambda *_: setattr(parameter, "grad", torch.full((2,), 3.0)))
    optimizer.step()
    assert optimizer.grad_norm == math.sqrt(18)

    def closure() -> float:
        parameter.grad = torch.tensor([0.0, 2.0])
        return 1.5

    optimizer._optimizer_step_pre_hooks.clear()
    assert optimizer.step(closure) == 1.5
    assert optimizer.grad_norm == 2.0


def test_setting_an_option_in_a_backward_pass_that_steps_is_refused() -> None:
    optimizer = sgdcore.torch.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    with sgdcore.torch.step_in_backward(optimizer):
        for option in ("max_grad_norm", "skip_nonfinite"):
            with pytest.raises(
                ValueError, match=f"{option}: step_in_backward never has all gradients"
            ):
                setattr(optimizer, option, 1.0 if option == "max_grad_norm" else True)
    assert optimizer.max_grad_norm is None
    assert not optimizer.skip_nonfinite


# --- clip_grad_norm_ --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf, 0.5, -math.inf])
@pytest.mark.parametrize("max_norm", [1e9, 2.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clip_grad_norm_rewrites_as_torch_given_the_norm(
    dtype: torch.dtype, max_norm: float, norm_type: float
) -> None:
    grads = [grad for grad in tensors_of(1, dtype) if grad.numel()]
    theirs = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    ours = [sgdcore.Parameter(np.zeros(grad.shape, grad.numpy().dtype)) for grad in grads]
    for a, b, grad in zip(ours, theirs, grads, strict=True):
        a.grad, b.grad = grad.numpy().copy(), grad.clone()
    expected = torch.nn.utils.get_total_norm(grads, norm_type)
    norm = sgdcore.clip_grad_norm_(ours, max_norm, norm_type)
    assert norm == pytest.approx(float(expected), rel=1e-5)
    total = torch.tensor(norm, dtype=torch.float64)
    torch.nn.utils.clip_grads_with_norm_(theirs, max_norm, total)
    for a, b in zip(ours, theirs, strict=True):
        assert same_bits(torch.from_numpy(a.grad), b.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_grad_norm_takes_buffers_arrays_and_strides(dtype: Any) -> None:
    values = rng.standard_normal((300, 200)).astype(dtype)
    compute = np.float64 if dtype == np.float64 else np.float32
    norm = exact_norm([values])
    factor = compute(_core.clip_coefficient(1.0, norm))
    expected = (values.astype(compute) * factor).astype(dtype)
    buffer = sgdcore.ParameterBuffer({"w": np.zeros_like(values), "b": np.zeros(2, dtype)})
    buffer["w"].grad = values
    strided = np.zeros((200, 900), dtype).T[::3]
    strided[...] = values
    unwritten = sgdcore.Parameter(np.zeros(3, dtype))
    for params in (buffer, [values.copy()], iter([strided, unwritten]), values.copy()):
        kept = params if isinstance(params, np.ndarray) else None
        if isinstance(params, list):
            kept = params[0]
        assert ulps_between(sgdcore.clip_grad_norm_(params, 1.0), norm) <= 1
        got = kept if kept is not None else buffer["w"].grad
        assert got.tobytes() == expected.tobytes()
    assert strided.tobytes() == expected.tobytes()


def test_what_clip_grad_norm_refuses_changes_nothing() -> None:
    good, bad = np.float32([3, 4]), np.float32([3, math.inf])
    constant = np.float32([1, 2])
    constant.flags.writeable = False
    repeated = np.broadcast_to(np.float32(1), (3,))
    for params, options, error, message in [
        ([good, bad], {"error_if_nonfinite": True}, RuntimeError, "total norm of order 2.0 for gradients"),
        ([good, constant], {}, ValueError, r"grads\[1\]: expected an array that can be written"),
        ([good, repeated], {}, ValueError, r"grads\[1\]: expected"),
        ([good, 3], {}, TypeError, r"params\[1\]: expected a Parameter or an array, got int"),
        (3, {}, TypeError, "params: expected a Parameter"),
        ([good], {"max_norm": -1}, ValueError, "max_norm: expected a number >= 0, got -1"),
        ([good], {"norm_type": "2"}, TypeError, "norm_type: expected a number, got '2'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            sgdcore.clip_grad_norm_(params, **{"max_norm": 1.0, **options})
        assert good.tolist() == [3, 4]
    assert sgdcore.clip_grad_norm_([], 1.0) == 0.0
    assert sgdcore.clip_grad_norm_([good, bad], 1.0) == math.inf
    assert good.tolist() == [0, 0]


def test_a_step_that_is_left_out_is_not_counted() -> None:
    """Neither by averages nor by a rule that counts steps, whether the parameters are regular or not."""
    for kind, options in [
        (sgdcore.torch.SGD, {"average": sgdcore.EMA(0.5), "momentum": 0.9}),
        (sgdcore.torch.ScheduleFreeSGD, {"warmup_steps": 3}),
    ]:
        for dtype in (torch.float32, torch.complex64):
            params = [
                torch.nn.Parameter(torch.ones(3)),
                torch.nn.Parameter(torch.ones(2, dtype=dtype)),
            ]
            others = [torch.nn.Parameter(p.detach().clone()) for p in params]
            ours = kind(params, lr=0.1, skip_nonfinite=True, **options)
            plain = kind(others, lr=0.1, **options)
            for step in range(5):
                for p, q in zip(params, others, strict=True):
                    p.grad = torch.full_like(p, 1.0 + step)
                    q.grad = p.grad.clone()
                if step % 2 == 0:
                    params[1].grad[1] = math.nan
                else:
                    plain.step()
                ours.step()
            assert ours.skipped_steps == 3
            for p, q in zip(params, others, strict=True):
                assert torch.equal(p, q)
                for key, value in ours.state[p].items():
                    assert torch.equal(value, plain.state[q][key])
            for group, other in zip(ours.param_groups, plain.param_groups, strict=True):
                for key in group.keys() - {"params"}:
                    assert group[key] == other[key]
