"""Error messages for packages that are not installed, and for memory that cannot be allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["naming_allocation", "needs"]


def needs(what: str, package: str, extra: str, error: ImportError) -> str:
    """Return the message for a package that cannot be imported: the reason, and how to install the package."""
    return (
        f"{what} needs {package} ({error}): pip install 'sgdcore[{extra}]', "
        f"or pip install '.[{extra}]' in a clone of the repository"
    )


@contextmanager
def naming_allocation(
    what: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> Iterator[None]:
    """Replace a MemoryError of the block by one that names the array."""
    try:
        yield
    except MemoryError as error:
        size = math.prod(shape) * dtype.itemsize
        message = f"{what}: cannot allocate {size} bytes, for shape {shape} and dtype {dtype}"
        raise MemoryError(message) from error
