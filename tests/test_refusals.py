"""Everything sgdcore refuses: the error's type, its message, and that nothing has changed by then.

The tables hold one case each; `refused` (in support.py) compares parameters, gradients, momentum,
groups, hyperparameters and state before and after. Layouts that are accepted stand beside those that
are not.
"""

from __future__ import annotations

import array
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import SGD, Parameter, ParameterBuffer
from sgdcore.reference import ReferenceSGD
from support import (
    BFLOAT16,
    STORAGE_TYPES,
    Array,
    assert_same_bits,
    assert_same_training,
    numbers,
    parameters_of,
    refused,
    snapshot,
)

FULL = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}
SHAPES = ((4,), (2, 3), (4,))


def trained(**hyper: Any) -> sgdcore.SGD:
    """An optimizer over three parameters in two groups after its first step, with new gradients."""
    a, b, c = [sgdcore.Parameter(numbers(i, shape)) for i, shape in enumerate(SHAPES)]
    optimizer = sgdcore.SGD([{"params": [a, b]}, {"params": [c], "lr": 0.3}], **{**FULL, **hyper})
    for seed in (10, 20):
        for i, parameter in enumerate((a, b, c)):
            parameter.grad = numbers(seed + i, parameter.shape)
        if seed == 10:
            optimizer.step()
    return optimizer


def given_grads() -> list[Any]:
    return [numbers(30 + i, shape) for i, shape in enumerate(SHAPES)]


# --- Arrays of the wrong kind, wherever one may be given --------------------------------------------

EXPECTED = "expected dtype float64, float32, float16 or bfloat16 in native byte order, got dtype"
BAD_DTYPES: dict[str, tuple[Any, str]] = {
    "int64": (np.int64, r"\('int64'\)"),
    "int8": (np.int8, r"\('int8'\)"),
    "uint16": (np.uint16, r"\('uint16'\)"),
    "bool": (np.bool_, r"\('bool'\)"),
    "complex64": (np.complex64, r"\('complex64'\)"),
    "complex128": (np.complex128, r"\('complex128'\)"),
    "longdouble": (np.longdouble, r"\('float128'\)"),
    "big-endian float32": (">f4", r"\('>f4'\)"),
    "big-endian float64": (">f8", r"\('>f8'\)"),
    "big-endian float16": (">f2", r"\('>f2'\)"),
    "object": (object, r"\('O'\)"),
    "string": ("U4", r"\('<U4'\)"),
    "record": ([("x", "f4")], r"\(\[\('x', '<f4'\)\]\)"),
    "date": ("M8[s]", r"\('<M8\[s\]'\)"),
    "float8": ("float8_e4m3fn", r"\(float8_e4m3fn\)"),
}

NO_ARRAYS: dict[str, tuple[Any, str]] = {
    "list": ([1.0, 2.0, 3.0, 4.0], r"expected a NumPy array, got list \[1\.0, 2\.0, 3\.0, 4\.0\]"),
    "tuple": ((1.0,), r"expected a NumPy array, got tuple \(1\.0,\)"),
    "float": (1.5, r"expected a NumPy array, got float 1\.5"),
    "string": ("abc", "expected a NumPy array, got str 'abc'"),
    "bytes": (bytes(16), "expected a NumPy array, got bytes b'"),
    "set": ({1.0}, r"expected a NumPy array, got set \{1\.0\}"),
    "dict": ({"x": 1}, r"expected a NumPy array, got dict \{'x': 1\}"),
    "long text": ("x" * 1000, "expected a NumPy array, got str 'x{79}$"),
    "bytearray": (bytearray(4), r"expected dtype float64, .* got dtype\('uint8'\)"),
    "array of ints": (array.array("i", [1, 2, 3, 4]), r"expected dtype .* got dtype\('int32'\)"),
    "tensor of ints": (
        torch.zeros(4, dtype=torch.int32),
        "expected float64, .* got type code 0 of 32",
    ),
    "complex tensor": (
        torch.zeros(4, dtype=torch.complex64),
        "expected float64, .* type code 5 of 64",
    ),
}


def _assign(attribute: str) -> Callable[[sgdcore.SGD, Any], None]:
    return lambda optimizer, value: setattr(parameters_of(optimizer)[2], attribute, value)


def _load(optimizer: sgdcore.SGD, value: Any) -> None:
    checkpoint = optimizer.state_dict()
    checkpoint["state"][2] = {"momentum_buffer": value}
    optimizer.load_state_dict(checkpoint)


# Each place that takes an array: how to give it one there, and what its messages begin with.
PLACES: dict[str, tuple[Callable[[sgdcore.SGD, Any], Any], str]] = {
    "Parameter": (lambda _, value: sgdcore.Parameter(value), "data: "),
    "SGD": (lambda _, value: sgdcore.SGD([numbers(0, (2,)), value]), r"params\[1\]: "),
    "group": (
        lambda optimizer, value: optimizer.add_param_group({"params": [numbers(0, (2,)), value]}),
        r"params\[1\]: ",
    ),
    "data": (_assign("data"), "data: "),
    "grad": (_assign("grad"), "grad: "),
    "grads": (
        lambda optimizer, value: optimizer.step(grads=[*given_grads()[:2], value]),
        r"grads\[2\]: ",
    ),
    "momentum": (
        lambda optimizer, value: optimizer.state[parameters_of(optimizer)[2]].update(
            momentum_buffer=value
        ),
        "momentum_buffer: ",
    ),
}


@pytest.mark.parametrize("bad", BAD_DTYPES)
@pytest.mark.parametrize("place", PLACES)
def test_dtype_is_refused(place: str, bad: str) -> None:
    give, prefix = PLACES[place]
    dtype, text = BAD_DTYPES[bad]
    if np.dtype(np.longdouble).itemsize == 8 and bad == "longdouble":
        pytest.skip("long double is double on this platform")
    optimizer = trained()
    with refused(TypeError, f"^{prefix}{EXPECTED}{text}$", optimizer):
        give(optimizer, np.zeros(4, dtype))


@pytest.mark.parametrize("bad", BAD_DTYPES)
def test_dtype_is_refused_in_a_checkpoint(bad: str) -> None:
    dtype, text = BAD_DTYPES[bad]
    if np.dtype(np.longdouble).itemsize == 8 and bad == "longdouble":
        pytest.skip("long double is double on this platform")
    optimizer = trained()
    where = r"^state_dict\['state'\]\[2\]\['momentum_buffer'\]: "
    expected = f"expected one of float64, float32, float16, bfloat16, got dtype{text}$"
    with refused(TypeError, where + expected, optimizer):
        _load(optimizer, np.zeros(4, dtype))


@pytest.mark.parametrize("bad", NO_ARRAYS)
@pytest.mark.parametrize("place", [place for place in PLACES if place not in {"SGD", "group"}])
def test_what_is_no_array_is_refused(place: str, bad: str) -> None:
    give, prefix = PLACES[place]
    value, text = NO_ARRAYS[bad]
    if "tensor" in bad:
        prefix = "DLPack tensor: "
    optimizer = trained()
    with refused(TypeError, f"^{prefix}{text}", optimizer):
        give(optimizer, value)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.zeros(4), "torch.Tensor; .* sgdcore.torch.SGD"),
        (torch.nn.Parameter(torch.zeros(4)), "torch.Parameter; .* sgdcore.torch.SGD"),
        ([1.0, 2.0], "list"),
        (1.0, "float"),
        (np.float32(1), "float32"),
        (None, "NoneType"),
        ("w", "str"),
        ({"params": []}, "dict"),
        (array.array("f", [1.0]), "array"),
        (sgdcore.ParameterBuffer({"w": 1}), "ParameterBuffer; .* passed by itself, .*"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("place", ["SGD", "group"])
def test_only_parameters_and_arrays_are_optimized(place: str, value: Any, name: str) -> None:
    give, prefix = PLACES[place]
    optimizer = trained()
    expected = (
        "optimizer can only optimize Parameters, NumPy arrays and arrays on CUDA devices, "
        f"but got {name}$"
    )
    with refused(TypeError, f"^{prefix}{expected}", optimizer):
        give(optimizer, value)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        (
            numbers(0, (3,)),
            TypeError,
            "^params argument given .* but got ndarray; put it in a list$",
        ),
        (
            sgdcore.Parameter(numbers(0, (3,))),
            TypeError,
            "^params argument .* but got Parameter; put it in a list$",
        ),
        (
            np.float32(1),
            TypeError,
            "^params argument given .* but got float32; an optimizer updates arrays in place: ",
        ),
        (1.5, TypeError, "^params argument given .* but got float$"),
        (None, TypeError, "^params argument given .* but got NoneType$"),
        ("weights", TypeError, "^params argument given .* but got str$"),
        (
            torch.zeros(2),
            TypeError,
            r"^params\[0\]: optimizer can only optimize .* but got torch.Tensor; .*$",
        ),
        (
            {"params": []},
            TypeError,
            r"^params argument .* but got dict; put a group in a list, or pass ",
        ),
        ([], ValueError, "^optimizer got an empty parameter list$"),
        (
            iter(()),
            ValueError,
            "^optimizer got an empty parameter list; an iterator gives what it has only once$",
        ),
        ({sgdcore.Parameter(numbers(0, (3,)))}, TypeError, "organized in ordered collections"),
        (frozenset({sgdcore.Parameter(numbers(0, (3,)))}), TypeError, "the ordering of a set"),
        ([{"params": {1}}], TypeError, "organized in ordered collections"),
        (
            [{"params": [numbers(0, (3,))]}, numbers(1, (3,))],
            TypeError,
            "param_group must be a dict",
        ),
        ([numbers(0, (3,)), {"params": []}], TypeError, r"^params\[1\]: .* but got dict$"),
        (
            [(1, numbers(0, (3,)))],
            TypeError,
            "^params: expected a string as a parameter's name, got 1",
        ),
    ],
    ids=lambda value: "",
)
def test_params_argument_is_refused(params: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sgdcore.SGD(params, lr=0.1)


def test_tensor_that_requires_grad_is_refused_as_torch_does() -> None:
    with pytest.raises(BufferError, match="Can't export tensors that require gradient"):
        sgdcore.Parameter(torch.nn.Parameter(torch.zeros(2)))


def test_numpy_scalar_is_no_parameter() -> None:
    """It offers its memory, but only a copy could be updated."""
    with pytest.raises(
        TypeError, match=r"^data: expected a NumPy array, got float32 np\.float32\(1"
    ):
        sgdcore.Parameter(np.float32(1))


# --- Layouts --------------------------------------------------------------------------------------


def _unaligned(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(bytearray(size + 1), dtype, offset=1).reshape(shape)


def _empty(shape: tuple[int, ...]) -> Array:
    return np.empty(shape, np.float32)


# Arrays of 24 elements (or none, or one) that fill one range of memory, in whatever order of axes.
DENSE: dict[str, Callable[[], Array]] = {
    "C order": lambda: _empty((2, 3, 4)),
    "Fortran order": lambda: np.empty((2, 3, 4), np.float32, order="F"),
    "permuted": lambda: _empty((4, 2, 3)).transpose(1, 2, 0),
    "permuted otherwise": lambda: _empty((3, 4, 2)).transpose(2, 0, 1),
    "axes of length 1": lambda: _empty((4, 1, 6)).transpose(1, 2, 0),
    "axis of length 1 out of a larger array": lambda: _empty((1, 5, 24))[:, 2:3],
    "rows out of a larger array": lambda: _empty((9, 4))[1:7],
    "four dimensions": lambda: _empty((2, 2, 3, 2)).transpose(3, 1, 0, 2),
    "unaligned": lambda: _unaligned((4, 6)),
    "no dimensions": lambda: _empty(()),
    "element out of a larger array": lambda: _empty((4, 6))[2:3, 3:4],
    "one element with a negative stride": lambda: _empty((1,))[::-1],
    "no elements": lambda: _empty((2, 0, 4)),
    "no elements, with gaps": lambda: _empty((2, 0, 4))[:, :, ::2],
    "matrix subclass": lambda: np.empty((4, 6), np.float32).view(np.matrix),
}

GAPS: dict[str, tuple[Callable[[], Array], str]] = {
    "columns": (lambda: np.zeros((4, 6))[:, :3], r"shape \(4, 3\) and strides \(48, 8\)"),
    "every other": (lambda: np.zeros(8)[::2], r"shape \(4,\) and strides \(16,\)"),
    "reversed": (lambda: np.zeros(4)[::-1], r"shape \(4,\) and strides \(-8,\)"),
    "one axis reversed": (
        lambda: np.zeros((2, 3))[:, ::-1],
        r"shape \(2, 3\) and strides \(24, -8\)",
    ),
    "inner block": (
        lambda: np.zeros((3, 4, 5))[:, 1:3],
        r"shape \(3, 2, 5\) and strides \(160, 40, 8\)",
    ),
    "field of records": (
        lambda: np.zeros(4, [("x", "f4"), ("y", "f4")])["y"],
        r"shape \(4,\) and strides \(8,\)",
    ),
    "one element over and over": (
        lambda: np.lib.stride_tricks.as_strided(np.zeros(1), (4,), (0,)),
        r"shape \(4,\) and strides \(0,\)",
    ),
    "windows": (
        lambda: np.lib.stride_tricks.as_strided(np.zeros(5), (2, 4), (8, 8)),
        r"shape \(2, 4\) and strides \(8, 8\)",
    ),
}


def _grad_layouts(shape: tuple[int, ...]) -> dict[str, Array]:
    """Gradients of one shape whose elements lie anywhere in memory."""
    rank = len(shape)
    doubled = numbers(40, tuple(2 * n for n in shape))
    layouts = {
        "contiguous": numbers(41, shape),
        "Fortran order": np.array(numbers(42, shape), order="F"),
        "transposed": numbers(43, shape[::-1]).T,
        "sliced": doubled[(..., *(slice(None, None, 2) for _ in shape))],
        "offset": doubled[(..., *(slice(n // 2, n // 2 + n) for n in shape))],
        "reversed": numbers(44, shape)[(..., *(slice(None, None, -1) for _ in shape))],
        "reversed and sliced": doubled[(..., *(slice(None, None, -2) for _ in shape))],
        "broadcast": np.broadcast_to(numbers(45), shape),
        "another dtype": numbers(48, shape, BFLOAT16),
        "read-only": numbers(49, shape),
    }
    if rank:
        layouts["broadcast rows"] = np.broadcast_to(numbers(46, shape[-1:]), shape)
        layouts["broadcast columns"] = np.broadcast_to(numbers(47, (*shape[:-1], 1)), shape)
    unaligned = _unaligned(shape)
    unaligned[...] = numbers(50, shape)
    layouts["unaligned"] = unaligned
    records = np.zeros(shape, [("pad", "u1"), ("x", "f4"), ("y", "f8")])
    records["x"] = numbers(51, shape)
    layouts["field of packed records"] = records["x"]
    layouts["read-only"].flags.writeable = False
    return layouts


@pytest.mark.parametrize("zero_grad", [False, True], ids=["", "zero_grad"])
@pytest.mark.parametrize("way", ["own", "given"])
@pytest.mark.parametrize("layout", DENSE)
def test_dense_parameters_with_gradients_of_any_layout(
    layout: str, way: str, zero_grad: bool
) -> None:
    values = DENSE[layout]()
    values[...] = numbers(0, values.shape)
    start = np.array(values)
    for name, grad in _grad_layouts(values.shape).items():
        values[...] = start
        reference = ReferenceSGD([start], **FULL)
        parameter = sgdcore.Parameter(values)
        optimizer = sgdcore.SGD([parameter], **FULL)
        if zero_grad and name.startswith(("broadcast", "read-only")):
            continue
        contents = np.array(grad, copy=True)
        for step in range(2):
            parameter.grad = grad if way == "own" else None
            optimizer.step(grads=[grad] if way == "given" else None, zero_grad=zero_grad)
            reference.step([contents if step == 0 or not zero_grad else np.zeros_like(contents)])
        assert parameter.data is values
        assert_same_bits(np.asarray(values), reference.params[0], name)
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert_same_bits(buffer, reference.momentum_buffers[0], name)
        assert_same_bits(np.array(grad), np.zeros_like(contents) if zero_grad else contents, name)


@pytest.mark.parametrize("layout", DENSE)
def test_momentum_is_laid_out_like_its_parameter(layout: str) -> None:
    values = DENSE[layout]()
    values[...] = 0
    optimizer = sgdcore.SGD([values], lr=0.1, momentum=0.9)
    optimizer.step(grads=[np.zeros(values.shape, np.float32)])
    buffer = optimizer.state[parameters_of(optimizer)[0]]["momentum_buffer"]
    assert type(buffer) is np.ndarray
    long = [axis for axis, length in enumerate(values.shape) if length > 1]
    assert [buffer.strides[axis] for axis in long] == [values.strides[axis] for axis in long]


@pytest.mark.parametrize("layout", GAPS)
@pytest.mark.parametrize("place", ["Parameter", "SGD", "group"])
def test_parameter_that_is_not_dense_is_refused(place: str, layout: str) -> None:
    give, prefix = PLACES[place]
    make, text = GAPS[layout]
    values = make()
    optimizer = trained()
    expected = f"^{prefix}the array of {text} is not contiguous; update a contiguous array and copy"
    with refused(ValueError, expected, optimizer, values):
        give(optimizer, values)


@pytest.mark.parametrize("place", ["Parameter", "SGD", "group", "data", "momentum"])
def test_read_only_array_to_be_written_is_refused(place: str) -> None:
    give, prefix = PLACES[place]
    values = numbers(0, (4,))
    values.flags.writeable = False
    optimizer = trained()
    expected = r"the array of shape \(4,\) is read-only and cannot be updated in place$"
    with refused(ValueError, f"^{prefix}{expected}", optimizer, values):
        give(optimizer, values)


READ_ONLY: dict[str, Callable[[], Any]] = {
    "broadcast": lambda: np.broadcast_to(np.float32(1), (4,)),
    "bytes behind it": lambda: np.frombuffer(bytes(16), np.float32),
    "memoryview": lambda: memoryview(numbers(0, (4,))).toreadonly(),
    "exported by NumPy": lambda: _DLPackOf(np.frombuffer(bytes(16), np.float32)),
}


class _DLPackOf:
    """Offers an array's memory through DLPack only."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __dlpack__(self, **kwargs: Any) -> object:
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("kind", READ_ONLY)
def test_read_only_memory_is_refused_as_parameter_but_not_as_gradient(kind: str) -> None:
    value = READ_ONLY[kind]()
    with pytest.raises(ValueError, match=r"^data: the array of shape \(4,\) is read-only"):
        sgdcore.Parameter(value)
    parameter = sgdcore.Parameter(np.ones(4, np.float32))
    parameter.grad = value
    assert not parameter.grad.flags.writeable


def test_tensor_on_another_device_is_refused() -> None:
    class OnCuda:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **_: Any) -> object:
            raise AssertionError("must not be asked")

    if sgdcore.build_info()["cuda"]:
        pytest.skip("CUDA can be used here")
    optimizer = trained()
    for place in ("Parameter", "data", "grad", "grads", "momentum"):
        # What is missing depends on the machine: the module, the driver, or a device.
        give, prefix = PLACES[place]
        expected = "an array on a CUDA device cannot be used: .+"
        with refused(ValueError, f"^{prefix}{expected}", optimizer):
            give(optimizer, OnCuda())


def test_tensor_on_a_device_that_is_not_cuda_is_refused() -> None:
    class OnMetal:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 8, 0

        def __dlpack__(self, **_: Any) -> object:
            raise AssertionError("must not be asked")

    optimizer = trained()
    match = "^DLPack tensor: expected memory on the CPU or a CUDA device, got device type 8$"
    for place in ("Parameter", "data", "grad", "grads", "momentum"):
        with refused(ValueError, match, optimizer):
            PLACES[place][0](optimizer, OnMetal())


# --- Shapes, dtypes and layouts that do not match the parameter's -----------------------------------


@pytest.mark.parametrize("place", ["data", "grad", "grads", "momentum"])
@pytest.mark.parametrize(
    "shape", [(3,), (5,), (4, 1), (1, 4), (2, 2), (), (0,)], ids=lambda s: f"shape {s}"
)
def test_other_shape_is_refused(place: str, shape: tuple[int, ...]) -> None:
    give, prefix = PLACES[place]
    optimizer = trained()
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    expected = rf"expected shape \(4,\), the parameter's, got {text}$"
    with refused(ValueError, f"^{prefix}{expected}", optimizer):
        give(optimizer, numbers(0, shape))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtype_as_data_is_refused(dtype: str) -> None:
    optimizer = trained()
    with refused(TypeError, f"^data: expected dtype float32, got {dtype}$", optimizer):
        parameters_of(optimizer)[2].data = np.zeros(4, STORAGE_TYPES[dtype])


@pytest.mark.parametrize("place", ["data", "momentum"])
def test_other_layout_is_refused(place: str) -> None:
    parameter = sgdcore.Parameter(numbers(0, (2, 3)))
    parameter.grad = numbers(1, (2, 3))
    optimizer = sgdcore.SGD([parameter], **FULL)
    optimizer.step()
    other = np.asfortranarray(numbers(2, (2, 3)))
    name = "data" if place == "data" else "momentum_buffer"
    expected = (
        rf"^{name}: expected strides in the order of the parameter's, \(12, 4\), got \(4, 8\)$"
    )
    with refused(ValueError, expected, optimizer, other):
        if place == "data":
            parameter.data = other
        else:
            optimizer.state[parameter]["momentum_buffer"] = other
    with refused(ValueError, "is not contiguous", optimizer):
        if place == "data":
            parameter.data = np.zeros((2, 6), np.float32)[:, ::2]
        else:
            optimizer.state[parameter] = {"momentum_buffer": np.zeros((4, 3))[::2], "mine": 1}


def test_data_in_a_buffer_cannot_be_swapped() -> None:
    buffer = sgdcore.ParameterBuffer({"w": (3,)})
    optimizer = sgdcore.SGD(buffer, lr=0.1)
    expected = (
        r"^data: parameter 'w' lives in a ParameterBuffer; "
        r"assign into its array with data\[\.\.\.\] = value$"
    )
    with refused(ValueError, expected, optimizer):
        buffer["w"].data = np.ones(3, np.float32)
    buffer["w"].data = buffer["w"].data  # the end of `data += x`
    buffer["w"].data += 1
    assert buffer.data.all()


@pytest.mark.parametrize("attribute", ["name", "buffer", "shape", "dtype", "size"])
def test_attributes_that_cannot_be_set(attribute: str) -> None:
    optimizer = trained()
    parameter = parameters_of(optimizer)[0]
    with refused(AttributeError, "no setter|can't set", optimizer):
        setattr(parameter, attribute, None)
    with refused(AttributeError, "no deleter|can't delete", optimizer):
        del parameter.data


# --- Hyperparameters ------------------------------------------------------------------------------

# Numbers that a float cannot hold, and how messages show them.
TOO_LARGE: dict[str, tuple[Any, str]] = {
    "large": (10**400, "10{79}$"),
    "negative": (-(10**400), "-10{78}$"),
    "of more digits than Python prints": (10**5000, "<int object>$"),
    "fraction": (Fraction(10**400, 3), r"Fraction\(1"),
    "decimal": (Decimal("1e400"), r"Decimal\('1E\+400'\)$"),
    "long double": (np.longdouble("1e400"), r"np\.longdouble\('1e\+400'\)$"),
}

# Those that torch refuses as well, in the same words.
AS_TORCH: dict[str, dict[str, Any]] = {
    "lr": {"lr": -0.1},
    "lr as integer": {"lr": -1},
    "lr as infinity": {"lr": float("-inf")},
    "lr as scalar": {"lr": np.float64(-0.5)},
    "momentum": {"lr": 0.1, "momentum": -0.9},
    "momentum as integer": {"lr": 0.1, "momentum": -1},
    "weight_decay": {"lr": 0.1, "weight_decay": -1e-4},
    "weight_decay as integer": {"lr": 0.1, "weight_decay": -2},
    "nesterov without momentum": {"lr": 0.1, "nesterov": True},
    "nesterov with dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": True},
    "the first of several": {"lr": -1, "momentum": -1, "weight_decay": -1},
}

OWN_HYPERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lr nan": ({"lr": float("nan")}, ValueError, "^Invalid learning rate: nan$"),
    "lr array": ({"lr": np.array(-2.0)}, ValueError, r"^Invalid learning rate: -2\.0$"),
    "momentum nan": ({"momentum": float("nan")}, ValueError, "^Invalid momentum value: nan$"),
    "weight_decay nan": (
        {"weight_decay": float("nan")},
        ValueError,
        "^Invalid weight_decay value: nan$",
    ),
    "dampening nan": ({"dampening": float("nan")}, ValueError, "^Invalid dampening value: nan$"),
    "lr string": ({"lr": "0.1"}, TypeError, r"^lr: expected a number, got '0\.1'$"),
    "lr bytes": ({"lr": b"1"}, TypeError, "^lr: expected a number, got b'1'$"),
    "lr none": ({"lr": None}, TypeError, "^lr: expected a number, got None$"),
    "lr complex": ({"lr": 1j}, TypeError, "^lr: expected a number, got 1j$"),
    "lr list": ({"lr": [0.1]}, TypeError, r"^lr: expected a number, got \[0\.1\]$"),
    "lr array of strings": (
        {"lr": np.array("0.1")},
        TypeError,
        r"^lr: expected a number, got '0\.1'$",
    ),
    "lr array of two": (
        {"lr": np.ones(2)},
        ValueError,
        r"^lr: expected a number or an array of one element, got shape \(2,\)$",
    ),
    "lr empty array": (
        {"lr": np.ones((0, 3))},
        ValueError,
        r"^lr: expected a number or an array of one element, got shape \(0, 3\)$",
    ),
    "momentum string": ({"momentum": "x"}, TypeError, "^momentum: expected a number, got 'x'$"),
    "dampening none": ({"dampening": None}, TypeError, "^dampening: expected a number, got None$"),
    **{
        f"{key} {label}": (
            {key: value},
            ValueError,
            f"^{key}: expected a number that a float can hold, got {text}",
        )
        for key in ("lr", "momentum", "dampening", "weight_decay")
        for label, (value, text) in TOO_LARGE.items()
    },
    "weight_decay dict": (
        {"weight_decay": {}},
        TypeError,
        r"^weight_decay: expected a number, got \{\}$",
    ),
    "momentum_dtype": (
        {"momentum_dtype": "int32"},
        TypeError,
        "^momentum_dtype: expected one of float64, float32, float16, bfloat16, got 'int32'$",
    ),
    "momentum_dtype byte order": (
        {"momentum_dtype": ">f4"},
        TypeError,
        "^momentum_dtype: expected one of .*, got '>f4'$",
    ),
    "momentum_dtype nonsense": (
        {"momentum_dtype": "half-baked"},
        TypeError,
        "^momentum_dtype: expected one of .*, got 'half-baked'$",
    ),
}


@pytest.mark.parametrize("case", AS_TORCH)
@pytest.mark.parametrize("place", ["defaults", "group", "added group"])
def test_hyperparameter_is_refused_in_torch_words(place: str, case: str) -> None:
    hyper = AS_TORCH[case]
    with pytest.raises(ValueError) as theirs:
        torch.optim.SGD([torch.zeros(2)], **hyper)
    values = numbers(0, (2,))
    optimizer = trained()
    full = {"lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0, **hyper}
    with refused(ValueError, None, optimizer, values) as ours:
        if place == "defaults":
            sgdcore.SGD([values], **hyper)
        elif place == "group":
            sgdcore.SGD([{"params": [values], **full}], lr=0.1)
        else:
            optimizer.add_param_group({"params": [values], **full})
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("case", OWN_HYPERS)
@pytest.mark.parametrize("place", ["defaults", "group", "added group", "checkpoint"])
def test_hyperparameter_is_refused(place: str, case: str) -> None:
    hyper, error, match = OWN_HYPERS[case]
    values = numbers(0, (2,))
    optimizer = trained()
    with refused(error, match, optimizer, values):
        if place == "defaults":
            sgdcore.SGD([values], **{"lr": 0.1, **hyper})
        elif place == "group":
            sgdcore.SGD([{"params": [values], **hyper}], lr=0.1)
        elif place == "added group":
            optimizer.add_param_group({"params": [values], **hyper})
        else:
            checkpoint = optimizer.state_dict()
            checkpoint["param_groups"][1].update(hyper)
            optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("keyword", ["foreach", "fused", "differentiable", "learning_rate"])
def test_unknown_keyword_is_refused(keyword: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        sgdcore.SGD([numbers(0, (2,))], **{keyword: True})


# --- Steps that fail, because the last of several parameters or groups is bad -------------------------

Sabotage = Callable[[sgdcore.SGD], Iterator[dict[str, Any]]]
SABOTAGE: dict[str, tuple[Sabotage, type[Exception], str]] = {}


def sabotage(error: type[Exception], match: str) -> Callable[[Sabotage], Sabotage]:
    """Add a way to make a step fail: break something, yield the step's arguments, mend it."""

    def add(function: Sabotage) -> Sabotage:
        SABOTAGE[function.__name__] = function, error, match
        return function

    return add


def _sabotage_key(key: str, value: Any, error: type[Exception], match: str, label: str) -> None:
    def change(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
        group = optimizer.param_groups[1]
        before = dict(group)
        if value is KeyError:
            del group[key]
        else:
            group[key] = value
        yield {}
        group.clear()
        group.update(before)

    SABOTAGE[label] = change, error, match


for _key in ("lr", "momentum", "dampening", "weight_decay"):
    for _value, _text in [
        ("0.1", r"'0\.1'"),
        (None, "None"),
        (1j, "1j"),
        ([0.1], r"\[0\.1\]"),
        (np.array([0.1, 0.2]), r"array\(\[0\.1, 0\.2\]\)"),
        (np.array([]), r"array\(\[\], dtype=float64\)"),
        (np.array(1j), r"array\(0\.\+1\.j\)"),
    ]:
        _sabotage_key(
            _key,
            _value,
            TypeError,
            rf"^param_groups\[1\]\['{_key}'\]: expected a number, got {_text}",
            f"{_key} {str(_value)[:12]}",
        )
    for _label, (_value, _text) in TOO_LARGE.items():
        _sabotage_key(
            _key,
            _value,
            ValueError,
            rf"^param_groups\[1\]\['{_key}'\]: expected a number that a float can hold, got {_text}",
            f"{_key} {_label}",
        )
for _key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "params"):
    _sabotage_key(
        _key, KeyError, KeyError, rf"param_groups\[1\] has no '{_key}'", f"{_key} missing"
    )
for _key in ("nesterov", "maximize"):
    _sabotage_key(
        _key,
        np.ones(2),
        TypeError,
        rf"^param_groups\[1\]\['{_key}'\]: expected True or False, got array\(\[1\., 1\.\]\)$",
        f"{_key} array",
    )
for _value in ((), (numbers(0, (2,)),), [numbers(0, (2,))], ["w"], [None], None, "w"):
    _sabotage_key(
        "params",
        _value,
        TypeError,
        r"^param_groups\[1\]\['params'\]: expected a list of Parameters, got ",
        f"params {str(_value)[:10]}",
    )


class _Interrupted:
    """A number that Ctrl-C interrupts."""

    def __float__(self) -> float:
        raise KeyboardInterrupt

    def __deepcopy__(self, _: Any) -> _Interrupted:
        return self


_sabotage_key("lr", _Interrupted(), KeyboardInterrupt, None, "lr interrupted")  # type: ignore[arg-type]


@sabotage(TypeError, r"^param_groups\[1\]: expected a dict, got \[\]$")
def group_is_no_dict(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    group = optimizer.param_groups[1]
    optimizer.param_groups[1] = []  # type: ignore[call-overload]
    yield {}
    optimizer.param_groups[1] = group


TWICE = "^some parameters appear in more than one parameter group, or twice: parameter [123]$"


@sabotage(ValueError, TWICE)
def parameter_repeated_in_a_group(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    params = optimizer.param_groups[0]["params"]
    params.append(params[1])
    yield {}
    params.pop()


@sabotage(ValueError, TWICE)
def parameter_repeated_in_another_group(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"][1])
    yield {}
    optimizer.param_groups[1]["params"].pop()


@sabotage(
    ValueError, "^params: the data of parameter 0 and the data of parameter 3 overlap in memory$"
)
def parameter_overlapping_by_one_element(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    first = parameters_of(optimizer)[0]
    block = numbers(0, (7,))
    before = first.data
    block[:4] = before
    first.data = block[:4]
    optimizer.param_groups[1]["params"].append(sgdcore.Parameter(block[3:]))
    yield {}
    optimizer.param_groups[1]["params"].pop()
    before[...] = first.data
    first.data = before


@sabotage(ValueError, "^params: the data of parameter [02] and the data of parameter [02] overlap")
def parameter_swapped_to_overlap(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    first, _, last = parameters_of(optimizer)
    before = last.data
    last.data = first.data.view()
    yield {}
    last.data = before


@sabotage(
    ValueError,
    "^params: the (data of parameter 0|momentum_buffer of parameter 2) "
    "and the (data of parameter 0|momentum_buffer of parameter 2) overlap in memory$",
)
def momentum_overlapping_a_parameter(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    first, _, last = parameters_of(optimizer)
    before = optimizer.state[last]["momentum_buffer"]
    optimizer.state[last]["momentum_buffer"] = first.data
    yield {}
    optimizer.state[last]["momentum_buffer"] = before


@sabotage(ValueError, "^params: the .* of parameter 2 and the .* of parameter 2 overlap in memory$")
def momentum_overlapping_its_own_parameter(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    *_, last = parameters_of(optimizer)
    before = optimizer.state[last]["momentum_buffer"]
    optimizer.state[last]["momentum_buffer"] = last.data
    yield {}
    optimizer.state[last]["momentum_buffer"] = before


@sabotage(ValueError, "^params: the momentum_buffer of .* and the momentum_buffer of .* overlap")
def momentum_shared_by_two_parameters(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    first, _, last = parameters_of(optimizer)
    before = optimizer.state[last]["momentum_buffer"]
    optimizer.state[last]["momentum_buffer"] = optimizer.state[first]["momentum_buffer"]
    yield {}
    optimizer.state[last]["momentum_buffer"] = before


@sabotage(
    ValueError, "^params: the data of parameter 0 and the grad of parameter 2 overlap in memory$"
)
def gradient_overlapping_another_parameter(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    first, _, last = parameters_of(optimizer)
    before = last.grad
    last.grad = first.data
    yield {}
    last.grad = before


@sabotage(
    ValueError, "^params: the data of parameter 2 and the grad of parameter 2 overlap in memory$"
)
def gradient_that_is_its_parameter_reversed(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    *_, last = parameters_of(optimizer)
    before = last.grad
    last.grad = last.data[::-1]
    yield {}
    last.grad = before


@sabotage(
    ValueError, "^params: the momentum_buffer of parameter 0 and the grad of parameter 2 overlap"
)
def gradient_overlapping_momentum(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    first, _, last = parameters_of(optimizer)
    before = last.grad
    last.grad = optimizer.state[first]["momentum_buffer"]
    yield {}
    last.grad = before


@sabotage(ValueError, r"^grads\[2\]: overlaps the data of parameter 2 in memory$")
def given_gradient_overlapping(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": [*given_grads()[:2], parameters_of(optimizer)[2].data]}


@sabotage(TypeError, r"^grads\[2\]: expected a NumPy array, got float 0\.5$")
def given_gradient_is_no_array(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": [*given_grads()[:2], 0.5]}


@sabotage(ValueError, r"^grads\[2\]: expected shape \(4,\), the parameter's, got \(5,\)$")
def given_gradient_of_another_shape(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": (*given_grads()[:2], np.zeros(5, np.float32))}


@sabotage(TypeError, r"^grads\[2\]: expected dtype float64, .* got dtype\('int64'\)$")
def given_gradient_of_another_dtype(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": [*given_grads()[:2], np.zeros(4, np.int64)]}


@sabotage(ValueError, "^grads: expected 3 gradients, one per parameter, got 2$")
def too_few_given_gradients(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": given_grads()[:2]}


@sabotage(ValueError, "^grads: expected 3 gradients, one per parameter, got 4$")
def too_many_given_gradients(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": [*given_grads(), None]}


@sabotage(ValueError, "^grads: expected 3 gradients, one per parameter, got 0$")
def no_given_gradients(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": []}


@sabotage(TypeError, "^grads: expected a list, tuple or other sequence of arrays, got generator$")
def given_gradients_from_a_generator(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": (grad for grad in given_grads())}


@sabotage(TypeError, "^grads: expected a list, tuple or other sequence of arrays, got ndarray$")
def given_gradients_as_one_array(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": np.zeros((3, 4), np.float32)}


@sabotage(TypeError, "^grads: expected a list, tuple or other sequence of arrays, got dict$")
def given_gradients_as_a_dict(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": dict(enumerate(given_grads()))}


@sabotage(TypeError, "^grads: expected a list, tuple or other sequence of arrays, got set$")
def given_gradients_as_a_set(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": {1, 2, 3}}


@sabotage(TypeError, "^grads: expected a list, tuple or other sequence of arrays, got str$")
def given_gradients_as_text(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": "abc"}


@sabotage(TypeError, "^grads: expected a list, tuple or other sequence of arrays, got bytes$")
def given_gradients_as_bytes(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": b"abc"}


@sabotage(ValueError, "^zero_grad: the gradient of parameter 2 is read-only and cannot be zeroed$")
def read_only_gradient_to_be_zeroed(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    *_, last = parameters_of(optimizer)
    grad = last.grad
    last.grad = grad.view()
    last.grad.flags.writeable = False
    last.grad = memoryview(grad).toreadonly()
    yield {"zero_grad": True}
    last.grad = grad


@sabotage(ValueError, "^zero_grad: the gradient of parameter 2 is read-only and cannot be zeroed$")
def broadcast_gradient_to_be_zeroed(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grads": [*given_grads()[:2], np.broadcast_to(np.float32(1), (4,))], "zero_grad": True}


@sabotage(
    ValueError,
    r"^zero_grad: the gradient of parameter 2 has strides \(0,\), which reach the same element twice",
)
def repeating_gradient_to_be_zeroed(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    repeating = np.lib.stride_tricks.as_strided(numbers(0, (1,)), (4,), (0,))
    yield {"grads": [*given_grads()[:2], repeating], "zero_grad": True}


@sabotage(ValueError, "^params: the grad of parameter [02] and the grad of parameter [02] overlap")
def shared_gradient_to_be_zeroed(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    first, _, last = parameters_of(optimizer)
    before = last.grad
    last.grad = first.grad
    yield {"zero_grad": True}
    last.grad = before


@sabotage(ValueError, r"^grads\[[02]\]: overlaps grads\[[02]\] in memory$")
def partly_shared_given_gradient_to_be_zeroed(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    block = numbers(0, (10,))
    yield {"grads": [block[:7:2], None, block[6:]], "zero_grad": True}


@sabotage(ZeroDivisionError, "division by zero")
def closure_that_raises(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"closure": lambda: 1 / 0}


@sabotage(TypeError, "^closure: expected a function, got int$")
def closure_that_is_none(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"closure": 3}


@sabotage(TypeError, "unexpected keyword argument 'grad'")
def misspelled_argument(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    yield {"grad": None}


@sabotage(RuntimeError, "must return None or a tuple of ")
def pre_hook_that_returns_nonsense(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    handle = optimizer.register_step_pre_hook(lambda *_: 1)
    yield {}
    handle.remove()


@sabotage(ValueError, r"^grads: expected 3 gradients, one per parameter, got 1$")
def pre_hook_that_replaces_the_gradients(optimizer: sgdcore.SGD) -> Iterator[dict[str, Any]]:
    handle = optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"grads": [None]}))
    yield {}
    handle.remove()


@pytest.mark.parametrize("case", SABOTAGE)
def test_failed_step_changes_nothing_and_training_goes_on(case: str) -> None:
    function, error, match = SABOTAGE[case]
    optimizer, untouched = trained(), trained()
    steps = contextmanager(function)(optimizer)
    with steps as arguments:
        # Twice, because what a first attempt has looked at, a second one may take for checked.
        for _ in range(2):
            given = arguments.get("grads")
            with refused(error, match, optimizer, *(given if isinstance(given, list) else ())):
                optimizer.step(**arguments)
    assert snapshot(optimizer)["momentum"] != []
    optimizer.step()
    untouched.step()
    assert_same_training(optimizer, untouched)


def test_what_a_refused_step_has_seen_is_still_checked_by_the_next() -> None:
    """Two gradients come to share memory in a step that is refused for a third one's sake."""
    optimizer = trained()
    first, _, last = parameters_of(optimizer)
    optimizer.step(zero_grad=True)
    first.grad, last.grad = numbers(1, (4,)), numbers(2, (4,))
    optimizer.add_param_group({"params": [sgdcore.Parameter(numbers(3, (4,)))]})
    *_, added = parameters_of(optimizer)
    optimizer.step(zero_grad=True)
    last.grad, added.grad = first.grad, first.data
    with refused(ValueError, "overlap in memory$", optimizer):
        optimizer.step(zero_grad=True)
    added.grad = None
    with refused(
        ValueError, "the grad of parameter [02] and the grad of parameter [02]", optimizer
    ):
        optimizer.step(zero_grad=True)


def test_why_a_number_does_not_convert_is_told() -> None:
    optimizer = trained()
    optimizer.param_groups[1]["lr"] = 10**400
    with refused(ValueError, r"^param_groups\[1\]\['lr'\]: expected a number", optimizer) as caught:
        optimizer.step()
    assert isinstance(caught.value.__cause__, OverflowError)


def test_sabotage_of_a_first_step_leaves_no_momentum() -> None:
    optimizer = sgdcore.SGD([numbers(0, (4,)), numbers(1, (4,))], **FULL)
    for _ in range(2):
        with refused(ValueError, r"^grads\[1\]: expected shape", optimizer):
            optimizer.step(grads=[numbers(2, (4,)), numbers(3, (5,))])
    optimizer.param_groups[0]["momentum_dtype"] = "int8"
    with refused(TypeError, "^momentum_dtype: expected one of .* got 'int8'$", optimizer):
        optimizer.step(grads=[numbers(2, (4,)), numbers(3, (4,))])
    assert len(optimizer.state) == 0


# --- Overlap: what is found, and what is none -----------------------------------------------------


@pytest.mark.parametrize(
    ("names", "label"),
    [(("", ""), "parameter 0"), (("a", "b"), "parameter 'a'")],
    ids=["", "named"],
)
def test_overlapping_parameters_are_refused(names: tuple[str, str], label: str) -> None:
    block = numbers(0, (16,))
    a, b = sgdcore.Parameter(block[:9], names[0]), sgdcore.Parameter(block[8:], names[1])
    c = sgdcore.Parameter(numbers(1, (3,)), "c")
    for params in (
        [a, c, b],
        [{"params": [a, c]}, {"params": [b]}],
        [a.data, c, b.data],
        [("a", a), ("c", c), ("b", b)],
        [*sgdcore.ParameterBuffer({"a": (9,), "c": (3,)}).parameters(), a, b],
    ):
        with refused(ValueError, "^params: the data of .* overlap in memory$", None, block):
            sgdcore.SGD(params, lr=0.1)
    with pytest.raises(ValueError, match=label):
        sgdcore.SGD([a, c, b], lr=0.1)


def test_array_twice_is_refused() -> None:
    values = numbers(0, (3,))
    with refused(
        ValueError, "^some parameters appear in more than one .*, or twice: parameter", None, values
    ):
        sgdcore.SGD([values, values], lr=0.1)
    with refused(
        ValueError, "^some parameters appear in more than one .*, or twice: parameter", None, values
    ):
        sgdcore.SGD([{"params": [values]}, {"params": [values]}], lr=0.1)


def test_tensor_sharing_memory_with_an_array_is_refused() -> None:
    tensor = torch.zeros(6)
    with pytest.raises(ValueError, match=r"^params: the data of .* overlap in memory$"):
        sgdcore.SGD([sgdcore.Parameter(tensor), tensor.numpy()[2:4]], lr=0.1)


def test_neighbours_in_one_block_are_accepted() -> None:
    """Parameters, gradients and momentum may touch, in any order, without gap."""
    block = numbers(0, (12,))
    expected = ReferenceSGD([block[:2], block[4:6]], **FULL)
    grads = [block[2:4], block[6:8]]
    copies = [grad.copy() for grad in grads]
    optimizer = sgdcore.SGD([block[:2], block[4:6]], **FULL)
    for parameter, at in zip(parameters_of(optimizer), (8, 10), strict=True):
        optimizer.state[parameter]["momentum_buffer"] = block[at : at + 2]
    expected.momentum_buffers = [block[8:10].copy(), block[10:].copy()]
    for _ in range(2):
        optimizer.step(grads=grads)
        expected.step(copies)
    assert_same_bits(block[:2], expected.params[0])
    assert_same_bits(block[4:6], expected.params[1])
    assert_same_bits(block[8:], np.concatenate(expected.momentum_buffers))
    assert_same_bits(block[2:4], copies[0])


def test_empty_parameters_never_overlap() -> None:
    block = numbers(0, (4,))
    optimizer = sgdcore.SGD([block, block[2:2], block[1:1]], lr=1)
    optimizer.step(grads=[np.ones(4, np.float32), block[2:2], block[1:1]], zero_grad=False)
    assert_same_bits(block, numbers(0, (4,)) - np.float32(1))


def test_shared_gradient_is_accepted_where_it_is_only_read() -> None:
    grad = numbers(5, (4,))
    values = [numbers(i, (4,)) for i in range(2)]
    reference = ReferenceSGD(values, **FULL)
    optimizer = sgdcore.SGD(values, **FULL)
    for _ in range(2):
        optimizer.step(grads=[grad, grad])
        reference.step([grad, grad])
    for parameter, expected in zip(parameters_of(optimizer), reference.params, strict=True):
        assert_same_bits(parameter.data, expected)


@pytest.mark.parametrize("way", ["own", "given"])
def test_interleaved_gradients_are_zeroed(way: str) -> None:
    """The columns of a matrix cover the same range of memory, but share no element."""
    matrix = numbers(0, (5, 4))
    columns = [matrix[:, i] for i in (2, 0, 3)]
    values = [numbers(i, (5,)) for i in range(3)]
    reference = ReferenceSGD(values, **FULL)
    optimizer = sgdcore.SGD([sgdcore.Parameter(value) for value in values], **FULL)
    if way == "own":
        for parameter, column in zip(parameters_of(optimizer), columns, strict=True):
            parameter.grad = column
    for step in range(3):
        matrix[...] = numbers(step, (5, 4))
        reference.step([column.copy() for column in columns])
        optimizer.step(grads=columns if way == "given" else None, zero_grad=True)
        for parameter, expected in zip(parameters_of(optimizer), reference.params, strict=True):
            assert_same_bits(parameter.data, expected)
        assert not matrix[:, [2, 0, 3]].any()
        assert_same_bits(matrix[:, 1], numbers(step, (5, 4))[:, 1])  # in between, untouched


def test_gradients_once_found_disjoint_are_checked_again_when_they_change() -> None:
    optimizer = trained()
    optimizer.step(zero_grad=True)
    optimizer.step(zero_grad=True)
    first, _, last = parameters_of(optimizer)
    first.grad[...] = 1
    last.grad = first.grad
    with refused(ValueError, "^params: the grad of parameter ", optimizer):
        optimizer.step(zero_grad=True)
    last.grad = numbers(0, (4,))
    optimizer.step(zero_grad=True)
    grads = given_grads()
    optimizer.step(grads=grads, zero_grad=True)
    with refused(ValueError, r"^grads\[[02]\]: overlaps grads\[", optimizer, *grads):
        optimizer.step(grads=[grads[0], grads[1], grads[0]], zero_grad=True)


def test_overlap_that_a_new_momentum_buffer_brings_is_found() -> None:
    """A gradient may become a conflict later, when what it overlaps turns into momentum."""
    parameter = sgdcore.Parameter(numbers(0, (4,)))
    optimizer = sgdcore.SGD([parameter], **FULL)
    parameter.grad = numbers(1, (4,))
    optimizer.step()
    optimizer.state[parameter]["momentum_buffer"] = parameter.grad
    for _ in range(2):
        with refused(ValueError, "momentum_buffer of .* and the grad of .* overlap", optimizer):
            optimizer.step()
    parameter.grad = numbers(2, (4,))
    optimizer.step()


# --- zero_grad() ----------------------------------------------------------------------------------


def test_zero_grad_with_a_read_only_gradient_clears_none() -> None:
    optimizer = trained()
    parameters_of(optimizer)[2].grad = np.broadcast_to(np.float32(1), (4,))
    match = r"^grad: the gradient of a parameter of shape \(4,\) is read-only and cannot be zeroed$"
    with refused(ValueError, match, optimizer):
        optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    assert [parameter.grad for parameter in parameters_of(optimizer)] == [None] * 3
    named = sgdcore.Parameter(numbers(0, (2,)), name="w")
    named.grad = np.broadcast_to(np.float32(1), (2,))
    with pytest.raises(ValueError, match="the gradient of parameter 'w' is read-only"):
        sgdcore.SGD([named]).zero_grad(set_to_none=False)


INTERLEAVED: dict[str, Callable[[Array], list[Array]]] = {
    "columns": lambda block: [block[:, i] for i in range(12)],
    "columns backwards": lambda block: [block[::-1, i] for i in range(12)],
    "blocks of columns": lambda block: [block[:, :5], block[:, 5:6], block[:, 6:]],
    "every third column": lambda block: [block[:, i::3] for i in range(3)],
    "columns from later rows on": lambda block: [block[i:, i] for i in range(8)],
    "columns of some rows": lambda block: [block[i::2, j] for i in range(2) for j in range(12)],
    "real and imaginary parts": lambda block: [block.view(np.complex64).real, block.view("F").imag],
    "two matrices": lambda block: [part[:, i] for part in (block[:4], block[4:]) for i in range(3)],
}


@pytest.mark.parametrize("views", INTERLEAVED)
def test_common_interleaved_gradients_are_told_apart_without_numpy(
    views: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy would be asked once for each pair."""
    monkeypatch.setattr(np, "shares_memory", lambda *_: pytest.fail("NumPy was asked"))
    block = numbers(1, (8, 12))
    grads = INTERLEAVED[views](block)
    params = [numbers(2, grad.shape) for grad in grads]
    reference = ReferenceSGD([p.copy() for p in params], lr=0.1)
    reference.step([grad.copy() for grad in grads])
    SGD(params, lr=0.1).step(grads=grads, zero_grad=True)
    for i, (param, expected) in enumerate(zip(params, reference.params, strict=True)):
        assert_same_bits(param, expected, f"parameter {i}")
    assert not any(grad.any() for grad in grads)


def _random_view(rng: np.random.Generator, block: Array) -> Array:
    """Some slices of a block that is seen as one to three axes."""
    shape = [(96,), (8, 12), (12, 8), (4, 6, 4)][rng.integers(4)]
    view = block.reshape(shape)[
        tuple(
            slice(*sorted(rng.integers(0, length + 1, 2)), rng.integers(1, 4)) for length in shape
        )
    ]
    return view[(slice(None, None, rng.choice([1, -1])), ...)].transpose(rng.permutation(view.ndim))


def test_gradients_to_be_zeroed_are_refused_just_where_they_share_memory() -> None:
    rng = np.random.default_rng(1)
    outcomes = []
    for _ in range(2000):
        block = np.ones(96, np.float32)
        views = [_random_view(rng, block) for _ in range(rng.integers(2, 4))]
        shared = any(
            np.shares_memory(views[i], views[j]) for i in range(len(views)) for j in range(i)
        )
        optimizer = SGD([np.zeros(view.shape, np.float32) for view in views], lr=1.0)
        try:
            optimizer.step(grads=views, zero_grad=True)
            is_refused = False
        except ValueError:
            is_refused = True
        assert is_refused == shared, [(v.__array_interface__, v.strides) for v in views]
        assert block.all() or not shared
        interleaved = any(
            np.may_share_memory(views[i], views[j]) for i in range(len(views)) for j in range(i)
        )
        outcomes.append((shared, interleaved))
    # Each of the three outcomes that there are.
    assert min(outcomes.count(each) for each in set(outcomes)) > 100
    assert len(set(outcomes)) == 3


@pytest.mark.parametrize(
    "layout", [name for name, grad in _grad_layouts((2, 3)).items() if grad.flags.writeable]
)
def test_zero_grad_zeroes_any_layout_and_nothing_else(layout: str) -> None:
    grad = _grad_layouts((2, 3))[layout]
    owner = grad if grad.base is None else grad.base

    def bytes_set(array: Any) -> int:
        contents = array.tobytes() if isinstance(array, np.ndarray) else bytes(array)
        return int(np.count_nonzero(np.frombuffer(contents, np.uint8)))

    outside = bytes_set(owner) - bytes_set(grad)
    parameter = sgdcore.Parameter(numbers(0, (2, 3)))
    parameter.grad = grad
    sgdcore.SGD([parameter]).zero_grad(set_to_none=False)
    assert parameter.grad is grad
    assert not grad.any()
    assert bytes_set(owner) == outside


# --- ParameterBuffer's arguments ------------------------------------------------------------------

F4 = np.float32
BAD_BUFFERS: dict[str, tuple[Callable[[Array], Any], type[Exception], str]] = {
    "list of shapes": (
        lambda _: ([(2, 3)],),
        TypeError,
        "^parameters: expected a mapping of names to shapes or arrays, got list$",
    ),
    "name that is no string": (
        lambda _: ({1: (2, 3)},),
        TypeError,
        "^parameters: expected non-empty strings as names, got 1$",
    ),
    "empty name": (
        lambda _: ({"": (2, 3)},),
        TypeError,
        "^parameters: expected non-empty strings as names, got ''$",
    ),
    "shape of floats": (
        lambda _: ({"w": (2.0, 3)},),
        TypeError,
        r"^parameters\['w'\]: expected a shape or an array, got \(2\.0, 3\)$",
    ),
    "no shape": (
        lambda _: ({"w": None},),
        TypeError,
        r"^parameters\['w'\]: expected a shape or an array, got None$",
    ),
    "negative shape": (
        lambda _: ({"v": 3, "w": (2, -3)},),
        ValueError,
        r"^parameters\['w'\]: negative length in shape \(2, -3\)$",
    ),
    "too large": (
        lambda _: ({"w": 2**61},),
        MemoryError,
        rf"^data: cannot allocate {2**63} bytes, for shape \({2**61},\) and dtype float32$",
    ),
    "much too large": (
        lambda _: ({"w": (2**40, 2**40)},),
        MemoryError,
        rf"^data: cannot allocate {2**82} bytes, for shape \({2**80},\) and dtype float32$",
    ),
    "several dtypes": (
        lambda _: ({"v": np.ones(2), "w": np.ones(3, F4)},),
        TypeError,
        r"^parameters: arrays of several dtypes \(float32, float64\); say which with dtype=$",
    ),
    "array of integers": (
        lambda _: ({"w": np.arange(3)}, "float32"),
        TypeError,
        r"^parameters\['w'\]: expected one of .* got dtype\('int64'\)$",
    ),
    "complex array": (
        lambda memory: ({"v": np.ones(3, F4), "w": np.ones(3, np.complex64)}, "float32", memory),
        TypeError,
        r"^parameters\['w'\]: expected one of .* got dtype\('complex64'\)$",
    ),
    "big-endian array": (
        lambda _: ({"w": np.ones(3, ">f4")},),
        TypeError,
        r"^parameters\['w'\]: expected one of .* got dtype\('>f4'\)$",
    ),
    "dtype": (
        lambda _: ({"w": 3}, "int32"),
        TypeError,
        "^dtype: expected one of float64, float32, float16, bfloat16, got 'int32'$",
    ),
    "memory too short": (
        lambda memory: ({"w": np.ones(7, F4)}, None, memory),
        ValueError,
        r"^data: expected shape \(7,\), the total size, got \(6,\)$",
    ),
    "memory of two dimensions": (
        lambda memory: ({"w": np.ones(6, F4)}, None, memory.reshape(2, 3)),
        ValueError,
        r"^data: expected shape \(6,\), the total size, got \(2, 3\)$",
    ),
    "memory that is no array": (
        lambda _: ({"w": 2}, None, [1.0, 2.0]),
        TypeError,
        "^data: expected a NumPy array, got list$",
    ),
    "memory with gaps": (
        lambda memory: ({"w": np.ones(3, F4)}, None, memory[::2]),
        ValueError,
        "^data: expected a contiguous and writable array, ",
    ),
    "read-only memory": (
        lambda _: ({"w": 3}, None, np.broadcast_to(F4(1), (3,))),
        ValueError,
        "^data: expected a contiguous and writable array, ",
    ),
    "memory of integers": (
        lambda _: ({"w": 3}, None, np.zeros(3, np.int32)),
        TypeError,
        r"^data: expected one of .* got dtype\('int32'\)$",
    ),
    "memory of another dtype": (
        lambda memory: ({"w": np.ones(6, F4)}, "float64", memory),
        TypeError,
        "^data: expected dtype float64, got float32$",
    ),
    "gradient memory too short": (
        lambda memory: ({"w": np.ones(6, F4)}, None, memory, np.zeros(5, F4)),
        ValueError,
        r"^grad: expected shape \(6,\), the total size, got \(5,\)$",
    ),
    "gradients in the parameters' memory": (
        lambda memory: ({"w": np.ones(6, F4)}, None, memory, memory),
        ValueError,
        "^grad: overlaps data in memory$",
    ),
    "gradients partly in the parameters' memory": (
        lambda memory: ({"w": np.ones(4, F4)}, None, memory[:4], memory[2:]),
        ValueError,
        "^grad: overlaps data in memory$",
    ),
}


@pytest.mark.parametrize("case", BAD_BUFFERS)
def test_buffer_argument_is_refused(case: str) -> None:
    make, error, match = BAD_BUFFERS[case]
    memory = numbers(0, (6,))
    parameters, dtype, data, grad = (*make(memory), None, None, None)[:4]
    with refused(error, match, None, memory):
        sgdcore.ParameterBuffer(parameters, dtype, data=data, grad=grad)


def test_gradient_dtype_of_a_buffer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^grad_dtype: expected one of .* got 'int8'$"):
        sgdcore.ParameterBuffer({"w": 3}, grad_dtype="int8")
    with pytest.raises(TypeError, match=r"^grad: expected dtype float64, got float32$"):
        sgdcore.ParameterBuffer({"w": 3}, grad_dtype="float64", grad=np.zeros(3, np.float32))


def test_unknown_name_in_a_buffer() -> None:
    buffer = sgdcore.ParameterBuffer({"w": 3})
    with pytest.raises(KeyError, match="v"):
        buffer["v"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        buffer["w"] = np.zeros(3, np.float32)  # type: ignore[index]


@pytest.mark.parametrize("place", ["buffer", "parameter"])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dl_device": (2, 0)}, r"^dl_device: expected the CPU, \(1, 0\), got \(2, 0\)$"),
        ({"stream": 1}, "^stream: memory on the CPU has none, got 1$"),
    ],
    ids=["device", "stream"],
)
def test_dlpack_request_is_refused(place: str, arguments: dict[str, Any], match: str) -> None:
    buffer = sgdcore.ParameterBuffer({"w": 3})
    with pytest.raises(BufferError, match=match):
        (buffer if place == "buffer" else buffer["w"]).__dlpack__(**arguments)


@pytest.mark.parametrize("attribute", ["data", "grad"])
def test_array_of_a_buffer_is_not_replaced(attribute: str) -> None:
    buffer = ParameterBuffer({"w": (3,)})
    own = getattr(buffer, attribute)
    match = f"^{attribute}: it belongs to the buffer and its parameters .* got ndarray$"
    with pytest.raises(AttributeError, match=match):
        setattr(buffer, attribute, np.ones(3, np.float32))
    assert getattr(buffer, attribute) is own
    buffer.grad += 2
    buffer.data += 1
    SGD(buffer, lr=0.25).step()
    np.testing.assert_array_equal(buffer["w"].data, np.full(3, 0.5, np.float32))


def test_memory_that_cannot_be_had_is_named() -> None:
    with pytest.raises(
        MemoryError,
        match=r"^data: cannot allocate 9223372036854775800 bytes, for shape \(2305843009213693950,\) and dtype ",
    ):
        ParameterBuffer({"w": (2**61 - 2,)})


# --- Arguments of another kind, with what was probably meant ------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda w: {"w": w},
            TypeError,
            r"but got dict; put a group in a list, or .* list\(params.items\(\)\)$",
        ),
        (
            lambda _: [ParameterBuffer({"w": (3,)})],
            TypeError,
            r"^params\[0\]: .* but got ParameterBuffer; a ParameterBuffer is passed by itself",
        ),
        (
            lambda _: torch.nn.Linear(1, 1).parameters(),
            TypeError,
            r"^params\[0\]: .* but got torch.Parameter; for torch's tensors there is sgdcore.torch.SGD$",
        ),
        (
            lambda w: [w, w],
            ValueError,
            "appear in more than one parameter group, or twice: parameter at position 1$",
        ),
        (
            lambda w: [Parameter(w), Parameter(w, name="again")],
            ValueError,
            "appear in more than one parameter group, or twice: parameter 'again'$",
        ),
    ],
)
def test_params_of_another_kind_are_explained(make: Any, error: Any, match: str) -> None:
    values = np.ones(3, np.float32)
    with pytest.raises(error, match=match):
        SGD(make(values))


@pytest.mark.parametrize(
    ("closure", "match"),
    [
        (np.ones(3), "^closure: expected a function, got ndarray; gradients are passed as grads=$"),
        ([np.ones(3)], "^closure: expected a function, got list; gradients are passed as grads=$"),
        (3.0, "^closure: expected a function, got float$"),
    ],
)
def test_closure_that_is_no_function_is_refused(closure: Any, match: str) -> None:
    optimizer = trained()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    with refused(TypeError, match, optimizer):
        optimizer.step(closure)
    assert not called


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda _: None, TypeError, "^state_dict: expected a mapping, got NoneType$"),
        (lambda _: "x", TypeError, "^state_dict: expected a mapping, got str$"),
        (lambda _: {"a": 1}, KeyError, r"state_dict: expected a key 'state', got \['a'\]"),
        (
            lambda d: {"state": d["state"]},
            KeyError,
            r"state_dict: expected a key 'param_groups', got \['state'\]",
        ),
        (
            lambda d: {**d, "state": 3},
            TypeError,
            r"^state_dict\['state'\]: expected a mapping, got int$",
        ),
        (
            lambda d: {**d, "state": {0: 3}},
            TypeError,
            r"^state_dict\['state'\]\[0\]: expected a mapping, got 3$",
        ),
        (
            lambda d: {**d, "param_groups": 3},
            TypeError,
            r"^state_dict\['param_groups'\]: expected a list, got int$",
        ),
        (
            lambda d: {**d, "param_groups": [3]},
            TypeError,
            r"^state_dict\['param_groups'\]\[0\]: expected a mapping with a list 'params', got 3$",
        ),
        (
            lambda d: {**d, "param_groups": [{}]},
            TypeError,
            r"^state_dict\['param_groups'\]\[0\]: expected a mapping with a list 'params', got \{\}$",
        ),
    ],
)
def test_state_dict_of_another_layout_is_refused(change: Any, error: Any, match: str) -> None:
    optimizer = trained()
    bad = change(optimizer.state_dict())
    with refused(error, match, optimizer):
        optimizer.load_state_dict(bad)


# --- Keys of the state ----------------------------------------------------------------------------


def test_state_of_what_is_no_parameter_is_refused() -> None:
    optimizer = trained()
    with refused(TypeError, "^state: expected a Parameter as key, got 'w'$", optimizer):
        optimizer.state["w"]
    with refused(TypeError, "^state: expected a Parameter as key, got 'w'$", optimizer):
        optimizer.state["w"] = {}
    with refused(KeyError, "w", optimizer):
        del optimizer.state["w"]


def test_state_replaced_by_something_bad_stays() -> None:
    optimizer = trained()
    parameter = parameters_of(optimizer)[0]
    with refused(ValueError, "^momentum_buffer: expected shape", optimizer):
        optimizer.state[parameter] = {"mine": 1, "momentum_buffer": np.zeros(5, np.float32)}


# --- Process-wide settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "error", "match"),
    [
        (4097, ValueError, "^count: expected a number of threads up to 4096, or 0 for the default"),
        (-1, ValueError, "^count: expected a number of threads up to 4096, or 0 .*, got -1$"),
        (2**31, ValueError, f"^count: expected a number of threads .*, got {2**31}$"),
        (2.5, TypeError, r"^count: expected an integer, got 2\.5$"),
        (True, TypeError, "^count: expected an integer, got True$"),
        ("two", TypeError, "^count: expected an integer, got 'two'$"),
        (None, TypeError, "^count: expected an integer, got None$"),
    ],
)
def test_number_of_threads_is_refused(count: Any, error: Any, match: str) -> None:
    before = sgdcore.get_num_threads()
    with pytest.raises(error, match=match):
        sgdcore.set_num_threads(count)
    assert sgdcore.get_num_threads() == before


@pytest.mark.parametrize("name", ["z80", "X86-64", "x86-64-v9", " "])
def test_unknown_instruction_set_is_refused(name: str) -> None:
    before = sgdcore.get_isa()
    with pytest.raises(
        ValueError, match=f"^isa: this machine has no instruction set '{name}'; it has ."
    ):
        sgdcore.set_isa(name)
    assert sgdcore.get_isa() == before


def test_instruction_set_that_is_no_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^isa: expected a string or None, got 3$"):
        sgdcore.set_isa(3)  # type: ignore[arg-type]


def test_unknown_instruction_set_in_the_environment() -> None:
    """Importing works; the first use says what is wrong, and nothing has changed by then."""
    script = """
import numpy as np, sgdcore
w = np.ones(3, np.float32)
optimizer = sgdcore.SGD([w], lr=1, momentum=0.9)
for use in (lambda: optimizer.step(grads=[w.copy()]), sgdcore.get_isa, sgdcore.build_info):
    try:
        use()
    except ValueError as error:
        print(error)
print(w, len(optimizer.state))
sgdcore.set_isa(sorted(sgdcore._core.instruction_sets())[0])
optimizer.step(grads=[w.copy()])
print(w)
"""
    environment = {**os.environ, "SGDCORE_ISA": "z80", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    *errors, unchanged, stepped = done.stdout.splitlines()
    assert len(errors) == 3
    for error in errors:
        assert error.startswith("SGDCORE_ISA: this machine has no instruction set 'z80'; it has ")
    assert unchanged == "[1. 1. 1.] 0"
    assert stepped == "[0. 0. 0.]"


def test_unknown_instruction_set_on_the_command_line() -> None:
    environment = {**os.environ, "SGDCORE_ISA": "z80", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sgdcore", "info"]
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "python -m sgdcore info: SGDCORE_ISA: this machine has no instruction set 'z80'"
    )
