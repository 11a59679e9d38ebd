"""torch.optim.Optimizer's interface, with the update in the core."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer as _optimizer

from sgdcore import _core
from sgdcore._arrays import as_tensor
from sgdcore._averages import AVERAGE, Polyak, exchanged, taken_steps, without_saved
from sgdcore._checkpoint import check_layout, refuse_other_optimizers
from sgdcore._devices import CPU
from sgdcore._grad_scaler import asked_by_grad_scaler
from sgdcore._hooks import call_pre_hooks
from sgdcore._hyperparameters import float_of
from sgdcore._options import HasOptions
from sgdcore._precision import (
    PRECISION_KEYS,
    PRECISION_STATES,
    check_precision,
    precision_defaults,
)
from sgdcore._rules import State, rule_of
from sgdcore.device_array import DeviceArray
from sgdcore.parameter import Parameter, ParameterBuffer
from sgdcore.torch import _averages, _interface, _irregular, _precision
from sgdcore.torch._compile import not_compiled
from sgdcore.torch._interface import STORAGE_TYPES, exchange_api, new_plan, profiler_enabled

__all__ = ["Optimizer", "number_of"]

# These objects stay the same for the life of the process.
_global_pre_hooks = _optimizer._global_optimizer_pre_hooks
_global_post_hooks = _optimizer._global_optimizer_post_hooks


class _Uncast:
    """Hides a state from torch, which would cast it in load_state_dict."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _StepAttribute:
    """An attribute that GradScaler sets before a step and removes after the step.

    The values are in one dict, so a step sees at once that there are none. Asking for the optimizer's ``__dict__``
    would make Python create it, and all its attributes would be found more slowly from then on.
    """

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    @not_compiled
    def __get__(self, optimizer: Optimizer | None, _: type) -> Any:
        if optimizer is None:
            return self
        try:
            return optimizer._step_attributes[self._name]
        except KeyError:
            raise AttributeError(f"no step under a GradScaler sets {self._name} now") from None

    @not_compiled
    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        optimizer._step_attributes[self._name] = value

    @not_compiled
    def __delete__(self, optimizer: Optimizer) -> None:
        if optimizer._step_attributes.pop(self._name, self) is self:
            raise AttributeError(self._name)


class Optimizer(HasOptions, torch.optim.Optimizer):
    """Base of the optimizers of torch parameters: torch.optim.Optimizer, with the update in the core.

    Subclasses name the core's rule, check its hyperparameters, and have the rule in torch's operations.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups, as in torch.
        defaults: the hyperparameters of groups that do not set their own.
        own: the hyperparameters that torch lacks. Those with their default value are left out of defaults and groups,
            so that torch can load the checkpoint, too.
        options: the optimizer's `sgdcore.Options`, by name.

    Raises:
        TypeError, ValueError: if `params` are no parameters, or a hyperparameter in `own` is not valid.
    """

    rule: ClassVar[str]
    found_inf = _StepAttribute()
    grad_scale = _StepAttribute()

    @not_compiled
    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        own: Mapping[str, Any],
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._take_average(options)
        self._start()
        self._take_options(options)
        own_defaults = self._own_defaults()
        defaults |= {key: value for key, value in own.items() if value != own_defaults[key]}
        defaults |= precision_defaults(options)
        self._check_group(defaults)
        torch.optim.Optimizer.__init__(self, _listed_params(params), defaults)
        self._observe()

    @staticmethod
    def by_operations(
        parameter: Tensor, grad: Tensor, states: list[Tensor | None], group: dict[str, Any]
    ) -> list[Tensor | None]:
        """Update a tensor that has operations of its own instead of memory, by torch's operations.

        Args:
            parameter: the tensor, which is updated in place.
            grad: its gradient.
            states: its states, in the order of the rule; None for those that take no part, or that are new.
            group: the hyperparameters.

        Returns:
            The states.
        """
        raise NotImplementedError

    def _step_recorded(self) -> None:
        """Take a step that autograd records, for groups that are ``differentiable``."""
        raise ValueError(f"differentiable: {type(self).__name__} has no step that autograd records")

    @classmethod
    def _own_defaults(cls) -> dict[str, Any]:
        """Return the keys of a group that torch lacks, with their default values."""
        return _own_defaults(cls.rule)

    @property
    @not_compiled
    def state(self) -> defaultdict[Tensor, Any]:
        """Maps each parameter to a dict with the rule's states, tensors like the parameter.

        SGD's only state is ``"momentum_buffer"``. A state may be read, changed in place, or replaced between steps.
        """
        # The caller may keep a state and move its memory, so each step reads the states from now on.
        self._plan.state_exposed = True
        self._remove_pending()
        return self._state

    @state.setter
    @not_compiled
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        # The first assignment is torch's, in __init__, which keeps no reference to the dict.
        self._plan.state_exposed = hasattr(self, "_state")
        self._state = state

    def _start(self) -> None:
        """Set the attributes that are not part of a checkpoint or a pickle."""
        self._plan = new_plan(exchange_api(), self.rule)
        self._plan.averaged = None if self._averages is None else self._averages.steps
        # Bound once, which saves a look-up in each step.
        self._run_unobserved = self._plan.run_unobserved
        self._step_attributes: dict[str, Any] = {}
        # Pending first steps: the first state of each such parameter, with its flags on the device.
        self._pending: dict[Tensor, Tensor] = {}
        # Loading a state dict does not end step_in_backward.
        self._in_backward = getattr(self, "_steps_in_backward", None)
        # torch wraps a subclass's own step(), and runs the hooks itself.
        self._observed_outside = type(self).step is not Optimizer.step
        self._share_clipping()

    def _hooks(self) -> list[dict[Any, Any]]:
        """Return the dicts of hooks before and after a step: this optimizer's, and those of all optimizers."""
        own: Any = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
        return [*own, _global_pre_hooks, _global_post_hooks]

    def _observe(self) -> None:
        """Tell the plan which dicts observe a step, which is one call into the core if none does."""
        self._plan.observe([*self._hooks(), self._step_attributes])

    @property
    def _in_backward(self) -> Any:
        """The StepInBackward that steps for this optimizer, or None."""
        return self._steps_in_backward

    @_in_backward.setter
    def _in_backward(self, value: Any) -> None:
        self._steps_in_backward = value
        self._plan.in_backward = value is not None

    @property
    @not_compiled
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks this first. If true, it leaves the scale and found_inf to `step`.
        return asked_by_grad_scaler() and self._takes_scale() and not self._step_is_replaced()

    def _plans(self) -> list[Any]:
        return [self._plan, *([] if self._in_backward is None else [self._in_backward.plan])]

    @staticmethod
    def _new_result(device: int) -> tuple[Tensor, int]:
        result = _interface.new_result(device)
        return result, result.data_ptr()

    @staticmethod
    def _norm_in(result: Tensor) -> Tensor:
        return result[0].clone()  # the next step overwrites the result

    @staticmethod
    def _skipped_in(result: Tensor) -> int:
        return int(result[3])

    def _require_measurable(self, option: str) -> None:
        if self._in_backward is not None:
            raise ValueError(f"{option}: step_in_backward never has all gradients together")

    def _takes_scale(self) -> bool:
        """Return whether `step` undoes the scale, and skips an overflow, as the attributes of one step tell."""
        if self._in_backward is not None:
            raise RuntimeError(
                "GradScaler cannot be used with step_in_backward: the parameters were already updated, with "
                "gradients that are still scaled"
            )
        return not _any_differentiable(self.param_groups)

    def _step_is_replaced(self) -> bool:
        """Return whether this optimizer's `step` was replaced, as accelerate does.

        accelerate takes a step for skipped if `step` was not called, so GradScaler has to decide. A scheduler replaces
        `step`, too, only to note that there was a first call.
        """
        step = self.step
        if getattr(step, "__func__", None) is type(self).step:
            return False
        return not hasattr(step, "_wrapped_by_lr_sched")

    @not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Hyperparameters that the group does not set get the defaults.

        Raises:
            TypeError, ValueError: as torch does, and for an invalid dtype of a state or sparse_mode.
        """
        if isinstance(param_group, dict):
            self._check_group(param_group)
            if "params" in param_group:
                param_group["params"] = _listed_params(param_group["params"])
        super().add_param_group(param_group)
        try:
            self._check_precision(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise
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
        if closure is None:
            # The usual step is one call into the core, which also finds whether anything observes the step.
            found = self._run_unobserved(self.param_groups, self._state, zero_grad)
            if found is True:
                return None
            if found is not None:
                if not self._update_irregular(found, zero_grad, 1.0):
                    self.zero_grad(set_to_none=False)
                return None
        observed = any(self._hooks()) or profiler_enabled()
        try:
            if self._observed_outside or (closure is None and not observed):
                return self._step(closure, zero_grad=zero_grad)
            return self._observed_step(closure, zero_grad)
        except BaseException:
            # GradScaler removes the attributes only after a step that succeeds.
            self._step_attributes.clear()
            raise

    # Otherwise torch would wrap `step` in what `_observed_step` does, which takes 10 us a step.
    step.hooked = True  # type: ignore[attr-defined]

    def _observed_step(self, closure: Callable[[], float] | None, zero_grad: bool) -> float | None:
        """Call the hooks around the step, under torch's label for the profiler."""
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {"zero_grad": True} if zero_grad else {}
        label = f"Optimizer.step#{type(self).__name__}.step"
        with torch.autograd.profiler.record_function(label):
            pre_hooks = chain(_global_pre_hooks.values(), self._optimizer_step_pre_hooks.values())
            args, kwargs = call_pre_hooks(pre_hooks, self, args, kwargs, str(type(self).step))
            # As in torch, a hook may name another optimizer, which then steps.
            if not (args and isinstance(args[0], Optimizer)):
                raise TypeError(
                    f"a step pre-hook returned args that do not begin with an optimizer of sgdcore.torch: {args!r}"
                )
            loss = Optimizer._step(*args, **kwargs)
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
            _core.require_steps(self.rule, list(self.param_groups))  # it may change gradients
            with torch.enable_grad():
                loss = closure()
        self._update(zero_grad)
        return loss

    def _update(self, zero_grad: bool) -> None:
        if self._in_backward is not None:
            self._in_backward.finish_round()  # only parameters that did not step in it are left
        grad_factor, scaling = 1.0, None
        if self._step_attributes:
            found_inf = self._step_attributes.get("found_inf")
            scale = self._step_attributes.get("grad_scale")
            # What the host counts, it counts only in steps that happen.
            if not rule_of(self.rule).counts:
                scaling = _scaling_on_device(found_inf, scale)
            if scaling is None:
                if found_inf is not None and float(found_inf) != 0:
                    if zero_grad:
                        self.zero_grad(set_to_none=False)
                    return
                if scale is not None:
                    grad_factor = _irregular.factor_of(scale)
            elif isinstance(self.average, Polyak):
                # The weight of the next step depends on whether this one happens.
                left_out, grad_factor = scaling.on_host()
                scaling = None
                if left_out:
                    if zero_grad:
                        self.zero_grad(set_to_none=False)
                    return
        # A step that the device skips would not clear the gradients.
        clear_later = zero_grad and scaling is not None
        clear_now = zero_grad and not clear_later
        found = self._plan.run(self.param_groups, self._state, clear_now, grad_factor, scaling)
        if found is not True and found is not None:
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
        """Step where the plan found irregular parameters. Return False if gradients are still to be cleared."""
        sparse = any(
            p.grad is not None and p.grad.layout is not torch.strided
            for group in self.param_groups
            for p in group["params"]
        )
        if scaling is None and self.skip_nonfinite and self._any_on_device():
            if sparse:
                raise ValueError(
                    "skip_nonfinite: rows of sparse gradients on a device step without knowing of the others"
                )
            scaling = _irregular.Scaling(None, None, may_skip=True)
        precise = any(group.get("precision") is not None for group in self.param_groups)
        if scaling is not None and (self._averages is not None or sparse or precise):
            # Rows of a state have no pending flags, and some averages move after the step, so the host has to read the
            # numbers.
            left_out, grad_factor = scaling.on_host()
            scaling = None
            if left_out:
                return not zero_grad
        if _any_differentiable(self.param_groups):
            option = self._clipping_in_use()
            if option is not None:
                raise ValueError(
                    f"{option}: a differentiable step is torch's own, whose gradients are clipped by "
                    "torch.nn.utils"
                )
            self._step_recorded()
            return not zero_grad
        cleared = _irregular.step(
            self._updater(self._plan),
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

    def _any_on_device(self) -> bool:
        return any(
            _interface.device_index(p) not in (CPU, None)
            for group in self.param_groups
            for p in group["params"]
        )

    def _updater(self, plan: _core.TorchPlan) -> _irregular.Updater:
        return _irregular.Updater(plan, rule_of(self.rule), self.by_operations, self._averages)

    def _set_pending(self) -> None:
        self._plan.set_pending([(s, flags.data_ptr()) for s, flags in self._pending.items()])

    def _remove_pending(self) -> None:
        """Remove states whose first step the device skipped. Waits for the device if first steps are pending."""
        if not self._pending:
            return
        empty = {id(s) for s, flags in self._pending.items() if bool(flags.any())}
        keys = [state.key for state in rule_of(self.rule).states]
        for values in self._state.values():
            if isinstance(values, dict) and any(id(values.get(key)) in empty for key in keys):
                for key in keys:
                    values.pop(key, None)
        self._pending.clear()
        self._set_pending()

    def _update_part(
        self,
        plan: _core.TorchPlan,
        groups: list[dict[str, Any]],
        found: Any,
        place: tuple[int, int],
    ) -> None:
        """Step a part of a group in which `plan.run` found irregular parameters."""
        _irregular.step(self._updater(plan), groups, self._state, 1.0, found, place=place)

    # Checkpoints

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """Return state and groups in torch's layout, with dtypes as names; see torch.optim.Optimizer."""
        if self._averages is not None:
            self._averages.require_parameters("state_dict")
        # Runs before the user's hooks, which then see what is saved.
        hook = self.register_state_dict_post_hook(_complete_groups, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    @not_compiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a copy of a state dict of this class, of the NumPy class of the same name, or of torch's.

        Unlike in torch, a state is not cast to the parameter's dtype. It keeps its own, unless this optimizer's group
        names the dtype of the state (``momentum_dtype``) and the checkpoint, such as one of torch's, does not.

        Raises:
            TypeError, KeyError: if `state_dict` is not laid out as an optimizer's, such as a model's.
            ValueError: if the groups do not match, or a state does not have its parameter's shape, or it is
                the state dict of another kind of optimizer.

        The optimizer is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            check_layout(state_dict)
        if self._averages is not None:
            self._averages.require_parameters("load_state_dict")
        # Hooks run in the order of registration, so this hook gets what the user's hooks return.
        hook = self.register_load_state_dict_pre_hook(_read_checkpoint)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        if self._averages is not None:
            self._averages.steps.taken = self._averages.loaded

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict, copy and pickle call this. The first two pass the objects that are to be kept.
        defaults = state.get("defaults") or self.defaults
        groups = state.get("param_groups", ())
        # A group keeps the values of keys that a checkpoint of torch's lacks.
        earlier = getattr(self, "param_groups", ())
        if len(earlier) != len(groups):
            earlier = [defaults] * len(groups)
        for group, known in zip(groups, earlier, strict=True):
            for key in (*self._own_defaults(), *PRECISION_KEYS):
                if key not in group and key in known:
                    group[key] = known[key]
            self._check_group(group)
            self._check_precision(group, defaults)
        group_of = {p: group for group in groups for p in group["params"]}
        for parameter, values in state.get("state", {}).items():
            kept = values.items() if isinstance(values, dict) else ()
            for key, value in [(key, value) for key, value in kept if isinstance(value, _Uncast)]:
                values[key] = value.tensor
                if parameter in group_of:
                    values[key] = self._loaded_state(
                        key, value.tensor, parameter, group_of[parameter]
                    )
        super().__setstate__(state)
        for group in self.param_groups:
            rule = rule_of(self.rule)
            for key in (*rule.flags, *rule.modes, *rule.counts):
                if key not in group:  # checkpoints of other optimizers may lack these
                    group[key] = defaults.get(key, False)
        if "state" in state:
            self._state = self.__dict__.pop("state")  # torch has put the state there
        self._start()
        self._observe()

    def _loaded_state(
        self, key: str, tensor: Tensor, parameter: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        """Return a copy of a state of a checkpoint: on the parameter's device, in its layout."""
        named = group if self._averages is None else {**group, **self._averages.named_dtype}
        dtype_keys = {state.key: state.dtype_key for state in self._states()}
        return _state_for(key, parameter, tensor, named.get(dtype_keys[key]))

    def _named_dtype(self, name: str, dtype: Any) -> torch.dtype | None:
        group = {name: dtype}
        _check_dtype(group, name)
        checked: torch.dtype | None = group[name]
        return checked

    def _states(self) -> tuple[State, ...]:
        """Return the states that the rule and the options keep."""
        extras = () if self._averages is None else (AVERAGE,)
        return (*rule_of(self.rule).states, *PRECISION_STATES, *extras)

    def _check_precision(
        self, group: dict[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Check how a group's parameters are kept, once the group has all its keys.

        Raises:
            TypeError, ValueError: if its precision is not valid, or does not go with what else the group says.
        """
        if not any(key in group for key in PRECISION_KEYS):
            return
        names = group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]
        check_precision(
            group,
            self.defaults if defaults is None else defaults,
            (
                (name, str(p.dtype).removeprefix("torch."))
                for name, p in zip(names, group["params"], strict=True)
            ),
        )
        if group.get("precision") is None:
            return
        if group.get("differentiable", False):
            raise ValueError(
                "differentiable: a step that autograd records does not go with precision="
            )
        in_backward = getattr(self, "_steps_in_backward", None)
        if in_backward is not None:
            in_backward.require_precision(group)

    def set_master(self, parameter: Tensor, values: Tensor) -> None:
        """Set a parameter to values in float32, as far as its precision holds them; see `sgdcore.SGD.set_master`.

        Raises:
            ValueError: if the optimizer has no such parameter, or the shapes differ.
        """
        self._set_master(parameter, self._group_of(parameter), values)

    def _set_master(self, parameter: Tensor, group: Mapping[str, Any], values: Tensor) -> None:
        if values.shape != parameter.shape:
            raise ValueError(
                f"values: expected shape {tuple(parameter.shape)}, got {tuple(values.shape)}"
            )
        with torch.no_grad():
            _precision.set_master(parameter, group, self.state[parameter], values)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the group of one of the optimizer's parameters."""
        for group in self.param_groups:
            if any(each is parameter for each in group["params"]):
                return group
        raise ValueError(
            f"parameter: expected one of the optimizer's parameters, got {_core.repr_text(parameter)}"
        )

    def master(self, parameter: Tensor) -> Tensor:
        """Return the values of a parameter in float32, as the next step reads them; see `sgdcore.SGD.master`.

        Args:
            parameter: one of the optimizer's parameters.

        Returns:
            A new tensor on the parameter's device: float32, or float64 for a parameter of that dtype.

        Raises:
            ValueError: if the optimizer has no such parameter.
        """
        return self._master(parameter, self._group_of(parameter))

    def _master(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        return _precision.master(parameter, group, self._state.get(parameter, {}))

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averages where the parameters are, for the time of a ``with`` block; see `sgdcore.SGD.averaged`.

        Buffers, such as batch norm's statistics, stay as they are.
        """
        if self._averages is None:
            raise RuntimeError("averaged: the optimizer was made without average=")
        pairs = (
            (p, values[AVERAGE.key])
            for group in self.param_groups
            for p in group["params"]
            if (values := self._state.get(p)) and values.get(AVERAGE.key) is not None
        )
        return exchanged(self._averages.steps, pairs, _averages.copied, _averages.copy_into)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._averages is not None:
            self._averages.require_parameters("a copy")
        kept = {"_averages": self._averages, "_clipping": self._clipping}
        return {**state, **{name: value for name, value in kept.items() if value is not None}}

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check the hyperparameters that torch lacks. Replace the name of a dtype by torch's dtype."""
        for state in rule_of(self.rule).states:
            _check_dtype(group, state.dtype_key)
        if self._averages is not None and group.get("differentiable", False):
            raise ValueError(
                "differentiable: a step that autograd records does not go with average="
            )
        mode = group.get("sparse_mode", "dense")
        if mode not in ("dense", "lazy"):
            raise ValueError(f"sparse_mode: expected 'dense' or 'lazy', got {mode!r}")


@cache
def _own_defaults(rule: str) -> dict[str, Any]:
    return {state.dtype_key: None for state in rule_of(rule).states} | {"sparse_mode": "dense"}


def number_of(name: str, value: Any) -> Any:
    """Return a hyperparameter as something that compares with numbers. A tensor of one element is returned as it is.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is no number.
    """
    if not isinstance(value, Tensor):
        return float_of(name, value)
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")
    return value


def _scaling_on_device(found_inf: Any, scale: Any) -> _irregular.Scaling | None:
    """Return a Scaling for a GradScaler's numbers on a device; None if they are on the CPU."""
    tensors = [each for each in (found_inf, scale) if isinstance(each, Tensor)]
    if all(_interface.device_index(each) == CPU for each in tensors):
        return None
    numbers = (None if each is None else _irregular.as_tensor(each) for each in (found_inf, scale))
    return _irregular.Scaling(next(numbers), next(numbers))


def _any_differentiable(groups: Iterable[dict[str, Any]]) -> bool:
    # A group that a user appended may lack the key.
    return any(group.get("differentiable", False) for group in groups)


def _listed_params(params: Any) -> Any:
    """Return parameters as a list. Raise for values that are easily mistaken for parameters."""
    if isinstance(params, Tensor | set | frozenset):
        return params  # torch takes or refuses these
    hint = _hint_for(params)
    if hint:
        raise TypeError(
            f"params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
            f"{torch.typename(params)}{hint}"
        )
    if not isinstance(params, Iterable):
        return params
    entries = list(params)
    # Of thousands of parameters only their few types are looked at.
    if all(issubclass(kind, (Tensor, dict)) for kind in set(map(type, entries))):
        return entries
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):  # a group
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
    """Return a hint at what to pass instead of a value that is no parameter; empty if there is no hint."""
    if isinstance(value, Tensor):  # tested first, since this is called for each parameter
        return ""
    if isinstance(value, torch.nn.Module):
        return "; pass its parameters, as model.parameters()"
    if isinstance(value, np.ndarray | Parameter | ParameterBuffer | DeviceArray):
        return "; arrays are for sgdcore.SGD, or become tensors by torch.from_numpy"
    if isinstance(value, Mapping) and any(isinstance(key, str) for key in value):
        return "; put a group in a list, or pass names with list(params.items())"
    return ""


def _check_dtype(group: dict[str, Any], key: str) -> None:
    """Check the storage type that a group has under a key. Replace its name by torch's dtype."""
    dtype = group.get(key)
    if isinstance(dtype, str):
        dtype = group[key] = _interface.dtype_of(dtype)
    if dtype is not None and dtype not in STORAGE_TYPES:
        expected = ", ".join(str(dtype) for dtype in STORAGE_TYPES)
        raise TypeError(f"{key}: expected one of {expected} or None, got {dtype!r}")


def _complete_groups(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Replace dtypes by their names, since torch.distributed.checkpoint and JSON take plain values only.

    Also add what is saved of the averages.
    """
    for group in state_dict["param_groups"]:
        if optimizer._averages is not None:
            group.update(optimizer._averages.saved())
        for state in rule_of(optimizer.rule).states:
            if isinstance(group.get(state.dtype_key), torch.dtype):
                group[state.dtype_key] = STORAGE_TYPES[group[state.dtype_key]]


def _read_checkpoint(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Check a state dict, and hide the rule's states from torch's casting."""
    name, rule = type(optimizer).__name__, rule_of(optimizer.rule)
    check_layout(state_dict)
    refuse_other_optimizers(state_dict, name, rule)
    for i, group in enumerate(state_dict["param_groups"]):
        missing = [key for key in rule.numbers if key not in group]
        if missing:
            raise ValueError(
                f"state_dict['param_groups'][{i}]: expected {name}'s hyperparameters, got none called "
                f"{', '.join(missing)}"
            )
    taken = taken_steps(optimizer._averages, state_dict)
    if optimizer._averages is not None:
        optimizer._averages.loaded = taken
    state = {}
    states = optimizer._states()
    for key, values in state_dict["state"].items():
        if isinstance(values, dict):
            own = {each.key: values[each.key] for each in states if each.key in values}
            values = values | {name: _uncast(value) for name, value in own.items()}
        state[key] = values
    groups = _without_own_defaults(optimizer, state_dict["param_groups"])
    return {**state_dict, "state": state, "param_groups": groups}


def _uncast(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # of an optimizer of arrays
        value = as_tensor(value)
    return _Uncast(value) if isinstance(value, Tensor) else value


def _without_own_defaults(
    optimizer: Any, saved: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a checkpoint's groups without keys that have their default: earlier versions saved all of them."""
    groups = [without_saved(group) for group in saved]
    # Not strict: torch refuses another number of groups, with its own message.
    for group, present in zip(groups, optimizer.param_groups, strict=False):
        for key, default in optimizer._own_defaults().items():
            if key not in present and group.get(key, present) == default:
                del group[key]
    return groups


def _state_for(key: str, parameter: Tensor, state: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a copy of a loaded state: on the parameter's device, in its layout."""
    if state.shape != parameter.shape:
        raise ValueError(
            f"state_dict: expected a {key} of shape {tuple(parameter.shape)}, its parameter's, "
            f"got {tuple(state.shape)}"
        )
    if dtype is None or state.dtype.is_complex:
        dtype = state.dtype
    distributed = sys.modules.get("torch.distributed.tensor")
    if _irregular.has_own_operations(state) or (
        distributed is not None and isinstance(state, distributed.DTensor)
    ):
        loaded: Tensor = state.to(device=parameter.device, dtype=dtype, copy=True)
        return loaded
    with torch.no_grad():
        if state.layout is not torch.strided:  # torch leaves such a state after sparse gradients
            state = state.to_dense()
        return _interface.empty_like(parameter, dtype).copy_(state)
