"""Arrays of either kind, NumPy's and torch's, as flat pieces of memory.

Indexing, slicing, ``a[...] = b`` and the in-place operators mean the same for both, so that the rest of the package is
written once; what differs is here. Every piece is a view: nothing is moved, nothing is rebound.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from sgdcore import _core
from sgdcore._arrays import storage_dtype

__all__ = [
    "address",
    "alike",
    "all_finite",
    "array_namespace",
    "compute_dtype",
    "copied",
    "copy_all",
    "copy_into",
    "count_change",
    "dtype_name",
    "element_strides",
    "empty",
    "flat",
    "is_torch",
    "item_bytes",
    "join",
    "overlap",
    "reorder",
    "runs",
    "scale",
    "shaped",
    "store",
    "zero_nonfinite",
    "zeros_like",
]

# Elements that are handled at a time where each is needed twice: they stay in the processor's cache.
BLOCK = 1 << 17

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


def is_torch(array: Any) -> bool:
    """Return whether something is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


@cache
def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of NumPy or torch, or a name as it is."""
    if isinstance(dtype, str):
        return dtype
    name = str(dtype)
    return name.removeprefix("torch.") if name.startswith("torch.") else np.dtype(dtype).name


def item_bytes(dtype: str) -> int:
    """Return the size of an element."""
    return ITEM_BYTES[dtype]


def compute_dtype(dtype: str) -> str:
    """Return the dtype in which the core computes with values of a dtype: float32 for 16-bit ones, else their own."""
    return "float64" if dtype == "float64" else "float32"


def address(array: Any) -> int:
    """Return where the array begins."""
    return int(array.data_ptr() if is_torch(array) else array.__array_interface__["data"][0])


def flat(array: Any, label: str) -> Any:
    """Return a 1-d view of all elements, in the order of memory.

    Raises:
        TypeError: if it is no dense array.
        ValueError: if there are gaps between its elements.
    """
    if is_torch(array):
        return _flat_tensor(array.detach(), label)
    view = array.transpose(_axes(array)).reshape(-1)
    if not view.flags.c_contiguous or (array.size and not np.shares_memory(view, array)):
        raise ValueError(f"{label}: expected an array without gaps, got strides {array.strides}")
    return view


def _flat_tensor(tensor: Any, label: str) -> Any:
    torch = sys.modules["torch"]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise TypeError(
            f"{label}: expected a dense tensor of torch's own type, got {type(tensor).__name__} ({tensor.layout})"
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if dtype_name(tensor.dtype) not in ITEM_BYTES:
        raise TypeError(f"{label}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.is_contiguous():
        return tensor.view(-1)
    tensor = tensor.permute(_axes(tensor))
    if not tensor.is_contiguous():
        raise ValueError(f"{label}: expected a tensor without gaps, got strides {tensor.stride()}")
    return tensor.view(-1)


def _axes(array: Any) -> list[int]:
    """Return the axes in the order of memory, the outermost first."""
    if len(array.shape) < 2:
        return list(range(len(array.shape)))
    strides = array.stride() if is_torch(array) else array.strides
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


def reorder(values: Any, before: Any, after: Any) -> None:
    """Bring flat values from the order in memory of one array into that of another one of its shape, in place."""
    source, target = shaped(copied(values), before), shaped(values, after)
    target[...] = source


def shaped(values: Any, like: Any) -> Any:
    """Return flat values as a view in the shape of an array, whose `flat` view has the same order."""
    if is_torch(like) and like.is_complex():
        like = sys.modules["torch"].view_as_real(like)
    axes = _axes(like)
    view = values.reshape([like.shape[axis] for axis in axes])
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return view.permute(back) if is_torch(view) else view.transpose(back)


def empty(like: Any, size: int, dtype: str) -> Any:
    """Return new memory of the same kind, on the same device; on huge pages if it is large."""
    large = size * item_bytes(dtype) >= 2 * _core.huge_page
    if is_torch(like):
        torch = sys.modules["torch"]
        kind = getattr(torch, dtype)
        if large and like.device.type == "cpu":
            words = _core.allocate(-(-size * item_bytes(dtype) // 8), np.dtype(np.int64))
            return torch.from_numpy(words).view(kind)[:size]
        return torch.empty(size, dtype=kind, device=like.device)
    numpy_dtype = np.dtype(dtype) if dtype == "int64" else storage_dtype(dtype)
    return _core.allocate(size, numpy_dtype) if large else np.empty(size, numpy_dtype)


def count_change(array: Any) -> None:
    """Tell autograd that a tensor was changed: of what an engine writes torch may know nothing."""
    if is_torch(array):
        from sgdcore.torch._interface import increment_versions

        increment_versions([array])


def zeros_like(array: Any, dtype: Any = None) -> Any:
    """Return zeros in the array's shape and order in memory, of its dtype or another one."""
    if is_torch(array):
        return sys.modules["torch"].zeros_like(array, dtype=dtype)
    return np.zeros_like(array, dtype=None if dtype is None else storage_dtype(dtype))


def element_strides(array: Any) -> list[int]:
    """Return the strides in elements, of the axes that have more than one."""
    if len(array.shape) == 0:
        return []
    strides = array.stride() if is_torch(array) else [s // array.itemsize for s in array.strides]
    return [stride for stride, n in zip(strides, array.shape, strict=True) if n != 1]


def copied(array: Any) -> Any:
    """Return a copy of an array; of None, None."""
    if array is None:
        return None
    return array.clone() if is_torch(array) else array.copy("K")


def zero_nonfinite(array: Any) -> None:
    """Set what is not finite to 0, in place."""
    if is_torch(array):
        array.nan_to_num_(0.0, 0.0, 0.0)
    else:
        np.nan_to_num(array, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def store(array: Any, values: Any) -> None:
    """Copy a NumPy array's values into an array of either kind."""
    array[...] = sys.modules["torch"].from_numpy(values.copy()) if is_torch(array) else values


def array_namespace(array: Any) -> Any:
    """Return the module with ``add``, ``subtract``, ``multiply`` and ``divide`` for arrays of this kind."""
    return sys.modules["torch"] if is_torch(array) else np


def copy_into(target: Any, source: Any) -> None:
    """``target[...] = source``, at less cost for a small tensor."""
    if is_torch(target):
        target.copy_(source)
    else:
        target[...] = source


def copy_all(targets: Sequence[Any], sources: Sequence[Any]) -> None:
    """Copy each source into its target, at less cost for many small tensors."""
    if targets and is_torch(targets[0]):
        sys.modules["torch"]._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target[...] = source


def scale(array: Any, factor: float, look: bool = False) -> bool:
    """Multiply an array by a number, in place.

    Args:
        array: a flat view.
        factor: the number.
        look: look whether the products are finite, while they are in the processor's cache.

    Returns:
        Whether all products were finite; True where they were not looked at.
    """
    number = factor if is_torch(array) else array.dtype.type(factor)
    multiply = array_namespace(array).multiply
    if not look:
        if factor != 1:
            multiply(array, number, out=array)
        return True
    finite = True
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK]
        if factor != 1:
            multiply(block, number, out=block)
        finite = finite and all_finite(block)
    return finite


def all_finite(array: Any) -> bool:
    """Return whether all elements are finite."""
    # A sum takes a fraction of the time that looking at each element does; it may overflow, and is then looked into.
    with np.errstate(all="ignore"):
        if math.isfinite(float(array.sum())):
            return True
    return bool(array_namespace(array).isfinite(array).all())


def runs(views: Sequence[Any]) -> list[list[int]]:
    """Return the positions of flat views, those together that lie side by side in one allocation."""
    starts, ends = _extents(views)
    # Most small arrays lie apart, which the addresses tell at less cost than `_adjacent`.
    touching = (ends[:-1] == starts[1:]).tolist()
    result: list[list[int]] = [[0]] if views else []
    for i, touches in enumerate(touching, 1):
        if touches and _adjacent(views[i - 1], views[i]):
            result[-1].append(i)
        else:
            result.append([i])
    return result


def overlap(views: Sequence[Any]) -> tuple[int, int] | None:
    """Return the positions of two flat views that have memory in common, or None."""
    starts, ends = _extents(views)
    order = np.argsort(starts, kind="stable")
    order = order[ends[order] > starts[order]]  # empty ones have no memory
    # Where any two overlap, so do two that follow each other.
    found = np.flatnonzero(ends[order][:-1] > starts[order][1:])
    if len(found) == 0:
        return None
    i, j = (int(order[found[0] + k]) for k in (0, 1))
    return min(i, j), max(i, j)


def _extents(views: Sequence[Any]) -> tuple[Any, Any]:
    """Return where the memory of flat views begins and ends."""
    starts = np.array([address(view) for view in views], np.int64)
    return starts, starts + np.array([view.nbytes for view in views], np.int64)


def join(views: Sequence[Any]) -> Any:
    """Return one flat view over views side by side, or None if they are not."""
    if len(views) == 1:
        return views[0]
    if not all(_adjacent(a, b) for a, b in pairwise(views)):
        return None
    first, size = views[0], sum(len(view) for view in views)
    if is_torch(first):
        return first.as_strided((size,), (1,), first.storage_offset())
    whole = first.base.reshape(-1)
    start = (address(first) - address(whole)) // first.itemsize
    return whole[start : start + size]


def _adjacent(a: Any, b: Any) -> bool:
    """Return whether `b` begins where `a` ends, as parts of what a single view can span."""
    if a.dtype != b.dtype or len(a) == 0 or len(b) == 0:
        return False
    if is_torch(a):
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
            return False
        return bool(a.storage_offset() + len(a) == b.storage_offset())
    base = a.base
    return (
        isinstance(base, np.ndarray)
        and base is b.base
        and base.dtype == a.dtype
        and base.flags.c_contiguous
        and address(a) + a.nbytes == address(b)
    )


def alike(views: Sequence[Any], dtype: str | None = None) -> list[Any]:
    """Return new flat views of the same sizes, those of one dtype and device side by side.

    Args:
        views: flat views.
        dtype: for all of them; their own if None.
    """
    names = [dtype or dtype_name(view.dtype) for view in views]
    keys = [
        (name, view.device if is_torch(view) else None)
        for name, view in zip(names, views, strict=True)
    ]
    totals: dict[Any, int] = {}
    for key, view in zip(keys, views, strict=True):
        totals[key] = totals.get(key, 0) + len(view)
    first = dict(zip(reversed(keys), reversed(views), strict=True))
    memory = {key: empty(first[key], total, key[0]) for key, total in totals.items()}
    starts = dict.fromkeys(totals, 0)
    result = []
    for key, view in zip(keys, views, strict=True):
        start = starts[key]
        starts[key] = start + len(view)
        result.append(memory[key][start : starts[key]])
    return result
