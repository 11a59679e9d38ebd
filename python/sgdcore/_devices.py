"""CUDA devices: loading the module that drives them, saying what is missing, and finding the stream to use."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from sgdcore import _core

__all__ = ["CPU", "current_stream", "load_runtime", "reason_against", "status"]

CPU = _core.cpu_device  # the CPU's number among devices; CUDA's count from 0

_BUILT_WITHOUT = (
    "this installation of sgdcore has no CUDA module, because no CUDA compiler (nvcc 12 or newer) was found when it "
    "was built, or SGDCORE_CUDA=OFF was set"
)


def _import_module() -> Any:
    try:
        return importlib.import_module("sgdcore._cuda")
    except ModuleNotFoundError as error:
        if error.name != "sgdcore._cuda":
            raise
        raise RuntimeError(_BUILT_WITHOUT) from None
    except ImportError as error:
        raise RuntimeError(f"sgdcore's CUDA module cannot be loaded: {error}") from error


def load_runtime() -> None:
    """Give the core the CUDA runtime.

    Raises:
        RuntimeError: saying what is missing: the module, the driver, or a device.
    """
    _core.use_runtime(_import_module().runtime)


def status() -> dict[str, Any]:
    """Return whether the CUDA module was built, whether it can be used, and why not; for `build_info`."""
    try:
        module = _import_module()
    except RuntimeError as error:
        return {"cuda_built": False, "cuda": False, "cuda_reason": str(error)}
    found: dict[str, Any] = {
        "cuda_built": True,
        "cuda_compiler": module.compiler,
        "cuda_architectures": module.architectures.split(),
    }
    try:
        if not _core.has_runtime():
            load_runtime()
        names = [_core.device_name(device) for device in range(_core.device_count())]
    except RuntimeError as error:
        return {**found, "cuda": False, "cuda_reason": str(error)}
    return {**found, "cuda": True, "cuda_reason": "", "cuda_devices": names}


def reason_against() -> str:
    """Return why CUDA cannot be used; an empty string if it can."""
    try:
        _core.device_count()
    except RuntimeError as error:
        return str(error)
    return ""


def current_stream(array: Any, device: int) -> int:
    """Return the address of the stream that the array's library uses on the device; 0 is the default stream."""
    library = type(array).__module__.partition(".")[0]
    module = sys.modules.get(library)
    if module is None or library not in ("cupy", "torch"):
        return 0
    if library == "torch":
        return int(module.cuda.current_stream(device).cuda_stream)
    with module.cuda.Device(device):
        return int(module.cuda.get_current_stream().ptr)
