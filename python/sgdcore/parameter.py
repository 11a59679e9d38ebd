"""Parameters: arrays that an optimizer updates, with their gradients, separate or in one flat buffer."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype
from sgdcore._copies import attributes_of, set_attributes, writable
from sgdcore._devices import CPU
from sgdcore._hints import naming_allocation
from sgdcore.device_array import DeviceArray, device_number

__all__ = ["ArrayParameter", "Parameter", "ParameterBuffer"]

# ParameterBuffer's own attributes, which copies do not get.
_BUFFER_ATTRIBUTES = frozenset({"_data", "_device", "_dtype", "_grad", "_parameters"})

_DLPACK_CPU = (1, 0)  # kDLCPU and the number of the only CPU


class Parameter(_core.Parameter):
    """An array that an optimizer updates in place, and its gradient.

    Args:
        data: the values, float64, float32, float16 or bfloat16 (ml_dtypes) of any shape: an ndarray;
            an object that shares its memory through the buffer protocol or DLPack; or an array on a
            CUDA device, through DLPack or ``__cuda_array_interface__``. Writable and contiguous in any
            order of axes; never copied. An array must be plain: not masked, without a unit.
        name: shown in error messages.

    Attributes:
        data: the array that was given, or an ndarray over the memory of another object on the CPU.
            Assign another array of the same shape, dtype and layout to swap it.
        grad: the gradient, or None (the default: the optimizer skips the parameter). Assign an
            array of the parameter's shape, which is read in place; its dtype and strides may differ.
            ``grad += g`` adds to the gradient; while it is None, assign the first one.
        name: as given.
        device: the number of the CUDA device that holds ``data``; -1 for the CPU.
        buffer: the `ParameterBuffer` that the parameter is part of, or None.
        shape, dtype, size: those of ``data``.

    Copies and pickles keep the class and all attributes. Arrays that are unpickled over read-only memory are copied.

    Raises:
        TypeError: if an array has another dtype or is no plain array, or the name is no string.
        ValueError: if an array is read-only, not contiguous, or of another shape.

    Example:
        >>> w = Parameter(np.zeros(3, np.float32), name="w")
        >>> w.grad = np.ones(3, np.float32)
        >>> w
        Parameter(name='w', shape=(3,), dtype=float32)
    """

    # True if an optimizer made the parameter of an array; see Plan::require_reachable_grads.
    _made_of_array = False

    def __init__(self, data: Any, name: str = "") -> None:
        _check_name("name", name)
        super().__init__(data, name=name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``data``."""
        return self._description.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of ``data``."""
        return self._description.dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._description.size

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        if self.device != CPU:
            raise TypeError(
                f"{self}: it is on CUDA device {self.device}; copy it to the host first"
            )
        return np.array(self.data, dtype=dtype, copy=copy)

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        return _export(self.data, stream, max_version, dl_device, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _dlpack_device(self.data)

    def __repr__(self) -> str:
        name = f"name={self.name!r}, " if self.name else ""
        return f"Parameter({name}shape={self.shape}, dtype={self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a buffer's parameter comes from the copy of its buffer, so that both share memory again.
        if self.buffer is not None:
            return operator.getitem, (self.buffer, self.name)
        arguments = (type(self), self.data, self.grad, self.name)
        return _restore_parameter, arguments, self.__getstate__()


class ArrayParameter(Parameter):
    """The parameter that an optimizer makes of an array."""

    _made_of_array = True


class _BufferParameter(Parameter):
    """A parameter whose data and gradient are views into a ParameterBuffer.

    Assigning to ``grad`` copies into the buffer. None makes the optimizer skip the parameter until
    the next assignment.
    """

    def __init__(self, buffer: ParameterBuffer, name: str, data: Array, grad: Array) -> None:
        _core.Parameter.__init__(self, data, name=name, buffer=buffer, buffer_grad=grad)


def _restore_parameter(
    cls: type[Parameter], data: Array, grad: Array | None, name: str
) -> Parameter:
    # Without __init__: a subclass's may take other arguments.
    parameter = cls.__new__(cls)
    _core.Parameter.__init__(parameter, _writable(data), name=name)
    if grad is not None:
        parameter.grad = _writable(grad)
    return parameter


def _writable(array: Any) -> Any:
    return writable(array) if isinstance(array, np.ndarray) else array


class ParameterBuffer(Mapping[str, Parameter]):
    """Parameters side by side in one flat array, their gradients in another.

    An optimizer updates the whole buffer in one uninterrupted pass, with its momentum in a third flat
    array; the flat arrays also suit an all-reduce, a norm, or a file. Parameters follow each other
    without gaps, in the mapping's order. Memory is aligned to 64 bytes; from 4 MiB on it lies on
    transparent huge pages where the system offers them.

    Args:
        parameters: maps each name to a shape (values start at zero), or to an array whose values are copied.
        dtype: the parameters' dtype; default: the arrays' common one, else float32.
        grad_dtype: the gradients' dtype; default: the parameters'.
        data: memory to use for the parameters instead of allocating it: a contiguous 1-d array of
            exactly the total size. It keeps its values unless `parameters` holds arrays.
        grad: the same for the gradients.
        device: ``"cuda"``, ``"cuda:1"`` or a number from 0 on puts the buffer on a CUDA device. `data`, `grad` and all
            views are then `DeviceArray` objects, or the arrays that were given as `data` and `grad`. None (the
            default), ``"cpu"`` and -1 mean the CPU.

    Attributes:
        data: all parameters, 1-d.
        grad: all gradients, 1-d, zero at first. The gradients always exist: clear them with
            ``optimizer.zero_grad()`` or ``step(zero_grad=True)``.

    Views keep the memory alive, also after the buffer is gone. Copies and pickles have memory of their own, and keep
    the class and all attributes, those of the parameters included.

    Raises:
        TypeError: if a dtype is none of the four storage types, or arrays differ in dtype.
        ValueError: if a shape is invalid, or given memory has the wrong size or overlaps.

    Example:
        >>> buffer = ParameterBuffer({"w": (2, 3), "b": (3,)})
        >>> buffer["b"].data[:] = 1
        >>> buffer.data
        array([0., 0., 0., 0., 0., 0., 1., 1., 1.], dtype=float32)
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        dtype: DTypeLike | None = None,
        *,
        grad_dtype: DTypeLike | None = None,
        data: Any = None,
        grad: Any = None,
        device: str | int | None = None,
    ) -> None:
        if not isinstance(parameters, Mapping):
            raise TypeError(
                f"parameters: expected a mapping of names to shapes or arrays, got {type(parameters).__name__}"
            )
        shapes = {name: _shape_of(name, value) for name, value in parameters.items()}
        self._device = device_number(device)
        arrays = _arrays_in(parameters, self._device)
        if dtype is None and data is None:
            dtype = _common_dtype(arrays)
        size = sum(math.prod(shape) for shape in shapes.values())
        self._data = _flat_array("data", data, size, dtype, self._device)
        self._dtype = _description(self._data).dtype
        if grad_dtype is not None:
            grad_dtype = storage_dtype(grad_dtype, "grad_dtype")
        elif grad is None:
            grad_dtype = self._dtype
        self._grad = _flat_array("grad", grad, size, grad_dtype, self._device)
        if np.shares_memory(_description(self._data), _description(self._grad)):
            raise ValueError("grad: overlaps data in memory")
        self._parameters = self._views(shapes)
        self._take_values(arrays)

    def _views(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameter]:
        """Return parameters of these shapes, one behind the other in the flat arrays."""
        parameters: dict[str, Parameter] = {}
        start = 0
        for name, shape in shapes.items():
            part = slice(start, start + math.prod(shape))
            start = part.stop
            data, grad = self._data[part].reshape(shape), self._grad[part].reshape(shape)
            parameters[name] = _BufferParameter(self, name, data, grad)
        return parameters

    def _take_values(self, arrays: Mapping[str, Any]) -> None:
        """Copy each array into the parameter of the same name."""
        if self._device != CPU:
            for name, array in arrays.items():
                values = array.data if isinstance(array, Parameter) else array
                DeviceArray.of(self[name].data).assign(values)
            return
        # Arrays that lie in the buffer's own memory are copied before the first write.
        read = {n: np.array(v, copy=np.may_share_memory(v, self._data)) for n, v in arrays.items()}
        for name, values in read.items():
            # "unsafe", since NumPy does not count bfloat16 as a float.
            np.copyto(self[name].data, values, casting="unsafe")

    @property
    def data(self) -> Any:
        """All parameters, 1-d. Write in place, also by ``buffer.data += x``; the array cannot be replaced."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        self._refuse_other("data", value, self._data)

    @property
    def grad(self) -> Any:
        """All gradients, 1-d. Write in place, as `data`."""
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self._refuse_other("grad", value, self._grad)

    @staticmethod
    def _refuse_other(attribute: str, value: Any, own: Array) -> None:
        # ``buffer.grad += g`` assigns the buffer's own array.
        if value is not own:
            raise AttributeError(
                f"{attribute}: it belongs to the buffer and its parameters and cannot be replaced; "
                f"copy values into it with buffer.{attribute}[:] = ..., got {type(value).__name__}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The parameters' dtype."""
        return self._dtype

    @property
    def size(self) -> int:
        """The number of elements of all parameters."""
        return _description(self.data).size

    def parameters(self) -> list[Parameter]:
        """Return the parameters in order."""
        return list(self._parameters.values())

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """Return (name, parameter) pairs in order, as an optimizer takes them."""
        return list(self._parameters.items())

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    # Buffers are compared by identity, as parameters are. Mapping would compare contents.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        return _export(self.data, stream, max_version, dl_device, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _dlpack_device(self.data)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {p.shape}" for name, p in self.items())
        return f"ParameterBuffer({{{shapes}}}, dtype={self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        shapes = {name: parameter.shape for name, parameter in self.items()}
        without_grad = [name for name, parameter in self.items() if parameter.grad is None]
        data, grad = self.data, self.grad
        device: tuple[int, ...] = ()
        if self._device != CPU:
            data, grad = DeviceArray.of(data).numpy(), DeviceArray.of(grad).numpy()
            device = (self._device,)
        arguments = (type(self), shapes, data, grad, without_grad, *device)
        return _restore_buffer, arguments, self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        parameters = {name: attributes_of(each) for name, each in self.items()}
        return {
            "buffer": attributes_of(self, _BUFFER_ATTRIBUTES),
            "parameters": {name: state for name, state in parameters.items() if state},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_attributes(self, state["buffer"])
        for name, attributes in state["parameters"].items():
            set_attributes(self[name], attributes)

    @classmethod
    def _restore(
        cls, shapes: dict[str, tuple[int, ...]], data: Array, grad: Array, device: int
    ) -> Self:
        buffer = cls.__new__(cls)  # without __init__, as in _restore_parameter
        if device != CPU:
            ParameterBuffer.__init__(
                buffer, shapes, data.dtype, grad_dtype=grad.dtype, device=device
            )
            buffer.data.assign(data)
            buffer.grad.assign(grad)
            return buffer
        ParameterBuffer.__init__(buffer, shapes, data.dtype, grad_dtype=grad.dtype)
        buffer.data[...] = data
        buffer.grad[...] = grad
        return buffer


def _restore_buffer(
    cls: type[ParameterBuffer],
    shapes: dict[str, tuple[int, ...]],
    data: Array,
    grad: Array,
    without_grad: list[str],
    device: int = CPU,
) -> ParameterBuffer:
    buffer = cls._restore(shapes, data, grad, device)
    for name in without_grad:
        buffer[name].grad = None
    return buffer


def _check_name(argument: str, name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a string, got {_core.repr_text(name)}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{argument}: expected text that UTF-8 can encode, got {name!r}") from None


def _dlpack_device(array: Any) -> tuple[int, int]:
    if isinstance(array, np.ndarray):
        return _DLPACK_CPU
    device: tuple[int, int] = array.__dlpack_device__()
    return device


def _export(
    array: Any,
    stream: Any,
    max_version: tuple[int, int] | None,
    dl_device: tuple[int, int] | None,
    copy: bool | None,
) -> object:
    """Export an array as the array API standard demands of ``__dlpack__``."""
    if not isinstance(array, np.ndarray):
        shared: object = array.__dlpack__(
            stream=stream, max_version=max_version, dl_device=dl_device, copy=copy
        )
        return shared
    if stream is not None:
        raise BufferError(f"stream: memory on the CPU has none, got {stream!r}")
    if dl_device is not None and tuple(dl_device) != _DLPACK_CPU:
        raise BufferError(f"dl_device: expected the CPU, {_DLPACK_CPU}, got {dl_device!r}")
    versioned = max_version is not None and max_version >= (1, 0)
    return _core.to_dlpack(array.copy("K") if copy else array, versioned=versioned)


def _shape_of(name: Any, value: Any) -> tuple[int, ...]:
    """Return the shape that a value of the mapping gives."""
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"parameters: expected non-empty strings as names, got {_core.repr_text(name)}"
        )
    _check_name("parameters", name)
    if _is_array(value):
        return tuple(value.shape)
    try:
        shape = (
            (operator.index(value),)
            if not isinstance(value, tuple | list)
            else tuple(map(operator.index, value))
        )
    except TypeError:
        raise TypeError(
            f"parameters[{name!r}]: expected a shape or an array, got {_core.repr_text(value)}"
        ) from None
    if any(length < 0 for length in shape):
        raise ValueError(f"parameters[{name!r}]: negative length in shape {shape}")
    return shape


def _is_array(value: Any) -> bool:
    """Tell whether a value of the mapping is an array, rather than a shape."""
    return isinstance(value, np.ndarray | Parameter) or _core.is_on_device(value)


def _arrays_in(parameters: Mapping[str, Any], device: int) -> dict[str, Any]:
    """Return the arrays among the mapping's values. Raise if a buffer on the device cannot take one of them."""
    arrays = {name: value for name, value in parameters.items() if _is_array(value)}
    for name, array in arrays.items():
        on_device = not isinstance(array, np.ndarray) and _core.is_on_device(array)
        if device == CPU and on_device:
            raise ValueError(
                f"parameters[{name!r}]: on a CUDA device; say device= to put the buffer there"
            )
        _core.require_plain(array, f"parameters[{name!r}]")
        storage_dtype(array.dtype, f"parameters[{name!r}]")
    return arrays


def _common_dtype(arrays: Mapping[str, Any]) -> DTypeLike:
    """Return the arrays' common dtype; float32 without arrays."""
    found = {np.dtype(array.dtype) for array in arrays.values()}
    if len(found) > 1:
        names = ", ".join(sorted(str(each) for each in found))
        raise TypeError(f"parameters: arrays of several dtypes ({names}); say which with dtype=")
    return found.pop() if found else np.float32


def _description(array: Any) -> Array:
    """Return an ndarray as it is; for an array on a device the ndarray that describes it."""
    return array if isinstance(array, np.ndarray) else DeviceArray.of(array)._description


def _flat_array(argument: str, given: Any, size: int, dtype: DTypeLike | None, device: int) -> Any:
    """Return the given memory after checking it, or new zeros."""
    if given is None:
        return _zeros(argument, size, storage_dtype(dtype), device)
    _check_given(argument, given, size, None if dtype is None else storage_dtype(dtype), device)
    return given


def _zeros(argument: str, size: int, dtype: np.dtype[Any], device: int) -> Any:
    """Return a new flat array of zeros."""
    if device != CPU:
        return DeviceArray.zeros(size, dtype, device)
    with naming_allocation(argument, (size,), dtype):
        if size > sys.maxsize // dtype.itemsize:
            raise MemoryError("more than the address space")
        return _core.allocate(size, dtype)


def _check_given(
    argument: str, given: Any, size: int, dtype: np.dtype[Any] | None, device: int
) -> None:
    """Raise if the memory given for a buffer does not fit. If `dtype` is None, any storage type fits."""
    if device == CPU:
        if not isinstance(given, np.ndarray):
            raise TypeError(f"{argument}: expected a NumPy array, got {type(given).__name__}")
    elif not _core.is_on_device(given):
        raise TypeError(
            f"{argument}: expected an array on CUDA device {device}, got {type(given).__name__}"
        )
    elif DeviceArray.of(given).device != device:
        raise ValueError(
            f"{argument}: expected an array on CUDA device {device}, got one on {DeviceArray.of(given).device}"
        )
    _core.require_plain(given, argument)
    array = _description(given)
    if array.shape != (size,):
        raise ValueError(f"{argument}: expected shape ({size},), the total size, got {array.shape}")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(
            f"{argument}: expected a contiguous and writable array, got flags {array.flags}"
        )
    storage_dtype(array.dtype, argument)
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{argument}: expected dtype {dtype}, got {array.dtype}")
