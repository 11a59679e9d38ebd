"""The numbers: every bit of parameters and momentum against torch.optim.SGD(foreach=False) and the oracle.

float32 and float64 are compared with torch itself; the oracle (sgdcore.reference, exact fma) covers
what torch computes otherwise or not at all: 16-bit types, mixed types, float64 arithmetic.
"""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sgdcore
from sgdcore import reference

Hyper = dict[str, Any]

# All meaningful combinations of the six hyperparameters: each term absent and present.
HYPERS: list[Hyper] = [
    {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for lr, momentum, dampening, weight_decay, nesterov, maximize in itertools.product(
        [0.1], [0.0, 0.9], [0.0, 0.3], [0.0, 0.01], [False, True], [False, True]
    )
    if not (nesterov and (momentum == 0 or dampening != 0))
    and not (momentum == 0 and dampening != 0)
] + [
    {"lr": 1e-3, "momentum": 0.99, "dampening": 1.0, "weight_decay": 0.5},
    {"lr": 0.0, "momentum": 0.5, "weight_decay": 1e-4, "nesterov": True},
    {"lr": 3.7, "momentum": 1.5, "dampening": -0.5},
]

# Around the widths of vectors (4 to 16 lanes), cache lines (8 to 32 elements) and blocks (1,024), and past the size at
# which a second thread joins.
SIZES = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    129,
    1023,
    1024,
    1025,
    4099,
]
CHUNK_SIZES = [65_535, 65_536, 65_537, 131_071, 200_003]
STEPS = 20

FLOATS = ["float32", "float64"]
TYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def hyper_id(hyper: Hyper) -> str:
    return "-".join(f"{key}={value}" for key, value in hyper.items() if value) or "plain"


def values(rng: np.random.Generator, size: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Return values of mixed magnitude, never zero."""
    magnitude = np.exp(rng.normal(0, 2, size))
    return (magnitude * rng.choice([-1.0, 1.0], size)).astype(dtype)


def unaligned(array: np.ndarray[Any, Any], offset: int) -> np.ndarray[Any, Any]:
    """Return a copy that starts `offset` bytes past an aligned address."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Compare bit patterns; any NaN equals any NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    word = f"u{actual.dtype.itemsize}"
    different = actual.view(word) != expected.view(word)
    different &= ~(np.isnan(actual.astype(np.float64)) & np.isnan(expected.astype(np.float64)))
    assert not different.any(), (
        f"{different.sum()} of {different.size} differ, first at {np.flatnonzero(different)[0]}: "
        f"{actual[different][:3]} instead of {expected[different][:3]}"
    )


def torch_run(
    start: list[np.ndarray[Any, Any]], grads: list[list[np.ndarray[Any, Any]]], hyper: Hyper
) -> tuple[list[Any], list[Any]]:
    """Return parameters and momentum after torch's for-loop path took a step with each entry of `grads`."""
    params = [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in start]
    optimizer = torch.optim.SGD(params, foreach=False, **hyper)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = torch.from_numpy(grad)
        optimizer.step()
    momenta = [optimizer.state[p].get("momentum_buffer") for p in params]
    return [p.detach().numpy() for p in params], [None if b is None else b.numpy() for b in momenta]


def check_against(
    params: list[sgdcore.Parameter], optimizer: sgdcore.SGD, expected: tuple[list[Any], list[Any]]
) -> None:
    for param, data, momentum in zip(params, *expected, strict=True):
        assert_same_bits(param.data, data)
        if momentum is None:
            assert "momentum_buffer" not in optimizer.state[param]
        else:
            assert_same_bits(optimizer.state[param]["momentum_buffer"], momentum)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hyper", HYPERS, ids=hyper_id)
def test_equals_torch(hyper: Hyper, dtype: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    start = [values(rng, size, dtype) for size in SIZES]
    grads = [[values(rng, size, dtype) for size in SIZES] for _ in range(STEPS)]
    expected = torch_run(start, grads, hyper)

    params = [sgdcore.Parameter(array.copy()) for array in start]
    optimizer = sgdcore.SGD(params, **hyper)
    # Unaligned views: by a whole element, and by a single byte.
    odd = [sgdcore.Parameter(unaligned(array, 4 + i % 2)) for i, array in enumerate(start)]
    odd_optimizer = sgdcore.SGD(odd, **hyper)
    # Flat.
    buffer = sgdcore.ParameterBuffer({str(i): array for i, array in enumerate(start)})
    flat_optimizer = sgdcore.SGD(buffer, **hyper)
    for step_grads in grads:
        for i, grad in enumerate(step_grads):
            params[i].grad = grad
            odd[i].grad = unaligned(grad, 8 + i % 3)
            buffer[str(i)].grad = grad
        optimizer.step()
        odd_optimizer.step()
        flat_optimizer.step()
    check_against(params, optimizer, expected)
    check_against(odd, odd_optimizer, expected)
    check_against(buffer.parameters(), flat_optimizer, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", CHUNK_SIZES)
@pytest.mark.usefixtures("threads")
def test_same_bits_for_every_thread_count(size: int, dtype: str) -> None:
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    rng = np.random.default_rng(1)
    sizes = [size, 10, 40_001, 1]
    start = [values(rng, n, dtype) for n in sizes]
    grads = [[values(rng, n, dtype) for n in sizes] for _ in range(3)]
    expected = torch_run(start, grads, hyper)
    for count in (1, 2, 3, 7):
        sgdcore.set_num_threads(count)
        for offset in (0, 1, 8):
            params = [sgdcore.Parameter(unaligned(array, offset)) for array in start]
            optimizer = sgdcore.SGD(params, **hyper)
            for step_grads in grads:
                optimizer.step(grads=step_grads)
            check_against(params, optimizer, expected)


def oracle_steps(
    start: np.ndarray[Any, Any],
    grads: list[np.ndarray[Any, Any]],
    momentum_dtype: Any,
    hyper: Hyper,
) -> tuple[Any, Any]:
    param, momentum = start, None
    for grad in grads:
        param, momentum = reference.sgd_update(
            param, grad, momentum, momentum_dtype=momentum_dtype, **hyper
        )
    return param, momentum


@pytest.mark.parametrize("triple", list(itertools.product(TYPES, repeat=3)), ids="-".join)
def test_every_mix_of_types_equals_the_oracle(triple: tuple[str, str, str]) -> None:
    """Arithmetic in the compute type, and one rounding per stored value."""
    param_type, grad_type, momentum_type = (TYPES[name] for name in triple)
    rng = np.random.default_rng(2)
    for hyper in HYPERS:
        for size in (1, 17, 1025):
            start = values(rng, size, param_type)
            grads = [values(rng, size, grad_type) for _ in range(3)]
            expected = oracle_steps(start, grads, momentum_type, hyper)
            parameter = sgdcore.Parameter(start.copy())
            optimizer = sgdcore.SGD([parameter], momentum_dtype=momentum_type, **hyper)
            for grad in grads:
                parameter.grad = grad
                optimizer.step()
            check_against([parameter], optimizer, ([expected[0]], [expected[1]]))


@pytest.mark.parametrize("name", TYPES)
def test_special_values_go_where_the_formulas_send_them(name: str, isa: str) -> None:
    dtype = TYPES[name]
    info = ml_dtypes.finfo(dtype)
    tiny = float(info.smallest_subnormal)
    specials = np.array(
        [
            np.nan,
            np.inf,
            -np.inf,
            0.0,
            -0.0,
            tiny,
            -tiny,
            float(info.tiny),
            float(info.max),
            -float(info.max),
            1.0,
            -3.0,
        ]
    ).astype(dtype)
    grid = np.stack(np.meshgrid(specials, specials, specials), -1).reshape(-1, 3)
    start, first, second = (np.ascontiguousarray(grid[:, i]) for i in range(3))
    for hyper in HYPERS:
        expected = oracle_steps(start, [first, second], dtype, hyper)
        parameter = sgdcore.Parameter(start.copy())
        optimizer = sgdcore.SGD([parameter], **hyper)
        optimizer.step(grads=[first])
        optimizer.step(grads=[second])
        check_against([parameter], optimizer, ([expected[0]], [expected[1]]))
        if name in FLOATS:
            check_against([parameter], optimizer, torch_run([start], [[first], [second]], hyper))


def test_bits_of_nan_and_zero_signs() -> None:
    """-0.0 survives a zero gradient, maximize flips the sign of zero, and a skipped term makes no NaN."""
    parameter = sgdcore.Parameter(np.array([-0.0, np.inf], np.float32))
    sgdcore.SGD([parameter], lr=0.1).step(grads=[np.array([0.0, 0.0], np.float32)])
    assert np.signbit(parameter.data[0])
    assert parameter.data[1] == np.inf
    optimizer = sgdcore.SGD([parameter], lr=0.1, momentum=0.9, maximize=True)
    optimizer.step(grads=[np.array([0.0, 0.0], np.float32)])
    assert np.signbit(optimizer.state[parameter]["momentum_buffer"]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_grad_in_the_same_pass(dtype: str) -> None:
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    rng = np.random.default_rng(3)
    for size in [*SIZES, *CHUNK_SIZES]:
        start, grads = values(rng, size, dtype), [[values(rng, size, dtype)] for _ in range(2)]
        parameter = sgdcore.Parameter(start.copy())
        optimizer = sgdcore.SGD([parameter], **hyper)
        for (grad,) in grads:
            parameter.grad = grad.copy()
            optimizer.step(zero_grad=True)
            assert not parameter.grad.any()
        check_against([parameter], optimizer, torch_run([start], grads, hyper))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_groups_shapes_and_strides_equal_torch(data: st.DataObject) -> None:
    """0 mismatches over random groups, hyperparameters changed between steps, shapes, strides and missing gradients."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(FLOATS))
    unit = st.floats(0, 2, width=32)
    groups: list[tuple[list[np.ndarray[Any, Any]], Hyper]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        shapes = data.draw(
            st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=4)
        )
        momentum, nesterov = data.draw(unit), data.draw(st.booleans())
        hyper = {
            "lr": data.draw(unit),
            "momentum": momentum,
            "dampening": 0.0 if nesterov else data.draw(unit),
            "weight_decay": data.draw(st.one_of(st.just(0.0), unit)),
            "nesterov": nesterov and momentum > 0,
            "maximize": data.draw(st.booleans()),
        }
        arrays = []
        for shape in shapes:
            axes = data.draw(st.permutations(range(len(shape))))
            dense = values(rng, int(np.prod(shape)), dtype).reshape([shape[a] for a in axes])
            arrays.append(dense.transpose(np.argsort(axes)))
        groups.append((arrays, hyper))

    # torch's own bits do not depend on layout for these types, so its side is contiguous.
    ours = [[sgdcore.Parameter(a.copy(order="K")) for a in arrays] for arrays, _ in groups]
    theirs = [
        [
            torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(a).reshape(a.shape).copy()))
            for a in arrays
        ]
        for arrays, _ in groups
    ]
    optimizer = sgdcore.SGD([{"params": p, **h} for p, (_, h) in zip(ours, groups, strict=True)])
    expected = torch.optim.SGD(
        [{"params": p, **h} for p, (_, h) in zip(theirs, groups, strict=True)], foreach=False
    )
    zero_grad = data.draw(st.booleans())
    for _ in range(3):
        for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            if data.draw(st.integers(0, 4)) == 0:
                mine.grad, other.grad = None, None
                continue
            # A gradient with strides of its own: permuted, stepped, reversed.
            axes = data.draw(st.permutations(range(mine.data.ndim)))
            stretched = [2 * mine.shape[a] for a in axes]
            base = values(rng, int(np.prod(stretched)), dtype).reshape(stretched)
            step = data.draw(st.sampled_from([1, 2, -1, -2]))
            index = tuple(slice(None, None, step) for _ in stretched)
            crop = tuple(slice(0, mine.shape[a]) for a in axes)
            grad = base[index][crop].transpose(np.argsort(axes))
            assert grad.shape == mine.shape
            other.grad = torch.from_numpy(np.ascontiguousarray(grad).reshape(grad.shape).copy())
            mine.grad = grad
        lr = data.draw(unit)
        for group in (*optimizer.param_groups, *expected.param_groups):
            group["lr"] = lr
        optimizer.step(zero_grad=zero_grad)
        expected.step()
    for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert_same_bits(mine.data, other.detach().numpy())
        momentum = expected.state[other].get("momentum_buffer")
        assert (momentum is not None) == ("momentum_buffer" in optimizer.state[mine])
        if momentum is not None:
            assert_same_bits(optimizer.state[mine]["momentum_buffer"], momentum.numpy())
