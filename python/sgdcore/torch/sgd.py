"""torch.optim.SGD's interface, with the update in the core."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer as _optimizer

from sgdcore import _core
from sgdcore._arrays import as_tensor
from sgdcore._checkpoint import check_layout, refuse_other_optimizers
from sgdcore._devices import CPU
from sgdcore._grad_scaler import asked_by_grad_scaler
from sgdcore._hyperparameters import float_of
from sgdcore.device_array import DeviceArray
from sgdcore.parameter import Parameter, ParameterBuffer
from sgdcore.torch import _interface, _irregular
from sgdcore.torch._compile import not_compiled
from sgdcore.torch._interface import STORAGE_TYPES, exchange_api, new_plan

__all__ = ["SGD"]

# The hyperparameters that torch.optim.SGD lacks, with what they are in a group that does not have them.
_OWN_DEFAULTS: dict[str, Any] = {"momentum_dtype": None, "sparse_mode": "dense"}

# Those that a step needs and that torch does not add to an old checkpoint.
_REQUIRED = ("lr", "momentum", "dampening", "weight_decay")

_profiler_enabled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
# The same objects for the life of the process.
_global_pre_hooks = _optimizer._global_optimizer_pre_hooks
_global_post_hooks = _optimizer._global_optimizer_post_hooks


class _Kept:
    """A momentum buffer on its way through load_state_dict, hidden from torch, which would cast it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _OfOneStep:
    """An attribute that GradScaler sets before a step and removes after it.

    All of them are kept in one dict, so that a step sees at a glance that there are none, and without asking for the
    optimizer's ``__dict__``: Python makes that when first asked for, and finds attributes more slowly ever after.
    """

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    @not_compiled
    def __get__(self, optimizer: SGD | None, _: type) -> Any:
        if optimizer is None:
            return self
        try:
            return optimizer._of_one_step[self._name]
        except KeyError:
            raise AttributeError(f"no step under a GradScaler sets {self._name} now") from None

    @not_compiled
    def __set__(self, optimizer: SGD, value: Any) -> None:
        optimizer._of_one_step[self._name] = value

    @not_compiled
    def __delete__(self, optimizer: SGD) -> None:
        if optimizer._of_one_step.pop(self._name, self) is self:
            raise AttributeError(self._name)


class SGD(torch.optim.SGD):
    """Stochastic gradient descent for torch parameters on the CPU and CUDA; takes the place of torch.optim.SGD.

    For each parameter p with gradient g and momentum buffer b, all of one shape::

        g = -g                                          if maximize
        g = fma(weight_decay, p, g)                     if weight_decay != 0
        b = g                                           if momentum != 0, on the parameter's first step
        b = fma(1 - dampening, g, round(momentum * b))  if momentum != 0, on later steps
        g = fma(momentum, b, g)                         if momentum != 0 and nesterov
        g = b                                           if momentum != 0 and not nesterov
        p = fma(-lr, g, p)

    ``fma(x, y, z)`` is x * y + z, rounded once. For float32 and float64 parameters every bit equals
    torch.optim.SGD(foreach=False); complex ones agree to a few roundings. bfloat16 and float16 are computed in float32
    and rounded once per stored value. docs/torch.md says what is equal, better, and refused.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups, as in torch.
        lr: learning rate, a number or a tensor of one element. On the parameters' CUDA device it is read there, also
            by a captured graph; so is weight_decay.
        momentum: the part of the buffer that survives a step.
        dampening: the part of the gradient that an existing buffer does not receive.
        weight_decay: weight decay (L2 penalty), a number or a tensor of one element.
        nesterov: use Nesterov momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        foreach, fused: accepted and kept in the groups; there is one path here.
        differentiable: let autograd record the step, with torch's own (slow) code.
        momentum_dtype: type of new momentum buffers, one of float64, float32, float16, bfloat16, or its name; the
            parameter's if None. A state dict has its name. float32 for bfloat16 parameters keeps small gradients from
            being rounded away.
        sparse_mode: what a sparse gradient means. ``"dense"``: what the same gradient means as a dense tensor, so
            that weight decay and momentum act on all rows. ``"lazy"``: only the rows that it names are touched.

    Raises:
        ValueError, TypeError: for hyperparameters out of range, worded as torch does.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
    in the form that torch.optim.SGD gave it.
    """

    found_inf = _OfOneStep()
    grad_scale = _OfOneStep()

    @not_compiled
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_dtype: torch.dtype | str | None = None,
        sparse_mode: str = "dense",
    ) -> None:
        if _is_negative("lr", lr):
            raise ValueError(f"Invalid learning rate: {lr}")
        if _is_negative("momentum", momentum):
            raise ValueError(f"Invalid momentum value: {momentum}")
        if _is_negative("weight_decay", weight_decay):
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        _is_negative("dampening", dampening)  # which it may be, if it is a number
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self._start()
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        # The keys are torch's, unless ours are used: a checkpoint is then torch's, too.
        own = {"momentum_dtype": momentum_dtype, "sparse_mode": sparse_mode}
        defaults |= {key: value for key, value in own.items() if value != _OWN_DEFAULTS[key]}
        _check_group(defaults)
        torch.optim.Optimizer.__init__(self, _listed(params), defaults)

    @property
    @not_compiled
    def state(self) -> defaultdict[Tensor, Any]:
        """What is remembered of each parameter: a dict whose ``"momentum_buffer"`` is a tensor like the parameter.

        A momentum buffer may be read, changed in place, or replaced between steps.
        """
        # From now on somebody may hold a momentum buffer, and each step looks whether it was moved.
        self._plan.state_exposed = True
        self._settle()
        return self._state

    @state.setter
    @not_compiled
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        # The first one is torch's, in __init__, which keeps no reference to it.
        self._plan.state_exposed = hasattr(self, "_state")
        self._state = state

    def _start(self) -> None:
        """Set up what is not part of a checkpoint or a pickle."""
        self._plan = new_plan(exchange_api())
        self._run = self._plan.run  # one look-up less in each step
        self._of_one_step: dict[str, Any] = {}
        # Momentum buffers that may hold nothing yet, with the flags on their device that say so.
        self._pending: dict[Tensor, Tensor] = {}
        # The StepInBackward that steps for us; loading a state dict changes nothing about that.
        self._in_backward: Any = getattr(self, "_in_backward", None)
        # Subclasses with a step() of their own are wrapped by torch, hooks and all.
        self._observed_outside = type(self).step is not SGD.step

    @property
    @not_compiled
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        # What GradScaler.step asks first: the scale and found_inf are then left to `step`.
        return asked_by_grad_scaler() and self._takes_scale() and not self._step_is_replaced()

    def _takes_scale(self) -> bool:
        """Return whether `step` undoes the scale and leaves itself out for an overflow, given as attributes."""
        if self._in_backward is not None:
            raise RuntimeError(
                "GradScaler cannot be used with step_in_backward: the parameters were already updated, with "
                "gradients that are still scaled"
            )
        return not _any_differentiable(self.param_groups)

    def _step_is_replaced(self) -> bool:
        """Return whether somebody replaced this optimizer's `step`, as accelerate does.

        accelerate learns that a step was left out from `step` not being called, so GradScaler has to decide. What a
        scheduler puts in the place of `step` only notes that there was a first call.
        """
        step = self.step
        if getattr(step, "__func__", None) is type(self).step:
            return False
        return not hasattr(step, "_wrapped_by_lr_sched")

    @not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the defaults for the hyperparameters it does not set.

        Raises:
            TypeError, ValueError: as torch does, and for an invalid momentum_dtype or sparse_mode.
        """
        if isinstance(param_group, dict):
            _check_group(param_group)
            if "params" in param_group:
                param_group["params"] = _listed(param_group["params"])
        super().add_param_group(param_group)
        _interface.collapse_huge_pages(self.param_groups[-1]["params"])
        if self._in_backward is not None:
            try:
                self._in_backward.add_last_group()
            except BaseException:
                self.param_groups.pop()
                raise

    # The step

    @overload
    def step(self, closure: None = None, *, zero_grad: bool = False) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, zero_grad: bool = False) -> float: ...
    @not_compiled
    def step(
        self, closure: Callable[[], float] | None = None, *, zero_grad: bool = False
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: called first, if given, with gradients enabled, to compute the loss, which is returned.
            zero_grad: also set every gradient to zeros, in the same pass over memory.

        Raises:
            TypeError, ValueError: naming the hyperparameter or parameter that is at fault; before anything is changed.
            KeyError: if a group lacks a hyperparameter; before anything is changed.
        """
        observed = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
            or _profiler_enabled()
        )
        if closure is None and not (observed or self._of_one_step or self._in_backward):
            # What `_update` does in the usual case; the call to it would be a tenth of the time of a small step.
            found = self._run(self.param_groups, self._state, zero_grad, 1.0, None)
            if found is not True and not self._update_irregular(found, zero_grad, 1.0):
                self.zero_grad(set_to_none=False)
            return None
        try:
            if self._observed_outside or (closure is None and not observed):
                return self._step(closure, zero_grad=zero_grad)
            return self._observed_step(closure, zero_grad)
        except BaseException:
            # GradScaler removes what it set for one step only where that succeeds.
            self._of_one_step.clear()
            raise

    # torch would otherwise wrap `step` with what `_observed_step` does, at 10 us a step.
    step.hooked = True  # type: ignore[attr-defined]

    def _observed_step(self, closure: Callable[[], float] | None, zero_grad: bool) -> float | None:
        """Step under torch's label for the profiler, with all hooks."""
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {"zero_grad": True} if zero_grad else {}
        label = f"Optimizer.step#{type(self).__name__}.step"
        with torch.autograd.profiler.record_function(label):
            for pre_hook in chain(
                _global_pre_hooks.values(), self._optimizer_step_pre_hooks.values()
            ):
                replaced: Any = pre_hook(self, args, kwargs)
                if replaced is not None:
                    if not (isinstance(replaced, tuple) and len(replaced) == 2):
                        raise RuntimeError(
                            f"{type(self).step} must return None or a tuple of (new_args, new_kwargs), "
                            f"but got {replaced}."
                        )
                    args, kwargs = replaced
            # As in torch, a hook may have named another optimizer, whose step it is then.
            if not (args and isinstance(args[0], SGD)):
                raise TypeError(
                    f"a step pre-hook returned args that do not begin with a {SGD.__module__}.SGD: {args!r}"
                )
            loss = SGD._step(*args, **kwargs)
            self._optimizer_step_code()
            for post_hook in chain(
                self._optimizer_step_post_hooks.values(), _global_post_hooks.values()
            ):
                post_hook(self, args, kwargs)
        return loss

    def _step(
        self, closure: Callable[[], float] | None = None, *, zero_grad: bool = False
    ) -> float | None:
        """Step without hooks."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(zero_grad)
        return loss

    def _update(self, zero_grad: bool) -> None:
        if self._in_backward is not None:
            self._in_backward.finish_round()  # and then the parameters that did not step in it
        grad_factor, scaling = 1.0, None
        if self._of_one_step:
            found_inf = self._of_one_step.get("found_inf")
            scale = self._of_one_step.get("grad_scale")
            scaling = _scaling_on_device(found_inf, scale)
            if scaling is None:
                if found_inf is not None and float(found_inf) != 0:
                    if zero_grad:
                        self.zero_grad(set_to_none=False)
                    return
                if scale is not None:
                    grad_factor = _irregular.factor_of(scale)
        # What the device decides not to do would not clear the gradients either.
        clear_later = zero_grad and scaling is not None
        clear_now = zero_grad and not clear_later
        found = self._run(self.param_groups, self._state, clear_now, grad_factor, scaling)
        if found is not True:
            clear_later |= not self._update_irregular(found, clear_now, grad_factor, scaling)
        if clear_later:
            self.zero_grad(set_to_none=False)

    def _update_irregular(
        self,
        found: Any,
        zero_grad: bool,
        grad_factor: float,
        scaling: _irregular.Scaling | None = None,
    ) -> bool:
        """Step where the plan found something unusual. Return False if gradients are still to be set to zeros."""
        if scaling is not None and any(
            p.grad is not None and p.grad.layout is not torch.strided
            for group in self.param_groups
            for p in group["params"]
        ):
            # Rows of a momentum buffer have no flags, so the host has to know.
            left_out, grad_factor = scaling.on_host()
            scaling = None
            if left_out:
                return not zero_grad
        if _any_differentiable(self.param_groups):
            # Written by torch, and recorded by autograd as a graph of tensor operations.
            step = torch.optim.SGD.step
            if getattr(step, "hooked", False):  # by torch, which would call our hooks a second time
                step = step.__wrapped__  # type: ignore[attr-defined]
            step(self)
            return not zero_grad
        cleared = _irregular.step(
            self._plan,
            self.param_groups,
            self._state,
            grad_factor,
            found,
            scaling=scaling,
            pending=self._pending,
            zero_grad=zero_grad,
        )
        if scaling is not None and scaling.pending:
            self._pending.update(scaling.pending)
            self._set_pending()
        return cleared

    def _set_pending(self) -> None:
        self._plan.set_pending([(b, flags.data_ptr()) for b, flags in self._pending.items()])

    def _settle(self) -> None:
        """Remove momentum buffers whose first step the device left out. Waits for the device, where there are any."""
        if not self._pending:
            return
        empty = {id(b) for b, flags in self._pending.items() if bool(flags.any())}
        for values in self._state.values():
            if isinstance(values, dict) and id(values.get("momentum_buffer")) in empty:
                del values["momentum_buffer"]
        self._pending.clear()
        self._set_pending()

    def _update_part(
        self,
        plan: _core.TorchPlan,
        groups: list[dict[str, Any]],
        found: Any,
        place: tuple[int, int],
    ) -> None:
        """Step a part of a group in which `plan.run` found something unusual."""
        _irregular.step(plan, groups, self._state, 1.0, found, place=place)

    # Checkpoints

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """Return state and groups in torch's layout, momentum_dtype by its name; see torch.optim.Optimizer."""
        # Before the user's hooks, which see what is saved.
        hook = self.register_state_dict_post_hook(_name_dtypes, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    @not_compiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a copy of a state dict of this class, of torch.optim.SGD or of `sgdcore.SGD`.

        Unlike in torch, a momentum buffer keeps its dtype rather than being cast to the parameter's; where this
        group's ``momentum_dtype`` is set and the checkpoint has none, as torch's, it is cast to that.

        Raises:
            TypeError, KeyError: if `state_dict` is not laid out as an optimizer's, such as a model's.
            ValueError: if the groups do not match, or a momentum buffer does not have its parameter's shape, or it is
                the state dict of another kind of optimizer.

        The optimizer is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            check_layout(state_dict)
        # Hooks run in the order of registration, so this one sees what the user's return.
        hook = self.register_load_state_dict_pre_hook(_read_checkpoint)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by load_state_dict, copy and pickle; the first two pass what may be kept, so nothing is changed in
        # place.
        defaults = state.get("defaults") or self.defaults
        groups = state.get("param_groups", ())
        # What a checkpoint of torch's does not say of a group stays as it is.
        earlier = getattr(self, "param_groups", ())
        if len(earlier) != len(groups):
            earlier = [defaults] * len(groups)
        for group, known in zip(groups, earlier, strict=True):
            for key in _OWN_DEFAULTS:
                if key not in group and key in known:
                    group[key] = known[key]
            _check_group(group)
        dtypes = {p: group.get("momentum_dtype") for group in groups for p in group["params"]}
        for parameter, values in state.get("state", {}).items():
            if isinstance(values, dict) and isinstance(values.get("momentum_buffer"), _Kept):
                kept = values["momentum_buffer"].tensor
                if parameter in dtypes:
                    kept = _momentum_for(parameter, kept, dtypes[parameter])
                values["momentum_buffer"] = kept
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "state" in state:
            self._state = self.__dict__.pop("state")  # where torch has put it
        self._start()


def _is_negative(name: str, value: Any) -> bool:
    """Compare a hyperparameter with zero, as torch does; one that is no number is refused by name."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")
    try:
        is_negative = bool(value < 0.0)
        if not isinstance(value, Tensor):  # whose conversion may wait for a device
            float_of(name, value)
        return is_negative
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {_core.repr_text(value)}") from None


def _scaling_on_device(found_inf: Any, scale: Any) -> _irregular.Scaling | None:
    """Return a GradScaler's numbers as something that leaves them on their device; None if they are on the CPU."""
    tensors = [each for each in (found_inf, scale) if isinstance(each, Tensor)]
    if all(_interface.device_index(each) == CPU for each in tensors):
        return None
    return _irregular.Scaling(
        *(None if each is None else _irregular.as_tensor(each) for each in (found_inf, scale))
    )


def _any_differentiable(groups: Iterable[dict[str, Any]]) -> bool:
    # Groups that a user made need not have it: torch's step does not ask them.
    return any(group.get("differentiable", False) for group in groups)


def _listed(params: Any) -> Any:
    """Return parameters as a list; raise if one is of a kind that is easily mistaken for a parameter."""
    if isinstance(params, Tensor | set | frozenset):
        return params  # which torch takes, or refuses
    hint = _hint_for(params)
    if hint:
        raise TypeError(
            f"params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
            f"{torch.typename(params)}{hint}"
        )
    if not isinstance(params, Iterable):
        return params
    entries = list(params)
    for i, entry in enumerate(entries):
        if isinstance(entry, Tensor | dict):  # a parameter, or a group
            continue
        value = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        hint = _hint_for(value)
        if hint:
            raise TypeError(
                f"params[{i}]: optimizer can only optimize Tensors, but one of the params is "
                f"{torch.typename(value)}{hint}"
            )
    return entries


def _hint_for(value: Any) -> str:
    """Say what to pass instead of what is no parameter of torch's; empty if there is nothing to say."""
    if isinstance(value, Tensor):  # at once: one call for each parameter
        return ""
    if isinstance(value, torch.nn.Module):
        return "; pass its parameters, as model.parameters()"
    if isinstance(value, np.ndarray | Parameter | ParameterBuffer | DeviceArray):
        return "; arrays are for sgdcore.SGD, or become tensors by torch.from_numpy"
    if isinstance(value, Mapping) and any(isinstance(key, str) for key in value):
        return "; put a group in a list, or pass names with list(params.items())"
    return ""


def _check_group(group: dict[str, Any]) -> None:
    """Check the hyperparameters that torch does not have; a dtype given by its name becomes torch's."""
    if isinstance(group.get("momentum_dtype"), str):
        group["momentum_dtype"] = _interface.dtype_of(group["momentum_dtype"])
    dtype, mode = (group.get(key, default) for key, default in _OWN_DEFAULTS.items())
    if dtype is not None and dtype not in STORAGE_TYPES:
        expected = ", ".join(str(dtype) for dtype in STORAGE_TYPES)
        raise TypeError(f"momentum_dtype: expected one of {expected} or None, got {dtype!r}")
    if mode not in ("dense", "lazy"):
        raise ValueError(f"sparse_mode: expected 'dense' or 'lazy', got {mode!r}")


def _name_dtypes(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Write dtypes as names: torch.distributed.checkpoint and JSON take plain values only."""
    for group in state_dict["param_groups"]:
        if isinstance(group.get("momentum_dtype"), torch.dtype):
            group["momentum_dtype"] = STORAGE_TYPES[group["momentum_dtype"]]


def _read_checkpoint(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Check a state dict, and wrap its momentum buffers, so that torch's casting passes them by."""
    check_layout(state_dict)
    refuse_other_optimizers(state_dict)
    for i, group in enumerate(state_dict["param_groups"]):
        missing = [key for key in _REQUIRED if key not in group]
        if missing:
            raise ValueError(
                f"state_dict['param_groups'][{i}]: expected SGD's hyperparameters, got none called {', '.join(missing)}"
            )
    state = {}
    for key, values in state_dict["state"].items():
        momentum = values.get("momentum_buffer") if isinstance(values, dict) else None
        if isinstance(momentum, np.ndarray):  # of sgdcore.SGD
            momentum = as_tensor(momentum)
        if isinstance(momentum, Tensor):
            values = {**values, "momentum_buffer": _Kept(momentum)}
        state[key] = values
    groups = _without_own_defaults(state_dict["param_groups"], optimizer.param_groups)
    return {**state_dict, "state": state, "param_groups": groups}


def _without_own_defaults(
    saved: Iterable[Mapping[str, Any]], own: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a checkpoint's groups without what says nothing: earlier versions saved all of our keys."""
    groups = [dict(group) for group in saved]
    for group, present in zip(groups, own, strict=False):  # torch refuses other numbers of groups
        for key, default in _OWN_DEFAULTS.items():
            if key not in present and group.get(key, present) == default:
                del group[key]
    return groups


def _momentum_for(parameter: Tensor, momentum: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a copy of a loaded momentum buffer: on the parameter's device, in its layout."""
    if momentum.shape != parameter.shape:
        raise ValueError(
            f"state_dict: expected a momentum buffer of shape {tuple(parameter.shape)}, its parameter's, "
            f"got {tuple(momentum.shape)}"
        )
    if dtype is None or momentum.dtype.is_complex:
        dtype = momentum.dtype
    distributed = sys.modules.get("torch.distributed.tensor")
    if _irregular.has_own_operations(momentum) or (
        distributed is not None and isinstance(momentum, distributed.DTensor)
    ):
        loaded: Tensor = momentum.to(device=parameter.device, dtype=dtype, copy=True)
        return loaded
    with torch.no_grad():
        if momentum.layout is not torch.strided:  # torch's, of sparse gradients
            momentum = momentum.to_dense()
        return _interface.empty_like(parameter, dtype).copy_(momentum)
