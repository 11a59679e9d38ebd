"""Data types of arrays: the four storage types, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Array", "as_tensor", "storage_dtype"]

Array = NDArray[Any]

_STORAGE_TYPES = ("float64", "float32", "float16", "bfloat16")


def storage_dtype(dtype: DTypeLike | None, argument: str = "dtype") -> np.dtype[Any]:
    """Return the NumPy dtype of one of the storage types, given by name, type or dtype, of NumPy or torch.

    Raises:
        TypeError: if it is none of float64, float32, float16, bfloat16 in native byte order.
        ImportError: for bfloat16, if ml_dtypes is not installed.
    """
    if type(dtype).__module__ == "torch":
        dtype = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            message = "bfloat16 arrays need the ml_dtypes package: pip install 'sgdcore[bfloat16]'"
            raise ImportError(message) from error
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    try:
        resolved = None if dtype is None else np.dtype(dtype)  # NumPy takes None for float64
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in _STORAGE_TYPES or not resolved.isnative:
        expected = ", ".join(_STORAGE_TYPES)
        raise TypeError(f"{argument}: expected one of {expected}, got {dtype!r}")
    return resolved


def as_tensor(array: Array) -> Any:
    """Return a torch tensor that shares an array's memory. Imports torch."""
    import torch

    if array.dtype.name == "bfloat16":  # which torch does not know as NumPy's
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
