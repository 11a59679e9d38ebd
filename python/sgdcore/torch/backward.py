"""The update inside the backward pass: each parameter steps as soon as its gradient is there."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import Tensor

from sgdcore.torch._interface import exchange_api, new_plan
from sgdcore.torch.sgd import SGD

__all__ = ["StepInBackward", "step_in_backward"]


class _UsedGradient(Tensor):
    """What stands in for a gradient that was used and freed: without memory, and any use of it raises."""

    @staticmethod
    def __new__(cls, parameter: Tensor) -> Self:
        used: Self = Tensor._make_wrapper_subclass(
            cls,
            parameter.shape,
            strides=parameter.stride(),
            dtype=parameter.dtype,
            device=parameter.device,
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


class StepInBackward:
    """Returned by `step_in_backward`; `remove` makes the optimizer step by itself again. Also a context manager."""

    def __init__(self, optimizer: SGD) -> None:
        self._optimizer = optimizer
        self._handles: list[Any] = []
        # Of one parameter each time, so there is nothing to remember.
        self._plan = new_plan(exchange_api(), pins=False)
        # Where each parameter was last found: the index of its group, and its position there.
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._stepped: dict[Tensor, None] = {}  # an ordered set; since the last round's end
        self._used: dict[Tensor, _UsedGradient] = {}
        for group in optimizer.param_groups:
            self.add_group(group)

    def add_group(self, group: dict[str, Any]) -> None:
        """Make the parameters of a group step in the backward pass."""
        # The garbage collector does not see what such hooks refer to: a cycle through one would stay for ever.
        this = weakref.ref(self)

        def step(parameter: Tensor) -> None:
            alive = this()
            if alive is not None:
                alive._step(parameter)

        for parameter in group["params"]:
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(step)
                self._handles.append(handle)

    def _group_of(self, parameter: Tensor) -> dict[str, Any] | None:
        """Return the parameter's group as it is now, with this parameter alone; None if it is in none."""
        groups = self._optimizer.param_groups
        for _ in range(2):
            index, position = self._places.get(parameter, (len(groups), 0))
            if index < len(groups):
                group = groups[index]
                params = group["params"]
                if position < len(params) and params[position] is parameter:
                    only = {**group, "params": [parameter]}
                    if "param_names" in group:
                        only["param_names"] = [group["param_names"][position]]
                    return only
            self._places = {
                p: (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])
            }
        return None

    def _step(self, parameter: Tensor) -> None:
        group = self._group_of(parameter)
        if group is None:
            return  # it was removed, and keeps its gradient
        used = self._used.get(parameter)
        # The parameter may have been converted since.
        if (
            used is None
            or used.dtype != parameter.dtype
            or used.shape != parameter.shape
            or used.device != parameter.device
        ):
            used = self._used[parameter] = _UsedGradient(parameter)
        optimizer = self._optimizer
        if not self._plan.run([group], optimizer._state, False, 1.0):
            optimizer._update_part(self._plan, [group], self._places[parameter])
        parameter.grad = used
        self._stepped[parameter] = None

    def finish_round(self) -> None:
        """Let the parameters take new gradients; a part of ``optimizer.step()``."""
        for parameter in self._stepped:
            if isinstance(parameter.grad, _UsedGradient):
                parameter.grad = None
        self._stepped.clear()

    def remove(self) -> None:
        """Take the hooks off again; the optimizer then steps when it is told to."""
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


def step_in_backward(optimizer: SGD) -> StepInBackward:
    """Update each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

    The gradients of all parameters are then never in memory together, and each is used while it is in the cache. The
    training loop stays as it is: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``, where ``step()`` updates
    the parameters that got a gradient in another way, runs the hooks and schedulers' bookkeeping, and lets the next
    backward pass begin. Hyperparameters are read at each update. The numbers are those of separate steps, provided the
    backward pass uses no parameter after its gradient was complete; autograd raises an error if it does.

    Between the backward pass and ``step()``, ``p.grad`` is a placeholder without memory that raises a RuntimeError when
    it is used: by clip_grad_norm_, or by a second backward pass that would accumulate. A GradScaler gets a
    RuntimeError, too, but only after the parameters were updated with scaled gradients.

    Args:
        optimizer: the optimizer whose parameters are to be stepped.

    Raises:
        TypeError: if the optimizer is not an sgdcore.torch.SGD.
        ValueError: if it is differentiable, or already steps in the backward pass, or a gradient is pending.
    """
    if not isinstance(optimizer, SGD):
        raise TypeError(f"optimizer: expected an sgdcore.torch.SGD, got {type(optimizer)}")
    if optimizer._in_backward is not None:
        raise ValueError("optimizer: it already steps in the backward pass")
    for group in optimizer.param_groups:
        if group.get("differentiable", False):
            raise ValueError("optimizer: differentiable=True cannot go with step_in_backward")
        if any(parameter.grad is not None for parameter in group["params"]):
            raise ValueError(
                "optimizer: some parameters have gradients; call step() or zero_grad() before step_in_backward"
            )
    optimizer._in_backward = StepInBackward(optimizer)
    return optimizer._in_backward  # type: ignore[no-any-return]
