"""What the wrappers of an optimizer have in common: they stand in for it."""

from __future__ import annotations

import sys
import weakref
from collections import UserDict
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, Self, cast

from sgdcore._grad_scaler import asked_by_grad_scaler
from sgdcore.distributed._flat import is_torch
from sgdcore.distributed.buffers import Buffers, warn_of_batch_norm
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.distributed.header import Caller
from sgdcore.distributed.parameters import Parameters
from sgdcore.optimizer import Optimizer


class _Inner:
    """An attribute that is the inner optimizer's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Wrapper | None, owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper._optimizer, self._name)

    def __set__(self, wrapper: Wrapper, value: Any) -> None:
        setattr(wrapper._optimizer, self._name, value)


class _State(UserDict[Any, Any]):
    """A torch optimizer's state, which counts as there even while it is empty.

    torch's checkpoint API (``get_optimizer_state_dict``) takes a step with any optimizer whose state is empty; a
    wrapper's would be a round with the other ranks.
    """

    def __init__(self, state: Any) -> None:
        self.data = state

    def __bool__(self) -> bool:
        return True

    def __missing__(self, key: Any) -> Any:
        return self.data[key]  # which makes one


class Wrapper:
    """Stands in for an optimizer: groups, state, hooks and `zero_grad` are the inner one's.

    Around a torch optimizer it is a torch.optim.Optimizer itself, so that schedulers and GradScaler take it.
    """

    _optimizer: Any
    _group: ProcessGroup
    _buffers: Buffers
    _model: Any
    _caller: Caller
    _feedback: ErrorFeedback
    _parameters: Any

    param_groups = _Inner()
    defaults = _Inner()
    zero_grad = _Inner()
    register_step_pre_hook = _Inner()
    register_step_post_hook = _Inner()
    register_state_dict_pre_hook = _Inner()
    register_state_dict_post_hook = _Inner()
    register_load_state_dict_pre_hook = _Inner()
    register_load_state_dict_post_hook = _Inner()

    def __new__(cls, optimizer: Any = None, *_: Any, **__: Any) -> Self:
        """Return an instance that is a torch.optim.Optimizer around one."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(optimizer, torch.optim.Optimizer):
            return cast(Self, object.__new__(_torch_flavour(cls)))  # type: ignore[arg-type]
        return object.__new__(cls)

    def _wrap(self, optimizer: Any, group: Any, model: Any, buffers: Any) -> None:
        """Take the optimizer over, after checking what it is."""
        if isinstance(optimizer, Wrapper):
            raise TypeError(f"optimizer: it is distributed already, got {type(optimizer).__name__}")
        torch = sys.modules.get("torch")
        kinds = (Optimizer,) if torch is None else (Optimizer, torch.optim.Optimizer)
        if not isinstance(optimizer, kinds):
            raise TypeError(
                f"optimizer: expected one of sgdcore or torch.optim, got {type(optimizer).__name__}"
            )
        if torch is not None and isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer: LBFGS evaluates its closure several times a step, with parameters and gradients that are "
                "not averaged in between; expected an optimizer that steps with one gradient"
            )
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError("optimizer: expected at least one parameter, got none")
        if model is not None and not (torch is not None and isinstance(model, torch.nn.Module)):
            raise TypeError(f"model: expected a torch.nn.Module or None, got {model!r}")
        self._group = as_process_group(group)
        self._optimizer, self._model = optimizer, model
        self._caller, self._feedback = Caller(self), ErrorFeedback()
        if hasattr(optimizer, "_in_backward"):
            self._optimizer._wrapper = weakref.ref(self)  # step_in_backward asks it
        if buffers is None and model is not None:
            buffers = dict(model.named_buffers())
        self._buffers = Buffers(buffers)
        if model is None and not self._buffers.layout and self._group.size > 1:
            groups = optimizer.param_groups
            warn_of_batch_norm(p for each in groups for p in each["params"] if is_torch(p))

    def _read_parameters(self) -> Parameters:
        """Return the optimizer's parameters, by the model's names where it has none."""
        named = () if self._model is None else self._model.named_parameters()
        return Parameters(self._optimizer, {id(parameter): name for name, parameter in named})

    def _other_parameters(self) -> Buffers:
        """Return the model's parameters that the optimizer does not have, by name."""
        own = {id(parameter) for parameter in self._parameters.all}
        named = () if self._model is None else self._model.named_parameters()
        return Buffers({name: p.detach() for name, p in named if id(p) not in own})

    @property
    def _like(self) -> Any:
        """An array of the kind that the group takes."""
        return self._parameters.flats[0]

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        state = self._optimizer.state
        return state if isinstance(self._optimizer, Optimizer) else _State(state)

    @state.setter
    def state(self, value: Any) -> None:
        self._optimizer.state = value

    @property
    def optimizer(self) -> Any:
        """The optimizer that does the steps."""
        return self._optimizer

    @property
    def group(self) -> ProcessGroup:
        """The process group."""
        return self._group

    def finish(self) -> None:
        """End training on this rank."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.finish()

    def check_step_in_backward(self) -> None:
        """Raise a ValueError if stepping in the backward pass cannot go with this wrapper."""

    def _refuse_step_in_backward(self) -> None:
        if getattr(self._optimizer, "_in_backward", None) is not None:
            self.check_step_in_backward()

    def _inner_step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Let the inner optimizer step, as GradScaler wants it."""
        attributes = self.__dict__
        found_inf, scale = attributes.get("found_inf"), attributes.get("grad_scale")
        if found_inf is None and scale is None:
            step = self._optimizer.step
            return step(**kwargs) if closure is None else step(closure, **kwargs)
        inner = self._optimizer
        # Of sgdcore.torch.SGD; torch's optimizers answer with the attribute.
        takes_scale = getattr(inner, "_takes_scale", None)
        if takes_scale() if takes_scale else getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf, inner.grad_scale = found_inf, scale
            try:
                return inner.step(**kwargs)
            finally:
                for name in ("found_inf", "grad_scale"):
                    vars(inner).pop(name, None)
        if found_inf is not None and float(found_inf) != 0:
            return None
        if scale is not None:
            factor = scale.double().reciprocal().float()  # as GradScaler.unscale_ computes it
            for parameter in self._parameters.all:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.device))
        return inner.step(**kwargs)

    def _forget_scaling(self) -> None:
        """Drop what GradScaler set for one step; it removes it itself only where that step succeeds."""
        self.__dict__.pop("found_inf", None)
        self.__dict__.pop("grad_scale", None)

    def __repr__(self) -> str:
        inner = "\n".join("  " + line for line in repr(self._optimizer).splitlines())
        return f"{type(self).__name__} over {self._group!r} of\n{inner}"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} belongs to its process group and cannot be copied or pickled; save its state_dict()"
        )


def _step_supports_amp_scaling(_: Wrapper) -> bool:
    # GradScaler would leave out `step` for an overflow on this rank alone, and the ranks would no longer agree on
    # when a round ends; told that `step` knows about scaling, it always calls it.
    return asked_by_grad_scaler()


@cache
def _torch_flavour(cls: Any) -> Any:
    """Return the class's subclass that is a torch.optim.Optimizer, too."""
    base = sys.modules["torch"].optim.Optimizer
    supports = property(_step_supports_amp_scaling)
    attributes = {"__module__": cls.__module__, "_step_supports_amp_scaling": supports}
    return cls if issubclass(cls, base) else type(cls.__name__, (cls, base), attributes)


def call_closure(closure: Callable[[], Any], parameter: Any) -> Any:
    """Call a closure that computes gradients, with autograd enabled where there is one."""
    if is_torch(parameter):
        with sys.modules["torch"].enable_grad():
            return closure()
    return closure()
