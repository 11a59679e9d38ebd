"""Steps over tensors that the core does not read by itself: turned into such as it does.

The core takes dense tensors of torch's own types, on the CPU or a CUDA device, whose momentum is there already.
Everything else comes here: first steps, sparse and complex tensors, views with gaps, tensor subclasses, shared memory.
Each parameter is prepared as a `_Update` whose tensors the core can read (aliases of the user's memory, or copies that
are written back); nothing is changed before all are prepared and found acceptable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim.sgd import sgd as torch_sgd

from sgdcore import _core, _devices
from sgdcore._devices import CPU
from sgdcore.torch import _interface
from sgdcore.torch._interface import STORAGE_TYPES

__all__ = ["Scaling", "as_tensor", "factor_of", "has_own_operations", "label_of", "step"]

_HYPERPARAMETERS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
_COMPLEX_MOMENTUM = {torch.float64: torch.complex128, torch.float32: torch.complex64}


class Scaling:
    """A GradScaler's found_inf and scale that stay on the device; see DeviceInterface in the core.

    Attributes:
        pending: momentum buffers that a step may have left empty, since the device decides whether it happens; each
            with the flags that say where, which the device clears.
    """

    def __init__(self, found_inf: Tensor | None, scale: Tensor | None) -> None:
        self.found_inf = found_inf
        self.scale = scale
        self.pending: dict[Tensor, Tensor] = {}
        self._held: list[Tensor] = []

    def __call__(self, device: int) -> tuple[Any, Any]:
        if device == CPU:  # parameters on the CPU have to wait for the numbers
            return self.on_host()
        return self._address(self.found_inf, device), self._address(self.scale, device)

    def on_host(self) -> tuple[bool, float]:
        """Return whether the step is to be left out, and the factor of the gradients."""
        left_out = self.found_inf is not None and float(self.found_inf) != 0
        return left_out, 1.0 if self.scale is None else factor_of(self.scale)

    def _address(self, tensor: Tensor | None, device: int) -> int:
        if tensor is None:
            return 0
        there = _interface.on_device(tensor.detach().float(), device)
        self._held.append(there)  # until the step is on its stream
        return there.data_ptr()


def as_tensor(number: Any) -> Tensor:
    """Return a tensor as it is, where torch.as_tensor would move it to the default device."""
    return number if isinstance(number, Tensor) else torch.tensor(number, device="cpu")


def factor_of(scale: Any) -> float:
    """Return what undoes a scale, as GradScaler.unscale_ computes it."""
    return float(as_tensor(scale).double().reciprocal().float())


@dataclass
class _Update:
    """One parameter's part of a step."""

    label: str
    parameter: Tensor  # as the user has it, as is `momentum`
    momentum: Tensor | None
    group: int
    first: bool
    pending: Tensor | None = None  # flags of a momentum buffer that the device may leave empty
    # What the core is given; None if there is nothing to compute: tensors on the meta device and
    # fake ones, which stand for a model whose memory is being planned.
    arguments: tuple[Tensor, Tensor, Tensor | None] | None = None
    by_torch: bool = False  # the parameter has operations of its own, which torch's code calls
    # What brings the core's results back to the user's tensors, where it worked on copies.
    write_back: list[Callable[[], object]] = field(default_factory=list)

    def item(self) -> tuple[Tensor, Tensor, Tensor | None, int, bool, int]:
        assert self.arguments is not None
        flags = 0 if self.pending is None else self.pending.data_ptr()
        return (*self.arguments, self.group, self.first, flags)


def step(
    plan: _core.TorchPlan,
    groups: list[dict[str, Any]],
    state: dict[Any, Any],
    grad_factor: float,
    scaling: Scaling | None = None,
    pending: Mapping[Tensor, Tensor] | None = None,
    place: tuple[int, int] = (0, 0),
) -> None:
    """Update all parameters that have a gradient, of whatever kind they are.

    Args:
        plan: reads the tensors.
        groups: the optimizer's, or a part of one of them.
        state: the optimizer's.
        grad_factor: multiplies every gradient.
        scaling: what takes its place on devices.
        pending: the flags of momentum buffers that earlier steps may have left empty. New ones go to
            `scaling.pending`.
        place: where `groups` begins in the optimizer's: the index of the group, and of the parameter in it.

    Raises:
        TypeError, ValueError: naming the parameter that cannot be updated; before anything is changed.
    """
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        updates = [
            _prepare(plan, group, index, position, place, parameter, state.get(parameter, {}))
            for index, group in enumerate(groups)
            for position, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
    by_torch = [update for update in updates if update.by_torch]
    if (
        by_torch
    ):  # first: an operation that the subclass lacks is found before anything else is changed
        _step_by_torch(groups, by_torch, state, grad_factor, scaling)
        updates = [update for update in updates if not update.by_torch]
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        real = [update for update in updates if update.arguments is not None]
        for update in real:
            _await_device(update, scaling, pending or {})
        items = [update.item() for update in real]
        # Copies of memory that others share would miss what is written to it meanwhile.
        copies_are_current = not any(update.write_back for update in real) or _all_apart(real)
        if copies_are_current and plan.run_items(
            groups, items, grad_factor, dry_run=False, scaling=scaling
        ):
            for update in real:
                for write in update.write_back:
                    write()
        else:
            _step_in_sequence(plan, groups, real, grad_factor, scaling)
        changed = []
        for update in updates:
            changed.append(update.parameter)
            if update.momentum is not None:
                state.setdefault(update.parameter, {})["momentum_buffer"] = update.momentum
                changed.append(update.momentum)
        _interface.increment_versions(changed)


def _step_by_torch(
    groups: list[dict[str, Any]],
    updates: list[_Update],
    state: dict[Any, Any],
    grad_factor: float,
    scaling: Scaling | None,
) -> None:
    """Step with torch's own loop, for subclasses that are no memory but operations."""
    if scaling is not None:
        left_out, grad_factor = scaling.on_host()
        if left_out:
            return
    with torch.no_grad():
        for update in updates:
            group, parameter = groups[update.group], update.parameter
            grad = _placed_like(parameter, parameter.grad, update.label)  # type: ignore[arg-type]
            buffers = [update.momentum]
            torch_sgd(
                [parameter],
                [grad if grad_factor == 1 else grad * grad_factor],
                buffers,
                has_sparse_grad=False,
                foreach=False,
                fused=False,
                **{name: group[name] for name in _HYPERPARAMETERS},
            )
            momentum, dtype = buffers[0], _interface.dtype_of(group.get("momentum_dtype"))
            if momentum is not None:
                if update.first and dtype is not None:
                    momentum = momentum.to(dtype)
                state.setdefault(parameter, {})["momentum_buffer"] = momentum


def _step_in_sequence(
    plan: _core.TorchPlan,
    groups: list[dict[str, Any]],
    updates: list[_Update],
    grad_factor: float,
    scaling: Scaling | None,
) -> None:
    """Step one parameter after the other, each seeing what those before it wrote, as torch's loop does.

    For parameters that share memory with each other or with gradients.
    """
    for update in updates:
        parameter, grad, *others = update.item()
        item = (parameter, grad.clone(), *others)
        if not plan.run_items(groups, [item], grad_factor, dry_run=True):
            raise ValueError(
                f"{update.label}: expected a momentum buffer and a parameter that do not overlap in memory"
            )
    for update in updates:
        if update.write_back:  # copies of what it was before the others
            update.write_back.clear()
            _arrange(plan, groups[update.group], update)
        parameter, grad, *others = update.item()
        item = (parameter, grad.clone(), *others)
        plan.run_items(groups, [item], grad_factor, dry_run=False, scaling=scaling)
        for write in update.write_back:
            write()


def _await_device(
    update: _Update, scaling: Scaling | None, pending: Mapping[Tensor, Tensor]
) -> None:
    """Give a momentum buffer flags if only the device knows whether its first step happens."""
    assert update.arguments is not None
    parameter, _, momentum = update.arguments
    if update.momentum is None or momentum is None:
        return
    update.pending = pending.get(update.momentum)
    device = _interface.device_index(parameter)
    if update.first and scaling is not None and scaling.found_inf is not None and device != CPU:
        count = -(-momentum.numel() // _core.chunk_size)
        update.pending = torch.ones(count, dtype=torch.uint8, device=momentum.device)
        scaling.pending[update.momentum] = update.pending


def _all_apart(updates: list[_Update]) -> bool:
    """Return False if some tensors may share memory: if they have the same storage."""
    seen = set()
    for update in updates:
        for tensor in (update.parameter, update.parameter.grad, update.momentum):
            if tensor is None:
                continue
            tensor = _plain(tensor, update.label)
            if tensor.layout is torch.strided and tensor.numel() > 0:
                address = tensor.untyped_storage().data_ptr()
                if address in seen:
                    return False
                seen.add(address)
    return True


def _prepare(
    plan: _core.TorchPlan,
    group: dict[str, Any],
    index: int,
    position: int,
    place: tuple[int, int],
    parameter: Tensor,
    values: Any,
) -> _Update:
    label = label_of(group, position, (place[0] + index, place[1] + position))
    if parameter.layout is not torch.strided:
        raise TypeError(f"{label}: expected a dense tensor, got one of layout {parameter.layout}")
    by_torch = has_own_operations(parameter)
    momentum: Tensor | None = None
    first = False
    if float(group["momentum"]) != 0:
        if not isinstance(values, dict):
            raise TypeError(f"the state of {label}: expected a dict, got {values!r}")
        momentum = values.get("momentum_buffer")
        if not (momentum is None or isinstance(momentum, Tensor)):
            raise TypeError(
                f"the momentum buffer of {label}: expected a tensor or None, got {momentum!r}"
            )
        first = momentum is None
        if momentum is None and not by_torch:
            momentum = _new_momentum(parameter, group, label)
    update = _Update(label, parameter, momentum, index, first, by_torch=by_torch)
    if not (by_torch or parameter.is_meta or isinstance(parameter, FakeTensor)):
        _arrange(plan, group, update)
    return update


def has_own_operations(tensor: Tensor) -> bool:
    """Tell whether the tensor, or this rank's part of a DTensor, wraps others and says what torch's operations do."""
    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        return has_own_operations(tensor._local_tensor)
    if type(tensor).__name__ == "AsyncCollectiveTensor":  # memory, once the collective is done
        return False
    return bool(type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__)


def label_of(group: dict[str, Any], position: int, place: tuple[int, int]) -> str:
    """Return what error messages call a parameter: its name, else its group's index and its position there."""
    names = group.get("param_names")
    if names is not None and position < len(names):
        return f"parameter '{names[position]}'"
    return f"param_groups[{place[0]}]['params'][{place[1]}]"


def _arrange(plan: _core.TorchPlan, group: dict[str, Any], update: _Update) -> None:
    """Find what the core is to be given."""
    parameter, momentum, label = update.parameter, update.momentum, update.label
    grad = parameter.grad
    assert grad is not None
    if momentum is not None and momentum.layout is not torch.strided:
        # As torch leaves it after sparse gradients.
        momentum = update.momentum = momentum.to_dense()
    p = _plain(parameter, label)
    g = _plain(_placed_like(parameter, grad, label), f"the gradient of {label}")
    b = None if momentum is None else _plain(momentum, f"the momentum buffer of {label}")
    for tensor, what in _named(label, p, g, b):
        _require_usable_device(tensor, what)
    if b is not None and b.device != p.device:
        raise ValueError(
            f"the momentum buffer of {label}: expected a tensor on {p.device}, where its parameter is now, got one on "
            f"{b.device}. Move a model before its optimizer takes a step; afterwards, "
            "optimizer.load_state_dict(optimizer.state_dict()) moves the state to where the parameters are"
        )
    for tensor, what in _named(label, p, g, b):
        if tensor.shape != p.shape:
            raise ValueError(
                f"{what}: expected shape {tuple(p.shape)}, the parameter's, got {tuple(tensor.shape)}"
            )
        if _was_freed(tensor):
            raise ValueError(
                f"{what}: expected a tensor with memory, got one whose memory was freed"
            )
    if g.layout is not torch.strided:
        if g.layout is torch.sparse_coo and g.sparse_dim() > 0 and _only_rows(group):
            _prepare_rows(update, p, g, b)
            p, g, b = update.arguments or (p, g, b)
        else:
            g = g.to_dense()
    p, g, b = _real(update, p, g, b)
    for tensor, what in _named(label, p, g, b):
        if tensor.dtype not in STORAGE_TYPES:
            expected = ", ".join(STORAGE_TYPES.values())
            raise TypeError(f"{what}: expected one of {expected} or complex, got {tensor.dtype}")
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(
            f"{label}: expected elements with memory of their own, got an expanded tensor"
        )
    if p.is_neg() or not plan.is_dense(p):
        p = _staged(update, p, p.resolve_neg().contiguous())
    if b is not None and (b.is_neg() or b.stride() != p.stride()):
        b = _staged(update, b, torch.empty_like(p, dtype=b.dtype).copy_(b))
    update.arguments = (p, g.resolve_neg(), b)


def _named(label: str, p: Tensor, g: Tensor, b: Tensor | None) -> Iterator[tuple[Tensor, str]]:
    """Yield parameter, gradient and momentum buffer, if there is one, each with its name in error messages."""
    yield p, label
    yield g, f"the gradient of {label}"
    if b is not None:
        yield b, f"the momentum buffer of {label}"


def _was_freed(tensor: Tensor) -> bool:
    """Tell whether the storage was emptied under the tensor, as FSDP does with parameters that are elsewhere."""
    strided = tensor.layout is torch.strided and not tensor._is_zerotensor()
    return strided and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _require_usable_device(tensor: Tensor, what: str) -> None:
    index = _interface.device_index(tensor)
    if index == CPU:
        return
    if index is None:
        raise ValueError(
            f"{what}: expected a tensor on the CPU or CUDA, got one on {tensor.device}"
        )
    reason = _devices.reason_against()
    if reason:
        raise ValueError(
            f"{what}: expected a CPU tensor, got one on {tensor.device}, and CUDA cannot be used: {reason}"
        )


def _new_momentum(parameter: Tensor, group: dict[str, Any], label: str) -> Tensor:
    dtype = _interface.dtype_of(group.get("momentum_dtype")) or parameter.dtype
    if parameter.dtype.is_complex and not dtype.is_complex:
        if dtype not in _COMPLEX_MOMENTUM:
            raise TypeError(
                f"momentum_dtype: expected float32 or float64 for the complex {label}, got {dtype}"
            )
        dtype = _COMPLEX_MOMENTUM[dtype]
    if _interface.is_capturing():
        raise RuntimeError(
            f"{label} has no momentum buffer yet, and a graph would start with its first step at each replay: take a "
            "step before the capture"
        )
    # Zeros, for the rows that a lazy step leaves out.
    return _interface.empty_like(parameter, dtype).zero_()


def _placed_like(parameter: Tensor, grad: Tensor, label: str) -> Tensor:
    """Return a distributed gradient with the parameter's placements."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(parameter, distributed.DTensor):
        return grad
    if not isinstance(grad, distributed.DTensor):
        raise TypeError(
            f"the gradient of {label}: expected a DTensor as the parameter is, got {type(grad)}"
        )
    placed: Tensor = grad
    if grad.placements != parameter.placements or grad.device_mesh != parameter.device_mesh:
        placed = grad.redistribute(parameter.device_mesh, parameter.placements)
    return placed


def _plain(tensor: Tensor, label: str) -> Tensor:
    """Return a tensor of torch's own type over the same memory: this rank's part of a DTensor."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{label}: expected a tensor with memory of its own, got one inside of a transform such as vmap"
        )
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        local = tensor._local_tensor
        if hasattr(local, "wait"):  # a collective still under way
            local = local.wait()
        return _plain(local, label)
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"{label}: expected a tensor with memory of its own, or a DTensor, got {type(tensor)}"
        )
    return tensor.as_subclass(torch.Tensor)


def _only_rows(group: dict[str, Any]) -> bool:
    """Tell whether a sparse gradient leaves the rows it does not name as they are.

    Always so in the lazy mode, and where the dense result is the same: p - lr * 0 is p, unless maximize turns
    the zeros negative.
    """
    if group.get("sparse_mode", "dense") == "lazy":
        return True
    return (
        float(group["momentum"]) == 0
        and float(group["weight_decay"]) == 0
        and not group["maximize"]
    )


def _prepare_rows(update: _Update, p: Tensor, g: Tensor, b: Tensor | None) -> None:
    """Make the arguments copies of the rows that the sparse gradient names, to be put back afterwards."""
    g = g.coalesce()
    rows = tuple(g.indices())
    p_rows = p[rows]
    update.write_back.append(lambda: p.index_put_(rows, p_rows))
    b_rows = None
    if b is not None:
        b_rows = b[rows]
        update.write_back.append(lambda: b.index_put_(rows, b_rows))
    update.arguments = (p_rows, g.values(), b_rows)


def _real(
    update: _Update, p: Tensor, g: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return complex tensors as real ones, over the same memory where possible; real ones as they are."""
    if not p.is_complex():
        return p, g, b
    if not g.is_complex() or not (b is None or b.is_complex()):
        raise TypeError(
            f"{update.label}: expected a complex gradient and momentum buffer for a complex parameter"
        )
    if p.is_conj():
        p = _staged(update, p, p.resolve_conj())
    if b is not None and b.is_conj():
        b = _staged(update, b, b.resolve_conj())
    return (
        torch.view_as_real(p),
        torch.view_as_real(g.resolve_conj()),
        None if b is None else torch.view_as_real(b),
    )


def _staged(update: _Update, tensor: Tensor, copy: Tensor) -> Tensor:
    """Return the copy, to be written back to the tensor after the step."""
    # The innermost copy is written back first.
    update.write_back.insert(0, lambda: tensor.copy_(copy))
    return copy
