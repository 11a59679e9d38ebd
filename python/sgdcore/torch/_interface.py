"""torch's functions for the core: reading a tensor's memory, and telling autograd of changes.

Only this module depends on the version of torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import torch

from sgdcore import _core
from sgdcore._devices import CPU
from sgdcore.torch._compile import refuse_fullgraph

__all__ = [
    "STORAGE_TYPES",
    "collapse_huge_pages",
    "device_index",
    "dtype_of",
    "empty_like",
    "exchange_api",
    "increment_versions",
    "is_capturing",
    "new_plan",
    "new_result",
    "on_device",
    "profiler_enabled",
]

# torch's dtypes of the core's storage types, with the core's names.
STORAGE_TYPES: dict[torch.dtype, str] = {getattr(torch, name): name for name in _core.storage_types}


_BY_NAME = {name: dtype for dtype, name in STORAGE_TYPES.items()}


def dtype_of(value: Any) -> Any:
    """Return torch's dtype for the name of a storage type. Any other value is returned as it is."""
    return _BY_NAME.get(value, value) if isinstance(value, str) else value


def device_index(tensor: torch.Tensor) -> int | None:
    """Return the number of the tensor's device, as `sgdcore.Parameter.device`; None if the core cannot read there."""
    if tensor.is_cpu:
        return CPU
    # In torch's builds for ROCm the type "cuda" means another company's devices.
    if tensor.device.type == "cuda" and torch.version.hip is None:
        return tensor.device.index
    return None


def on_device(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Return the tensor, or a copy on the CUDA device if the tensor is elsewhere. Does not wait."""
    if device_index(tensor) == index:
        return tensor
    return tensor.to(torch.device("cuda", index), non_blocking=True)


def is_capturing() -> bool:
    """Tell whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def new_result(device: int) -> torch.Tensor:
    """Return four zeros of float64 on a CUDA device.

    Raises:
        RuntimeError: if a graph is being captured, whose replays would make them zeros again.
    """
    if is_capturing():
        raise RuntimeError(
            "max_grad_norm, skip_nonfinite: take a step before the capture, which makes the memory of the norm"
        )
    return torch.zeros(4, dtype=torch.float64, device=torch.device("cuda", device))


def empty_like(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a new tensor laid out like a parameter, on huge pages if it is large."""
    # No argument where none is needed: an optimizer's first step makes this call for each parameter.
    memory = (
        torch.empty_like(parameter) if dtype is None else torch.empty_like(parameter, dtype=dtype)
    )
    if memory.nbytes >= 2 * _core.huge_page and _has_addresses(memory):
        _core.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def collapse_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Move tensors on the CPU to huge pages, if the system can. Values and addresses stay the same."""
    own = [t for t in tensors if type(t) in (torch.Tensor, torch.nn.Parameter)]
    # First a fast test, which most models fail: an optimizer of a thousand small parameters is made as fast as torch's.
    largest_item = 16  # bytes
    if largest_item * sum(map(torch.Tensor.numel, own)) < _core.huge_page:
        return
    _core.collapse_huge_pages(
        [
            (tensor.data_ptr(), tensor.nbytes)
            for tensor in own
            # Memory that processes share is left as it is.
            if _has_addresses(tensor)
            and tensor.untyped_storage().nbytes() >= _core.huge_page
            and _is_dense(tensor)
            and not tensor.is_shared()  # type: ignore[no-untyped-call]
        ]
    )


def _has_addresses(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is plain memory on the CPU."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Tell whether the elements fill one range of memory in C order or in one of torch's channels-last orders."""
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.is_contiguous() or (
        tensor.ndim in orders and tensor.is_contiguous(memory_format=orders[tensor.ndim])
    )


def current_stream(device: int) -> int:
    """Return the address of torch's current stream on a CUDA device."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # makes no object
    if raw is not None:
        return int(raw(device))
    return int(torch.cuda.current_stream(device).cuda_stream)


def _describe(
    tensor: torch.Tensor,
) -> tuple[int, tuple[int, ...], tuple[int, ...], str, int] | None:
    """Return address, shape, strides, storage type and device; None if the tensor is no plain memory."""
    device = device_index(tensor) if tensor.layout is torch.strided else None
    if device is None or tensor.dtype not in STORAGE_TYPES or tensor.is_neg():
        return None
    return (
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        STORAGE_TYPES[tensor.dtype],
        device,
    )


def increment_versions(tensors: list[torch.Tensor]) -> None:
    """Tell autograd that the tensors were changed. Inference tensors have no version and are left out."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def exchange_api() -> Any:
    """Return torch's DLPack C exchange API as a capsule; None if this version of torch lacks the API."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


# Names in torch's libraries, in the order of the core's TensorAccess.
_GETTERS = ("data_ptr", "sizes", "strides", "dim", "dtype", "device_type", "device_index", "layout")
_CODES = (
    *(f"dtype_{name}" for name in STORAGE_TYPES.values()),
    "device_type_cpu",
    "device_type_cuda",
    "layout_strided",
    "layout_sparse_coo",
)


# Names of C++ functions in torch's libraries, in the same order.
_BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
_GRAD = "_ZNK3c1010TensorImpl4gradEv"
_WRAP = "_Z16THPVariable_WrapRKN2at10TensorBaseE"
_PROFILER_ENABLED = "_ZN5torch8profiler4impl15profilerEnabledEv"

profiler_enabled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def _access() -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Return offset, addresses and codes of the core's TensorAccess; None where torch lacks them."""
    with torch.inference_mode(False):
        probe = torch.nn.Parameter(torch.ones(3, device="cpu"))
    offset = _offset_of_implementation(probe)
    if exchange_api() is None or offset is None:
        return None
    try:
        library = ctypes.PyDLL(torch._C.__file__)  # finds the symbols of linked libraries, too
        getters = [getattr(library, f"aoti_torch_get_{name}") for name in _GETTERS]
        codes = [getattr(library, f"aoti_torch_{name}")() for name in _CODES]
    except (AttributeError, OSError):
        return None
    handle, address = ctypes.c_void_p(id(probe) + offset), ctypes.c_void_p()
    if getters[0](handle, ctypes.byref(address)) != 0 or address.value != probe.data_ptr():
        return None
    functions = [*getters, *_cpp_functions(library, probe, handle)]
    addresses = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return offset, tuple(addresses), tuple(codes)


def _cpp_functions(library: ctypes.PyDLL, probe: torch.Tensor, handle: Any) -> list[Any]:
    """Return the C++ functions of the core's TensorAccess, with None in the place of those that fail on a probe."""
    names = (_BUMP_VERSION, _GRAD, _WRAP, _PROFILER_ENABLED)
    bump_version, grad, wrap, is_enabled = (getattr(library, name, None) for name in names)
    if bump_version is not None:
        bump_version(handle)
        if probe._version != 1:
            bump_version = None
    if grad is not None and wrap is not None and not _finds_grads(grad, wrap, probe):
        grad = None
    if is_enabled is not None:
        is_enabled.restype = ctypes.c_bool
        if is_enabled() != profiler_enabled():
            is_enabled = None
    return [bump_version, grad, wrap, is_enabled]


def _finds_grads(grad: Any, wrap: Any, probe: torch.Tensor) -> bool:
    """Tell whether the C++ functions give a tensor's gradient as the attribute does: None, and then a tensor."""
    grad.restype, wrap.restype = ctypes.c_void_p, ctypes.py_object
    for expected in (None, torch.zeros_like(probe.detach())):
        probe.grad = expected
        if wrap(ctypes.c_void_p(grad(ctypes.c_void_p(probe._cdata)))) is not expected:
            return False
    return True


def _offset_of_implementation(tensor: torch.Tensor) -> int | None:
    """Return the offset of the C++ tensor's address in the Python object; None if it is ambiguous."""
    word = ctypes.sizeof(ctypes.c_void_p)
    found = [
        offset
        for offset in range(object.__basicsize__, torch._C.TensorBase.__basicsize__, word)
        if ctypes.c_void_p.from_address(id(tensor) + offset).value == tensor._cdata
    ]
    return found[0] if len(found) == 1 else None


def _takes_lists(increment_version: Any) -> bool:
    """Tell whether torch's C function takes a list of tensors, as in recent versions."""
    with torch.inference_mode(False):  # tensors of inference mode have no versions
        probe = torch.empty(0, device="cpu")
    try:
        increment_version([probe])
    except (TypeError, RuntimeError):
        return False
    return bool(probe._version == 1)


# Found once, since each optimizer makes a plan.
_tensor_access = _access()


def _kind_of(kind: Any) -> int:
    """Return the core's TensorKind of a type other than Tensor and Parameter: 0 other, 1 plain, 2 distributed."""
    if not issubclass(kind, torch.Tensor) or kind.grad is not torch.Tensor.grad:
        return 0
    # A type with operations of its own need not be memory, and the step would run its code.
    if kind.__torch_function__ is not torch._C._disabled_torch_function_impl:
        return 0
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and kind is distributed.DTensor:
        return 2
    return int(kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__)


def new_plan(api: Any, rule: str) -> _core.TorchPlan:
    """Return a plan that reads tensors through `api`, or through their Python attributes if it is None.

    Args:
        api: what `exchange_api` returned, or None.
        rule: the rule's name.
    """
    increment_version = getattr(torch._C, "_increment_version", None)
    if increment_version is None or not _takes_lists(increment_version):
        increment_version = increment_versions
    return _core.TorchPlan(
        rule=rule,
        exchange_api=api,
        describe=_describe,
        access=_tensor_access,
        increment_version=increment_version,
        increment_version_where_possible=increment_versions,
        is_negated=torch.Tensor.is_neg,
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        grad_descriptor=torch.Tensor.grad,
        requires_grad_descriptor=torch.Tensor.requires_grad,
        kind_of=_kind_of,
        sparse_indices=torch.Tensor._indices,
        sparse_values=torch.Tensor._values,
        current_stream=current_stream,
        profiler_enabled=profiler_enabled,
        refuse_fullgraph=refuse_fullgraph,
    )
