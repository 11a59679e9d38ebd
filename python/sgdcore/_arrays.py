"""The storage types as NumPy's dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sgdcore import _core
from sgdcore._hints import needs

__all__ = ["Array", "as_tensor", "storage_dtype"]

Array = NDArray[Any]


def storage_dtype(dtype: DTypeLike | None, argument: str = "dtype") -> np.dtype[Any]:
    """Return the NumPy dtype of a storage type, which a name, or a type or dtype of NumPy or torch gives.

    Raises:
        TypeError: if `dtype` is none of float64, float32, float16, bfloat16 in native byte order.
        ImportError: for bfloat16, if ml_dtypes is not installed.
    """
    if type(dtype).__module__ == "torch":
        dtype = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError(
                needs("an array of bfloat16", "ml_dtypes", "bfloat16", error)
            ) from error
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    try:
        resolved = None if dtype is None else np.dtype(dtype)  # NumPy takes None for float64
    except Exception:  # noqa: BLE001 (NumPy asks for the repr of a bad value)
        resolved = None
    if resolved is None or resolved.name not in _core.storage_types or not resolved.isnative:
        expected = ", ".join(_core.storage_types)
        hint = "" if resolved is None else _core.dtype_hint(resolved)
        raise TypeError(
            f"{argument}: expected one of {expected}, got {_core.repr_text(dtype)}{hint}"
        )
    return resolved


def as_tensor(array: Array) -> Any:
    """Return a torch tensor that shares an array's memory. Imports torch."""
    import torch

    if array.dtype.name == "bfloat16":  # torch does not know NumPy's bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
