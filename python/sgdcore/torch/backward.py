"""The update inside the backward pass: each parameter steps as soon as its gradient is complete."""

from __future__ import annotations

import gc
import warnings
import weakref
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import Tensor

from sgdcore._rules import rule_of
from sgdcore.torch._averaged import averaged_parameters, is_sharded, watch_wrappers
from sgdcore.torch._compile import not_compiled
from sgdcore.torch._interface import exchange_api, new_plan
from sgdcore.torch._irregular import label_of
from sgdcore.torch._passes import current_pass, keeps_graph, nested_pass
from sgdcore.torch.optimizer import Optimizer

__all__ = ["StepInBackward", "step_in_backward"]


class _UsedGradient(Tensor):
    """A placeholder for a gradient that was used and freed. It has no memory, and any use raises."""

    @staticmethod
    def __new__(cls, parameter: Tensor, grad: Tensor) -> Self:
        used: Self = Tensor._make_wrapper_subclass(
            cls,
            grad.shape,
            strides=parameter.stride(),
            dtype=grad.dtype,
            device=grad.device,
        )
        return used

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<gradient of shape {tuple(self.shape)}, already used by step_in_backward>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        raise RuntimeError(
            f"{func}: the gradient was used and freed by step_in_backward. Gradients cannot be clipped by their global "
            "norm, unscaled or accumulated with it; call optimizer.step() after each backward pass, or remove() it"
        )


class _Hook:
    """Steps one parameter when its gradient is complete. The parameter refers to its hook, not the hook to it.

    Attributes:
        owner: a weak reference to the StepInBackward. The garbage collector does not see the references of hooks, so
            it could not free a cycle through one.
        place: where the parameter was last found: the index of its group, and its position in the group.
        used: the last placeholder for its gradient.
    """

    __slots__ = ("owner", "place", "used")

    def __init__(self, owner: weakref.ref[StepInBackward], place: tuple[int, int]) -> None:
        self.owner = owner
        self.place = place
        self.used: _UsedGradient | None = None

    @not_compiled
    def __call__(self, parameter: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner._step(parameter, self)

    def replace_grad(self, parameter: Tensor, grad: Tensor) -> None:
        """Replace a gradient that was used by a placeholder."""
        if self.used is not None:
            try:
                parameter.grad = self.used
                return
            except RuntimeError:  # the parameter was converted meanwhile
                pass
        self.used = _UsedGradient(parameter, grad)
        parameter.grad = self.used


def _hooks_of(parameter: Tensor) -> list[_Hook]:
    hooks = parameter._post_accumulate_grad_hooks or {}
    return [hook for hook in hooks.values() if isinstance(hook, _Hook)]


class StepInBackward:
    """Returned by `step_in_backward`; `remove` makes the optimizer step by itself again. Also a context manager."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._this = weakref.ref(self)
        self._handles: list[Any] = []
        self._plan = new_plan(exchange_api(), optimizer.rule)
        self._plan.clipping = optimizer._clipping
        # The hooks of parameters that stepped in this round: `step` clears their gradients. There is no reference to
        # the parameters, not even a weak one, which torch.utils.swap_tensors would refuse.
        self._stepped: set[_Hook] = set()
        self._waiting = False  # all parameters wait for `step` until the end of the round
        # The number of the last backward pass that was examined, and whether another pass adds to its gradients.
        self._pass = -1
        self._pass_is_partial = False
        self._warned = False
        self._add_groups(0)
        this = self._this

        def wrapped(wrapper: str, name: str, parameter: Tensor) -> None:
            owner = this()
            if owner is not None:
                owner._refuse_wrapper(wrapper, name, parameter)

        self._watch = weakref.finalize(self, watch_wrappers(wrapped).remove)
        self._watch.atexit = False

    @property
    def plan(self) -> Any:
        """The plan of the steps in the backward pass."""
        return self._plan

    @staticmethod
    def require_precision(group: dict[str, Any]) -> None:
        """Raise if a group's precision needs to know of the other parameters."""
        if group.get("precision") == "stochastic":
            raise ValueError(
                "precision: 'stochastic' rounds by the parameter's position among all, which a step in the backward "
                "pass does not know; 'split' and 'kahan' go with step_in_backward"
            )

    def add_last_group(self) -> None:
        """Make the parameters of the optimizer's last group step in the backward pass.

        Raises:
            ValueError: if something else averages or steps one of them; before anything is changed.
        """
        self._add_groups(len(self._optimizer.param_groups) - 1)

    def _add_groups(self, first: int) -> None:
        added = list(enumerate(self._optimizer.param_groups))[first:]
        for _, group in added:
            self.require_precision(group)
        averaged = averaged_parameters()
        for index, group in added:
            self._check_group(index, group, averaged)
        # Handles of parameters that have ended are dropped.
        self._handles = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
        for index, group in added:
            for position, parameter in enumerate(group["params"]):
                # A parameter that was moved from another group has its hook already.
                if parameter.requires_grad and self._hook_of(parameter) is None:
                    hook = _Hook(self._this, (index, position))
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def _check_group(self, index: int, group: dict[str, Any], averaged: set[int]) -> None:
        for position, parameter in enumerate(group["params"]):
            reason = None
            if id(parameter) in averaged:
                reason = "DistributedDataParallel averages its gradient only after that"
            elif is_sharded(parameter):
                reason = "FullyShardedDataParallel averages its gradient only after that; fully_shard does it before"
            elif self._other_owner(parameter) is not None:
                reason = "another optimizer steps in the backward pass and has the parameter, too"
            if reason is not None:
                label = label_of(group, position, (index, position))
                raise ValueError(f"{label} cannot be updated in the backward pass: {reason}")

    def _other_owner(self, parameter: Tensor) -> StepInBackward | None:
        """Return another StepInBackward that steps the parameter, or None."""
        for hook in _hooks_of(parameter):
            owner = hook.owner()
            if owner not in (None, self) and owner._group_of(parameter, hook) is not None:
                return owner
        return None

    def _hook_of(self, parameter: Tensor) -> _Hook | None:
        return next((h for h in _hooks_of(parameter) if h.owner is self._this), None)

    def _refuse_wrapper(self, wrapper: str, name: str, parameter: Tensor) -> None:
        hook = self._hook_of(parameter)
        if hook is not None and self._group_of(parameter, hook) is not None:
            raise ValueError(
                f"{wrapper}: parameter '{name}' is updated in the backward pass, before its gradient is averaged; "
                "remove() step_in_backward from its optimizer first"
            )

    def _group_of(self, parameter: Tensor, hook: _Hook) -> dict[str, Any] | None:
        """Return the parameter's group as it is now, with this parameter only; None if no group has the parameter."""
        for _ in range(2):
            if self._parameter_at(hook.place) is parameter:
                index, position = hook.place
                group = self._optimizer.param_groups[index]
                only = {**group, "params": [parameter]}
                if "param_names" in group:
                    only["param_names"] = [group["param_names"][position]]
                return only
            self._find_places()
        return None

    def _parameter_at(self, place: tuple[int, int]) -> Tensor | None:
        index, position = place
        groups = self._optimizer.param_groups
        if index < len(groups):
            params = groups[index]["params"]
            if position < len(params):
                return params[position]  # type: ignore[no-any-return]
        return None

    def _find_places(self) -> None:
        """Note where each parameter is now. A change that moves one parameter mostly moves many."""
        for i, group in enumerate(self._optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                hook = self._hook_of(parameter)
                if hook is not None:
                    hook.place = (i, j)

    def _step(self, parameter: Tensor, hook: _Hook) -> None:
        grad = parameter.grad
        assert grad is not None
        # A gradient that autograd has recorded (create_graph=True) is needed after the pass.
        if self._waiting or grad.requires_grad:
            return  # `step` updates it
        number = current_pass()
        if number != self._pass:
            self._look_at(number)
        if self._pass_is_partial:
            return
        group = self._group_of(parameter, hook)
        if group is None:
            return  # a parameter that was removed keeps its gradient
        optimizer = self._optimizer
        found = self._plan.run([group], optimizer._state, False, 1.0, None)
        if found is not True:
            optimizer._update_part(self._plan, [group], found, hook.place)
        try:
            hook.replace_grad(parameter, grad)
        except BaseException:
            parameter.grad = None  # otherwise `step` would use the gradient a second time
            raise
        self._stepped.add(hook)

    def _look_at(self, number: int) -> None:
        """Note whether other passes will add to the gradients of the running one."""
        # After a failure the pass is examined again.
        self._pass, self._pass_is_partial = -1, False
        if number == -1:
            return
        # A graph that is kept is for another pass.
        partial = keeps_graph()
        if not partial:
            node = nested_pass()
            if node is not None:
                partial = True
                self._wait(node)
        self._pass, self._pass_is_partial = number, partial

    def _wait(self, node: str) -> None:
        """Leave all updates of this round to `step`."""
        self._waiting = True
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"step_in_backward: {node} runs a backward pass of its own (torch.utils.checkpoint does with "
                "use_reentrant=True), and parameters may get gradients from both; they keep them until "
                "optimizer.step(), which updates them. Pass use_reentrant=False to free them in the backward pass",
                UserWarning,
                stacklevel=2,
            )

    def finish_round(self) -> None:
        """Let the parameters take new gradients. ``optimizer.step()`` calls this."""
        stepped, self._stepped = self._stepped, set()
        self._waiting = False
        elsewhere = {hook for hook in stepped if not self._clear_used(hook)}
        if elsewhere:
            self._find_places()
            elsewhere = {hook for hook in elsewhere if not self._clear_used(hook)}
        if elsewhere:
            self._clear_removed(elsewhere)

    def _clear_used(self, hook: _Hook) -> bool:
        """Clear the placeholder of a gradient. Return False if the parameter is not where it was last found."""
        parameter = self._parameter_at(hook.place)
        if parameter is None:
            return False
        if parameter.grad is hook.used:
            parameter.grad = None
            return True
        return hook in _hooks_of(parameter)

    def _clear_removed(self, hooks: set[_Hook]) -> None:
        """Clear the placeholders of parameters that no group has any longer. Python's garbage collector finds these."""
        of_parameters = (handle.hooks_dict_ref() for handle in self._handles)
        own = [of for of in of_parameters if of and any(hook in of.values() for hook in hooks)]
        for parameter in gc.get_referrers(*own) if own else ():
            if isinstance(parameter, Tensor) and isinstance(parameter.grad, _UsedGradient):
                parameter.grad = None

    @not_compiled
    def remove(self) -> None:
        """Remove the hooks. The optimizer then steps in ``step()`` again."""
        self._watch()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.finish_round()
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


@not_compiled
def step_in_backward(optimizer: Optimizer) -> StepInBackward:
    """Update each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

    The gradients of all parameters are then never in memory together, and each is used while it is in the cache. The
    training loop stays as it is: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``, where ``step()`` updates
    the parameters that still have a gradient, runs the hooks and schedulers' bookkeeping, and lets the next backward
    pass begin. Hyperparameters are read at each update. The numbers are those of separate steps, provided the backward
    pass uses no parameter after its gradient was complete; autograd raises an error if it does.

    Between the backward pass and ``step()``, ``p.grad`` is a placeholder without memory that raises a RuntimeError when
    it is used: by clip_grad_norm_, or by a second backward pass that would accumulate. A GradScaler gets a
    RuntimeError, too, but only after the parameters were updated with scaled gradients.

    Parameters keep their gradients until ``step()`` where another pass is to add to them: after
    ``backward(retain_graph=True)`` or ``create_graph=True``, and, with a warning, where a node of the graph runs a
    backward pass of its own, as ``torch.utils.checkpoint`` does with ``use_reentrant=True``.

    Args:
        optimizer: the optimizer whose parameters are to be stepped.

    Raises:
        TypeError: if the optimizer is none of sgdcore.torch.
        ValueError: if it is differentiable, has averages, `max_grad_norm` or `skip_nonfinite`, counts whole steps as
            ScheduleFreeSGD does, or already steps in the backward pass, or a gradient is pending, or
            DistributedDataParallel, FullyShardedDataParallel or another optimizer's step_in_backward has one of the
            parameters, or a wrapper of `sgdcore.distributed` that cannot go with it has the optimizer.
            DistributedDataParallel raises it, too, when it is to wrap one of the parameters afterwards.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected an optimizer of sgdcore.torch, got {type(optimizer)}")
    if optimizer._in_backward is not None:
        raise ValueError("optimizer: it already steps in the backward pass")
    if optimizer.average is not None:
        raise ValueError("optimizer: average= cannot go with step_in_backward")
    if rule_of(optimizer.rule).counts:
        raise ValueError(
            f"step_in_backward: {type(optimizer).__name__} counts whole steps, of all parameters of a group at once"
        )
    for option in ("max_grad_norm", "skip_nonfinite"):
        if getattr(optimizer, option):
            raise ValueError(
                f"optimizer: {option} cannot go with step_in_backward, which never has all gradients together"
            )
    wrapper = getattr(optimizer, "_wrapper", lambda: None)()  # a wrapper of sgdcore.distributed
    if wrapper is not None:
        wrapper.check_step_in_backward()
    for group in optimizer.param_groups:
        if group.get("differentiable", False):
            raise ValueError("optimizer: differentiable=True cannot go with step_in_backward")
        if any(parameter.grad is not None for parameter in group["params"]):
            raise ValueError(
                "optimizer: some parameters have gradients; call step() or zero_grad() before step_in_backward"
            )
    optimizer._in_backward = StepInBackward(optimizer)
    return optimizer._in_backward  # type: ignore[no-any-return]
