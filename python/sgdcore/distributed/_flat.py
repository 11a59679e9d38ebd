"""Arrays of either kind, NumPy's and torch's, as flat pieces of memory.

Indexing, slicing, ``a[...] = b`` and the in-place operators mean the same for both, so that the rest of the package is
written once; what differs is here. Every piece is a view: nothing is moved, nothing is rebound.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype

# Elements that are handled at a time where each is needed twice: they stay in the processor's cache.
BLOCK = 1 << 16

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


def wire_name(dtype: str, wire: str | None = None) -> str:
    """Return the dtype on the wire for arrays of a dtype: 16-bit ones are added up in float32 unless `wire` says so."""
    if wire is not None and item_bytes(wire) <= item_bytes(dtype):
        return wire
    return compute_dtype(dtype)


def flat(array: Any, label: str) -> Any:
    """Return a 1-d view of all elements, in the order of memory; raise a TypeError or a ValueError if none is."""
    if isinstance(array, np.ndarray):
        ordered = array if array.flags.c_contiguous else array.transpose(_axes(array))
        if not ordered.flags.c_contiguous:
            raise ValueError(
                f"{label}: expected an array without gaps, got strides {array.strides}"
            )
        return ordered.reshape(-1)
    torch = sys.modules["torch"]
    if type(array) not in (torch.Tensor, torch.nn.Parameter) or array.layout is not torch.strided:
        raise TypeError(
            f"{label}: expected a dense tensor of torch's own type, got {type(array).__name__} ({array.layout})"
        )
    tensor = array.detach() if array.requires_grad else array
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if dtype_name(tensor.dtype) not in ITEM_BYTES:
        raise TypeError(f"{label}: expected a floating-point tensor, got {tensor.dtype}")
    if not tensor.is_contiguous():
        tensor = tensor.permute(_axes(tensor))
        if not tensor.is_contiguous():
            raise ValueError(
                f"{label}: expected a tensor without gaps, got strides {array.stride()}"
            )
    return tensor.view(-1)


def _axes(array: Any) -> list[int]:
    """Return the axes in the order of memory, the outermost first."""
    strides = array.stride() if is_torch(array) else array.strides
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


def shaped(values: Any, like: Any) -> Any:
    """Return flat values as a view in the shape of an array, whose `flat` view has the same order."""
    if is_torch(like) and like.is_complex():
        like = sys.modules["torch"].view_as_real(like)
    axes = _axes(like)
    view = values.reshape([like.shape[axis] for axis in axes])
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return view.permute(back) if is_torch(view) else view.transpose(back)


def reorder(values: Any, before: Any, after: Any) -> None:
    """Bring flat values from the order in memory of one array into that of another one of its shape, in place."""
    source, target = shaped(copied(values), before), shaped(values, after)
    target[...] = source


def element_strides(array: Any) -> list[int]:
    """Return the strides in elements, of the axes that have more than one."""
    if isinstance(array, np.ndarray):
        strides = [stride // array.itemsize for stride in array.strides]
    else:
        strides = array.stride()
    return [stride for stride, n in zip(strides, array.shape, strict=True) if n != 1]


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


def alike(views: Sequence[Any], dtype: str | None = None) -> list[Any]:
    """Return new flat views of the same sizes, of a dtype or their own, those of one dtype and device side by side."""
    keys = [(dtype or dtype_name(view.dtype), getattr(view, "device", None)) for view in views]
    result: list[Any] = [None] * len(views)
    for key in dict.fromkeys(keys):
        positions = [i for i, other in enumerate(keys) if other == key]
        ends = list(accumulate((len(views[i]) for i in positions), initial=0))
        memory = empty(views[positions[0]], ends[-1], key[0])
        for i, (start, stop) in zip(positions, pairwise(ends), strict=True):
            result[i] = memory[start:stop]
    return result


def zeros_like(array: Any, dtype: Any = None) -> Any:
    """Return zeros in the array's shape and order in memory, of its dtype or another one."""
    if is_torch(array):
        return sys.modules["torch"].zeros_like(array, dtype=dtype)
    return np.zeros_like(array, dtype=None if dtype is None else storage_dtype(dtype))


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
    if is_torch(source):
        copy_all(views, source.split(sizes))
    else:
        bounds = pairwise(accumulate(sizes, initial=0))
        copy_all(views, [source[start:stop] for start, stop in bounds])


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


def zero_nonfinite(array: Any) -> None:
    """Set what is not finite to 0, in place."""
    if is_torch(array):
        array.nan_to_num_(0.0, 0.0, 0.0)
    else:
        np.nan_to_num(array, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def scale(array: Any, factor: float, look: bool = False) -> bool:
    """Multiply a flat view of float32 or float64, in place; return whether that is finite, if `look` says so."""
    if is_torch(array):
        if array.device.type != "cpu":
            array *= factor
            return not look or all_finite(array)
        array = array.numpy()
    finite, number = True, array.dtype.type(factor)
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK]
        if factor != 1:
            np.multiply(block, number, out=block)
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


def addresses(arrays: Sequence[Any]) -> list[int]:
    """Return where each array begins."""
    if arrays and is_torch(arrays[0]):
        return [array.data_ptr() for array in arrays]
    return [array.__array_interface__["data"][0] for array in arrays]


def _extents(views: Sequence[Any]) -> tuple[Array, Array]:
    """Return where the memory of flat views begins and ends."""
    starts = np.array(addresses(views), np.int64)
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
    base = a.base
    return (
        isinstance(base, np.ndarray)
        and base is b.base
        and base.dtype == a.dtype
        and base.flags.c_contiguous
    )


def join(views: Sequence[Any]) -> Any:
    """Return one flat view over views side by side, or None if they are not."""
    first = views[0]
    if len(views) == 1:
        return first
    if len(runs(views)) > 1:
        return None
    size = sum(len(view) for view in views)
    if is_torch(first):
        return first.as_strided((size,), (1,), first.storage_offset())
    whole = first.base.reshape(-1)
    start = (addresses([first])[0] - addresses([whole])[0]) // first.itemsize
    return whole[start : start + size]


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
