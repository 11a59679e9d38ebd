"""Synchronous SGD: each step with the mean of all ranks' gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sgdcore.distributed import _flat
from sgdcore.distributed._checks import check_number
from sgdcore.distributed._flat import is_torch
from sgdcore.distributed.groups import as_process_group
from sgdcore.distributed.header import RoundError, any_flags, compare, fingerprint
from sgdcore.distributed.wrapper import Wrapper


class DataParallel(Wrapper):
    r"""Steps of an optimizer with the gradients' mean over all ranks, which keeps the ranks' parameters equal.

    With the gradient g_i and the weight w_i of rank i, each step takes::

        g = (w_1 g_1 + ... + w_N g_N) / (w_1 + ... + w_N)

    Gradients are averaged in `step`, in place, or before it in `average_gradients`. (torch's DistributedDataParallel
    around the model, with our optimizer in it, averages while the backward pass still computes, and can compress.) All
    ranks start with the parameters, state and hyperparameters of the first one. A parameter without a gradient on some
    ranks counts as zero there, and gets the mean; one that has none on any rank is left alone. On one rank nothing is
    changed.

    Args:
        optimizer: `sgdcore.SGD`, `sgdcore.torch.SGD`, or any optimizer of torch.optim but LBFGS.
        group: see `as_process_group`; by default all ranks.
        model: as for `LocalSGD`.
        buffers: as for `LocalSGD`; they are averaged with each step.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ in it or in their parameters' names or layout;
            before anything is changed.
        RoundError: on all ranks, if gradients cannot be averaged, or ranks call different wrappers. The parameters are
            then those of the last step. Where the ranks are all there, they go on with the next one; see `rebind` for
            where not.
    """

    def __init__(
        self, optimizer: Any, group: Any = None, *, model: Any = None, buffers: Any = None
    ) -> None:
        self._wrap(optimizer, group, model, buffers)
        self._weight = 1.0
        self._steps = 0
        self._averaged = False
        self._start(0)

    def check_step_in_backward(self) -> None:
        """Raise a ValueError: a backward pass that steps does so with this rank's gradients alone."""
        raise ValueError(
            "optimizer: DataParallel cannot go with step_in_backward, which steps with this rank's gradients alone"
        )

    def _status(self) -> int:
        return self._steps + 1

    def _meet(self, status: int) -> None:
        """See that ranks agree; take the parameters of the one with the most steps. A new rank's status is 0."""
        self._follow_first(self._introduce(status))

    def _follow_first(self, everyone: list[int]) -> None:
        """Take parameters, the optimizer's state and the count of steps of the rank with the most steps."""
        group, parameters, source = self._group, self._parameters, everyone.index(max(everyone))
        state = self._state_of(source, self._optimizer.state_dict)
        parameters.averager().broadcast(group, parameters.flats, source)
        self._buffers.broadcast(group, source)
        if group.rank != source:
            self._load_inner(state)
        self._steps = max(0, everyone[source] - 1)
        self._averaged = self._verified = False

    @property
    def weight(self) -> float:
        """The weight of this rank in the next mean, such as the number of examples in its batch; 1 unless set.

        With 0 this rank's gradients count for nothing, whatever they hold; some rank's weight has to be more.
        """
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = check_number("weight", value)

    # Gradients

    def _collect(self, grads: Sequence[Any] | None) -> list[Any]:
        """Return gradients, or None: those given or the parameters' own, laid out as the parameters are."""
        parameters = self._parameters.all
        found = [parameter.grad for parameter in parameters] if grads is None else list(grads)
        if len(found) != len(parameters):
            raise ValueError(
                f"grads: expected {len(parameters)} gradients, one for each parameter, got {len(found)}"
            )
        for i, gradient in enumerate(found):
            found[i] = self._laid_out(i, gradient)
            if grads is None and found[i] is not gradient:
                parameters[i].grad = found[i]
        return found

    def _laid_out(self, i: int, gradient: Any) -> Any:
        """Return the gradient, or a copy that has the parameter's order in memory and can be written to."""
        if gradient is None:
            return None
        label, data = f"the gradient of {self._parameters.labels[i]}", self._parameters.data[i]
        expected, got = tuple(data.shape), tuple(gradient.shape)
        if got != expected:
            raise ValueError(f"{label}: expected shape {expected}, the parameter's, got {got}")
        if is_torch(gradient) and gradient.is_sparse:
            raise TypeError(f"{label}: expected a dense tensor, got a sparse one")
        if not is_torch(gradient) and not gradient.flags.writeable:
            gradient = gradient.copy()
        return _flat.laid_out(gradient, data)

    # Averaging

    def _average(self, grads: Sequence[Any] | None = None, idle: bool = False) -> list[Any]:
        """Average gradients with the other ranks.

        Args:
            grads: this rank's, changed in place; None for the parameters' own.
            idle: this rank has none, and weighs nothing.

        Returns:
            The means; none on an idle rank where all others are idle, too.
        """
        try:
            return self._take_part(grads, idle)
        except Exception as error:
            self._averaged = False
            if isinstance(error.__cause__, TypeError | ValueError):
                raise error.__cause__ from None  # bad input is just that on its own rank
            group, step = self._group, self._steps + 1
            message = (
                f"the gradients of step {step} could not be averaged on rank {group.rank} of {group.size}; "
                f"parameters are those of step {step - 1}, gradients are of no use: {error}"
            )
            raise RoundError(message, step, True) from error

    def _take_part(self, grads: Sequence[Any] | None, idle: bool) -> list[Any]:
        parameters, gradients = self._parameters, list[Any]()

        def prepare() -> dict[str, Any]:
            gradients[:] = [None] * len(parameters.all) if idle else self._collect(grads)
            return {"present": np.packbits([each is not None for each in gradients])}

        weight, hyper = 0.0 if idle else self.weight, self._hyperparameters()
        headers = self._exchange("a step", prepare, hyper=hyper, active=not idle, weight=weight)
        active, total = headers["active"], sum(headers["weight"])
        if not any(active):
            return []
        compare("hyperparameters", headers["hyper"], active)
        what = "the parameters before this step, which were changed on some ranks only"
        self._verify(headers, what, active)
        if total == 0:
            raise ValueError("weight: expected more than 0 on some rank")
        wanted = any_flags(headers["present"], len(gradients))
        for i in (i for i, there in enumerate(wanted) if there and not idle):
            if gradients[i] is None:
                gradients[i] = _flat.zeros_like(parameters.data[i])
                if grads is None:  # a buffer's parameter keeps it in memory of its own
                    parameters.all[i].grad = gradients[i]
                    gradients[i] = parameters.all[i].grad
        labelled = zip(gradients, parameters.labels, strict=True)
        views = [] if idle else [g if g is None else _flat.flat(g, label) for g, label in labelled]
        factor = headers["weight"][self._group.rank] / total
        parameters.averager().average(self._group, views, factor, wanted=wanted)
        self._buffers.average(self._group, (not idle) / sum(active), active.index(True))
        return gradients

    def _hyperparameters(self) -> str:
        """Return the hyperparameters that are numbers, one a line."""
        return "\n".join(
            f"param_groups[{i}][{name!r}] = {value if type(value) in (int, float, bool) else float(value)!r}"
            for i, group in enumerate(self._optimizer.param_groups)
            for name, value in group.items()
            if type(value) in (int, float, bool) or (is_torch(value) and value.numel() == 1)
        )

    # Training

    def average_gradients(self) -> None:
        """Average the gradients now, on all ranks; the next step does not do it again.

        For whoever looks at them before the step, to clip them for instance, and for GradScaler. A second call averages
        the means, which stay what they are up to rounding.

        Raises:
            TypeError, ValueError: if gradients of this rank do not fit the parameters; a RoundError on the others.
            RoundError: if that failed.
        """
        if self._group.size > 1:
            self._average()
        self._averaged = True

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Call the inner optimizer's; means are forgotten, so call it on all ranks, after a skipped step as well."""
        self._averaged = False
        self._optimizer.zero_grad(*args, **kwargs)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Average the gradients, unless that was done, and let the inner optimizer step.

        Args:
            closure: called first, to compute loss and gradients; its value is returned.
            **kwargs: further arguments of the inner optimizer's step. The arrays of ``grads`` are overwritten by the
                means.

        Raises:
            TypeError, ValueError, RoundError: as `average_gradients`; before the step.
        """
        loss = None if closure is None else _call(closure, self._parameters.flats[0])
        grads = kwargs.get("grads")
        if not self._averaged and self._group.size > 1:
            means = self._average(grads)
            kwargs |= {} if grads is None else {"grads": means}
        self._optimizer.step(**kwargs)
        self._averaged = False
        self._steps += 1
        return loss

    def finish(self) -> None:
        """End training: take part in the others' averages until all ranks are here, whatever their numbers of steps.

        A rank that has no more data weighs nothing in the means. In the end, unless all took as many steps and have
        equal parameters, all take the parameters, the optimizer's state and its hyperparameters of the first rank with
        the most steps. (What a scheduler counts by itself stays each rank's own.)

        Raises:
            RoundError: if an average failed. As long as others go on, call it again.
            TypeError: if pickle does not take something of that rank's state or hyperparameters.
        """
        if self._group.size == 1:
            return
        while self._average(idle=True):
            pass
        ends = self._ranks().gather((self._status(), fingerprint(self._checksums())))
        if len(set(ends)) > 1:
            self._follow_first([status for status, _ in ends])

    def rebind(self, group: Any = None) -> None:
        """Go on with other ranks: those left after a failure, and new ones that construct their DataParallel now.

        All take the parameters, the optimizer's state and its hyperparameters of the rank with the most steps.

        Args:
            group: a process group of the ranks that go on, as in the constructor.
        """
        self._group = as_process_group(group)
        self._follow_moves()
        self._meet(self._status())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state dict, on all ranks; the next step compares their parameters."""
        self._optimizer.load_state_dict(state_dict)
        self._verified = False


def _call(closure: Callable[[], Any], like: Any) -> Any:
    """Call a closure that computes gradients, with autograd enabled where there is one."""
    if not is_torch(like):
        return closure()
    with sys.modules["torch"].enable_grad():
        return closure()
