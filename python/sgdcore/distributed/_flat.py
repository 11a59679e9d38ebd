"""Arrays of either kind, NumPy's and torch's, as flat pieces of memory.

Indexing, slicing, ``a[...] = b`` and the in-place operators mean the same for both kinds, so that the rest of the
package is written once. What differs is here. Every flat piece is a view: no array is moved or rebound.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
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


@cache
def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of NumPy or torch, or a name as it is."""
    if isinstance(dtype, str):
        return dtype
    name = str(dtype)
    return name.removeprefix("torch.") if name.startswith("torch.") else np.dtype(dtype).name


def compute_dtype(dtype: str) -> str:
    """Return the dtype in which the core computes with values of a dtype: float32 for 16-bit ones, else their own."""
    return "float64" if dtype == "float64" else "float32"


def wire_name(dtype: str, wire: str | None = None) -> str:
    """Return the dtype on the wire for arrays of a dtype: 16-bit ones are added up in float32 unless `wire` says so."""
    if wire is not None and ITEM_BYTES[wire] <= ITEM_BYTES[dtype]:
        return wire
    return compute_dtype(dtype)


# Views


def flat(array: Any, label: str) -> Any:
    """Return a 1-d view of all elements, in the order of memory; raise a TypeError or a ValueError if none is."""
    if is_torch(array):
        torch = sys.modules["torch"]
        kind, layout = type(array), array.layout
        if kind not in (torch.Tensor, torch.nn.Parameter) or layout is not torch.strided:
            raise TypeError(f"{label}: expected a dense torch.Tensor, got {kind} ({layout})")
        array = array.detach() if array.requires_grad else array
        array = torch.view_as_real(array) if array.is_complex() else array
        if array.is_contiguous():
            return array.view(-1)
        ordered = array.permute(_axes(array.stride()))
        contiguous = ordered.is_contiguous()
    else:
        ordered = array if array.flags.c_contiguous else array.transpose(_axes(array.strides))
        contiguous = ordered.flags.c_contiguous
    if not contiguous:
        raise ValueError(
            f"{label}: expected memory without gaps, got {strides_of(array)} as strides"
        )
    return ordered.reshape(-1)


def _axes(strides: Sequence[int]) -> list[int]:
    """Return the axes in the order of memory, the outermost first."""
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


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


def beside(kept: Sequence[Any], data: Sequence[Any], dtypes: Iterable[Any]) -> list[Any]:
    """Return what is kept beside arrays, in their order in memory now; zeros of these dtypes for those without any."""
    laid = [laid_out(each, like) for each, like in zip(kept, data, strict=False)]
    return laid + [zeros_like(data[i], d) for i, d in enumerate(dtypes) if i >= len(laid)]


def _extents(views: Sequence[Any]) -> tuple[Array, Array]:
    """Return where the memory of flat views begins and ends."""
    if views and is_torch(views[0]):
        addresses = [view.data_ptr() for view in views]
    else:
        addresses = [view.__array_interface__["data"][0] for view in views]
    starts = np.array(addresses, np.int64)
    return starts, starts + np.array([view.nbytes for view in views], np.int64)


def runs(views: Sequence[Any], groups: Sequence[int] | None = None) -> list[list[int]]:
    """Return the positions of flat views, those together that lie side by side in one allocation, and in one group."""
    starts, ends = _extents(views)
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
    if len(views) > 1 and len(runs(views)) > 1:
        return None
    first, size = views[0], sum(len(view) for view in views)
    if is_torch(first):
        return first.as_strided((size,), (1,))
    return np.lib.stride_tricks.as_strided(first, (size,), first.strides)


def bits(array: Any) -> Any:
    """Return a flat view as integers, whose sums with zeros are exact."""
    integer = "int32" if ITEM_BYTES[dtype_name(array.dtype)] == 4 else "int64"
    return array.view(getattr(sys.modules["torch"] if is_torch(array) else np, integer))


def overlap(views: Sequence[Any]) -> tuple[int, int] | None:
    """Return the positions of two flat views that have memory in common, or None."""
    starts, ends = _extents(views)
    order = np.argsort(starts, kind="stable")
    order = order[ends[order] > starts[order]]  # empty ones have no memory
    # Where any two overlap, so do two that follow each other.
    found = np.flatnonzero(ends[order][:-1] > starts[order][1:])
    if len(found) == 0:
        return None
    first, second = sorted(order[found[0] :][:2].tolist())
    return first, second


# Memory


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
    """Return a copy of a NumPy array, as an array of another one's kind on its device."""
    if not is_torch(like):
        return array.copy()
    return sys.modules["torch"].from_numpy(array.copy()).to(like.device)


def concatenate(views: Sequence[Any], target: Any) -> None:
    """Copy flat views one after the other into an array."""
    if is_torch(target):
        sys.modules["torch"].cat(views, out=target)
    else:
        np.concatenate(views, out=target, casting="unsafe")


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


# Values


def count_change(array: Any) -> None:
    """Tell autograd that a tensor was changed: of what an engine writes torch may know nothing."""
    if is_torch(array):
        from sgdcore.torch._interface import increment_versions

        increment_versions([array])


def zero_nonfinite(array: Any) -> None:
    """Set what is not finite to 0, in place."""
    if is_torch(array):
        array.nan_to_num_(0.0, 0.0, 0.0)
    else:
        np.nan_to_num(array, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def scale(array: Any, factor: float, look: bool = False) -> bool:
    """Multiply a flat view of float32 or float64, in place; return whether that is finite, if `look` says so."""
    finite = True
    if is_torch(array) and array.device.type == "cpu":
        array = array.numpy()
    block_size = len(array) if is_torch(array) else BLOCK
    for start in range(0, len(array), block_size or 1):
        block = array[start : start + block_size]
        if factor != 1:
            block *= factor
        finite = finite and (not look or all_finite(block))
    return finite


def all_finite(array: Any) -> bool:
    """Return whether all elements of a flat view are finite."""
    # Their squares' sum takes a fraction of the time of a look at each; it may overflow, and is then looked into.
    fast = not is_torch(array) and array.dtype.char in "fd"
    with np.errstate(all="ignore"):
        if math.isfinite(float(np.dot(array, array) if fast else array.sum())):
            return True
    return bool((sys.modules["torch"] if is_torch(array) else np).isfinite(array).all())
