"""Steps over tensors that the core does not read by itself: turned into such as it does.

The core takes dense tensors of torch's own types, on the CPU or a CUDA device, whose momentum is there already, also as
parts of a DTensor, and sparse gradients where the rows without one stay as they are. Everything else comes here: first
steps, complex tensors, views with gaps, tensor subclasses with operations of their own, shared memory. The parameters
that are as usual go to the core the usual way, together with what was made of the others. Each of the others is
prepared as a `_Update` whose tensors the core can read (aliases of the user's memory, or copies that are written back);
nothing is changed before all are prepared and found acceptable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

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

    def memory(self) -> list[tuple[int, int, bool]] | None:
        """Return the ranges of memory behind copies: address, bytes, and whether it is written; None without copies."""
        if not self.write_back:
            return None
        tensors = (
            (self.parameter, True),
            (self.momentum, True),
            (self.parameter.grad, False),
        )
        return [
            (plain.data_ptr(), _reach(plain), written)
            for tensor, written in tensors
            if tensor is not None
            and (plain := _elements(_plain(tensor, self.label))).layout is torch.strided
            and plain.numel() > 0
        ]


# A parameter's position among all, the index of its group, and its position in that.
_Place = tuple[int, int, int]


class _Step:
    """A step of which the core leaves a part to Python.

    Attributes:
        updates: what is prepared, by the parameter's position among all.
        new: the parameters that lack only a momentum buffer, each with a new one, by position.
        in_sequence: positions of the updates that overlap others in memory: they step one after the other, at last.
        left_out: positions of the parameters that are not for the core to find; None for all.
    """

    def __init__(
        self,
        plan: _core.TorchPlan,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        grad_factor: float,
        scaling: Scaling | None,
        pending: Mapping[Tensor, Tensor],
        place: tuple[int, int],
    ) -> None:
        self.plan = plan
        self.groups = groups
        self.state = state
        self.grad_factor = grad_factor
        self.scaling = scaling
        self.pending = pending
        self.place = place
        self.updates: dict[int, _Update] = {}
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self.in_sequence: set[int] = set()
        self.left_out: set[int] | None = set()

    def all_places(self) -> list[_Place]:
        """Return where all parameters are: position among all, index of the group, position in it."""
        counts = (len(group["params"]) for group in self.groups)
        places = ((i, j) for i, count in enumerate(counts) for j in range(count))
        return [(position, i, j) for position, (i, j) in enumerate(places)]

    def prepare(self, places: Iterable[_Place]) -> None:
        """Prepare the parameters that have a gradient; the core leaves all of these alone."""
        for position, index, at in places:
            if self.left_out is not None:
                self.left_out.add(position)
            self.new.pop(position, None)
            group = self.groups[index]
            parameter = group["params"][at]
            if position not in self.updates and parameter.grad is not None:
                self.updates[position] = _prepare(
                    self.plan,
                    group,
                    index,
                    at,
                    self.place,
                    parameter,
                    self.state.get(parameter, {}),
                )

    def make_momenta(self, places: list[_Place]) -> None:
        """Make the momentum buffers of parameters that lack only them."""
        if not places:
            return
        _, index, at = places[0]
        _require_no_capture(_label_at(self.groups[index], index, at, self.place))
        empty_like, dtype_of = _interface.empty_like, _interface.dtype_of
        dtypes: dict[int, torch.dtype | None] = {}
        for position, index, at in places:
            group = self.groups[index]
            if index not in dtypes:
                dtypes[index] = dtype_of(group.get("momentum_dtype"))
            parameter = group["params"][at]
            momentum = empty_like(parameter, dtypes[index])
            if parameter.grad.layout is not torch.strided:
                momentum.zero_()  # for the rows that a lazy step leaves out
            self.new[position] = parameter, momentum

    def step_by_torch(self) -> None:
        """Step the parameters that have operations of their own."""
        positions = [position for position, update in self.updates.items() if update.by_torch]
        updates = [self.updates.pop(position) for position in sorted(positions)]
        _step_by_torch(self.groups, updates, self.state, self.grad_factor, self.scaling)

    def finish(self, overlapping: list[_Place], zero_grad: bool) -> bool:
        """Step all that is left. Return False if gradients are still to be set to zeros."""
        self.separate({place[0] for place in overlapping})
        cleared = self.run(zero_grad)
        self.note_updates()
        if not zero_grad:
            return True
        return cleared and self.left_out is not None and _clear(self.groups, self.left_out)

    def separate(self, positions: set[int]) -> None:
        """Have these updates step in sequence, or raise if one of them cannot be stepped at all."""
        for position in sorted(positions - self.in_sequence):
            update = self.updates.get(position)
            if update is not None and update.arguments is not None:
                self.in_sequence.add(position)
                _require_apart(self.plan, self.groups, update, self.grad_factor)

    def run(self, zero_grad: bool) -> bool:
        """Step the core's part and the updates. Return whether the core's gradients are cleared if they are to be."""
        clears = zero_grad
        while True:
            real = self._real()
            items = [
                (*update.item(), update.memory(), position in self.in_sequence)
                for position, update in real
            ]
            clears = clears and not self.in_sequence
            found = self.plan.run_beside(
                self.groups,
                self.state,
                clears,
                self.grad_factor,
                self.scaling,
                None if self.left_out is None else sorted(self.left_out),
                [(position, momentum) for position, (_, momentum) in self.new.items()],
                items,
            )
            if found is True:
                break
            if found is False:
                self.left_out = None
                self.prepare(self.all_places())
                continue
            odd, missing, overlapping, indices, clearable = found
            clears = clears and clearable
            self.prepare([*odd, *missing, *overlapping])
            self.separate({place[0] for place in overlapping} | {real[i][0] for i in indices})
        self._note_new()
        for position, update in real:
            if position not in self.in_sequence:
                for write in update.write_back:
                    write()
        for position in sorted(self.in_sequence):
            _step_alone(
                self.plan, self.groups, self.updates[position], self.grad_factor, self.scaling
            )
        return clears

    def _real(self) -> list[tuple[int, _Update]]:
        """Return the updates that have anything to compute, in the order of the parameters."""
        real = [(i, update) for i, update in sorted(self.updates.items()) if update.arguments]
        for _, update in real:
            _await_device(update, self.scaling, self.pending)
        return real

    def _note_new(self) -> None:
        for parameter, momentum in self.new.values():
            self.state.setdefault(parameter, {})["momentum_buffer"] = momentum

    def note_updates(self) -> None:
        """Put new momentum buffers into the state, and tell autograd of what was written."""
        changed = []
        for update in self.updates.values():
            changed.append(update.parameter)
            if update.momentum is not None:
                self.state.setdefault(update.parameter, {})["momentum_buffer"] = update.momentum
                changed.append(update.momentum)
        _interface.increment_versions(changed)


def step(
    plan: _core.TorchPlan,
    groups: list[dict[str, Any]],
    state: dict[Any, Any],
    grad_factor: float,
    found: Any,
    *,
    scaling: Scaling | None = None,
    pending: Mapping[Tensor, Tensor] | None = None,
    place: tuple[int, int] = (0, 0),
    zero_grad: bool = False,
) -> bool:
    """Update all parameters that have a gradient, of whatever kind they are.

    Args:
        plan: reads the tensors.
        groups: the optimizer's, or a part of one of them.
        state: the optimizer's.
        grad_factor: multiplies every gradient.
        found: what ``plan.run`` returned: what it found unusual.
        scaling: what takes the place of `grad_factor` on devices.
        pending: the flags of momentum buffers that earlier steps may have left empty. New ones go to
            `scaling.pending`.
        place: where `groups` begins in the optimizer's: the index of the group, and of the parameter in it.
        zero_grad: whether to set all gradients to zeros, too.

    Returns:
        False if gradients are still to be set to zeros.

    Raises:
        TypeError, ValueError: naming the parameter that cannot be updated; before anything is changed.
    """
    work = _Step(plan, groups, state, grad_factor, scaling, pending or {}, place)
    overlapping: list[_Place] = []
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if found is False:
            work.left_out = None
            work.prepare(work.all_places())
        else:
            odd, missing, overlapping, _, _ = found
            if scaling is not None:  # whose first steps the device may leave out
                odd, missing = [*odd, *missing], []
            work.prepare([*odd, *overlapping])
            work.make_momenta(missing)
        if not any(update.by_torch for update in work.updates.values()):
            return work.finish(overlapping, zero_grad)
    # First: an operation that a subclass lacks is found before anything else is changed.
    work.step_by_torch()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        return work.finish(overlapping, zero_grad)


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


def _require_apart(
    plan: _core.TorchPlan, groups: list[dict[str, Any]], update: _Update, grad_factor: float
) -> None:
    """Raise if an update cannot be computed whatever other parameters do."""
    item = update.item()
    if plan.run_items(groups, [item], grad_factor, dry_run=True):
        return
    item = (item[0], item[1].clone(), *item[2:])
    if not plan.run_items(groups, [item], grad_factor, dry_run=True):
        raise ValueError(
            f"{update.label}: expected a momentum buffer and a parameter that do not overlap in memory"
        )


def _step_alone(
    plan: _core.TorchPlan,
    groups: list[dict[str, Any]],
    update: _Update,
    grad_factor: float,
    scaling: Scaling | None,
) -> None:
    """Step a parameter that shares memory with others or with gradients: it sees what those before it wrote.

    One after the other, such parameters do what torch's loop does.
    """
    if update.write_back:  # copies of what it was before the others
        update.write_back.clear()
        _arrange(plan, groups[update.group], update)
    item = update.item()
    if not plan.run_items(groups, [item], grad_factor, dry_run=False, scaling=scaling):
        item = (item[0], item[1].clone(), *item[2:])  # which overlaps the parameter or its momentum
        plan.run_items(groups, [item], grad_factor, dry_run=False, scaling=scaling)
    for write in update.write_back:
        write()


def _clear(groups: list[dict[str, Any]], positions: Iterable[int]) -> bool:
    """Set the gradients of the parameters at these positions among all to zeros, as torch's zero_grad does."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    for position in positions:
        grad = parameters[position].grad
        if grad is None:
            continue
        if grad.grad_fn is not None:
            grad.detach_()
        else:
            grad.requires_grad_(False)
        grad.zero_()
    return True


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


def _elements(tensor: Tensor) -> Tensor:
    """Return the tensor that holds the elements: the values of a sparse one."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    compressed = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return tensor.values() if tensor.layout in compressed else tensor


def _reach(tensor: Tensor) -> int:
    """Return the number of bytes from a tensor's first element to behind its last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)  # none of torch's are negative
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _prepare(
    plan: _core.TorchPlan,
    group: dict[str, Any],
    index: int,
    position: int,
    place: tuple[int, int],
    parameter: Tensor,
    values: Any,
) -> _Update:
    label = _label_at(group, index, position, place)
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


def _label_at(group: dict[str, Any], index: int, position: int, place: tuple[int, int]) -> str:
    return label_of(group, position, (place[0] + index, place[1] + position))


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
    tensors = (p, g) if b is None else (p, g, b)
    if any(_interface.device_index(tensor) != CPU for tensor in tensors):
        for tensor, what in _named(label, p, g, b):
            _require_usable_device(tensor, what)
        if b is not None and b.device != p.device:
            raise ValueError(
                f"the momentum buffer of {label}: expected a tensor on {p.device}, where its parameter is now, got one "
                f"on {b.device}. Move a model before its optimizer takes a step; afterwards, "
                "optimizer.load_state_dict(optimizer.state_dict()) moves the state to where the parameters are"
            )
    shape = p.shape
    if any(tensor.shape != shape or _was_freed(tensor) for tensor in tensors):
        _refuse_shape(label, p, g, b)
    if g.layout is not torch.strided:
        if g.layout is torch.sparse_coo and g.sparse_dim() > 0 and _only_rows(group):
            _prepare_rows(update, p, g, b)
            p, g, b = update.arguments or (p, g, b)
        else:
            g = g.to_dense()
    p, g, b = _real(update, p, g, b)
    tensors = (p, g) if b is None else (p, g, b)
    if any(tensor.dtype not in STORAGE_TYPES for tensor in tensors):
        _refuse_dtype(label, p, g, b)
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(
            f"{label}: expected elements with memory of their own, got an expanded tensor"
        )
    if p.is_neg() or not plan.is_dense(p):
        p = _staged(update, p, p.resolve_neg().contiguous())
    if b is not None and (b.is_neg() or b.stride() != p.stride()):
        b = _staged(update, b, torch.empty_like(p, dtype=b.dtype).copy_(b))
    update.arguments = (p, g.resolve_neg(), b)


def _refuse_shape(label: str, p: Tensor, g: Tensor, b: Tensor | None) -> NoReturn:
    """Raise for a tensor of another shape than its parameter's, or without memory."""
    for tensor, what in _named(label, p, g, b):
        if tensor.shape != p.shape:
            raise ValueError(
                f"{what}: expected shape {tuple(p.shape)}, the parameter's, got {tuple(tensor.shape)}"
            )
        if _was_freed(tensor):
            break
    raise ValueError(f"{what}: expected a tensor with memory, got one whose memory was freed")


def _refuse_dtype(label: str, p: Tensor, g: Tensor, b: Tensor | None) -> NoReturn:
    """Raise for a tensor that has none of the core's types."""
    tensor, what = next(
        each for each in _named(label, p, g, b) if each[0].dtype not in STORAGE_TYPES
    )
    expected = ", ".join(STORAGE_TYPES.values())
    raise TypeError(f"{what}: expected one of {expected} or complex, got {tensor.dtype}")


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
    _require_no_capture(label)
    # Zeros, for the rows that a lazy step leaves out.
    return _interface.empty_like(parameter, dtype).zero_()


def _require_no_capture(label: str) -> None:
    if _interface.is_capturing():
        raise RuntimeError(
            f"{label} has no momentum buffer yet, and a graph would start with its first step at each replay: take a "
            "step before the capture"
        )


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
