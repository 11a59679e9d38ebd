"""CUDA devices that are simulated on the CPU: the core's own code around the kernel's body, without a GPU.

The library is compiled from tests/cpp when it is first asked for, and kept for later runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from sgdcore import _core

CPP = Path(__file__).parent / "cpp"
SOURCES = [CPP / "simulated.cpp", CPP / "simulated_library.cpp"]
# The core that is tested may be built of other sources: see test_new_rule.py.
CORE = Path(os.environ.get("SGDCORE_TEST_SOURCES", CPP.parent.parent / "csrc"))
# Products and sums are not contracted, as in the core.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden")


@cache
def library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    headers = [*sorted(CORE.rglob("*.hpp")), SOURCES[0].with_suffix(".hpp")]
    digest = hashlib.sha256(version + " ".join(FLAGS).encode())
    for path in (*SOURCES, *headers):
        digest.update(path.read_bytes())
    path = Path(tempfile.gettempdir()) / f"sgdcore-simulated-{digest.hexdigest()[:20]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *FLAGS, f"-I{CORE}", *map(str, SOURCES)]
            subprocess.run([*command, "-o", str(built)], check=True)
            built.replace(path)
    found = ctypes.CDLL(str(path))
    found.simulated_capsule_name.restype = ctypes.c_void_p  # as an address: a capsule keeps it
    found.simulated_devices.restype = ctypes.c_void_p
    found.simulated_failure.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
    found.simulated_capture.argtypes = (ctypes.c_void_p, ctypes.c_bool)
    found.simulated_counts.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64))
    return found


class Simulated:
    """Devices that are the core's from now on; counts what they are told to do."""

    def __init__(self, devices: int = 2) -> None:
        self._runtime = library().simulated_devices(devices)
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        name = library().simulated_capsule_name()
        _core.use_runtime(new_capsule(self._runtime, name, None))

    def __getitem__(self, what: str) -> int:
        counts = (ctypes.c_int64 * 3)()
        library().simulated_counts(self._runtime, counts)
        return counts[("launches", "copies", "allocations").index(what)]

    def capture(self, begin: bool) -> None:
        """Begin to capture the default stream, or end that and drop what was captured."""
        library().simulated_capture(self._runtime, begin)

    def fail(self, call: str, device: int = -1) -> None:
        """Let a call fail from now on, on one device or on all; an empty name ends that."""
        library().simulated_failure(self._runtime, call.encode(), device)
