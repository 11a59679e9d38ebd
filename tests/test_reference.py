"""The reference implementation against the real thing: libm's fma, torch's SGD, plain definitions.

Other tests trust `sgdcore.reference`; this file is why they may. Results are compared bit by bit,
except that any nan equals any nan.
"""

from __future__ import annotations

import ast
import ctypes
import ctypes.util
import doctest
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sgdcore import reference

Array = NDArray[Any]
Hyper = dict[str, Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
STORAGE_DTYPES = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)

INF = float("inf")
NAN = float("nan")


def assert_same_bits(actual: Array | None, expected: Array | None, what: str = "") -> None:
    if actual is None or expected is None:
        assert actual is expected, what
        return
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    word = f"u{actual.dtype.itemsize}"
    same_bits = np.asarray(actual).view(word) == np.asarray(expected).view(word)
    wrong = np.argwhere(~(same_bits | (np.isnan(actual) & np.isnan(expected))))
    if len(wrong):
        first = tuple(wrong[0])
        pytest.fail(
            f"{what}: {len(wrong)} of {actual.size} elements differ, first at {first}: "
            f"{actual[first]!r} instead of {expected[first]!r}"
        )


# --- fma ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A binary floating-point format, and libm's fused multiply-add for it."""

    dtype: np.dtype[Any]
    precision: int  # bits of the significand, the hidden one included
    max_exponent: int
    c_type: Any
    c_function: str

    @property
    def n(self) -> int:
        """From here up to 2 * n, the numbers of the format are the integers."""
        return 1 << (self.precision - 1)

    @property
    def largest(self) -> float:
        return float(np.finfo(self.dtype).max)

    @property
    def smallest(self) -> float:
        return float(np.finfo(self.dtype).smallest_subnormal)

    @property
    def smallest_normal(self) -> float:
        return float(np.finfo(self.dtype).smallest_normal)

    @property
    def half_last_place_of_largest(self) -> float:
        return 2.0 ** (self.max_exponent - self.precision)

    def below(self, value: float) -> float:
        return float(np.nextafter(self.dtype.type(value), self.dtype.type(-INF)))

    def above(self, value: float) -> float:
        return float(np.nextafter(self.dtype.type(value), self.dtype.type(INF)))

    def array(self, values: Any) -> Array:
        return np.array(values, self.dtype)

    def from_bits(self, bits: Any) -> Array:
        return np.array(bits, f"u{self.dtype.itemsize}").view(self.dtype)

    def libm_fma(self, a: Array, b: Array, c: Array) -> Array:
        library = ctypes.util.find_library("m")
        if library is None:
            pytest.skip("there is no C math library to compare with")
        function = getattr(ctypes.CDLL(library), self.c_function)
        function.restype = self.c_type
        function.argtypes = [self.c_type] * 3
        results = itertools.starmap(function, zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
        return self.array(list(results))


FORMATS = (
    Format(FLOAT32, 24, 127, ctypes.c_float, "fmaf"),
    Format(FLOAT64, 53, 1023, ctypes.c_double, "fma"),
)
each_format = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.dtype.name)

FmaCase = Callable[[Format], tuple[float, float, float, float]]

# name: format -> a, b, c, the correctly rounded a * b + c. Around 3 * n a format's numbers are the
# even integers. 3 * (n + 1) and 3 * (n + 3) lie halfway between two of them; the one with an even
# significand is above the former and below the latter.
FMA_CASES: dict[str, FmaCase] = {
    "product exact": lambda f: (3, 5, 7, 22),
    "tie goes up to even": lambda f: (3, f.n + 1, 0, 3 * f.n + 4),
    "tie goes down to even": lambda f: (3, f.n + 3, 0, 3 * f.n + 8),
    "tie broken downwards by a tiny addend": lambda f: (3, f.n + 1, -f.smallest, 3 * f.n + 2),
    "tie broken upwards by a tiny addend": lambda f: (3, f.n + 3, f.smallest, 3 * f.n + 10),
    "negative tie broken downwards": lambda f: (-3, f.n + 3, -f.smallest, -3 * f.n - 10),
    "negative tie broken upwards": lambda f: (-3, f.n + 1, f.smallest, -3 * f.n - 2),
    # Next to a tie, by way of a number that is odd already, which rounding to odd must keep: the
    # first case for the way in which float32 is computed, the second for that of float64.
    "tie missed by 2**-28.5": lambda f: (3, f.n + 1, -(2.0**-28.5), 3 * f.n + 2),
    "tie missed by 1 - (1 + x) * (1 - x)": lambda f: (
        1 + int(0.55 * f.n**0.5) / f.n,
        1 - int(0.55 * f.n**0.5) / f.n,
        3 * f.n + 6,
        3 * f.n + 6,
    ),
    "tie broken by a tiny product": lambda f: (2.0**-40, 2.0**-70, 1, 1),
    "product's error survives cancellation": lambda f: (
        1 + 1 / f.n,
        1 + 1 / f.n,
        -1 - 2 / f.n,
        1 / f.n**2,
    ),
    "exact cancellation gives +0": lambda f: (3, 5, -15, 0.0),
    "exact cancellation of a negative product gives +0": lambda f: (-3, 5, 15, 0.0),
    "-0 + -0": lambda f: (-0.0, 1, -0.0, -0.0),
    "-0 + +0": lambda f: (-0.0, 1, 0.0, 0.0),
    "+0 + -0": lambda f: (0.0, 1, -0.0, 0.0),
    "zero product leaves the addend": lambda f: (0.0, f.largest, f.smallest, f.smallest),
    "product underflows to -0": lambda f: (-f.smallest, f.smallest, 0.0, -0.0),
    "product underflows to +0 despite a negative zero": lambda f: (
        f.smallest,
        f.smallest,
        -0.0,
        0.0,
    ),
    "subnormal tie goes down to even": lambda f: (f.smallest, 0.5, 0.0, 0.0),
    "subnormal above the tie": lambda f: (f.smallest, f.above(0.5), 0.0, f.smallest),
    "subnormal tie goes up to even": lambda f: (f.smallest, 1.5, 0.0, 2 * f.smallest),
    "subnormal below the tie": lambda f: (f.smallest, f.below(1.5), 0.0, f.smallest),
    "subnormal sum, tie": lambda f: (f.smallest, 0.5, f.smallest, 2 * f.smallest),
    "product below half of the smallest changes nothing": lambda f: (
        f.smallest,
        f.below(0.5),
        f.smallest_normal,
        f.smallest_normal,
    ),
    "sum falls from normal to subnormal": lambda f: (
        f.smallest,
        -1,
        f.smallest_normal,
        f.below(f.smallest_normal),
    ),
    "cancellation into the subnormal numbers": lambda f: (
        f.above(f.smallest_normal),
        1,
        -f.smallest_normal,
        f.smallest,
    ),
    "largest + half a last place overflows": lambda f: (
        f.half_last_place_of_largest,
        1,
        f.largest,
        INF,
    ),
    "largest + less than half a last place stays": lambda f: (
        f.below(f.half_last_place_of_largest),
        1,
        f.largest,
        f.largest,
    ),
    "-largest - half a last place overflows": lambda f: (
        f.half_last_place_of_largest,
        -1,
        -f.largest,
        -INF,
    ),
    "overflowing product comes back": lambda f: (f.largest, 2, -f.largest, f.largest),
    "overflowing product stays": lambda f: (f.largest, -f.largest, f.largest, -INF),
    "overflowing product does not count against infinity": lambda f: (
        f.largest,
        f.largest,
        -INF,
        -INF,
    ),
    "infinite product": lambda f: (-INF, 2, f.largest, -INF),
    "infinity - infinity": lambda f: (INF, 1, -INF, NAN),
    "infinity * zero": lambda f: (INF, 0.0, 1, NAN),
    "nan factor": lambda f: (1, NAN, 1, NAN),
    "nan addend": lambda f: (0.0, 1, NAN, NAN),
}


@each_format
@pytest.mark.parametrize("case", FMA_CASES.values(), ids=FMA_CASES.keys())
def test_fma_of_named_case(case: FmaCase, format: Format) -> None:
    a, b, c, expected = (format.array([value]) for value in case(format))
    assert_same_bits(format.libm_fma(a, b, c), expected, "libm")
    assert_same_bits(reference.fma(a, b, c), expected, "reference")
    assert_same_bits(reference.fma(b, a, c), expected, "reference, factors swapped")


@each_format
def test_fma_of_special_values_crossed(format: Format) -> None:
    positive = [
        0.0,
        format.smallest,
        3 * format.smallest,
        format.below(format.smallest_normal),
        format.smallest_normal,
        format.above(format.smallest_normal),
        2.0 ** -(format.max_exponent // 2),
        format.half_last_place_of_largest,
        1 / 3,
        format.below(1),
        1,
        format.above(1),
        1.5,
        2.0 ** (format.max_exponent // 2),
        format.largest / 2,
        format.below(format.largest),
        format.largest,
        INF,
        NAN,
    ]
    values = format.array(positive + [-value for value in positive])
    a, b, c = (axis.ravel() for axis in np.meshgrid(values, values, values))
    assert_same_bits(reference.fma(a, b, c), format.libm_fma(a, b, c))


@st.composite
def fma_operands(draw: st.DrawFn, format: Format) -> tuple[int, int, int]:
    """Bit patterns of a, b and c, likely to meet: sparse significands, and c in reach of a * b."""
    fraction_bits = format.precision - 1
    all_bits = 8 * format.dtype.itemsize

    any_pattern = st.integers(0, 2**all_bits - 1)
    sparse_pattern = st.builds(
        lambda upper, ones: upper << fraction_bits | sum(1 << one for one in ones),
        upper=st.integers(0, 2 ** (all_bits - fraction_bits) - 1),
        ones=st.sets(st.integers(0, fraction_bits - 1), max_size=3),
    )
    a, b = draw(any_pattern | sparse_pattern), draw(any_pattern | sparse_pattern)

    with np.errstate(all="ignore"):
        negated_product = -(format.from_bits([a]) * format.from_bits([b]))
    product_bits = int(negated_product.view(f"u{format.dtype.itemsize}")[0])
    pattern_near_product = st.builds(
        lambda last_places, exponents, sign: (
            (product_bits + last_places + (exponents << fraction_bits) + (sign << all_bits - 1))
            % 2**all_bits
        ),
        last_places=st.integers(-4, 4),
        exponents=st.integers(-2 * format.precision - 2, 2 * format.precision + 2),
        sign=st.integers(0, 1),
    )
    return a, b, draw(any_pattern | sparse_pattern | pattern_near_product | pattern_near_product)


@each_format
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_fma_of_any_bit_patterns(format: Format, data: st.DataObject) -> None:
    triples = data.draw(st.lists(fma_operands(format), min_size=1, max_size=20))
    a, b, c = (format.from_bits(bits) for bits in zip(*triples, strict=True))
    assert_same_bits(reference.fma(a, b, c), format.libm_fma(a, b, c))


@each_format
def test_fma_of_overlapping_random_numbers(format: Format) -> None:
    """Products and addends of similar magnitude, so that all bits of both matter."""
    rng = np.random.default_rng(1)
    count = 20_000
    a, b = (format.array(rng.uniform(1, 2, count)) for _ in range(2))
    exponents = rng.integers(-2 * format.precision, format.precision, count)
    c = format.array(rng.uniform(-2, 2, count) * 2.0**exponents)
    assert_same_bits(reference.fma(a, b, c), format.libm_fma(a, b, c))


@each_format
def test_fma_of_random_near_ties(format: Format) -> None:
    """Products that are ties, and addends so small that all they do is break them."""
    rng = np.random.default_rng(2)
    count = 20_000
    a = format.array(2 * rng.integers(format.n // 2, format.n, count) + 1)
    b = format.array(np.full(count, 3.0))
    c = format.array(rng.choice([-1.0, 1.0], count) * 2.0 ** rng.uniform(-100, -10, count))
    assert_same_bits(reference.fma(a, b, c), format.libm_fma(a, b, c))
    # And addends that are half a last place away from a tie, which the product misses by x**2.
    x = rng.integers(1, int(format.n**0.5), count) / format.n
    a, b = format.array(1 + x), format.array(1 - x)
    c = format.array(3 * format.n + 2 * rng.integers(0, 100, count))
    assert_same_bits(reference.fma(a, b, c), format.libm_fma(a, b, c))


@each_format
def test_fma_over_the_whole_range(format: Format) -> None:
    """Random magnitudes from the smallest to the largest number, in reach of each other."""
    rng = np.random.default_rng(3)
    count = 10_000
    lowest, highest = 2 - format.max_exponent - format.precision, format.max_exponent
    product_exponents = rng.uniform(lowest, highest, count)
    c_exponents = product_exponents + rng.uniform(-1, 1, count) * 2 * format.precision
    a_exponents = rng.uniform(-0.6, 0.6, count) * format.max_exponent
    # Half of the factors share the exponent evenly: the product is extreme before its factors are.
    a_exponents[::2] = product_exponents[::2] / 2
    with np.errstate(all="ignore"):
        a, b, c = (
            format.array(rng.choice([-1.0, 1.0], count) * 2.0 ** exponents.clip(lowest, highest))
            for exponents in (a_exponents, product_exponents - a_exponents, c_exponents)
        )
        # In a third of the cases only the product's rounding error remains.
        c[::3] = -(a * b)[::3]
    assert_same_bits(reference.fma(a, b, c), format.libm_fma(a, b, c))


@each_format
def test_fma_broadcasts(format: Format) -> None:
    row, column = format.array([1, 2, 3]), format.array([[10], [20]])
    scalar = format.dtype.type(0.5)
    expected = format.array([[10.5, 20.5, 30.5], [20.5, 40.5, 60.5]])
    assert_same_bits(reference.fma(row, column, scalar), expected)
    assert reference.fma(scalar, scalar, scalar).shape == ()
    assert reference.fma(row[:0], row[:0], scalar).shape == (0,)


FMA_REFUSALS = {
    "mixed": ((FLOAT32, FLOAT64, FLOAT32), "must have one dtype, got float32, float64 and float32"),
    "float16": ((FLOAT16,) * 3, "must be float32 or float64, got float16"),
    "int64": ((np.dtype(np.int64),) * 3, "must be float32 or float64, got int64"),
}


@pytest.mark.parametrize(("dtypes", "message"), FMA_REFUSALS.values(), ids=FMA_REFUSALS.keys())
def test_fma_refuses_dtypes(dtypes: tuple[np.dtype[Any], ...], message: str) -> None:
    a, b, c = (np.ones(2, dtype) for dtype in dtypes)
    with pytest.raises(TypeError, match=message):
        reference.fma(a, b, c)


# --- sgd_update against torch ---------------------------------------------------------------------


def hyper_table() -> dict[str, Hyper]:
    """Every combination of terms that makes a difference, and coefficients that are awkward."""
    momenta: dict[str, Hyper] = {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.3},
        "nesterov": {"momentum": 0.9, "nesterov": True},
    }
    table: dict[str, Hyper] = {}
    for name, terms in momenta.items():
        for decay_name, decay in {"": {}, "-decay": {"weight_decay": 0.01}}.items():
            for maximize_name, maximize in {"": {}, "-maximize": {"maximize": True}}.items():
                table[name + decay_name + maximize_name] = {"lr": 0.1, **terms, **decay, **maximize}
    return table | {
        "lr=0": {"lr": 0.0, "weight_decay": 0.01},
        "lr=1": {"lr": 1.0, "momentum": 0.5},
        "lr=1e-50, zero in float32": {"lr": 1e-50},
        "lr=0.001, all terms": {
            "lr": 0.001,
            "momentum": 0.99,
            "dampening": 0.1,
            "weight_decay": 1e-4,
            "maximize": True,
        },
        "dampening=1": {"lr": 0.1, "momentum": 0.9, "dampening": 1.0},
        "dampening=0.9, inexact in double": {"lr": 0.1, "momentum": 0.9, "dampening": 0.9},
        "dampening without momentum": {"lr": 0.1, "dampening": 0.5},
        "momentum=1": {"lr": 0.1, "momentum": 1.0, "nesterov": True},
        "momentum=1e-50, zero in float32": {"lr": 0.1, "momentum": 1e-50, "nesterov": True},
        "weight_decay=1e-50, zero in float32": {"lr": 0.1, "weight_decay": 1e-50},
    }


HYPERS = hyper_table()
each_hyper = pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS.keys())
each_compute_dtype = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=lambda d: d.name)

# Unusual shapes, and sizes on both sides of any vector length.
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 5), (2, 0, 3), (4, 3, 2)]
SHAPES += [(size,) for size in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 4099)]

SPECIAL_VALUES = [0.0, -0.0, 1.0, -1.0, 1e-42, 1e-310, -1e-310, 3e38, -3e38, 1e308, INF, -INF, NAN]


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Numbers of many magnitudes, none of them zero."""
    magnitudes = 2.0 ** rng.uniform(-12, 4, shape)
    return np.array(rng.choice([-1.0, 1.0], shape) * magnitudes, dtype)


def assert_equals_torch(params: list[Array], grads: list[list[Array]], hyper: Hyper) -> None:
    """Take one step per list of gradients, here and in torch; compare after each."""
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("without vector instructions torch rounds a * b + c twice")
    theirs = [torch.from_numpy(param.copy()).requires_grad_() for param in params]
    their_sgd = torch.optim.SGD(theirs, foreach=False, **hyper)
    our_sgd = reference.ReferenceSGD(params, **hyper)
    for step, step_grads in enumerate(grads):
        for their_param, grad in zip(theirs, step_grads, strict=True):
            their_param.grad = torch.from_numpy(grad.copy())
        their_sgd.step()
        our_sgd.step(step_grads)
        for i, their_param in enumerate(theirs):
            what = f"step {step}, shape {params[i].shape}"
            assert_same_bits(our_sgd.params[i], their_param.detach().numpy(), f"param, {what}")
            their_buffer = their_sgd.state[their_param].get("momentum_buffer")
            assert_same_bits(
                our_sgd.momentum_buffers[i],
                None if their_buffer is None else their_buffer.numpy(),
                f"momentum, {what}",
            )


@each_compute_dtype
@each_hyper
def test_update_equals_torch(hyper: Hyper, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(2)
    params = [random_array(rng, shape, dtype) for shape in SHAPES]
    grads = [[random_array(rng, shape, dtype) for shape in SHAPES] for _ in range(4)]
    assert_equals_torch(params, grads, hyper)


@each_compute_dtype
@each_hyper
def test_update_of_special_values_equals_torch(hyper: Hyper, dtype: np.dtype[Any]) -> None:
    with np.errstate(all="ignore"):
        values = np.array(SPECIAL_VALUES).astype(dtype)
    param, first, second = (axis.ravel() for axis in np.meshgrid(values, values, values))
    assert_equals_torch([param], [[first], [second]], hyper)


# --- sgd_update in all storage dtypes -------------------------------------------------------------


def non_negative_numbers(dtype: np.dtype[Any]) -> Array:
    """All of a short format, ascending, so that a number's place is its bit pattern.

    Last, in the place of infinity, comes the number that would follow the largest one: the one that
    rounding to nearest takes infinity for.
    """
    infinity = int(np.array(INF, dtype).view(np.uint16))
    numbers: Array = np.arange(infinity, dtype=np.uint16).view(dtype).astype(np.float64)
    return np.append(numbers, 2 * numbers[-1] - numbers[-2])


def round_by_search(values: Array, dtype: np.dtype[Any]) -> Array:
    """Round to nearest, ties to even, by finding the neighbours in the list of all numbers."""
    if dtype.itemsize > 2:
        with np.errstate(all="ignore"):
            return values.astype(dtype)
    numbers = non_negative_numbers(dtype)
    infinity = len(numbers) - 1
    magnitude = np.abs(values.astype(np.float64))
    upper = np.searchsorted(numbers, magnitude).clip(1, infinity)
    halfway = (numbers[upper - 1] + numbers[upper]) / 2
    goes_up = (magnitude > halfway) | ((magnitude == halfway) & (upper % 2 == 0))
    bits = np.where(np.isnan(values), 0x7FFF, np.where(goes_up, upper, upper - 1))
    rounded: Array = (bits | np.signbit(values) * 0x8000).astype(np.uint16).view(dtype)
    return rounded


NARROW_HYPERS = {
    name: HYPERS[name]
    for name in ("plain-decay", "momentum", "dampening-decay-maximize", "nesterov-decay")
}


@pytest.mark.parametrize("hyper", NARROW_HYPERS.values(), ids=NARROW_HYPERS.keys())
@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "momentum_dtype"),
    list(itertools.product(STORAGE_DTYPES, repeat=3)),
    ids=lambda dtype: dtype.name,
)
def test_storage_rounds_once(
    param_dtype: np.dtype[Any],
    grad_dtype: np.dtype[Any],
    momentum_dtype: np.dtype[Any],
    hyper: Hyper,
) -> None:
    """Any storage: the update in the compute dtype, then one rounding of each stored value."""
    rng = np.random.default_rng(3)
    operand_dtypes = [param_dtype, grad_dtype]
    if "momentum" in hyper:
        operand_dtypes.append(momentum_dtype)
    compute = FLOAT64 if FLOAT64 in operand_dtypes else FLOAT32
    param, momentum_buffer = random_array(rng, (50,), param_dtype), None
    for step in range(3):
        grad = random_array(rng, (50,), grad_dtype)
        # Between arrays of the compute dtype nothing is stored with a rounding: this is the update
        # that the tests above compare with torch.
        wide_param, wide_buffer = reference.sgd_update(
            param.astype(compute),
            grad.astype(compute),
            None if momentum_buffer is None else momentum_buffer.astype(compute),
            **hyper,
        )
        param, momentum_buffer = reference.sgd_update(
            param, grad, momentum_buffer, **hyper, momentum_dtype=momentum_dtype
        )
        assert_same_bits(param, round_by_search(wide_param, param_dtype), f"param, step {step}")
        assert_same_bits(
            momentum_buffer,
            None if wide_buffer is None else round_by_search(wide_buffer, momentum_dtype),
            f"momentum, step {step}",
        )


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64], ids=lambda dtype: f"from {dtype.name}")
def test_storage_rounds_to_nearest_even(dtype: np.dtype[Any], wide: np.dtype[Any]) -> None:
    """Every number of a short format, every tie, and the wide numbers next to them."""
    numbers = non_negative_numbers(dtype)
    ties = (numbers[:-1] + numbers[1:]) / 2
    positive = np.concatenate([numbers, ties, [INF, NAN]])
    with np.errstate(all="ignore"):
        exact = np.concatenate([positive, -positive]).astype(wide)
        values = np.concatenate(
            [exact, np.nextafter(exact, wide.type(INF)), np.nextafter(exact, wide.type(-INF))]
        )
    # A first step with lr = 0 stores the gradient, rounded, as momentum.
    zeros = np.zeros_like(values)
    _, stored = reference.sgd_update(zeros, values, lr=0.0, momentum=1.0, momentum_dtype=dtype)
    assert_same_bits(stored, round_by_search(values, dtype))


# --- sgd_update, case by case ---------------------------------------------------------------------


@dataclass(frozen=True)
class UpdateCase:
    """One element before and after an update. Each number is exact in its dtype."""

    param: float
    grad: float
    new_param: float
    hyper: Hyper
    buffer: float | None = None
    new_buffer: float | None = None
    # of the parameter, the gradient and the momentum buffer
    dtypes: tuple[np.dtype[Any], np.dtype[Any], np.dtype[Any]] = field(default=(FLOAT32,) * 3)


TINY32 = 2.0**-149  # the smallest positive float32
TINY16 = 2.0**-24  # the smallest positive float16

UPDATE_CASES = {
    # Terms with a zero coefficient do not exist.
    "inf parameter, no decay": UpdateCase(INF, 1, INF, {"lr": 0.5}),
    "inf parameter, decay": UpdateCase(INF, 1, NAN, {"lr": 0.5, "weight_decay": 0.5}),
    "inf parameter, decay is zero only in float32": UpdateCase(
        INF, 1, NAN, {"lr": 0.5, "weight_decay": 1e-50}
    ),
    "nan buffer, no momentum": UpdateCase(1, 1, 0.5, {"lr": 0.5}, buffer=NAN, new_buffer=NAN),
    "inf buffer, momentum": UpdateCase(
        1, 1, -INF, {"lr": 0.5, "momentum": 0.5}, buffer=INF, new_buffer=INF
    ),
    "inf buffer, momentum is zero only in float32": UpdateCase(
        1, 1, NAN, {"lr": 0.5, "momentum": 1e-50}, buffer=INF, new_buffer=NAN
    ),
    "nesterov, no momentum": UpdateCase(1, 1, 0.5, {"lr": 0.5, "nesterov": True}),
    # Special values take part in the arithmetic.
    "nan gradient": UpdateCase(1, NAN, NAN, {"lr": 0.5}),
    "nan gradient, lr=0": UpdateCase(1, NAN, NAN, {"lr": 0.0}),
    "nan parameter": UpdateCase(NAN, 1, NAN, {"lr": 0.5}),
    "inf gradient": UpdateCase(1, INF, -INF, {"lr": 0.5}),
    "inf gradient, maximize": UpdateCase(1, INF, INF, {"lr": 0.5, "maximize": True}),
    "inf gradient, lr=0": UpdateCase(1, INF, NAN, {"lr": 0.0}),
    "inf gradient into momentum": UpdateCase(
        1, INF, -INF, {"lr": 0.5, "momentum": 0.5}, buffer=1, new_buffer=INF
    ),
    "inf meets -inf in momentum": UpdateCase(
        1, INF, NAN, {"lr": 0.5, "momentum": 0.5}, buffer=-INF, new_buffer=NAN
    ),
    "zero gradient keeps -0": UpdateCase(-0.0, 0.0, -0.0, {"lr": 0.5}),
    "zero gradient, maximize, turns -0 into +0": UpdateCase(
        -0.0, 0.0, 0.0, {"lr": 0.5, "maximize": True}
    ),
    "-0 gradient keeps +0": UpdateCase(0.0, -0.0, 0.0, {"lr": 0.5}),
    "maximize flips the sign of zero": UpdateCase(
        1, 0.0, 1, {"lr": 0.5, "momentum": 0.5, "maximize": True}, new_buffer=-0.0
    ),
    "subnormal gradient is not flushed": UpdateCase(0.0, TINY32, -TINY32, {"lr": 1.0}),
    "subnormal parameter is not flushed": UpdateCase(TINY32, 0.0, TINY32, {"lr": 1.0}),
    "subnormal momentum is not flushed": UpdateCase(
        0.0, 0.0, -TINY32, {"lr": 1.0, "momentum": 0.5}, buffer=2 * TINY32, new_buffer=TINY32
    ),
    "subnormal float64": UpdateCase(
        0.0, 2.0**-1074, -(2.0**-1074), {"lr": 1.0}, dtypes=(FLOAT64,) * 3
    ),
    "overflow": UpdateCase(-3e38, 3e38, -INF, {"lr": 1.0}, dtypes=(FLOAT32,) * 3),
    # The order of the terms, in numbers that need no rounding.
    "first step has no dampening": UpdateCase(
        0, 1, -1, {"lr": 1.0, "momentum": 0.5, "dampening": 0.75}, new_buffer=1
    ),
    "later steps have": UpdateCase(
        0, 1, -1.25, {"lr": 1.0, "momentum": 0.5, "dampening": 0.75}, buffer=2, new_buffer=1.25
    ),
    "a zero buffer is no first step": UpdateCase(
        0, 1, -0.25, {"lr": 1.0, "momentum": 0.5, "dampening": 0.75}, buffer=0, new_buffer=0.25
    ),
    "decay enters the momentum": UpdateCase(
        2, 1, 0, {"lr": 1.0, "momentum": 0.5, "weight_decay": 0.5}, new_buffer=2
    ),
    "maximize leaves decay alone": UpdateCase(
        2, 1, 2, {"lr": 1.0, "weight_decay": 0.5, "maximize": True}
    ),
    "nesterov, first step": UpdateCase(
        0, 1, -1.5, {"lr": 1.0, "momentum": 0.5, "nesterov": True}, new_buffer=1
    ),
    "nesterov, later step": UpdateCase(
        0, 1, -2.0, {"lr": 1.0, "momentum": 0.5, "nesterov": True}, buffer=2, new_buffer=2
    ),
    "nesterov adds the undampened gradient": UpdateCase(
        0,
        1,
        -1.75,
        {"lr": 1.0, "momentum": 0.5, "dampening": 0.5, "nesterov": True},
        buffer=2,
        new_buffer=1.5,
    ),
    # What rounds, and what does not.
    "momentum * buffer is rounded before the gradient is added": UpdateCase(
        0,
        -1,
        0.0,
        {"lr": 1.0, "momentum": 1 + 2.0**-23},
        buffer=1 - 2.0**-23,  # the product, 1 - 2**-46, rounds to 1
        new_buffer=0.0,
    ),
    "float16 parameter with a tiny lr": UpdateCase(
        0, 2, -TINY16, {"lr": 2e-8}, dtypes=(FLOAT16,) * 3
    ),
    "float16 overflow": UpdateCase(-65504, 16, -INF, {"lr": 1.0}, dtypes=(FLOAT16,) * 3),
    "float16 just below overflow": UpdateCase(
        -65504, 15.9921875, -65504, {"lr": 1.0}, dtypes=(FLOAT16,) * 3
    ),
    "float16 gradient overflows only in float16": UpdateCase(
        0, 60000, -120000, {"lr": 2.0}, dtypes=(FLOAT32, FLOAT16, FLOAT32)
    ),
    "bfloat16 does not round momentum": UpdateCase(
        0,
        0,
        -64.5,  # 65 * 0.99 = 64.35, but with momentum rounded to 0.98828, 64.24, stored as 64
        {"lr": 1.0, "momentum": 0.99},
        buffer=65,
        new_buffer=64.5,
        dtypes=(BFLOAT16,) * 3,
    ),
    "the parameter moves by the unrounded momentum": UpdateCase(
        1 + 2.0**-9,
        1 + 2.0**-9,
        0.0,
        {"lr": 1.0, "momentum": 0.5},
        new_buffer=1.0,
        dtypes=(FLOAT32, FLOAT32, BFLOAT16),
    ),
    "nesterov looks ahead along the unrounded momentum": UpdateCase(
        0,
        1 + 2.0**-9,
        -1.5 - 3 * 2.0**-10,
        {"lr": 1.0, "momentum": 0.5, "nesterov": True},
        new_buffer=1.0,
        dtypes=(FLOAT32, FLOAT32, BFLOAT16),
    ),
    "float64 to bfloat16 in one rounding": UpdateCase(
        0,
        1 + 2.0**-8 + 2.0**-40,  # by way of float32: 1 + 2**-8, a tie, and then 1
        0,
        {"lr": 0.0, "momentum": 0.5},
        new_buffer=1 + 2.0**-7,
        dtypes=(FLOAT64, FLOAT64, BFLOAT16),
    ),
    "float64 buffer without momentum changes nothing": UpdateCase(
        1,
        1,
        0.0,  # in float64: -2**-30
        {"lr": 1 + 2.0**-30},
        buffer=0.1,
        new_buffer=0.1,
        dtypes=(FLOAT32, FLOAT32, FLOAT64),
    ),
    "float64 momentum makes float32 parameters compute in float64": UpdateCase(
        0,
        1,
        -(2.0**-30),
        {"lr": 1.0, "momentum": 1.0},
        buffer=-1 + 2.0**-30,
        new_buffer=2.0**-30,
        dtypes=(FLOAT32, FLOAT32, FLOAT64),
    ),
}


@pytest.mark.parametrize("case", UPDATE_CASES.values(), ids=UPDATE_CASES.keys())
def test_update_of_named_case(case: UpdateCase) -> None:
    def array(value: float | None, dtype: np.dtype[Any]) -> Array | None:
        return None if value is None else np.array([value], dtype)

    param_dtype, grad_dtype, momentum_dtype = case.dtypes
    param, momentum_buffer = reference.sgd_update(
        np.array([case.param], param_dtype),
        np.array([case.grad], grad_dtype),
        array(case.buffer, momentum_dtype),
        **case.hyper,
        momentum_dtype=momentum_dtype,
    )
    assert_same_bits(param, array(case.new_param, param_dtype), "param")
    assert_same_bits(momentum_buffer, array(case.new_buffer, momentum_dtype), "momentum")


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
@each_hyper
def test_update_is_pure(hyper: Hyper, shape: tuple[int, ...]) -> None:
    """Read-only inputs are enough, and no result shares memory with an input."""
    rng = np.random.default_rng(4)
    param, grad, buffer = inputs = [random_array(rng, shape, FLOAT32) for _ in range(3)]
    for array in inputs:
        array.flags.writeable = False
    for momentum_buffer in (None, buffer):
        new_param, new_buffer = reference.sgd_update(param, grad, momentum_buffer, **hyper)
        results = [new_param]
        if "momentum" not in hyper:
            assert new_buffer is momentum_buffer
        else:
            assert new_buffer is not None
            results.append(new_buffer)
        for result in results:
            assert isinstance(result, np.ndarray)
            assert result.shape == shape
            assert not any(np.shares_memory(result, array) for array in inputs)
    assert not np.shares_memory(new_param, new_buffer)


def test_update_ignores_memory_order() -> None:
    rng = np.random.default_rng(5)
    hyper = HYPERS["nesterov-decay"]
    param, grad, buffer = (random_array(rng, (4, 6), FLOAT64) for _ in range(3))
    expected = reference.sgd_update(param, grad, buffer, **hyper)
    reversed_twice = np.ascontiguousarray(grad[::-1, ::-1])[::-1, ::-1]
    actual = reference.sgd_update(
        np.asfortranarray(param), reversed_twice, np.repeat(buffer, 2, axis=1)[:, ::2], **hyper
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


UPDATE_REFUSALS = {
    "shape of grad": (np.ones(3), np.ones(2), None, ValueError, r"grad .* \(3,\), got \(2,\)"),
    "shape of momentum_buffer": (
        np.ones(3),
        np.ones(3),
        np.ones((1, 3)),
        ValueError,
        r"momentum_buffer .* \(3,\), got \(1, 3\)",
    ),
    "dtype of param": (np.ones(3, int), np.ones(3), None, TypeError, "got int64"),
    "dtype of grad": (np.ones(3), np.ones(3, complex), None, TypeError, "got complex128"),
    "dtype of momentum_buffer": (np.ones(3), np.ones(3), np.ones(3, bool), TypeError, "got bool"),
}


@pytest.mark.parametrize(
    ("param", "grad", "momentum_buffer", "error", "message"),
    UPDATE_REFUSALS.values(),
    ids=UPDATE_REFUSALS.keys(),
)
def test_update_refuses(
    param: Array, grad: Array, momentum_buffer: Array | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reference.sgd_update(param, grad, momentum_buffer, lr=0.1, momentum=0.9)


# --- The rest of the module -----------------------------------------------------------------------

COMPUTE_DTYPES = {
    "float64": ([FLOAT64], FLOAT64),
    "float32": ([FLOAT32], FLOAT32),
    "float16": ([FLOAT16], FLOAT32),
    "bfloat16": ([BFLOAT16], FLOAT32),
    "two short ones": ([FLOAT16, BFLOAT16], FLOAT32),
    "short with float32": ([BFLOAT16, FLOAT32, FLOAT16], FLOAT32),
    "float64 last": ([BFLOAT16, FLOAT32, FLOAT64], FLOAT64),
    "names and types": (["float16", np.float64], FLOAT64),
}


@pytest.mark.parametrize(("dtypes", "expected"), COMPUTE_DTYPES.values(), ids=COMPUTE_DTYPES.keys())
def test_compute_dtype(dtypes: list[Any], expected: np.dtype[Any]) -> None:
    assert reference.compute_dtype(*dtypes) == expected


def test_compute_dtype_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match=r"must be one of float64, .*, got int32"):
        reference.compute_dtype(np.float32, np.int32)


def test_optimizer_treats_each_parameter_by_itself() -> None:
    """Gradients may be missing; a parameter's first step is the one with its first gradient."""
    one, two = np.array([1.0]), np.array([2.0])
    sgd = reference.ReferenceSGD([one, one, one], lr=1.0, momentum=0.5, dampening=0.5)
    sgd.step([one, None, None])
    sgd.step([two, two, None])
    assert_same_bits(np.concatenate(sgd.params), np.array([-1.5, -1.0, 1.0]))
    first_buffer, second_buffer, third_buffer = sgd.momentum_buffers
    assert_same_bits(first_buffer, np.array([1.5]))
    assert_same_bits(second_buffer, two)
    assert third_buffer is None
    assert one == 1.0


def test_optimizer_owns_its_parameters() -> None:
    param = np.array([1.0])
    sgd = reference.ReferenceSGD([param], lr=1.0)
    param[0] = 2.0
    assert_same_bits(sgd.params[0], np.array([1.0]))


def test_optimizer_lets_hyperparameters_change() -> None:
    sgd = reference.ReferenceSGD([np.array([1.0])], lr=1.0)
    sgd.step([np.array([1.0])])
    sgd.hyper["lr"] = 0.25
    sgd.step([np.array([1.0])])
    assert_same_bits(sgd.params[0], np.array([-0.25]))


def test_optimizer_refuses_a_wrong_number_of_gradients() -> None:
    sgd = reference.ReferenceSGD([np.array([1.0])], lr=1.0)
    with pytest.raises(ValueError, match="1 entries, got 2"):
        sgd.step([None, None])


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(reference)
    assert result.failed == 0
    assert result.attempted > 0


def test_imports_are_standard_library_and_numpy() -> None:
    """The oracle must not depend on anything that it is the oracle of."""
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    roots = {name.partition(".")[0] for name in imported}
    assert roots <= sys.stdlib_module_names | {"numpy"}
