"""Steps with irregular parameters, whose tensors the core cannot read as they are.

The core reads dense tensors of torch's own types, or parts of a DTensor, on the CPU or a CUDA device, whose states
exist, and sparse gradients. Everything else is irregular: first steps, complex tensors, views with gaps, tensor
subclasses with operations of their own, shared memory. Each irregular parameter is prepared as an `_Update`, whose
tensors the core can read: aliases of the user's memory, or copies that are written back. The core steps the regular
parameters together with the prepared ones. Nothing is changed before all parameters are prepared and checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from sgdcore import _core, _devices
from sgdcore._averages import AVERAGE, Averages
from sgdcore._devices import CPU
from sgdcore._precision import PRECISION_STATES, rest_of
from sgdcore._rules import Rule, State
from sgdcore.torch import _averages, _interface, _precision
from sgdcore.torch._interface import STORAGE_TYPES

__all__ = [
    "Scaling",
    "Updater",
    "as_tensor",
    "factor_of",
    "has_own_operations",
    "label_of",
    "step",
]

_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


class Updater(NamedTuple):
    """The functions that update tensors.

    Attributes:
        plan: the core's plan.
        rule: the plan's rule.
        by_operations: ``by_operations(parameter, gradient, states, group)`` updates a tensor that has operations
            instead of memory, and returns its states. A state that takes no part, or that is new, is given as None.
        averages: the averages of the parameters, or None. Those of parameters that are prepared here, and new ones,
            move after the step.
    """

    plan: _core.TorchPlan
    rule: Rule
    by_operations: Callable[[Tensor, Tensor, _States, dict[str, Any]], _States]
    averages: Averages | None = None

    @property
    def clip_value(self) -> float | None:
        """The limit of each element of a gradient, or None."""
        clipping = self.plan.clipping
        return None if clipping is None else clipping.clip_value

    @property
    def norm_option(self) -> str | None:
        """The option that needs the norm of all gradients; None if none does."""
        clipping = self.plan.clipping
        if clipping is None or not clipping.asks_for_norm:
            return None
        return "skip_nonfinite" if clipping.max_norm is None else "max_grad_norm"


# One tensor for each of the rule's states; None for those that take no part.
_States = list[Tensor | None]


class Scaling:
    """A GradScaler's found_inf and scale, which stay on the device; see DeviceCallbacks in the core.

    Attributes:
        may_skip: whether the device decides if a step happens: by found_inf, or by the option skip_nonfinite.
        pending: the pending first steps, since the device decides whether a step happens: the first state of each
            parameter, with the flags that the device clears.
    """

    def __init__(
        self, found_inf: Tensor | None, scale: Tensor | None, may_skip: bool = False
    ) -> None:
        self.found_inf = found_inf
        self.scale = scale
        self.may_skip = may_skip or found_inf is not None
        self.pending: dict[Tensor, Tensor] = {}
        self._held: list[Tensor] = []

    def __call__(self, device: int) -> tuple[Any, Any]:
        if device == CPU:  # a step on the CPU has to wait for the numbers
            return self.on_host()
        return self._address(self.found_inf, device), self._address(self.scale, device)

    def on_host(self) -> tuple[bool, float]:
        """Return whether the step is skipped, and the factor of the gradients."""
        left_out = self.found_inf is not None and float(self.found_inf) != 0
        return left_out, 1.0 if self.scale is None else factor_of(self.scale)

    def _address(self, tensor: Tensor | None, device: int) -> int:
        if tensor is None:
            return 0
        there = _interface.on_device(tensor.detach().float(), device)
        self._held.append(there)  # kept until the step is on its stream
        return there.data_ptr()


def as_tensor(number: Any) -> Tensor:
    """Return a number as a tensor. Unlike torch.as_tensor, this does not move a tensor to the default device."""
    return number if isinstance(number, Tensor) else torch.tensor(number, device="cpu")


def factor_of(scale: Any) -> float:
    """Return the factor that undoes a scale, as GradScaler.unscale_ computes it."""
    return float(as_tensor(scale).double().reciprocal().float())


@dataclass
class _Update:
    """The prepared update of one irregular parameter."""

    label: str
    parameter: Tensor  # the user's own tensor, as are `states`
    states: _States
    group: int
    first: bool
    pending: Tensor | None = None  # the flags of a pending first step
    # The tensors for the core. None for tensors on the meta device and fake ones, which have nothing to compute: they
    # stand for a model whose memory is being planned.
    arguments: tuple[Tensor, Tensor, _States] | None = None
    by_torch: bool = False  # torch's operations update the parameter
    # Functions that copy the core's results back to the user's tensors.
    write_back: list[Callable[[], object]] = field(default_factory=list)

    def item(self, copies_grad: bool = False) -> tuple[Any, ...]:
        """Return the item for the core. A gradient that overlaps memory that the step writes has to be copied."""
        assert self.arguments is not None
        parameter, grad, states = self.arguments
        flags = 0 if self.pending is None else self.pending.data_ptr()
        grad = grad.clone() if copies_grad else grad
        return (parameter, grad, tuple(states), self.group, self.first, flags)

    def memory(self) -> list[tuple[int, int, bool]] | None:
        """Return the ranges of memory behind copies (address, bytes, whether it is written); None without copies."""
        if not self.write_back:
            return None
        written = [(tensor, True) for tensor in (self.parameter, *self.states)]
        tensors = [*written, (self.parameter.grad, False)]
        return [
            (plain.data_ptr(), _reach(plain), is_written)
            for tensor, is_written in tensors
            if tensor is not None
            and (plain := _elements(_plain(tensor, self.label))).layout is torch.strided
            and plain.numel() > 0
        ]


# A parameter's position among all, the index of its group, and its position in the group.
_Place = tuple[int, int, int]


class _Step:
    """A step with irregular parameters.

    Attributes:
        updates: the prepared updates, by the parameter's position among all.
        new: the parameters that lack only states or an average: (parameter, states, whether the step is the first), by
            position.
        in_sequence: the positions of updates that overlap other memory. They step one after the other, at the end.
        left_out: the positions of the parameters that the core leaves alone; None for all of them.
    """

    def __init__(
        self,
        updater: Updater,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        grad_factor: float,
        scaling: Scaling | None,
        pending: Mapping[Tensor, Tensor],
        place: tuple[int, int],
    ) -> None:
        self.updater = updater
        self.groups = groups
        self.state = state
        self.grad_factor = grad_factor
        self.scaling = scaling
        self.pending = pending
        self.place = place
        self.updates: dict[int, _Update] = {}
        self.new: dict[int, tuple[Tensor, tuple[Tensor | None, ...], bool]] = {}
        self.in_sequence: set[int] = set()
        self.left_out: set[int] | None = set()

    def all_places(self) -> list[_Place]:
        """Return the places of all parameters."""
        counts = (len(group["params"]) for group in self.groups)
        places = ((i, j) for i, count in enumerate(counts) for j in range(count))
        return [(position, i, j) for position, (i, j) in enumerate(places)]

    def prepare(self, places: Iterable[_Place]) -> None:
        """Prepare those of the parameters that have a gradient. The core then leaves all of them alone."""
        for position, index, at in places:
            if self.left_out is not None:
                self.left_out.add(position)
            self.new.pop(position, None)
            group = self.groups[index]
            parameter = group["params"][at]
            if position not in self.updates and parameter.grad is not None:
                self.updates[position] = _prepare(
                    self.updater,
                    group,
                    index,
                    at,
                    self.place,
                    parameter,
                    self.state.get(parameter, {}),
                )

    def make_states(self, places: list[_Place]) -> None:
        """Make the states of parameters that lack only states."""
        if not places:
            return
        empty_like, dtype_of = _interface.empty_like, _interface.dtype_of
        lacking: _States = [None] * _core.max_slots
        none: dict[str, Tensor] = {}
        listed = -1  # the group that `params` and `states` are of
        for position, index, at in places:
            if index != listed:
                group, listed = self.groups[index], index
                params = group["params"]
                found, _ = self.updater.rule.states_in(group)
                states = [(s.number, s.key, dtype_of(group.get(s.dtype_key))) for s in found]
                may_capture = True
                rest = rest_of(group)
                may_be_known = (
                    len(states) > 1 or self.updater.averages is not None or rest is not None
                )
            parameter = params[at]
            if may_capture and not parameter.is_cpu:
                missing = found[0] if found else AVERAGE
                _require_no_capture(_label_at(group, index, at, self.place), missing)
                may_capture = False
            # A single state is the missing one.
            known = self.state.get(parameter, none) if may_be_known else none
            new, first = lacking.copy(), False
            for number, key, dtype in states:
                tensor = known.get(key)
                if tensor is None:
                    first = True
                    tensor = empty_like(parameter, dtype)
                    if parameter.grad.layout is not torch.strided:
                        tensor.zero_()  # a lazy step leaves out rows
                new[number] = tensor
            if rest is not None:
                kept = known.get(rest.key)
                new[rest.number] = _precision.new_rest(parameter, group) if kept is None else kept
            self.new[position] = parameter, tuple(new), first

    def step_by_torch(self) -> None:
        """Step the parameters that have operations of their own."""
        positions = [position for position, update in self.updates.items() if update.by_torch]
        updates = [self.updates.pop(position) for position in sorted(positions)]
        _step_by_torch(
            self.updater, self.groups, updates, self.state, self.grad_factor, self.scaling
        )

    def finish(self, overlapping: list[_Place], zero_grad: bool) -> bool:
        """Step the core's parameters and the updates. Return False if gradients are still to be cleared."""
        averages = self.updater.averages
        moves = averages is not None and averages.steps.active
        weight = 0.0 if averages is None else averages.steps.weight
        self.separate({place[0] for place in overlapping})
        cleared = self.run(zero_grad)
        if cleared is None:
            return not zero_grad
        self.note_updates()
        if averages is not None and moves:
            _averages.move(averages, self._averaged_here(), self.state, weight)
        self.updater.plan.finish_step(self.groups)
        if not zero_grad:
            return True
        return cleared and self.left_out is not None and _clear(self.groups, self.left_out)

    def _averaged_here(self) -> Iterator[Tensor]:
        """Return the parameters whose averages the core left alone."""
        for position, index, at in self.all_places():
            if self.left_out is None or position in self.left_out or position in self.new:
                yield self.groups[index]["params"][at]

    def separate(self, positions: set[int]) -> None:
        """Make these updates step in sequence. Raise if one of them cannot be stepped at all."""
        for position in sorted(positions - self.in_sequence):
            update = self.updates.get(position)
            if update is not None and update.arguments is not None:
                self.in_sequence.add(position)
                _require_apart(self.updater, self.groups, update, self.grad_factor)

    def run(self, zero_grad: bool) -> bool | None:
        """Step the core's parameters and the updates. Return whether the core has cleared its gradients.

        The result is None if the step is left out.
        """
        clears = zero_grad
        while True:
            real = self._real()
            items = [
                (*update.item(), update.memory(), position in self.in_sequence)
                for position, update in real
            ]
            clears = clears and not self.in_sequence
            found = self.updater.plan.run_prepared(
                self.groups,
                self.state,
                clears,
                self.grad_factor,
                self.scaling,
                None if self.left_out is None else sorted(self.left_out),
                [(position, states, first) for position, (_, states, first) in self.new.items()],
                items,
            )
            if found is None:  # the plan leaves the step out
                return None
            if found is True:
                break
            if found is False:
                self.left_out = None
                self.prepare(self.all_places())
                continue
            irregular, lacking, overlapping, indices, clearable = found
            clears = clears and clearable
            self.prepare([*irregular, *lacking, *overlapping])
            self.separate({place[0] for place in overlapping} | {real[i][0] for i in indices})
        self._note_new()
        for position, update in real:
            if position not in self.in_sequence:
                for write in update.write_back:
                    write()
        for position in sorted(self.in_sequence):
            _step_alone(
                self.updater, self.groups, self.updates[position], self.grad_factor, self.scaling
            )
        return clears

    def _real(self) -> list[tuple[int, _Update]]:
        """Return the updates that have something to compute, in the order of the parameters."""
        real = [(i, update) for i, update in sorted(self.updates.items()) if update.arguments]
        for _, update in real:
            _await_device(update, self.scaling, self.pending)
        return real

    def _note_new(self) -> None:
        declared = (*self.updater.rule.states, *PRECISION_STATES)
        for parameter, states, _ in self.new.values():
            known = self.state.setdefault(parameter, {})
            for state in declared:
                tensor = states[state.number]
                if tensor is not None:
                    known[state.key] = tensor

    def note_updates(self) -> None:
        """Put new states into the optimizer's state, and tell autograd of the writes."""
        changed = []
        for update in self.updates.values():
            _note(self.updater.rule, self.state, update.parameter, update.states)
            changed += [update.parameter, *(each for each in update.states if each is not None)]
        _interface.increment_versions(changed)


def _note(rule: Rule, state: dict[Any, Any], parameter: Tensor, states: _States) -> None:
    """Put the states of a parameter into the optimizer's state."""
    for declared, tensor in zip(rule.states, states, strict=True):
        if tensor is not None:
            state.setdefault(parameter, {})[declared.key] = tensor


def step(
    updater: Updater,
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
    """Update all parameters that have a gradient, regular and irregular ones.

    Args:
        updater: updates the tensors.
        groups: the optimizer's groups, or a part of one of them.
        state: the optimizer's state.
        grad_factor: multiplies every gradient.
        found: what ``updater.plan.run`` returned.
        scaling: takes the place of `grad_factor` on devices.
        pending: the flags of first steps that are pending. New ones go to `scaling.pending`.
        place: where `groups` begins in the optimizer's groups: the index of the group, and of the parameter in it.
        zero_grad: whether to set all gradients to zeros, too.

    Returns:
        False if gradients are still to be cleared.

    Raises:
        TypeError, ValueError: naming the parameter that cannot be updated. Nothing is then changed.
    """
    work = _Step(updater, groups, state, grad_factor, scaling, pending or {}, place)
    overlapping: list[_Place] = []
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if found is False:
            work.left_out = None
            work.prepare(work.all_places())
        else:
            irregular, lacking, overlapping, _, _ = found
            if scaling is not None:  # the device may skip first steps
                irregular, lacking = [*irregular, *lacking], []
            work.prepare([*irregular, *overlapping])
            work.make_states(lacking)
        if not any(update.by_torch for update in work.updates.values()):
            return work.finish(overlapping, zero_grad)
    # First, so that an operation that a subclass lacks is found before anything else is changed.
    work.step_by_torch()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        return work.finish(overlapping, zero_grad)


def _step_by_torch(
    updater: Updater,
    groups: list[dict[str, Any]],
    updates: list[_Update],
    state: dict[Any, Any],
    grad_factor: float,
    scaling: Scaling | None,
) -> None:
    """Step by torch's operations, for subclasses that have operations instead of memory."""
    if scaling is not None:
        left_out, grad_factor = scaling.on_host()
        if left_out:
            return
    with torch.no_grad():
        for update in updates:
            group, parameter = groups[update.group], update.parameter
            grad = _placed_like(parameter, parameter.grad, update.label)  # type: ignore[arg-type]
            grad = grad if grad_factor == 1 else grad * grad_factor
            limit = updater.clip_value
            grad = grad if limit is None else grad.clamp(-limit, limit)
            states = updater.by_operations(parameter, grad, update.states, group)
            if update.first:
                dtypes = (_interface.dtype_of(group.get(s.dtype_key)) for s in updater.rule.states)
                states = [
                    tensor if tensor is None or dtype is None else tensor.to(dtype)
                    for tensor, dtype in zip(states, dtypes, strict=True)
                ]
            _note(updater.rule, state, parameter, states)


def _require_apart(
    updater: Updater, groups: list[dict[str, Any]], update: _Update, grad_factor: float
) -> None:
    """Raise if an update cannot be computed even by itself."""
    for copies_grad in (False, True):
        items = [update.item(copies_grad)]
        if updater.plan.run_items(groups, items, grad_factor, dry_run=True):
            return
    keys = ", ".join(state.key for state in updater.rule.states)
    raise ValueError(
        f"{update.label}: expected a parameter and its {keys} that do not overlap in memory"
    )


def _step_alone(
    updater: Updater,
    groups: list[dict[str, Any]],
    update: _Update,
    grad_factor: float,
    scaling: Scaling | None,
) -> None:
    """Step one parameter that shares memory with other parameters or with gradients.

    Such parameters step one after the other, as in torch's loop: each reads what those before it wrote.
    """
    if update.write_back:  # the copies were made before the other parameters stepped
        update.write_back.clear()
        _arrange(updater, groups[update.group], update)
    for copies_grad in (False, True):  # the gradient may overlap the parameter or a state
        items = [update.item(copies_grad)]
        if updater.plan.run_items(groups, items, grad_factor, dry_run=False, scaling=scaling):
            break
    for write in update.write_back:
        write()


def _clear(groups: list[dict[str, Any]], positions: Iterable[int]) -> bool:
    """Clear the gradients of the parameters at these positions among all, as torch's zero_grad does."""
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
    """Give a parameter pending flags if only the device knows whether its first step happens."""
    assert update.arguments is not None
    parameter = update.arguments[0]
    first_state = next((each for each in update.states if each is not None), None)
    if first_state is None:
        return
    update.pending = pending.get(first_state)
    device = _interface.device_index(parameter)
    if update.first and scaling is not None and scaling.may_skip and device != CPU:
        count = -(-parameter.numel() // _core.chunk_size)
        update.pending = torch.ones(count, dtype=torch.uint8, device=parameter.device)
        scaling.pending[first_state] = update.pending


def _elements(tensor: Tensor) -> Tensor:
    """Return the tensor that holds the elements: of a sparse tensor its values."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    compressed = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return tensor.values() if tensor.layout in compressed else tensor


def _reach(tensor: Tensor) -> int:
    """Return the number of bytes from a tensor's first element to the end of its last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)  # torch has no negative strides
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _prepare(
    updater: Updater,
    group: dict[str, Any],
    index: int,
    position: int,
    place: tuple[int, int],
    parameter: Tensor,
    values: Any,
) -> _Update:
    label = _label_at(group, index, position, place)
    precision = group.get("precision")
    if precision is not None:
        _refuse_precision(label, precision, parameter)
    if parameter.layout is not torch.strided:
        raise TypeError(f"{label}: expected a dense tensor, got one of layout {parameter.layout}")
    by_torch = has_own_operations(parameter)
    states: _States = [None] * len(updater.rule.states)
    first = False
    for state in updater.rule.states_in(group)[0]:
        if not isinstance(values, dict):
            raise TypeError(f"the state of {label}: expected a dict, got {values!r}")
        tensor = values.get(state.key)
        if not (tensor is None or isinstance(tensor, Tensor)):
            raise TypeError(
                f"the {state.key} of {label}: expected a tensor or None, got {tensor!r}"
            )
        if tensor is None:
            first = True
            tensor = None if by_torch else _new_state(state, parameter, group, label)
        states[state.number] = tensor
    if updater.norm_option is not None:
        _require_own_memory(parameter, by_torch, updater.norm_option, label)
    update = _Update(label, parameter, states, index, first, by_torch=by_torch)
    if not (by_torch or parameter.is_meta or isinstance(parameter, FakeTensor)):
        _arrange(updater, group, update)
    return update


def _require_own_memory(parameter: Tensor, by_torch: bool, option: str, label: str) -> None:
    """Raise if the core cannot read all elements of the gradient, which the norm needs."""
    distributed = sys.modules.get("torch.distributed.tensor")
    reason = None
    if distributed is not None and isinstance(parameter, distributed.DTensor):
        reason = "other processes have parts of it"
    elif by_torch:
        reason = f"its type, {torch.typename(parameter)}, has operations instead of memory"
    elif parameter.is_meta or isinstance(parameter, FakeTensor):
        reason = "it has no memory"
    if reason is not None:
        raise TypeError(
            f"{option}: the norm of the gradient of {label} cannot be taken, since {reason}; "
            "torch.nn.utils.clip_grad_norm_ may take it"
        )


def _refuse_precision(label: str, precision: str, parameter: Tensor) -> NoReturn:
    """Raise for an irregular parameter of a group that has a precision."""
    grad = parameter.grad
    found = (
        f"a gradient of layout {grad.layout}"
        if grad is not None and grad.layout is not torch.strided
        else f"{torch.typename(parameter)} of dtype {parameter.dtype} and strides {parameter.stride()}"
        if parameter.layout is torch.strided
        else f"a tensor of layout {parameter.layout}"
    )
    raise TypeError(
        f"precision: {precision!r} is for dense tensors with dense gradients that overlap no others and whose state "
        f"has their layout; for {label} got {found}"
    )


def has_own_operations(tensor: Tensor) -> bool:
    """Tell whether the tensor, or this rank's part of a DTensor, defines torch's operations itself."""
    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        return has_own_operations(tensor._local_tensor)
    if type(tensor).__name__ == "AsyncCollectiveTensor":  # plain memory when the collective is done
        return False
    return bool(type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__)


def _label_at(group: dict[str, Any], index: int, position: int, place: tuple[int, int]) -> str:
    return label_of(group, position, (place[0] + index, place[1] + position))


def label_of(group: dict[str, Any], position: int, place: tuple[int, int]) -> str:
    """Return a parameter's label in error messages: its name, else its group's index and its position there."""
    names = group.get("param_names")
    if names is not None and position < len(names):
        return f"parameter '{names[position]}'"
    return f"param_groups[{place[0]}]['params'][{place[1]}]"


def _arrange(updater: Updater, group: dict[str, Any], update: _Update) -> None:
    """Find the tensors for the core, and how to write copies back."""
    parameter, label = update.parameter, update.label
    grad = parameter.grad
    assert grad is not None
    update.states = [
        # torch leaves a sparse state after sparse gradients.
        each.to_dense() if each is not None and each.layout is not torch.strided else each
        for each in update.states
    ]
    p = _plain(parameter, label)
    g = _plain(_placed_like(parameter, grad, label), f"the gradient of {label}")
    names = [f"the {state.key} of {label}" for state in updater.rule.states]
    states = [
        None if each is None else _plain(each, name)
        for each, name in zip(update.states, names, strict=True)
    ]
    named = _Named(label, names)
    if any(_interface.device_index(tensor) != CPU for tensor, _ in named(p, g, states)):
        for tensor, what in named(p, g, states):
            _require_usable_device(tensor, what)
        for tensor, what in named.states_of(states):
            _require_same_device(tensor, what, p)
    if any(tensor.shape != p.shape or _was_freed(tensor) for tensor, _ in named(p, g, states)):
        _refuse_shape(p, named(p, g, states))
    if g.layout is not torch.strided:
        only_rows = g.layout is torch.sparse_coo and g.sparse_dim() > 0
        if only_rows and _only_rows(updater.rule, group):
            p, g, states = _prepare_rows(update, p, g, states)
        else:
            g = g.to_dense()
    if p.is_complex() and updater.clip_value is not None:
        raise ValueError(f"clip_value: complex numbers such as those of {label} have no order")
    p, g, states = _real(update, p, g, states)
    if any(tensor.dtype not in STORAGE_TYPES for tensor, _ in named(p, g, states)):
        _refuse_dtype(named(p, g, states))
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(
            f"{label}: expected elements with memory of their own, got an expanded tensor"
        )
    if p.is_neg() or not updater.plan.is_dense(p):
        p = _staged(update, p, p.resolve_neg().contiguous())
    for i, b in enumerate(states):
        if b is not None and (b.is_neg() or b.stride() != p.stride()):
            states[i] = _staged(update, b, torch.empty_like(p, dtype=b.dtype).copy_(b))
    update.arguments = (p, g.resolve_neg(), states)


class _Named(NamedTuple):
    """The names of a parameter's tensors in error messages."""

    label: str
    names: list[str]

    def __call__(self, p: Tensor, g: Tensor, states: _States) -> Iterator[tuple[Tensor, str]]:
        """Yield the parameter, the gradient and the states that take part, each with its name."""
        yield p, self.label
        yield g, f"the gradient of {self.label}"
        yield from self.states_of(states)

    def states_of(self, states: _States) -> Iterator[tuple[Tensor, str]]:
        for tensor, name in zip(states, self.names, strict=True):
            if tensor is not None:
                yield tensor, name


def _refuse_shape(p: Tensor, named: Iterable[tuple[Tensor, str]]) -> NoReturn:
    """Raise for a tensor of another shape than its parameter's, or without memory."""
    for tensor, what in named:
        if tensor.shape != p.shape:
            raise ValueError(
                f"{what}: expected shape {tuple(p.shape)}, the parameter's, got {tuple(tensor.shape)}"
            )
        if _was_freed(tensor):
            break
    raise ValueError(f"{what}: expected a tensor with memory, got one whose memory was freed")


def _refuse_dtype(named: Iterable[tuple[Tensor, str]]) -> NoReturn:
    """Raise for a tensor whose dtype is no storage type."""
    tensor, what = next(each for each in named if each[0].dtype not in STORAGE_TYPES)
    expected = ", ".join(STORAGE_TYPES.values())
    raise TypeError(f"{what}: expected one of {expected} or complex, got {tensor.dtype}")


def _was_freed(tensor: Tensor) -> bool:
    """Tell whether the tensor's storage was emptied, as FSDP does with parameters that are elsewhere."""
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


def _require_same_device(state: Tensor, what: str, p: Tensor) -> None:
    if state.device != p.device:
        raise ValueError(
            f"{what}: expected a tensor on {p.device}, where its parameter is now, got one on {state.device}. Move a "
            "model before its optimizer takes a step; afterwards, optimizer.load_state_dict(optimizer.state_dict()) "
            "moves the state to where the parameters are"
        )


def _new_state(state: State, parameter: Tensor, group: dict[str, Any], label: str) -> Tensor:
    dtype = _interface.dtype_of(group.get(state.dtype_key)) or parameter.dtype
    if parameter.dtype.is_complex and not dtype.is_complex:
        if dtype not in _COMPLEX:
            raise TypeError(
                f"{state.dtype_key}: expected float32 or float64 for the complex {label}, got {dtype}"
            )
        dtype = _COMPLEX[dtype]
    if not parameter.is_cpu:
        _require_no_capture(label, state)
    # Zeros, since a lazy step leaves out rows.
    return _interface.empty_like(parameter, dtype).zero_()


def _require_no_capture(label: str, state: State) -> None:
    """Raise a RuntimeError if a graph is being captured.

    Call this for CUDA devices only: a process that has asked CUDA anything cannot use CUDA in a child that it forks.
    """
    if _interface.is_capturing():
        raise RuntimeError(
            f"{label} has no {state.key} yet, and a graph would start with its first step at each replay: take a "
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
    """Return a tensor of torch's own type over the same memory; of a DTensor this rank's part."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{label}: expected a tensor with memory of its own, got one inside of a transform such as vmap"
        )
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        local = tensor._local_tensor
        if hasattr(local, "wait"):  # a collective may still be running
            local = local.wait()
        return _plain(local, label)
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"{label}: expected a tensor with memory of its own, or a DTensor, got {type(tensor)}"
        )
    return tensor.as_subclass(torch.Tensor)


def _only_rows(rule: Rule, group: dict[str, Any]) -> bool:
    """Tell whether a step leaves the rows without a gradient as they are.

    This is so in the lazy mode, and where a dense step gives the same result.
    """
    return group.get("sparse_mode", "dense") == "lazy" or rule.states_in(group)[1]


def _prepare_rows(
    update: _Update, p: Tensor, g: Tensor, states: _States
) -> tuple[Tensor, Tensor, _States]:
    """Return copies of the rows that have a gradient, to be written back after the step."""
    g = g.coalesce()
    rows = tuple(g.indices())

    def copied(tensor: Tensor) -> Tensor:
        copy = tensor[rows]
        update.write_back.append(lambda: tensor.index_put_(rows, copy))
        return copy

    return copied(p), g.values(), [None if each is None else copied(each) for each in states]


def _real(update: _Update, p: Tensor, g: Tensor, states: _States) -> tuple[Tensor, Tensor, _States]:
    """Return complex tensors as real ones, over the same memory where possible. Real tensors stay as they are."""
    if not p.is_complex():
        return p, g, states
    if not all(each.is_complex() for each in (g, *states) if each is not None):
        raise TypeError(
            f"{update.label}: expected a complex gradient and complex states for a complex parameter"
        )

    def real(tensor: Tensor) -> Tensor:
        if tensor.is_conj():
            tensor = _staged(update, tensor, tensor.resolve_conj())
        return torch.view_as_real(tensor)

    return (
        real(p),
        torch.view_as_real(g.resolve_conj()),
        [None if each is None else real(each) for each in states],
    )


def _staged(update: _Update, tensor: Tensor, copy: Tensor) -> Tensor:
    """Return the copy, to be written back to the tensor after the step."""
    # The innermost copy is written back first.
    update.write_back.insert(0, lambda: tensor.copy_(copy))
    return copy
