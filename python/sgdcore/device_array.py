"""Arrays in the memory of a CUDA device, to hold parameters, gradients and states and to exchange them."""

from __future__ import annotations

import math
import operator
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype
from sgdcore._devices import CPU, current_stream, load_runtime

__all__ = ["DeviceArray", "assign", "device_number"]

_KDLCUDA = 2  # DLPack's name for CUDA devices


def device_number(device: Any) -> int:
    """Return the number of a CUDA device; -1 for the CPU.

    Args:
        device: ``"cuda"``, ``"cuda:1"`` or a number from 0 on, whether there is such a device or not; or None,
            ``"cpu"`` or -1.

    Raises:
        ValueError: if `device` is none of these.
    """
    if device is None or device == "cpu":
        return CPU
    if isinstance(device, str):
        kind, _, number = device.partition(":")
        if kind == "cuda" and (number.isdecimal() or device == "cuda"):
            return int(number or 0)
    elif not isinstance(device, bool):
        try:
            index = operator.index(device)
        except TypeError:
            pass
        else:
            if index >= CPU:
                return index
    raise ValueError(
        "device: expected 'cpu', 'cuda', 'cuda:<number>', a number from 0 on or -1 for the CPU, "
        f"got {_core.repr_text(device)}"
    )


class DeviceArray:
    """An array on a CUDA device that shares its memory through ``__cuda_array_interface__`` and DLPack.

    The class has no arithmetic: ``cupy.asarray(array)`` or ``torch.from_dlpack(array)`` computes in place.

    Attributes:
        shape, dtype, size, nbytes, strides: as an ndarray's.
        device: the number of the device.

    Example (on a machine with a CUDA device)::

        array = DeviceArray.zeros((2, 3), "float32")
        array.assign(np.ones((2, 3)))
        array.numpy()
    """

    def __init__(self, description: Array, device: int, owner: Any) -> None:
        # An ndarray with the device's address. The host must not touch its elements.
        self._description = description
        self._owner = owner
        self.device = device

    @classmethod
    def zeros(
        cls, shape: int | tuple[int, ...], dtype: DTypeLike = "float32", device: int = 0
    ) -> Self:
        """Return a new array of zeros.

        Raises:
            RuntimeError: if CUDA cannot be used, with the reason.
        """
        return cls._allocate(
            (shape,) if isinstance(shape, int) else tuple(shape), dtype, device, True
        )

    @classmethod
    def empty(cls, size: int, dtype: DTypeLike, device: int) -> Self:
        """Return a new uninitialised 1-d array."""
        return cls._allocate((size,), dtype, device, False)

    @classmethod
    def empty_like(cls, array: Self, dtype: DTypeLike) -> Self:
        """Return an uninitialised array of a given dtype in the memory order of `array`, which is dense."""
        order = sorted(range(len(array.shape)), key=lambda axis: -array.strides[axis])
        shape = tuple(array.shape[axis] for axis in order)
        flat = cls._allocate(shape, dtype, array.device, False)
        description = flat._description.transpose(np.argsort(order))
        return cls(description, array.device, flat._owner)

    @classmethod
    def _allocate(cls, shape: tuple[int, ...], dtype: DTypeLike, device: int, zeros: bool) -> Self:
        resolved = storage_dtype(dtype)
        memory = _core.DeviceMemory(math.prod(shape) * resolved.itemsize, device, zeros)
        description = _core.describe_memory(memory.address, resolved, list(shape), memory)
        return cls(description, device, memory)

    @classmethod
    def of(cls, array: Any) -> Self:
        """Return an array over the memory of another array on a CUDA device.

        Raises:
            TypeError: if the dtype is none of the storage types.
            ValueError: if the array is not on a CUDA device, or CUDA cannot be used.
        """
        if isinstance(array, cls):
            return array
        if not _core.is_on_device(array):
            raise ValueError(f"array: expected one on a CUDA device, got {type(array).__name__}")
        description, device = _core.read_array(array, "array")
        return cls(description, device, array)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self._description.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides, in bytes."""
        return self._description.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype."""
        return self._description.dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._description.size

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self._description.nbytes

    def reshape(self, *shape: Any) -> Self:
        """Return a view of another shape.

        Raises:
            ValueError: if the array is not contiguous in C order, or the sizes differ.
        """
        if not self._description.flags.c_contiguous:  # NumPy would copy the elements, on the host
            raise ValueError(
                f"reshape: expected a contiguous array, this one has strides {self.strides}"
            )
        return type(self)(self._description.reshape(*shape), self.device, self._owner)

    def __len__(self) -> int:
        return len(self._description)

    def __getitem__(self, part: slice) -> Self:
        if not isinstance(part, slice):  # the host cannot read an element
            raise TypeError(
                f"DeviceArray: expected a slice, got {part!r}; numpy() copies the array to the host"
            )
        return type(self)(self._description[part], self.device, self._owner)

    def numpy(self) -> Array:
        """Return a copy on the host. Waits for the device.

        Raises:
            ValueError: if there are gaps between the elements.
        """
        self._require_dense("numpy")
        copy = np.empty_like(self._description)
        if self.size:
            _core.copy_array(copy, self._description, self.device, self._stream())
        return copy

    def assign(self, values: Any) -> None:
        """Copy values into the array.

        Args:
            values: an array-like on the host, or a dense array of this shape and dtype on the device.

        Raises:
            ValueError: if shapes, dtypes or memory orders do not match, an array is not contiguous, or this one is
                read-only.
        """
        self._require_writable("assign")
        if _core.is_on_device(values):
            source = DeviceArray.of(values)
            for what in ("shape", "dtype", "strides", "device"):
                own, other = getattr(self, what), getattr(source, what)
                if own != other:
                    raise ValueError(f"assign: expected an array of {what} {own}, got {other}")
            description = source._description
        else:
            description = np.empty_like(self._description)
            _core.require_plain(values, "assign")
            np.copyto(description, np.asarray(values), casting="unsafe")
        if self.size:
            _core.copy_array(self._description, description, self.device, self._stream())

    def fill_zero(self) -> None:
        """Set all elements to zero.

        Raises:
            ValueError: if there are gaps between the elements, or the array is read-only.
        """
        self._require_writable("fill_zero")
        _core.fill_zero(self._description, self.device, self._stream())

    def _require_writable(self, method: str) -> None:
        if not self._description.flags.writeable:
            raise ValueError(f"{method}: the array of shape {self.shape} is read-only")
        self._require_dense(method)

    def _require_dense(self, method: str) -> None:
        # What is copied and filled is one range of memory.
        if not _core.is_dense(self._description):
            raise ValueError(
                f"{method}: expected a contiguous array, this one has strides {self.strides}"
            )

    def _stream(self) -> int:
        return current_stream(self._owner, self.device)

    def __float__(self) -> float:
        return float(self.numpy().item())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.name == "bfloat16":
            raise AttributeError("__cuda_array_interface__ has no bfloat16; DLPack has")
        interface = dict(self._description.__array_interface__)
        return {
            "shape": self.shape,
            "typestr": interface["typestr"],
            "data": interface["data"],
            "strides": interface["strides"],
            "version": 3,
            "stream": None,
        }

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"dl_device: expected {self.__dlpack_device__()}, got {dl_device!r}")
        if copy:
            raise BufferError("copy: a DeviceArray shares its memory and does not copy it")
        versioned = max_version is not None and max_version >= (1, 0)
        return _core.to_dlpack(self._description, versioned=versioned, device=self.device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _KDLCUDA, self.device

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device='cuda:{self.device}')"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.numpy(), self.device)


def assign(target: Any, values: Any) -> None:
    """Copy values into an array of any library on a device."""
    DeviceArray.of(target).assign(values)


def _restore(values: Array, device: int) -> DeviceArray:
    array = DeviceArray.zeros(values.shape, values.dtype, device)
    array.assign(values)
    return array


# This is the lowest module that knows all functions that the core calls.
_core.use_functions(
    load_runtime=load_runtime,
    current_stream=current_stream,
    assign=assign,
    storage_dtype=storage_dtype,
)
