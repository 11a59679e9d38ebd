"""Arrays of either kind, NumPy's and torch's, as flat views of memory: what differs between the two is here."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype

# Elements that are handled at a time where each is needed twice: they stay in the processor's cache.
BLOCK = 1 << 16
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
FLOATS = ("float64", "float32", "float16", "bfloat16")


def is_torch(array: Any) -> bool:
    """Return whether something is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def library(array: Any) -> Any:
    """Return the module that has the functions for an array."""
    return sys.modules["torch"] if is_torch(array) else np


@cache
def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of NumPy or torch, or a name as it is."""
    if isinstance(dtype, str):
        return dtype
    name = str(dtype)
    return name.removeprefix("torch.") if name.startswith("torch.") else np.dtype(dtype).name


def wire_name(dtype: str, wire: str | None = None) -> str:
    """Return the dtype on the wire, and that of sums: `wire` if it is no wider; else 16-bit ones take float32."""
    if wire is not None and ITEM_BYTES[wire] <= ITEM_BYTES[dtype]:
        return wire
    return "float64" if dtype == "float64" else "float32"


def check_array(array: Any) -> None:
    """Raise a TypeError or a ValueError for what an engine cannot reduce in its place."""
    flat(array, "array")
    if not (_is_contiguous(array) and (is_torch(array) or array.flags.writeable)):
        raise ValueError("array: expected contiguous and writable memory")


def _is_contiguous(array: Any) -> bool:
    numpy = isinstance(array, np.ndarray)
    return bool(array.flags.c_contiguous if numpy else array.is_contiguous())


def flat(array: Any, label: str) -> Any:
    """Return a 1-d view of all elements, in the order of memory; raise a TypeError or a ValueError if none is."""
    if is_torch(array):
        torch = sys.modules["torch"]
        kind, layout = type(array), array.layout
        if kind not in (torch.Tensor, torch.nn.Parameter) or layout is not torch.strided:
            raise TypeError(f"{label}: expected a dense torch.Tensor, got {kind} ({layout})")
        array = array.detach() if array.requires_grad else array
        array = torch.view_as_real(array) if array.is_complex() else array
    elif not isinstance(array, np.ndarray):
        found = type(array).__name__
        raise TypeError(f"{label}: expected a NumPy array or a torch tensor, got {found}")
    if not _is_contiguous(array):
        strides = array.stride() if is_torch(array) else array.strides
        axes = sorted(range(array.ndim), key=lambda axis: -strides[axis])
        array = library(array).moveaxis(array, axes, list(range(array.ndim)))
        if not _is_contiguous(array):
            got = strides_of(array)
            raise ValueError(f"{label}: expected memory without gaps, got {got} as strides")
    return array.reshape(-1)


def strides_of(array: Any) -> list[int]:
    """Return the strides in elements, of the axes that have more than one."""
    numpy = isinstance(array, np.ndarray)
    strides = [s // array.itemsize for s in array.strides] if numpy else array.stride()
    return [stride for stride, n in zip(strides, array.shape, strict=True) if n != 1]


def laid_out(array: Any, like: Any) -> Any:
    """Return an array in the order in memory of another one of its shape: itself, or a copy."""
    if strides_of(array) == strides_of(like):
        return array
    ordered = zeros_like(like, array.dtype)
    ordered[...] = array
    return ordered


def extents(views: Sequence[Any]) -> tuple[Array, Array]:
    """Return where the memory of flat views begins and ends."""
    if views and is_torch(views[0]):
        addresses = [view.data_ptr() for view in views]
    else:
        addresses = [view.__array_interface__["data"][0] for view in views]
    starts = np.array(addresses, np.int64)
    return starts, starts + np.array([view.nbytes for view in views], np.int64)


def runs(
    views: Sequence[Any], groups: Sequence[int] | None = None, places: Any = None
) -> list[list[int]]:
    """Return the positions of flat views, those together that lie side by side in one allocation, and in one group."""
    starts, ends = extents(views) if places is None else places
    # Most small arrays lie apart, which the addresses tell at less cost than `_spannable`.
    touching = ends[:-1] == starts[1:]
    if groups is not None:
        touching &= np.diff(groups) == 0
    for i in np.flatnonzero(touching).tolist():
        touching[i] = _spannable(views[i], views[i + 1])
    bounds = [0, *(np.flatnonzero(~touching) + 1).tolist(), len(views)]
    return [list(range(start, stop)) for start, stop in pairwise(bounds)] if views else []


def _spannable(a: Any, b: Any) -> bool:
    """Return whether a single view can span two views, of which one begins where the other one ends."""
    if a.dtype != b.dtype or len(a) == 0 or len(b) == 0:
        return False
    if is_torch(a):
        return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
    return a.base is not None and a.base is b.base


def join(views: Sequence[Any]) -> Any:
    """Return one flat view over views side by side, or None if they are not."""
    first, size = views[0], sum([len(view) for view in views])
    starts, ends = extents([first, views[-1]])  # which tell most cases at once
    if ends[1] - starts[0] != size * first.itemsize or len(runs(views)) > 1:
        return None
    if is_torch(first):
        return first.as_strided((size,), (1,))
    return np.lib.stride_tricks.as_strided(first, (size,), first.strides)


def overlap(starts: Array, ends: Array) -> list[int]:
    """Return the positions of two views with these `extents` that have memory in common, if there are such."""
    order = np.argsort(starts, kind="stable")
    order = order[ends[order] > starts[order]]  # empty ones have no memory
    # Where any two overlap, so do two that follow each other.
    found = np.flatnonzero(ends[order][:-1] > starts[order][1:])
    return sorted(order[found[0] :][:2].tolist()) if len(found) else []


def empty(like: Any, size: int, dtype: str) -> Any:
    """Return new flat memory of an array's kind, on its device; on huge pages where the memory is the CPU's."""
    if not is_torch(like):
        return _core.allocate(size, np.dtype(dtype) if dtype == "int64" else storage_dtype(dtype))
    torch = sys.modules["torch"]
    if like.device.type != "cpu":
        return torch.empty(size, dtype=getattr(torch, dtype), device=like.device)
    words = _core.allocate(-(-size * ITEM_BYTES[dtype] // 8), np.dtype(np.int64))
    return torch.from_numpy(words).view(getattr(torch, dtype))[:size]


def zeros_like(array: Any, dtype: Any = None) -> Any:
    """Return zeros in the array's shape and order in memory, of its dtype or a real one, given by itself or by name."""
    if not is_torch(array):
        return np.zeros_like(array, dtype=None if dtype is None else storage_dtype(dtype))
    torch = sys.modules["torch"]
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and array.is_complex():
        dtype = dtype.to_complex()
    return torch.zeros_like(array, dtype=dtype)


def copied(array: Any) -> Any:
    """Return a copy of an array; of None, None."""
    if array is None:
        return None
    return array.clone() if is_torch(array) else array.copy("K")


def as_numpy(array: Any) -> Array:
    """Return an array or a tensor as an array: a view of memory of the CPU, a copy of any other."""
    result: Array = array.detach().cpu().numpy() if is_torch(array) else array
    return result


def as_kind(like: Any, array: Array) -> Any:
    """Return a NumPy array as an array of another one's kind on its device."""
    torch = sys.modules["torch"] if is_torch(like) else None
    return array if torch is None else torch.as_tensor(array, device=like.device)


def scatter(source: Any, views: Sequence[Any]) -> None:
    """Undo `concatenate`: copy an array's parts to the views."""
    sizes = [view.shape[0] for view in views]
    cut = source.split(sizes) if is_torch(source) else np.split(source, np.cumsum(sizes)[:-1])
    copy_all(views, cut)


def copy_all(targets: Sequence[Any], sources: Sequence[Any]) -> None:
    """Copy each source into its target, at less cost for many small tensors."""
    if targets and is_torch(targets[0]):
        sys.modules["torch"]._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target[...] = source


def count_change(array: Any) -> None:
    """Tell autograd that a tensor was changed: of what an engine writes torch may know nothing."""
    if is_torch(array):
        from sgdcore.torch._interface import increment_versions

        increment_versions([array])


def scale(array: Any, factor: float) -> bool:
    """Multiply a flat view of float32 or float64, in place; return whether the products are all finite."""
    finite = True
    if is_torch(array) and array.device.type == "cpu":
        array = array.numpy()
    block_size = len(array) if is_torch(array) else BLOCK
    for start in range(0, len(array), block_size or 1):
        block = array[start : start + block_size]
        if factor != 1:
            block *= factor
        finite = finite and all_finite(block)
    return finite


def all_finite(array: Any) -> bool:
    """Return whether all elements of a flat view are finite."""
    # Their squares' sum takes a fraction of the time of a look at each; it may overflow, and is then looked into.
    fast = not is_torch(array) and array.dtype.char in "fd"
    with np.errstate(all="ignore"):
        if math.isfinite(float(np.dot(array, array) if fast else array.sum())):
            return True
    return bool(library(array).isfinite(array).all())
