"""The optimizer's bookkeeping, as in torch.optim: parameter groups, state, hooks, checkpoints.

What costs time per parameter is in the core. Subclasses bring the hyperparameters and check them; the state of a
parameter is a momentum buffer, as SGD's is.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, count
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, overload
from weakref import WeakKeyDictionary

import numpy as np

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype
from sgdcore._checkpoint import check_layout, refuse_other_optimizers
from sgdcore._copies import attributes_of, set_attributes
from sgdcore._devices import CPU
from sgdcore._hints import naming_allocation
from sgdcore._mistakes import (
    is_torch_module,
    libraries_of,
    parameter_hint,
    params_hint,
    warn_of_near_keys,
)
from sgdcore.device_array import DeviceArray
from sgdcore.parameter import ArrayParameter, Parameter, ParameterBuffer

__all__ = ["HookHandle", "Loss", "Optimizer", "OptimizerState", "ParameterState", "ParamsLike"]

ParamsLike = ParameterBuffer | Iterable[Any]
Hook = Callable[..., Any]
Loss = TypeVar("Loss")


class HookHandle:
    """Returned by the ``register_*`` methods; `remove` takes the hook out again, as leaving a ``with`` block does."""

    _ids = count()

    def __init__(self, hooks: OrderedDict[int, Hook], hook: Hook, prepend: bool = False) -> None:
        self._hooks = hooks
        self._id = next(self._ids)
        hooks[self._id] = hook
        if prepend:
            hooks.move_to_end(self._id, last=False)

    def remove(self) -> None:
        """Remove the hook; once is enough, more does no harm."""
        self._hooks.pop(self._id, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_REQUIRED: Any = object()  # stands for a default that was not given


class ParameterState(MutableMapping[str, Any]):
    """What an optimizer remembers of one parameter: ``"momentum_buffer"``, and whatever users add.

    The momentum buffer may be read, changed in place, replaced by an array of the parameter's shape
    (float64, float32, float16 or bfloat16), or deleted, which makes the next step a first one. A state that was
    taken out of the optimizer's keeps its values, and raises a ReferenceError when it is given another momentum buffer
    after its parameter is gone.
    """

    __slots__ = ("_other", "slot")

    def __init__(self, parameter: Parameter) -> None:
        self.slot = _core.MomentumSlot(parameter)
        self._other: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key == "momentum_buffer" and self.slot.initialized:
            return self.slot.momentum
        return self._other[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "momentum_buffer":
            self.slot.set(value)
        else:
            self._other[key] = value
            self.slot.note_other_values(True)

    def __delitem__(self, key: str) -> None:
        if key == "momentum_buffer" and self.slot.initialized:
            self.slot.set(None)
        else:
            del self._other[key]
            self.slot.note_other_values(bool(self._other))

    def __iter__(self) -> Iterator[str]:
        if self.slot.initialized:
            yield "momentum_buffer"
        yield from self._other

    def __len__(self) -> int:
        return self.slot.initialized + len(self._other)

    def __repr__(self) -> str:
        return repr(dict(self))


class OptimizerState(MutableMapping[Parameter, MutableMapping[str, Any]]):
    """Maps each parameter to its state; lists those that have any, and makes an empty one on demand.

    Keeps alive the parameters that it lists, and no others.
    """

    def __init__(self) -> None:
        # A state that is not empty keeps its parameter alive, for as long as it is in here.
        self._states: WeakKeyDictionary[Parameter, ParameterState] = WeakKeyDictionary()

    def __del__(self) -> None:
        for state in self._states.values():
            state.slot.detach()

    def __getitem__(self, parameter: Parameter) -> ParameterState:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"state: expected a Parameter as key, got {_core.repr_text(parameter)}")
        state = self._states.get(parameter)
        if state is None:
            state = self._states[parameter] = ParameterState(parameter)
        return state

    def __setitem__(self, parameter: Parameter, value: Mapping[str, Any]) -> None:
        state = self[parameter]
        fresh = ParameterState(parameter)
        fresh.update(value)  # raises before anything is replaced
        state.clear()
        state.update(fresh)

    def __delitem__(self, parameter: Parameter) -> None:
        self.pop(parameter)

    def pop(self, parameter: Parameter, default: Any = _REQUIRED) -> Any:
        """Remove a parameter's state and return it as it is; `default` if there is none, else raise KeyError."""
        if parameter in self:
            state = self._states.pop(parameter)
            state.slot.detach()
            return state
        if default is _REQUIRED:
            raise KeyError(parameter)
        return default

    # The inherited methods would find the empty state that is made on demand.
    def get(self, parameter: Parameter, default: Any = None) -> Any:
        """Return a parameter's state; `default` if it has none."""
        return self._states[parameter] if parameter in self else default

    def setdefault(self, parameter: Parameter, default: Any = None) -> Any:
        """Return a parameter's state, which takes the values of `default`, a mapping or None, if there is none."""
        if parameter not in self:
            self[parameter] = {} if default is None else default
        return self[parameter]

    def __iter__(self) -> Iterator[Parameter]:
        return (parameter for parameter, state in self._states.items() if state)

    def __contains__(self, parameter: object) -> bool:
        return isinstance(parameter, Parameter) and bool(self._states.get(parameter))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Remove the state of every parameter."""
        states = list(self._states.values())
        self._states.clear()
        for state in states:
            state.slot.detach()

    def __repr__(self) -> str:
        return repr(dict(self))


class Optimizer:
    """Base of the optimizers: everything of torch.optim.Optimizer that is not the update itself.

    Args:
        params: what to optimize: a `ParameterBuffer`, or an iterable of `Parameter` objects or arrays,
            of (name, parameter) pairs, or of dicts, one per group, whose ``"params"`` is any of these
            and whose other keys override the defaults.
        defaults: the hyperparameters of groups that do not set their own.

    Attributes:
        rule: the name of the core's rule; subclasses set it.
        param_groups: one dict per group; hyperparameters may be changed between steps.
        state: maps each parameter to its state.
        defaults: the default hyperparameters.
    """

    rule: ClassVar[str]
    # The identities of the parameters so far, while the constructor adds groups.
    _known: set[int] | None = None

    def __init__(self, params: ParamsLike, defaults: dict[str, Any]) -> None:
        if not hasattr(self, "rule"):
            raise NotImplementedError(
                f"{type(self).__name__} has no rule; Optimizer is the base of the optimizers, such as sgdcore.SGD"
            )
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self._state = OptimizerState()
        self._start()

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
        # The plan is built once, of all groups: building it for each would take time that is quadratic in their number.
        self._known = set()
        for group in groups:
            self.add_param_group(group)
        self._known = None
        self._build_plan(self.param_groups)

    def _start(self) -> None:
        """Set up what is not part of a checkpoint."""
        self._plan = _core.Plan(self.rule)
        # Bound once: the binding costs a tenth of the smallest step.
        self._run_plan = self._plan.run
        self._step_pre_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._step_post_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._state_dict_pre_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._state_dict_post_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._load_state_dict_pre_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._load_state_dict_post_hooks: OrderedDict[int, Hook] = OrderedDict()

    @property
    def state(self) -> OptimizerState:
        """Maps each parameter to its state. The values of a mapping that is assigned are taken over."""
        return self._state

    @state.setter
    def state(self, state: Mapping[Parameter, MutableMapping[str, Any]]) -> None:
        if not isinstance(state, OptimizerState):
            values, state = state, OptimizerState()
            state.update(values)
        self._state = state
        self._plan.outdate()

    # Parameter groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the defaults for the hyperparameters it does not set.

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
        # As torch, compared with the first group: a look at all groups for each one would take time that is quadratic.
        if any(("param_names" in each) != (names is not None) for each in self.param_groups[:1]):
            which = "without names" if names is None else "with names"
            raise ValueError(
                "all optimizer param groups should be with/without names. "
                f"cannot add param group {which} to the optimizer"
            )
        self._normalize_group(group)
        known = self._known
        if known is None:
            known = {_identity(p) for each in self.param_groups for p in each["params"]}
        for position, parameter in enumerate(group["params"]):
            if _identity(parameter) in known:
                label = repr(parameter.name) if parameter.name else f"at position {position}"
                raise ValueError(
                    f"some parameters appear in more than one parameter group, or twice: parameter {label}"
                )
            known.add(_identity(parameter))
        if self._known is None:
            self._build_plan([*self.param_groups, group])
        self.param_groups.append(group)

    def _warn_of_near_keys(self, keys: Iterable[Any]) -> None:
        known = {*self.defaults, "params", "param_names"}
        warn_of_near_keys(keys, known, self.defaults)

    def _normalize_group(self, group: dict[str, Any]) -> None:
        """Put a group's hyperparameters into the form that groups keep, or raise if one is invalid."""

    def _build_plan(self, groups: list[dict[str, Any]]) -> None:
        for i, group in enumerate(groups):
            params = group["params"]
            if not isinstance(params, list) or not all(isinstance(p, Parameter) for p in params):
                raise TypeError(
                    f"param_groups[{i}]['params']: expected a list of Parameters, "
                    f"got {_core.repr_text(params)}"
                )
        parameters = chain.from_iterable(group["params"] for group in groups)
        self._plan.build(groups, [self.state[parameter].slot for parameter in parameters])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters.

        Args:
            set_to_none: forget the gradients rather than zeroing them in place; the parameters are then
                skipped until they get new ones. Gradients in a ParameterBuffer are always zeroed.

        Raises:
            ValueError: if a gradient to be zeroed is read-only, or on a device in another memory order than its
                parameter; before any is cleared.
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
            zero_grad: clear each gradient in the same pass, right after it was used.

        Raises:
            TypeError, ValueError: if a hyperparameter is not a number, a gradient does not fit, or arrays overlap
                in memory; if there are no gradients and the optimizer was given arrays only.
            KeyError: if a group lacks a hyperparameter.
            RuntimeError: if the optimizer is stepping in another thread.

        All of them are raised before anything is changed.
        """
        if closure is None and not self._step_pre_hooks and not self._step_post_hooks:
            # The usual call: one call into the core and nothing else.
            if not self._run_plan(self.param_groups, grads, zero_grad):
                self._run(grads, zero_grad)
            return None
        return self._step_with_hooks(closure, {"grads": grads, "zero_grad": zero_grad})

    def _run(self, grads: Any, zero_grad: bool) -> None:
        """Update all parameters, after making what the plan lacks."""
        while not self._plan.run(self.param_groups, grads, zero_grad):
            if not self._plan.matches(self.param_groups):
                self._build_plan(self.param_groups)
                continue
            positions = set(self._plan.missing_momentum())
            parameters = ((p, group) for group in self.param_groups for p in group["params"])
            missing = [
                (p, _momentum_dtype(group, p))
                for i, (p, group) in enumerate(parameters)
                if i in positions
            ]
            for (parameter, _), momentum in zip(missing, _new_momentum(missing), strict=True):
                self.state[parameter].slot.reserve(momentum)

    def _step_with_hooks(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Call the hooks around the closure and the update."""
        if closure is not None and not callable(closure):
            hint = "; gradients are passed as grads=" if np.iterable(closure) else ""
            raise TypeError(f"closure: expected a function, got {type(closure).__name__}{hint}")
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        for hook in self._step_pre_hooks.values():
            replaced = hook(self, args, kwargs)
            if replaced is not None:
                if not (isinstance(replaced, tuple) and len(replaced) == 2):
                    raise RuntimeError(
                        f"a step pre-hook must return None or a tuple of (new_args, new_kwargs), but got {replaced}"
                    )
                args, kwargs = replaced
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        loss = None if closure is None else closure()
        self._run(kwargs.get("grads"), kwargs.get("zero_grad", False))
        for hook in self._step_post_hooks.values():
            hook(self, args, kwargs)
        return loss

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

        ``{"state": {0: {"momentum_buffer": array}, ...}, "param_groups": [{..., "params": [0, ...]}]}``;
        the arrays are the optimizer's own, not copies.
        """
        for hook in self._state_dict_pre_hooks.values():
            hook(self)
        positions: dict[Parameter, int] = {}
        groups = []
        for group in self.param_groups:
            for parameter in group["params"]:
                positions[parameter] = len(positions)
            groups.append({**group, "params": [positions[p] for p in group["params"]]})
        state = {positions.get(p, p): dict(values) for p, values in self.state.items()}
        state_dict: dict[str, Any] = {"state": state, "param_groups": groups}
        for hook in self._state_dict_post_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` (or torch.optim.SGD's, with arrays for tensors) returned.

        Values are copied; a momentum buffer keeps its own dtype, and one that is a list gets its group's
        ``momentum_dtype`` or else its parameter's dtype. Hyperparameters that the checkpoint lacks keep this
        optimizer's defaults.

        Raises:
            TypeError: if `state_dict` is not laid out as `state_dict` returns it.
            KeyError: if it lacks "state" or "param_groups".
            ValueError: if the groups do not match this optimizer's, or a momentum buffer does not have its
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
        refuse_other_optimizers(state_dict)
        saved = state_dict["param_groups"]
        _require_matching(saved, self.param_groups)
        groups = [
            self._merged_group(own, other)
            for own, other in zip(self.param_groups, saved, strict=True)
        ]
        self._replace_state(self._read_state(state_dict, groups))
        # From here on only the user's hooks can raise.
        self.param_groups[:] = groups
        for hook in self._load_state_dict_post_hooks.values():
            hook(self)

    def _merged_group(self, own: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group of the optimizer's with a checkpoint's hyperparameters, or the defaults where it has none."""
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
        """Return a checkpoint's state by parameter: momentum buffers as arrays, copies of all else."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        dtypes = [(p, _momentum_dtype(group, p)) for group in groups for p in group["params"]]
        parameter_of = dict(zip(keys, dtypes, strict=True))
        state = {}
        for key, values in state_dict["state"].items():
            if key not in parameter_of:
                raise ValueError(
                    f"state_dict['state']: no parameter has the key {_core.repr_text(key)}"
                )
            parameter, dtype = parameter_of[key]
            momentum = values.get("momentum_buffer")
            read = copy.deepcopy({k: v for k, v in values.items() if k != "momentum_buffer"})
            if momentum is not None:
                read["momentum_buffer"] = _momentum_array(key, momentum, parameter, dtype)
            state[parameter] = read
        return state

    def _replace_state(self, new: Mapping[Parameter, Mapping[str, Any]]) -> None:
        """Put new values in the place of all state; a failure changes nothing.

        Momentum buffers are copied into new storage, so that the momentum of a buffer is one flat array again, and
        every other laid out like its parameter: pickle keeps some orders of axes and not others.
        """
        state = {parameter: dict(values) for parameter, values in new.items()}
        momenta = {p: v["momentum_buffer"] for p, v in state.items() if "momentum_buffer" in v}
        for parameter, momentum in _filled_momentum(momenta).items():
            state[parameter]["momentum_buffer"] = momentum
        self.state.clear()
        for parameter, values in state.items():
            self.state[parameter].update(values)

    def __getstate__(self) -> dict[str, Any]:
        state = {parameter: dict(values) for parameter, values in self.state.items()}
        return {
            "defaults": self.defaults,
            "state": state,
            "param_groups": self.param_groups,
            "attributes": attributes_of(self, _Own(type(self))),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.defaults = state["defaults"]
        self.param_groups = state["param_groups"]
        self._state = OptimizerState()
        self._start()
        self._replace_state(state["state"])
        set_attributes(self, state.get("attributes"))  # which pickles of earlier versions lack

    def __repr__(self) -> str:
        text = f"{type(self).__name__} ("
        for i, group in enumerate(self.param_groups):
            text += f"\nParameter Group {i}\n"
            text += "".join(
                f"    {key}: {group[key]}\n" for key in sorted(group) if key != "params"
            )
        return text + ")"


class _Own:
    """The attributes that copies of an optimizer do not get: its own, and functions in the place of its methods.

    Such a function, as a scheduler's counter around `step`, is bound to the original.
    """

    names = frozenset(
        {
            "_load_state_dict_post_hooks",
            "_load_state_dict_pre_hooks",
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
    """Tell whether something is iterated for parameters; what gives its rows, names or letters is not."""
    if isinstance(params, ParameterBuffer):
        return True
    if isinstance(params, Parameter | np.ndarray | str | bytes | dict):
        return False
    libraries = libraries_of(params)
    if "torch" in libraries:
        return isinstance(params, Iterable) and not is_torch_module(params)
    is_array = hasattr(params, "__array__") or hasattr(params, "__dlpack__")
    return isinstance(params, Iterable) and not is_array and "sklearn" not in libraries


def _momentum_dtype(group: Mapping[str, Any], parameter: Parameter) -> np.dtype[Any]:
    """Return the dtype of a parameter's new momentum buffer."""
    return storage_dtype(group.get("momentum_dtype") or parameter.dtype, "momentum_dtype")


def _check_states(states: Mapping[Any, Any]) -> None:
    for key, values in states.items():
        if not isinstance(values, Mapping):
            raise TypeError(
                f"state_dict['state'][{_core.repr_text(key)}]: expected a mapping, got {_core.repr_text(values)}"
            )


def _require_matching(saved: Sequence[Mapping[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Raise if a checkpoint's groups are not as many as the optimizer's, and each as large."""
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
    """Return what tells parameters apart; two made of one array are the same one."""
    return id(parameter.data)


def _read_params(params: Any) -> tuple[list[str] | None, list[Parameter]]:
    """Return the names, if there are any, and the parameters of a group."""
    if isinstance(params, ParameterBuffer):
        return None, params.parameters()
    if isinstance(params, set | frozenset):
        raise TypeError(
            "params: optimizer parameters need to be organized in ordered collections, but the ordering "
            "of a set changes between runs; use a list instead"
        )
    # One parameter may stand for a list of one, as in torch.
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
        kind = "torch." + kind  # which has a Parameter, too
    raise TypeError(
        f"params[{position}]: optimizer can only optimize Parameters, NumPy arrays and arrays on CUDA devices, "
        f"but got {kind}{hint}"
    )


def _filled_momentum(
    momenta: dict[Parameter, Array | DeviceArray],
) -> dict[Parameter, Array | DeviceArray]:
    """Return storage as `_new_momentum` does, with these values."""
    storage = _new_momentum([(p, values.dtype) for p, values in momenta.items()])
    for momentum, values in zip(storage, momenta.values(), strict=True):
        if not isinstance(momentum, DeviceArray):
            momentum[...] = values
        elif isinstance(values, DeviceArray) and values.strides != momentum.strides:
            momentum.assign(values.numpy())  # a device only copies what lies in the same order
        else:
            momentum.assign(values)
    return dict(zip(momenta, storage, strict=True))


class _Flat(NamedTuple):
    """One flat array of momentum, by what the parameters that share it have in common."""

    buffer: ParameterBuffer
    dtype: np.dtype[Any]
    device: int

    def allocate(self, size: int) -> Any:
        if self.device == CPU:
            with naming_allocation("the momentum of a ParameterBuffer", (size,), self.dtype):
                return _core.allocate(size, self.dtype)
        return DeviceArray.empty(size, self.dtype, self.device)


def _new_momentum(parameters: list[tuple[Parameter, np.dtype[Any]]]) -> list[Array | DeviceArray]:
    """Return storage for the momentum of each parameter, laid out like it.

    That of parameters in one buffer is one flat array, so that the step runs through all three without a break.
    """
    sizes: dict[_Flat, int] = {}
    for parameter, dtype in parameters:
        if parameter.buffer is not None:
            flat = _Flat(parameter.buffer, dtype, parameter.device)
            sizes[flat] = sizes.get(flat, 0) + parameter.size
    arrays = {flat: flat.allocate(size) for flat, size in sizes.items()}
    starts = dict.fromkeys(arrays, 0)
    momenta: list[Array | DeviceArray] = []
    for parameter, dtype in parameters:
        if parameter.buffer is None:
            momenta.append(_separate_momentum(parameter, dtype))
            continue
        flat = _Flat(parameter.buffer, dtype, parameter.device)
        start = starts[flat]
        starts[flat] = start + parameter.size
        momenta.append(arrays[flat][start : starts[flat]].reshape(parameter.shape))
    return momenta


def _separate_momentum(parameter: Parameter, dtype: np.dtype[Any]) -> Array | DeviceArray:
    """Return storage laid out like the parameter.

    Large storage on the CPU is mapped by itself. malloc would often place it right behind the parameter, where a step
    may take several times as long: see csrc/buffer.cpp.
    """
    data = parameter.data
    if parameter.device != CPU:
        return DeviceArray.empty_like(DeviceArray.of(data), dtype)
    what = f"the momentum of parameter {parameter.name!r}" if parameter.name else "momentum"
    with naming_allocation(what, data.shape, dtype):
        if data.size * dtype.itemsize < 2 * _core.huge_page or not data.flags.c_contiguous:
            return np.empty_like(data, dtype=dtype, subok=False)
        return _core.allocate(data.size, dtype).reshape(data.shape)


def _momentum_array(
    key: Any, value: Any, parameter: Parameter, dtype: np.dtype[Any]
) -> Array | DeviceArray:
    """Return a checkpoint's momentum buffer as an array of one of the storage types: `dtype` for one of lists."""
    argument = f"state_dict['state'][{_core.repr_text(key)}]['momentum_buffer']"
    _core.require_plain(value, argument)
    try:
        array: Array | DeviceArray
        if _core.is_on_device(value):
            array = DeviceArray.of(value)
            if parameter.device != array.device:
                array = array.numpy()
        else:
            # DLPack knows torch's bfloat16, NumPy's own conversion does not.
            shared = not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__")
            array = _core.from_dlpack(value) if shared else np.asarray(value)
            if not hasattr(value, "dtype") and array.dtype.kind in "iuf":
                array = array.astype(dtype)
    except Exception as error:
        raise TypeError(f"{argument}: {error}") from error
    storage_dtype(array.dtype, argument)
    if array.shape != parameter.shape:
        raise ValueError(
            f"{argument}: expected shape {parameter.shape}, the parameter's, got {array.shape}"
        )
    return array
