"""The attributes that copies and pickles of sgdcore's objects keep."""

from __future__ import annotations

import weakref
from collections.abc import Container
from typing import Any

import numpy as np

from sgdcore._arrays import Array

__all__ = ["attributes_of", "set_attributes", "writable"]

_copies: dict[int, tuple[weakref.ref[Array], weakref.ref[Array]]] = {}


def writable(array: Array) -> Array:
    """Return the array, or a copy if its memory is read-only, as in a file that joblib maps or in a pickle's buffers.

    Calls with the same read-only array return the same copy, as long as the copy lives.
    """
    if array.flags.writeable:
        return array
    key = id(array)
    copy = _copies[key][1]() if key in _copies else None
    if copy is None:
        copy = np.array(array, order="K", copy=True)
        # The entry is removed when the array ends: another object may then get its id.
        _copies[key] = weakref.ref(array, lambda _: _copies.pop(key, None)), weakref.ref(copy)
    return copy


def attributes_of(value: object, own: Container[str] = ()) -> Any:
    """Return an object's state as pickle knows it, attributes and slots, without the `own` attributes of its class."""
    state = object.__getstate__(value)
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    kept = {name: each for name, each in (attributes or {}).items() if name not in own}
    return kept if slots is None else (kept, slots)


def set_attributes(value: object, state: Any) -> None:
    """Give an object the attributes and slots that `attributes_of` returned; None gives it none."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    vars(value).update(attributes or {})
    for name, each in (slots or {}).items():
        setattr(value, name, each)
