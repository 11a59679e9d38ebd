"""The optimizer's bookkeeping, as in torch.optim: parameter groups, state, hooks, checkpoints.

All work per parameter is in the core. Subclasses name the rule and check its hyperparameters.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, overload

import numpy as np

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype
from sgdcore._averages import AVERAGE, exchanged, taken_steps, without_saved
from sgdcore._checkpoint import check_layout, refuse_other_optimizers
from sgdcore._copies import attributes_of, set_attributes
from sgdcore._hooks import Hook, HookHandle, call_pre_hooks
from sgdcore._mistakes import (
    is_torch_module,
    libraries_of,
    parameter_hint,
    params_hint,
    warn_of_near_keys,
)
from sgdcore._options import HasOptions
from sgdcore._precision import (
    MASTER_LOW,
    PRECISION_KEYS,
    check_precision,
    precision_defaults,
    rest_of,
)
from sgdcore._rules import State, rule_of
from sgdcore._states import (
    OptimizerState,
    StateStorage,
    as_array,
    as_storage,
    clear_rests,
    copied,
    copy_into,
    dtype_of,
    filled_storage,
    new_storage,
    on_host,
    read_low,
    read_state,
)
from sgdcore.device_array import DeviceArray
from sgdcore.parameter import ArrayParameter, Parameter, ParameterBuffer

__all__ = ["Loss", "Optimizer", "ParamsLike"]

ParamsLike = ParameterBuffer | Iterable[Any]
Loss = TypeVar("Loss")


class Optimizer(HasOptions):
    """Base of the optimizers: the interface of torch.optim.Optimizer without the update itself.

    Args:
        params: what to optimize: a `ParameterBuffer`, or an iterable of `Parameter` objects or arrays,
            of (name, parameter) pairs, or of dicts, one per group, whose ``"params"`` is any of these
            and whose other keys override the defaults.
        defaults: the hyperparameters of groups that do not set their own.
        options: the optimizer's `Options`, by name.

    Attributes:
        rule: the name of the core's rule; subclasses set it.
        param_groups: one dict per group; hyperparameters may be changed between steps.
        state: maps each parameter to its state.
        defaults: the default hyperparameters.
    """

    rule: ClassVar[str]
    # True while the constructor adds groups, before it builds the plan.
    _constructing = False

    def __init__(
        self,
        params: ParamsLike,
        defaults: dict[str, Any],
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if not hasattr(self, "rule"):
            raise NotImplementedError(
                f"{type(self).__name__} has no rule; Optimizer is the base of the optimizers, such as sgdcore.SGD"
            )
        self.defaults = {**defaults, **precision_defaults(options)}
        self.param_groups: list[dict[str, Any]] = []
        self._take_average(options)
        self._state = self._empty_state()
        self._start()
        self._take_options(options)

        if not _may_list_parameters(params):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Parameters, arrays "
                f"or dicts, but got {type(params).__name__}{params_hint(params)}"
            )
        groups: list[Any] = [params] if isinstance(params, ParameterBuffer) else list(params)
        if not groups:
            hint = "; an iterator gives what it has only once" if iter(params) is params else ""
            raise ValueError(f"optimizer got an empty parameter list{hint}")
        if not isinstance(groups[0], dict):
            whole = isinstance(params, ParameterBuffer | set | frozenset)
            groups = [{"params": params if whole else groups}]
        # The plan is built once, from all groups. Building it for each group would take quadratic time.
        self._constructing = True
        for group in groups:
            self.add_param_group(group)
        del self._constructing
        self._build_plan(self.param_groups)

    def _start(self) -> None:
        """Set the attributes that are not part of a checkpoint."""
        self._plan = _core.Plan(self.rule)
        self._plan.averaged = None if self._averages is None else self._averages.steps
        self._share_clipping()
        # Bound once: the binding costs a tenth of the smallest step.
        self._run_plan = self._plan.run
        # The plan's number of checks, and the identities of all parameters, which hold while the number stays.
        self._known: tuple[int, set[int]] = 0, set()
        self._step_pre_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._step_post_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._state_dict_pre_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._state_dict_post_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._load_state_dict_pre_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._load_state_dict_post_hooks: OrderedDict[int, Hook] = OrderedDict()

    @staticmethod
    def _new_result(device: int) -> tuple[Any, int]:
        result = DeviceArray.zeros(4, np.float64, device)
        return result, result.__cuda_array_interface__["data"][0]

    @property
    def state(self) -> OptimizerState:
        """Maps each parameter to its state. Assigning a mapping takes over its values."""
        return self._state

    @state.setter
    def state(self, state: Mapping[Parameter, MutableMapping[str, Any]]) -> None:
        if not isinstance(state, OptimizerState):
            values, state = state, self._empty_state()
            state.update(values)
        self._state = state
        self._plan.outdate()

    # Parameter groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Hyperparameters that the group does not set get the defaults.

        Raises:
            TypeError: if the group or one of its parameters is of the wrong kind.
            ValueError: if a hyperparameter is out of range, or a parameter appears twice or overlaps
                another one in memory.
            RuntimeError: if the optimizer is stepping in another thread.

        The optimizer is then as it was. A key that is no hyperparameter is the user's own; a UserWarning names the
        hyperparameter whose name it nearly has.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"param_group: expected a key 'params', got {list(param_group)}")
        self._warn_of_near_keys(param_group)
        group = {**self.defaults, **param_group}
        names, group["params"] = _read_params(param_group["params"])
        if names is not None:
            group["param_names"] = names
        # Compared with the first group, as in torch: comparing with all groups would take quadratic time.
        if any(("param_names" in each) != (names is not None) for each in self.param_groups[:1]):
            which = "without names" if names is None else "with names"
            raise ValueError(
                "all optimizer param groups should be with/without names. "
                f"cannot add param group {which} to the optimizer"
            )
        self._normalize_group(group)
        is_current = self._constructing or self._plan.is_current(self.param_groups)
        checks, known = self._known
        if not is_current or checks != self._plan.checks:
            known = {_identity(p) for each in self.param_groups for p in each["params"]}
        added: set[int] = set()
        for position, parameter in enumerate(group["params"]):
            identity = _identity(parameter)
            if identity in known or identity in added:
                label = repr(parameter.name) if parameter.name else f"at position {position}"
                raise ValueError(
                    f"some parameters appear in more than one parameter group, or twice: parameter {label}"
                )
            added.add(identity)
        if not is_current:
            self._build_plan([*self.param_groups, group])
        elif not self._constructing:
            params = list(group["params"])
            self._plan.add_group(params, [self.state[p].slots for p in params])
        self.param_groups.append(group)
        known |= added
        self._known = self._plan.checks, known

    def _warn_of_near_keys(self, keys: Iterable[Any]) -> None:
        known = {*self.defaults, *PRECISION_KEYS, "params", "param_names"}
        warn_of_near_keys(keys, known, [*self.defaults, *PRECISION_KEYS])

    def _normalize_group(self, group: dict[str, Any]) -> None:
        """Check a group's hyperparameters, and put them into the form that groups keep."""
        for state in rule_of(self.rule).states:
            if group.get(state.dtype_key) is not None:
                # The dtype's name: a checkpoint can then be read without NumPy and ml_dtypes.
                group[state.dtype_key] = storage_dtype(group[state.dtype_key], state.dtype_key).name

        if "params" in group:
            parameters = enumerate(group["params"])
            check_precision(
                group,
                self.defaults,
                ((repr(p.name) if p.name else f"params[{i}]", p.dtype.name) for i, p in parameters),
            )

    def _build_plan(self, groups: list[dict[str, Any]]) -> None:
        # The lists are copied: another thread may change the groups' own.
        parameters = []
        for i, group in enumerate(groups):
            params = group["params"]
            if isinstance(params, list):
                params = params.copy()
            if not isinstance(params, list) or not all(isinstance(p, Parameter) for p in params):
                raise TypeError(
                    f"param_groups[{i}]['params']: expected a list of Parameters, "
                    f"got {_core.repr_text(params)}"
                )
            parameters.append(params)
        self._plan.build(
            parameters, [[self.state[p].slots for p in params] for params in parameters]
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters.

        Args:
            set_to_none: forget the gradients rather than zeroing them in place; the parameters are then
                skipped until they get new gradients. Gradients in a ParameterBuffer are always zeroed.

        Raises:
            ValueError: if a gradient to be zeroed is read-only, or on a device in another memory order than its
                parameter. No gradient is then cleared.
        """
        _core.zero_grads(self.param_groups, set_to_none)

    # The step

    @overload
    def step(
        self, closure: None = None, *, grads: Sequence[Any] | None = None, zero_grad: bool = False
    ) -> None: ...
    @overload
    def step(
        self,
        closure: Callable[[], Loss],
        *,
        grads: Sequence[Any] | None = None,
        zero_grad: bool = False,
    ) -> Loss: ...
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: Sequence[Any] | None = None,
        zero_grad: bool = False,
    ) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: called first, if given, to compute loss and gradients; its value is returned.
            grads: gradients to use instead of the parameters' own: a list, tuple or other sequence of one array or
                None for each parameter, in order.
            zero_grad: clear each gradient in the same pass, right after its use.

        Raises:
            TypeError, ValueError: if a hyperparameter is not a number, a gradient does not fit, or arrays overlap
                in memory; if there are no gradients and the optimizer was given arrays only.
            KeyError: if a group lacks a hyperparameter.
            RuntimeError: if the optimizer is stepping in another thread.

        All of them are raised before anything is changed.
        """
        if closure is None and not self._step_pre_hooks and not self._step_post_hooks:
            # The usual step is one call into the core.
            if not self._run_plan(self.param_groups, grads, zero_grad):
                self._run(grads, zero_grad)
            return None
        return self._step_with_hooks(closure, {"grads": grads, "zero_grad": zero_grad})

    def _run(self, grads: Any, zero_grad: bool) -> None:
        """Update all parameters. Build the plan and make states first, where they are missing."""
        while not self._plan.run(self.param_groups, grads, zero_grad):
            found = self._plan.missing_states(self.param_groups)
            if found is None:
                self._build_plan(self.param_groups)
                continue
            states = {state.number: state for state in self._state.states}
            missing = [
                StateStorage(parameter, states[n], self._dtype_of(states[n], group, parameter))
                for parameter, group, n in found
            ]
            arrays = new_storage(missing)
            clear_rests(zip(missing, arrays, strict=True))
            for each, array in zip(missing, arrays, strict=True):
                self.state[each.parameter].slots.reserve(each.state.number, array)

    def _step_with_hooks(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Call the hooks around the closure and the update."""
        if closure is not None and not callable(closure):
            hint = "; gradients are passed as grads=" if np.iterable(closure) else ""
            raise TypeError(f"closure: expected a function, got {type(closure).__name__}{hint}")
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        hooks = self._step_pre_hooks.values()
        args, kwargs = call_pre_hooks(hooks, self, args, kwargs, "a step pre-hook")
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:  # it may change gradients
            _core.require_steps(self.rule, self.param_groups)
        loss = None if closure is None else closure()
        self._run(kwargs.get("grads"), kwargs.get("zero_grad", False))
        for hook in self._step_post_hooks.values():
            hook(self, args, kwargs)
        return loss

    def _empty_state(self) -> OptimizerState:
        return OptimizerState(self.rule, () if self._averages is None else (AVERAGE,))

    def _dtype_of(
        self, state: State, group: Mapping[str, Any], parameter: Parameter
    ) -> np.dtype[Any]:
        """Return the dtype of a parameter's new state."""
        if self._averages is not None and state is AVERAGE:
            group = self._averages.named_dtype
        return dtype_of(state, group, parameter)

    def master(self, parameter: Any) -> Array:
        """Return the values of a parameter in float32, as the next step reads them.

        Equations, with the array a that the model sees::

            (bits of a << 16) + master_low      with precision="split", on the bits of a float32
            round(a + compensation)             with precision="kahan"
            a                                   otherwise, and before a parameter's first step

        Args:
            parameter: one of the optimizer's parameters, or the array that it was made of.

        Returns:
            A new array of the parameter's shape, in host memory: float32, or float64 for a parameter of that dtype.

        Raises:
            ValueError: if the optimizer has no such parameter.

        What is written into a parameter's array by hand, by a broadcast or from a model's checkpoint takes the place
        of ``a`` alone. The next step starts from the sum: with split and kahan less than one unit in the last place of
        the new value away from it.
        """
        return self._master(*self._listed(parameter))

    def set_master(self, parameter: Any, values: Any) -> None:
        """Set a parameter to values in float32, as far as its precision holds them.

        What the model sees is then what a step would have left of these values; with precision="split" `master` gives
        them back in every bit.

        Args:
            parameter: as for `master`.
            values: array of the parameter's shape.

        Raises:
            ValueError: if the optimizer has no such parameter, or the shapes differ.
        """
        self._set_master(*self._listed(parameter), values)

    def _listed(self, parameter: Any) -> tuple[Parameter, dict[str, Any]]:
        """Return one of the optimizer's parameters, given itself or its array, and its group."""
        for group in self.param_groups:
            for each in group["params"]:
                if each is parameter or each.data is parameter:
                    return each, group
        raise ValueError(
            f"parameter: expected one of the optimizer's parameters, got {_core.repr_text(parameter)}"
        )

    def _set_master(self, parameter: Parameter, group: Mapping[str, Any], values: Any) -> None:
        from sgdcore.reference import part_kahan, part_split  # not needed for steps

        wanted = np.asarray(values, dtype=np.float32)
        if wanted.shape != parameter.shape:
            raise ValueError(f"values: expected shape {parameter.shape}, got {wanted.shape}")
        rest, visible, kept = rest_of(group), wanted, None
        if rest is MASTER_LOW:
            visible, kept = part_split(wanted)
            visible = visible.view(parameter.dtype)
        elif rest is not None:
            visible, kept = part_kahan(wanted, parameter.dtype)
        data = as_array(parameter.data)
        copy_into(data, visible.astype(data.dtype))
        if rest is not None and kept is not None:
            stored = np.empty_like(on_host(parameter.data), dtype=kept.dtype, subok=False)
            stored[...] = kept
            self.state[parameter][rest.key] = stored

    def _master(self, parameter: Parameter, group: Mapping[str, Any]) -> Array:
        from sgdcore.reference import join_kahan, join_split  # not needed for steps

        values = on_host(parameter.data)
        rest = rest_of(group)
        wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
        if rest is None or not self.state[parameter].slots.holds(rest.number):
            return wide
        kept = on_host(self.state[parameter].slots.array(rest.number))
        if rest is MASTER_LOW:
            return join_split(values, kept)
        return join_kahan(values, kept)

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averages where the parameters are, for the time of a ``with`` block.

        Inside, the parameters' arrays hold the averages; each is rounded to the parameter's dtype. Afterwards, also
        behind an exception, they hold what they held before, in every bit. A parameter that has no average yet keeps
        its values. The state's averages hold the parameters' values meanwhile, if their dtypes are equal, so the
        block takes memory for one more parameter; for averages of another dtype, for copies of all parameters.

        Raises:
            RuntimeError: if the optimizer was made without ``average=``, inside of another such block. Inside of one,
                `step`, `state_dict` and `load_state_dict` raise it.
        """
        if self._averages is None:
            raise RuntimeError("averaged: the optimizer was made without average=")
        pairs = (
            (as_array(p.data), as_array(self.state[p].slots.array(AVERAGE.number)))
            for group in self.param_groups
            for p in group["params"]
            if self.state[p].slots.holds(AVERAGE.number)
        )
        return exchanged(self._averages.steps, pairs, copied, copy_into)

    # Hooks

    def register_step_pre_hook(self, hook: Hook) -> HookHandle:
        """Call ``hook(optimizer, args, kwargs)`` before each step; it may return new (args, kwargs).

        As in torch, ``args[0]`` is the optimizer; the closure, if there is one, is ``args[1]``.
        """
        return HookHandle(self._step_pre_hooks, hook)

    def register_step_post_hook(self, hook: Hook) -> HookHandle:
        """Call ``hook(optimizer, args, kwargs)`` after each step."""
        return HookHandle(self._step_post_hooks, hook)

    def register_state_dict_pre_hook(self, hook: Hook, prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer)`` before `state_dict` collects anything."""
        return HookHandle(self._state_dict_pre_hooks, hook, prepend)

    def register_state_dict_post_hook(self, hook: Hook, prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer, state_dict)`` on what `state_dict` returns; it may return another dict."""
        return HookHandle(self._state_dict_post_hooks, hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Hook, prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer, state_dict)`` before loading; it may return another dict."""
        return HookHandle(self._load_state_dict_pre_hooks, hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Hook, prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer)`` after loading."""
        return HookHandle(self._load_state_dict_post_hooks, hook, prepend)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups in torch.optim's layout, with parameters replaced by their position.

        ``{"state": {0: {key: array, ...}, ...}, "param_groups": [{..., "params": [0, ...]}]}``, where the keys
        are those of the rule's states, such as SGD's ``"momentum_buffer"``; the arrays are the optimizer's own, not
        copies.
        """
        for hook in self._state_dict_pre_hooks.values():
            hook(self)
        saved = {}
        if self._averages is not None:
            self._averages.require_parameters("state_dict")
            saved = self._averages.saved()
        positions: dict[Parameter, int] = {}
        groups = []
        for group in self.param_groups:
            for parameter in group["params"]:
                positions[parameter] = len(positions)
            groups.append({**group, **saved, "params": [positions[p] for p in group["params"]]})
        state = {positions.get(p, p): dict(values) for p, values in self.state.items()}
        state_dict: dict[str, Any] = {"state": state, "param_groups": groups}
        for hook in self._state_dict_post_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` (or torch.optim.SGD's, with arrays for tensors) returned.

        Values are copied; an array of a state keeps its own dtype, and a list gets the dtype of new states, such as
        the group's ``momentum_dtype``, or else its parameter's. Hyperparameters that the checkpoint lacks keep this
        optimizer's defaults.

        Raises:
            TypeError: if `state_dict` is not laid out as `state_dict` returns it.
            KeyError: if it lacks "state" or "param_groups".
            ValueError: if the groups do not match this optimizer's, or a state does not have its
                parameter's shape, or it is the state dict of another kind of optimizer.

        The optimizer is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            check_layout(state_dict)
        state_dict = dict(state_dict)  # so that hooks may change it
        for hook in self._load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        check_layout(state_dict)
        _check_states(state_dict["state"])
        refuse_other_optimizers(state_dict, type(self).__name__, rule_of(self.rule))
        saved = state_dict["param_groups"]
        _require_matching(saved, self.param_groups)
        if self._averages is not None:
            self._averages.require_parameters("load_state_dict")
        taken = taken_steps(self._averages, state_dict)
        saved = [without_saved(group) for group in saved]
        groups = [
            self._merged_group(own, other)
            for own, other in zip(self.param_groups, saved, strict=True)
        ]
        self._replace_state(self._read_state(state_dict, groups))
        if self._averages is not None:
            self._averages.steps.taken = taken
        # From here on only the user's hooks can raise.
        self.param_groups[:] = groups
        for hook in self._load_state_dict_post_hooks.values():
            hook(self)

    def _merged_group(self, own: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group of the optimizer with the checkpoint's hyperparameters, or defaults where it lacks them."""
        self._warn_of_near_keys(key for key in saved if key not in own)
        loaded = copy.deepcopy({k: v for k, v in saved.items() if k != "params"})
        group = {**self.defaults, **loaded}
        if "param_names" in own:
            group.setdefault("param_names", own["param_names"])
        group["params"] = own["params"]
        self._normalize_group(group)
        return group

    def _read_state(
        self, state_dict: Mapping[str, Any], groups: list[dict[str, Any]]
    ) -> dict[Parameter, dict[str, Any]]:
        """Return a checkpoint's state by parameter: the rule's states as arrays, and copies of all other values."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = [(p, group) for group in groups for p in group["params"]]
        parameter_of = dict(zip(keys, parameters, strict=True))
        state = {}
        for key, values in state_dict["state"].items():
            if key not in parameter_of:
                raise ValueError(
                    f"state_dict['state']: no parameter has the key {_core.repr_text(key)}"
                )
            parameter, group = parameter_of[key]
            own = {each.key: each for each in self._state.states}
            read = copy.deepcopy({k: v for k, v in values.items() if k not in own})
            for name, each in own.items():
                if values.get(name) is not None:
                    argument = f"state_dict['state'][{_core.repr_text(key)}]['{name}']"
                    if each is MASTER_LOW:
                        read[name] = read_low(argument, values[name], parameter)
                        continue
                    dtype = self._dtype_of(each, group, parameter)
                    read[name] = read_state(argument, values[name], parameter, dtype)
            state[parameter] = read
        return state

    def _replace_state(self, new: Mapping[Parameter, Mapping[str, Any]]) -> None:
        """Replace the whole state. A failure changes nothing.

        The rule's states are copied into new storage: for a buffer's parameters one flat array, for others laid out
        like the parameter. Arrays of a pickle need not be, since pickle keeps only some orders of axes.
        """
        state = {parameter: dict(values) for parameter, values in new.items()}
        for values in state.values():
            if MASTER_LOW.key in values:
                values[MASTER_LOW.key] = as_storage(values[MASTER_LOW.key])
        filled = [
            (StateStorage(parameter, each, values[each.key].dtype), values[each.key])
            for parameter, values in state.items()
            for each in self._state.states
            if each.key in values
        ]
        for storage, array in filled_storage(filled):
            state[storage.parameter][storage.state.key] = array
        self.state.clear()
        for parameter, values in state.items():
            self.state[parameter].update(values)

    def __getstate__(self) -> dict[str, Any]:
        state = {parameter: dict(values) for parameter, values in self.state.items()}
        kept: dict[str, Any] = {} if self._clipping is None else {"clipping": self._clipping}
        if self._averages is not None:
            self._averages.require_parameters("a copy")
            kept["averages"] = self._averages
        return {
            "defaults": self.defaults,
            "state": state,
            "param_groups": self.param_groups,
            "attributes": attributes_of(self, _Own(type(self))),
            **kept,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.defaults = state["defaults"]
        self.param_groups = state["param_groups"]
        self._averages = state.get("averages")
        self._state = self._empty_state()
        if "clipping" in state:
            self._clipping = state["clipping"]
        self._start()
        self._replace_state(state["state"])
        set_attributes(self, state.get("attributes"))  # pickles of earlier versions lack these

    def __repr__(self) -> str:
        text = f"{type(self).__name__} ("
        for i, group in enumerate(self.param_groups):
            text += f"\nParameter Group {i}\n"
            text += "".join(
                f"    {key}: {group[key]}\n" for key in sorted(group) if key != "params"
            )
        return text + ")"


class _Own:
    """The attributes that copies of an optimizer do not get: the class's own, and functions that replace its methods.

    A function that replaces a method, such as a scheduler's counter around `step`, is bound to the original optimizer.
    """

    names = frozenset(
        {
            "_averages",
            "_load_state_dict_post_hooks",
            "_load_state_dict_pre_hooks",
            "_clipping",
            "_constructing",
            "_known",
            "_plan",
            "_run_plan",
            "_state_dict_post_hooks",
            "_state_dict_pre_hooks",
            "_step_post_hooks",
            "_step_pre_hooks",
            "defaults",
            "param_groups",
            "_state",
        }
    )

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __contains__(self, name: object) -> bool:
        return name in self.names or callable(getattr(self._cls, str(name), None))


def _may_list_parameters(params: Any) -> bool:
    """Tell whether iterating gives parameters, rather than an array's rows, a mapping's names or a text's letters."""
    if isinstance(params, ParameterBuffer):
        return True
    if isinstance(params, Parameter | np.ndarray | str | bytes | dict):
        return False
    libraries = libraries_of(params)
    if "torch" in libraries:
        return isinstance(params, Iterable) and not is_torch_module(params)
    is_array = hasattr(params, "__array__") or hasattr(params, "__dlpack__")
    return isinstance(params, Iterable) and not is_array and "sklearn" not in libraries


def _check_states(states: Mapping[Any, Any]) -> None:
    for key, values in states.items():
        if not isinstance(values, Mapping):
            raise TypeError(
                f"state_dict['state'][{_core.repr_text(key)}]: expected a mapping, got {_core.repr_text(values)}"
            )


def _require_matching(saved: Sequence[Mapping[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Raise if a checkpoint has another number of groups than the optimizer, or a group another size."""
    if len(saved) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved)}, expected {len(groups)}"
        )
    for i, (own, other) in enumerate(zip(groups, saved, strict=True)):
        if len(own["params"]) != len(other["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: group {i} has {len(other['params'])} parameters, expected {len(own['params'])}"
            )


def _identity(parameter: Parameter) -> int:
    """Return a parameter's identity. Two parameters made of one array are the same."""
    return id(parameter.data)


def _read_params(params: Any) -> tuple[list[str] | None, list[Parameter]]:
    """Return the names, or None, and the parameters of a group."""
    if isinstance(params, ParameterBuffer):
        return None, params.parameters()
    if isinstance(params, set | frozenset):
        raise TypeError(
            "params: optimizer parameters need to be organized in ordered collections, but the ordering "
            "of a set changes between runs; use a list instead"
        )
    # A single parameter counts as a list of one, as in torch.
    entries = [params] if isinstance(params, Parameter | np.ndarray) else list(params)
    names = [entry[0] for entry in entries if isinstance(entry, tuple)]
    if names and len(names) != len(entries):
        raise ValueError(
            "all optimizer params should be with/without names. Some param names are missing"
        )
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"params: expected a string as a parameter's name, got {_core.repr_text(name)}"
            )
    values = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    return names or None, [_as_parameter(value, i) for i, value in enumerate(values)]


def _as_parameter(value: Any, position: int) -> Parameter:
    if isinstance(value, Parameter):
        return value
    is_torch = "torch" in libraries_of(value)
    if isinstance(value, np.ndarray) or (not is_torch and _core.is_on_device(value)):
        try:
            return ArrayParameter(value)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("data:", f"params[{position}]:", 1)) from None
    kind, hint = type(value).__name__, ""
    if isinstance(value, ParameterBuffer):
        hint = "; a ParameterBuffer is passed by itself, SGD(buffer), or as a group's 'params'"
    elif not isinstance(value, np.generic):
        hint = parameter_hint(value)
    if type(value).__module__.partition(".")[0] == "torch":
        kind = "torch." + kind  # torch has a Parameter, too
    raise TypeError(
        f"params[{position}]: optimizer can only optimize Parameters, NumPy arrays and arrays on CUDA devices, "
        f"but got {kind}{hint}"
    )
