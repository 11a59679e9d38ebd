"""Process-wide settings, which are the threads and the instruction set, and facts of the build."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from sgdcore import _core, _devices

__all__ = ["build_info", "get_isa", "get_num_threads", "set_isa", "set_num_threads"]

# More than any system runs well. OpenMP ends the process where it cannot start the threads it is told to start.
_MOST_THREADS = 4096


def get_num_threads() -> int:
    """Return how many threads a large step uses.

    Unless `set_num_threads` chose a number, OpenMP's setting (``OMP_NUM_THREADS``, by default the
    number of cores). Always 1 in a forked child process. Results do not depend on it.
    """
    return _core.num_threads()


def set_num_threads(count: int) -> None:
    """Choose how many threads a large step uses; 0 follows OpenMP's setting again.

    Raises:
        TypeError: if `count` is no integer.
        ValueError: if it is negative or exceeds 4,096.
    """
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise TypeError(f"count: expected an integer, got {_core.repr_text(count)}")
    if not 0 <= count <= _MOST_THREADS:
        raise ValueError(
            f"count: expected a number of threads up to {_MOST_THREADS}, or 0 for the default, got {count}"
        )
    _core.set_num_threads(count)


def get_isa() -> str:
    """Return the name of the instruction set whose kernels are used, such as ``"x86-64-v3"``."""
    return _core.instruction_set()


def set_isa(isa: str | None) -> None:
    """Use the kernels of the named instruction set; None returns to the default.

    The default is what the environment variable ``SGDCORE_ISA`` names, else the best that the machine can run. Results
    do not depend on it.

    Raises:
        TypeError: if `isa` is neither a string nor None.
        ValueError: if this build has no such instruction set, or this machine cannot run it.
    """
    if isa is not None and not isinstance(isa, str):
        raise TypeError(f"isa: expected a string or None, got {_core.repr_text(isa)}")
    _core.use_instruction_set(isa or "")


def build_info() -> dict[str, Any]:
    """Return facts of the build and the settings in use, as ``python -m sgdcore info`` prints them.

    Keys: version, rules, isa (in use), isa_available, isa_built, threads, compiler, build_flags, cuda_built (whether
    the CUDA module was built), cuda (whether it can be used here), cuda_reason (why not), python, numpy. If the module
    was built, also cuda_compiler and cuda_architectures. If it can be used, also cuda_devices.
    """
    built = _core.instruction_sets()
    return {
        "version": _core.__version__,
        "rules": _core.rule_names(),
        "isa": _core.instruction_set(),
        "isa_available": [name for name, supported in built.items() if supported],
        "isa_built": list(built),
        "threads": _core.num_threads(),
        "compiler": _core.compiler,
        "build_flags": _core.build_flags,
        **_devices.status(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
