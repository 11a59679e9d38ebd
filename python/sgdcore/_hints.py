"""What error messages tell of packages that are not installed, and of memory that cannot be had."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["naming_allocation", "needs"]


def needs(what: str, package: str, extra: str, error: ImportError) -> str:
    """Return the message for a package that cannot be imported: why, and how to install it, also from a clone."""
    return (
        f"{what} needs {package} ({error}): pip install 'sgdcore[{extra}]', "
        f"or pip install '.[{extra}]' in a clone of the repository"
    )


@contextmanager
def naming_allocation(
    what: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> Iterator[None]:
    """Raise a MemoryError of the block again with the array that was to be allocated."""
    try:
        yield
    except MemoryError as error:
        size = math.prod(shape) * dtype.itemsize
        message = f"{what}: cannot allocate {size} bytes, for shape {shape} and dtype {dtype}"
        raise MemoryError(message) from error
