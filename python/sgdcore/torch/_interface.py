"""What the core needs to know of torch: how to read a tensor's memory, and how to tell autograd of a change.

The only place that depends on which version of torch is installed.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from sgdcore import _core

__all__ = ["STORAGE_TYPES", "new_plan"]

# torch's types of what the core can store, by the core's names.
STORAGE_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def _describe(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], str] | None:
    """Return address, shape, strides and storage type; None for what is not plain memory on the CPU."""
    if (
        tensor.layout is not torch.strided
        or tensor.device.type != "cpu"
        or tensor.dtype not in STORAGE_TYPES
        or tensor.is_neg()
    ):
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), STORAGE_TYPES[tensor.dtype]


def _increment_versions(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _pin(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return an object whose C++ side refers to the tensor, but not to its memory; see TorchPlan::Entry.

    That is what a view does for its base. The view's own memory is taken away, so that it does not keep the
    tensor's alive once the user gives it other memory.
    """
    if torch.__future__.get_swap_module_params_on_conversion():
        return None  # swap_tensors refuses tensors with a second reference
    if tensor.is_inference() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return None  # has no version, or is not for the core to read
    with torch.no_grad():
        view = tensor.view_as(tensor)
        view.data = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return view


# The plans that pin tensors.
_pinning: weakref.WeakSet[_core.TorchPlan] = weakref.WeakSet()


def _unpin(phase: str, info: dict[str, int]) -> None:
    """Let a full garbage collection see through the pins."""
    if phase == "start" and info["generation"] == 2:
        for plan in list(_pinning):
            plan.unpin()


gc.callbacks.append(_unpin)


def exchange_api() -> Any:
    """Return torch's DLPack C exchange API as a capsule; None for versions of torch that lack it."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def _takes_lists(increment_version: Any) -> bool:
    """Tell whether torch's C function increments the versions of a whole list, as recent ones do."""
    probe = torch.empty(0, device="cpu")
    try:
        increment_version([probe])
    except (TypeError, RuntimeError):
        return False
    return bool(probe._version == 1)


def new_plan(api: Any, *, pins: bool = True) -> _core.TorchPlan:
    """Return a plan that reads tensors through `api`, or through their Python attributes if it is None.

    Args:
        api: what `exchange_api` returned, or None.
        pins: whether the plan may remember tensors by `_pin`.
    """
    increment_version = getattr(torch._C, "_increment_version", None)
    if increment_version is None or not _takes_lists(increment_version):
        increment_version = _increment_versions
    plan = _core.TorchPlan(
        exchange_api=api,
        describe=_describe,
        increment_version=increment_version,
        pin=_pin if pins and api is not None else None,
        is_negated=torch.Tensor.is_neg,
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        grad_descriptor=torch.Tensor.grad,
    )
    if pins:
        _pinning.add(plan)
    return plan
