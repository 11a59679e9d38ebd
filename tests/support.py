"""Helpers of several test files: numbers to train with, comparing bits, showing that nothing changed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import sgdcore

Array = NDArray[Any]

# Some tables are tested in part, and whole in `.ci/nightly`.
WHOLE = os.environ.get("SGDCORE_WHOLE") == "1"

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORAGE_TYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


def numbers(seed: int, shape: tuple[int, ...] = (), dtype: Any = np.float32) -> Array:
    """Random numbers between 0.5 and 2 in magnitude: never zero, and rounded by every operation."""
    rng = np.random.default_rng(seed)
    magnitude = rng.uniform(0.5, 2, shape)
    return np.asarray(magnitude * rng.choice([-1.0, 1.0], shape)).astype(dtype)


def bits(array: Any) -> Array:
    """The array's elements as unsigned integers."""
    array = np.asarray(array)
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """Compare two arrays (or None) in dtype, shape and every bit."""
    if actual is None or expected is None:
        assert actual is expected, what
        return
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    wrong = np.flatnonzero(bits(actual) != bits(expected))
    if wrong.size:
        at = wrong[0]
        pytest.fail(
            f"{what}: {wrong.size} of {actual.size} elements differ, the first at flat index {at}: "
            f"{actual.flat[at]!r} instead of {expected.flat[at]!r}"
        )


def parameters_of(optimizer: sgdcore.SGD) -> list[sgdcore.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def momentum_of(optimizer: sgdcore.SGD) -> list[Array | None]:
    """Each parameter's momentum buffer, None where there is none."""
    state = optimizer.state
    return [state[p].get("momentum_buffer") for p in parameters_of(optimizer)]


def assert_same_training(actual: sgdcore.SGD, expected: sgdcore.SGD) -> None:
    """Compare the parameters and the momentum of two optimizers in every bit."""
    for i, (a, b) in enumerate(zip(parameters_of(actual), parameters_of(expected), strict=True)):
        assert_same_bits(a.data, b.data, f"parameter {i}")
    for i, (c, d) in enumerate(zip(momentum_of(actual), momentum_of(expected), strict=True)):
        assert_same_bits(c, d, f"momentum of parameter {i}")


class _Same:
    """Equal to the wrapper of the very same object."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):#x}>"


def _frozen(value: Any) -> Any:
    """A copy that compares by value, arrays by dtype, shape and bits."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, sgdcore.Parameter):
        return _Same(value)
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(each) for each in value]
    return copy.deepcopy(value)


def snapshot(optimizer: sgdcore.SGD) -> dict[str, Any]:
    """Everything an optimizer holds, by value, and which arrays hold it, by identity."""
    arrays = []
    for group in optimizer.param_groups:
        params = group.get("params") if isinstance(group, dict) else None
        arrays += [
            [_Same(p.data), _frozen(p.data), _Same(p.grad), _frozen(p.grad)]
            for p in (params if isinstance(params, list) else ())
            if isinstance(p, sgdcore.Parameter)
        ]
    return {
        "defaults": _frozen(optimizer.defaults),
        "param_groups": _frozen(optimizer.param_groups),
        "arrays": arrays,
        "state": [(_Same(p), _frozen(dict(values))) for p, values in optimizer.state.items()],
        "momentum": [
            _Same(v["momentum_buffer"]) for v in optimizer.state.values() if "momentum_buffer" in v
        ],
    }


@contextmanager
def refused(
    error: type[BaseException] | tuple[type[BaseException], ...],
    match: str | None,
    optimizer: sgdcore.SGD | None = None,
    *others: Array,
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error whose message matches, and the optimizer and the other arrays as they were."""
    before = None if optimizer is None else snapshot(optimizer)
    contents = _frozen(list(others))
    with pytest.raises(error, match=match) as caught:
        yield caught
    if optimizer is not None:
        assert snapshot(optimizer) == before
    assert _frozen(list(others)) == contents
