"""Arrays of other libraries: whose memory may be written, whose byte order is this machine's, whose numbers mean more.

Stand-ins show each kind where the library itself is not installed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import sgdcore
from sgdcore.reference import ReferenceSGD
from support import BFLOAT16, STORAGE_TYPES, Array, assert_same_bits, numbers, refused

FULL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


# --- Memory that may not be written -----------------------------------------------------------------


class Legacy:
    """Shares memory in an unversioned capsule, which cannot say whether it may be written."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __dlpack__(self, stream: Any = None) -> object:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Marked(Legacy):
    """Shares memory in a versioned capsule with the flags of its choice."""

    flags = 0
    major = 1

    def __dlpack__(self, **_: Any) -> object:  # type: ignore[override]
        capsule = self._array.__dlpack__(max_version=(1, 0))
        name = b"dltensor_versioned"
        ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
        ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        managed = ctypes.pythonapi.PyCapsule_GetPointer(capsule, name)
        ctypes.c_uint32.from_address(managed).value = self.major
        ctypes.c_uint64.from_address(managed + 24).value = self.flags
        return capsule


class ReadOnly(Marked):
    flags = 1


class Copied(Marked):
    flags = 2


class Version2(Marked):
    major = 2


class TorchAlike(Legacy):
    """Says it is torch's, as a tensor's class or one derived from it does."""


TorchAlike.__module__ = "torch._tensor"


class OfTorchsUser(TorchAlike):
    """A subclass in a user's program."""


class CupyAlike(Legacy):
    """As CuPy's arrays of releases without versioned capsules."""


CupyAlike.__module__ = "cupy"


def _pyarrow(array: Array) -> Any:
    return pytest.importorskip("pyarrow").array(array)


def _pyarrow_slice(array: Array) -> Any:
    return pytest.importorskip("pyarrow").array(np.append(np.float32(9), array))[1:]


def _jax(array: Array) -> Any:
    return pytest.importorskip("jax.numpy").asarray(array)


IMMUTABLE: dict[str, Callable[[Array], Any]] = {
    "unversioned capsule": Legacy,
    "flag of read-only memory": ReadOnly,
    "flag of a copy": Copied,
    "pyarrow": _pyarrow,
    "slice of pyarrow's": _pyarrow_slice,
    "jax": _jax,
}
WRITABLE: dict[str, Callable[[Array], Any]] = {
    "torch": torch.from_numpy,
    "torch's unversioned capsule": TorchAlike,
    "subclass of torch's": OfTorchsUser,
    "CuPy's unversioned capsule": CupyAlike,
    "versioned capsule": Marked,
    "bytearray": lambda array: np.frombuffer(bytearray(array.tobytes()), array.dtype),
    "memoryview": memoryview,
    "Parameter": sgdcore.Parameter,
}


def _shares(make: Callable[[Array], Any]) -> Any:
    return make(np.array([1, 2, 3], np.float32))


@pytest.mark.parametrize("kind", IMMUTABLE)
def test_immutable_memory_is_read_and_never_written(kind: str) -> None:
    value = _shares(IMMUTABLE[kind])
    read_only = r"the array of shape \(3,\) is read-only and cannot be updated in place$"
    with pytest.raises(ValueError, match=f"^data: {read_only}"):
        sgdcore.Parameter(value)
    parameter = sgdcore.Parameter(np.ones(3, np.float32), name="w")
    optimizer = sgdcore.SGD([parameter], **FULL)
    with refused(ValueError, f"^data: {read_only}", optimizer):
        parameter.data = value
    with refused(ValueError, f"^momentum_buffer: {read_only}", optimizer):
        optimizer.state[parameter]["momentum_buffer"] = value
    reference = ReferenceSGD([np.ones(3, np.float32)], **FULL)
    for step in range(2):
        parameter.grad = value if step else None
        optimizer.step(grads=None if step else [value])
        reference.step([np.array([1, 2, 3], np.float32)])
    assert_same_bits(parameter.data, reference.params[0])
    zeroed = "^zero_grad: the gradient of parameter 'w' is read-only and cannot be zeroed$"
    with refused(ValueError, zeroed, optimizer):
        optimizer.step(zero_grad=True)
    with refused(ValueError, zeroed, optimizer):
        optimizer.step(grads=[value], zero_grad=True)
    with refused(ValueError, "is read-only and cannot be zeroed$", optimizer):
        optimizer.zero_grad(set_to_none=False)
    np.testing.assert_array_equal(np.asarray(sgdcore._core.from_dlpack(value)), [1, 2, 3])


@pytest.mark.parametrize("kind", ["pyarrow", "unversioned capsule"])
def test_immutable_memory_under_a_buffer_is_refused(kind: str) -> None:
    shared = np.from_dlpack(_shares(IMMUTABLE[kind]))
    for argument in ("data", "grad"):
        with pytest.raises(ValueError, match=f"^{argument}: expected a contiguous and writable"):
            sgdcore.ParameterBuffer({"w": (3,)}, **{argument: shared})


@pytest.mark.parametrize("kind", WRITABLE)
def test_writable_memory_is_updated_where_it_is(kind: str) -> None:
    array = np.array([1, 2, 3], np.float32)
    value = WRITABLE[kind](array)
    parameter = sgdcore.Parameter(value)
    parameter.grad = WRITABLE[kind](np.ones(3, np.float32))
    sgdcore.SGD([parameter], lr=1).step(zero_grad=True)
    assert_same_bits(parameter.data, np.array([0, 1, 2], np.float32))
    assert not np.asarray(parameter.grad).any()
    if kind != "bytearray":
        assert_same_bits(array, np.array([0, 1, 2], np.float32))


def test_file_of_pyarrow_mapped_read_only_is_not_touched(tmp_path: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    path = str(tmp_path / "weights.arrow")
    batch = pa.record_batch([pa.array([1.0, 2.0, 3.0])], names=["w"])
    with pa.ipc.new_file(path, batch.schema) as file:
        file.write_batch(batch)
    with pa.memory_map(path) as source:
        column = pa.ipc.open_file(source).get_batch(0).column(0)
        with pytest.raises(ValueError, match=r"^data: the array .* is read-only"):
            sgdcore.Parameter(column)
        w = np.zeros(3)
        sgdcore.SGD([w], lr=1).step(grads=[column])
        np.testing.assert_array_equal(w, [-1, -2, -3])


def test_capsule_of_another_major_version_is_refused() -> None:
    with pytest.raises(BufferError, match=r"^DLPack tensor: expected version 1, got 2$"):
        sgdcore.Parameter(_shares(Version2))


def test_scalar_swapped_in_is_refused() -> None:
    """NumPy's scalars offer their memory, but only a copy could be updated."""
    parameter = sgdcore.Parameter(np.array(1, np.float32))
    with pytest.raises(TypeError, match=r"^data: expected a NumPy array, got float32 np\.float32"):
        parameter.data = np.float32(2)
    parameter.grad = np.float32(0.5)
    sgdcore.SGD([parameter], lr=1).step(zero_grad=True)
    assert parameter.data == 0.5


# --- Byte order -------------------------------------------------------------------------------------


def _of_ctypes(values: Array) -> Array:
    return np.ctypeslib.as_array((ctypes.c_float * 3)(*values))


def _of_raw_array(values: Array) -> Any:
    return np.ctypeslib.as_array(multiprocessing.RawArray("f", values.tolist()))


def _swapped_twice(values: Array) -> Array:
    foreign = values.dtype.newbyteorder()
    return values.byteswap().view(foreign).byteswap().view(foreign.newbyteorder())


NATIVE: dict[str, Callable[[Array], Any]] = {
    "ctypes": _of_ctypes,
    "object of ctypes": lambda values: (ctypes.c_float * 3)(*values),
    "RawArray": _of_raw_array,
    "object of multiprocessing": lambda values: multiprocessing.RawArray("f", values.tolist()),
    "swapped twice": _swapped_twice,
    "memoryview": lambda values: memoryview(_swapped_twice(values)),
    "spelled by its sign": lambda values: values.view("=f4"),
}


@pytest.mark.parametrize("kind", NATIVE)
def test_native_byte_order_however_it_is_spelled(kind: str) -> None:
    make = NATIVE[kind]
    values, grad = numbers(0, (3,)), numbers(1, (3,))
    spelled = make(values)
    for dtype in (getattr(spelled, "dtype", np.dtype("f4")), np.asarray(spelled).dtype):
        assert dtype.isnative
    parameter = sgdcore.Parameter(spelled)
    optimizer, reference = sgdcore.SGD([parameter], **FULL), ReferenceSGD([values], **FULL)
    parameter.grad = make(grad)
    optimizer.step()
    optimizer.step(grads=[make(grad)])
    optimizer.state[parameter]["momentum_buffer"] = np.asarray(
        make(optimizer.state[parameter]["momentum_buffer"])
    )
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0]["momentum_buffer"] = np.asarray(
        make(checkpoint["state"][0]["momentum_buffer"])
    )
    optimizer.load_state_dict(checkpoint)
    optimizer.step(grads=[grad])
    for _ in range(3):
        reference.step([grad])
    assert_same_bits(parameter.data, reference.params[0])
    assert np.asarray(spelled)[0] == parameter.data[0]


def test_buffer_over_spelled_memory() -> None:
    data, grad = _of_ctypes(numbers(0, (3,))), _of_ctypes(numbers(1, (3,)))
    buffer = sgdcore.ParameterBuffer({"w": 2, "b": 1}, data=data, grad=grad)
    values = sgdcore.ParameterBuffer({"w": _of_ctypes(numbers(0, (3,))), "b": numbers(2, (1,))})
    assert values.dtype == np.float32
    optimizer = sgdcore.SGD(buffer, **FULL)
    optimizer.step()
    reference = ReferenceSGD([numbers(0, (3,))], **FULL)
    reference.step([numbers(1, (3,))])
    assert_same_bits(data, reference.params[0])


@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_foreign_byte_order_is_refused(dtype: str) -> None:
    foreign = np.ones(3, STORAGE_TYPES[dtype]).astype(STORAGE_TYPES[dtype].newbyteorder())
    if foreign.dtype.isnative:
        pytest.skip("ml_dtypes has no other byte order")
    with pytest.raises(TypeError, match="in native byte order, got dtype"):
        sgdcore.Parameter(foreign)


# --- Numbers that are not all ---------------------------------------------------------------------------


class Metres(np.ndarray):
    """An array with a unit, as yt's."""

    units = "m"


class Logarithms(np.ndarray):
    """An array whose arithmetic is its own."""

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Plain(np.ndarray):
    """A subclass that adds a method."""

    unit = None

    def norm(self) -> float:
        return float(np.linalg.norm(self))


class Wrapped(Legacy):
    """A quantity around an array, whose attributes it passes on, as pint's."""

    units = "m"


def _astropy(array: Array) -> Any:
    return pytest.importorskip("astropy.units").Quantity(array, "m", dtype=array.dtype)


def _pint(array: Array) -> Any:
    return pytest.importorskip("pint").UnitRegistry().Quantity(array, "m")


MEANING: dict[str, tuple[Callable[[Array], Any], str]] = {
    "masked": (lambda a: np.ma.masked_less(a, 0), "MaskedArray, whose mask would be ignored; "),
    "masked nowhere": (np.ma.array, "MaskedArray, whose mask would be ignored; "),
    "unit": (lambda a: a.view(Metres), "Metres, whose unit would be lost; "),
    "arithmetic": (lambda a: a.view(Logarithms), "Logarithms, whose arithmetic is not NumPy's; "),
    "wrapped": (Wrapped, "Wrapped, whose unit would be lost; "),
    "astropy": (_astropy, "Quantity, whose unit would be lost; "),
    "pint": (_pint, "Quantity, whose unit would be lost; "),
}


@pytest.mark.parametrize("kind", MEANING)
def test_array_whose_meaning_would_be_lost_is_refused(kind: str) -> None:
    make, text = MEANING[kind]
    value = make(np.array([1, -2, 3], np.float32))
    parameter = sgdcore.Parameter(np.ones(3, np.float32))
    parameter.grad = np.ones(3, np.float32)
    optimizer = sgdcore.SGD([parameter], **FULL)
    optimizer.step()
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0] = {"momentum_buffer": value}
    places: dict[str, Callable[[], Any]] = {
        "data": lambda: sgdcore.Parameter(value),
        "grad": lambda: setattr(parameter, "grad", value),
        r"grads\[0\]": lambda: optimizer.step(grads=[value]),
        "momentum_buffer": lambda: optimizer.state[parameter].update(momentum_buffer=value),
        r"state_dict\['state'\]\[0\]\['momentum_buffer'\]": lambda: optimizer.load_state_dict(
            checkpoint
        ),
    }
    if isinstance(value, np.ndarray):
        places |= {
            r"params\[0\]": lambda: sgdcore.SGD([value]),
            r"parameters\['w'\]": lambda: sgdcore.ParameterBuffer({"w": value}),
        }
    for argument, give in places.items():
        with refused(TypeError, f"^{argument}: expected a plain array, got {text}", optimizer):
            give()
    if isinstance(value, np.ndarray):
        for argument in ("data", "grad"):
            with pytest.raises(TypeError, match=f"^{argument}: expected a plain array, got {text}"):
                sgdcore.ParameterBuffer({"w": 3}, **{argument: value})


@pytest.mark.parametrize("kind", ["subclass", "matrix", "memmap"])
def test_subclass_without_meaning_of_its_own_is_taken(kind: str, tmp_path: Any) -> None:
    def make() -> Array:
        if kind == "memmap":
            return np.memmap(tmp_path / "w", np.float32, "w+", shape=(2, 2))
        return np.zeros((2, 2), np.float32).view(Plain if kind == "subclass" else np.matrix)

    values = make()
    values[...] = 3
    parameter = sgdcore.Parameter(values)
    parameter.grad = np.ones((2, 2), np.float32).view(type(values))
    sgdcore.SGD([parameter], lr=1).step()
    assert parameter.data is values
    assert (np.asarray(values) == 2).all()


def test_learning_rate_with_a_mask_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^lr: expected a plain array, got MaskedArray"):
        sgdcore.SGD([np.ones(2)], lr=np.ma.array([0.1], mask=[True]))


# --- bfloat16 without its name ------------------------------------------------------------------------


def test_bfloat16_that_savez_wrote_is_explained(tmp_path: Any) -> None:
    parameter = sgdcore.Parameter(numbers(0, (3,), BFLOAT16))
    parameter.grad = numbers(1, (3,), BFLOAT16)
    optimizer = sgdcore.SGD([parameter], **FULL)
    optimizer.step()
    momentum = optimizer.state[parameter]["momentum_buffer"]
    np.savez(tmp_path / "state.npz", momentum=momentum)
    with np.load(tmp_path / "state.npz") as saved:
        nameless = saved["momentum"]
    assert nameless.dtype == "V2"
    hint = r"restore it with array\.view\(ml_dtypes\.bfloat16\)$"
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0] = {"momentum_buffer": nameless}
    with refused(TypeError, rf"\['momentum_buffer'\]: expected one of .*; .*{hint}", optimizer):
        optimizer.load_state_dict(checkpoint)
    for give in (
        lambda: optimizer.state[parameter].update(momentum_buffer=nameless),
        lambda: setattr(parameter, "grad", nameless),
        lambda: sgdcore.SGD([nameless]),
        lambda: sgdcore.ParameterBuffer({"w": nameless}),
    ):
        with refused(TypeError, hint, optimizer):
            give()
    checkpoint["state"][0] = {"momentum_buffer": nameless.view(ml_dtypes.bfloat16)}
    optimizer.load_state_dict(checkpoint)
    assert_same_bits(optimizer.state[parameter]["momentum_buffer"], momentum)
