"""Synchronous SGD: each step with the mean of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sgdcore.distributed import _flat
from sgdcore.distributed._checks import check_number
from sgdcore.distributed._flat import is_torch
from sgdcore.distributed.groups import as_process_group
from sgdcore.distributed.header import RoundError, anywhere
from sgdcore.distributed.wrapper import Wrapper


class DataParallel(Wrapper):
    r"""Steps of an optimizer with the gradients' mean over all ranks, which keeps the ranks' parameters equal.

    With the gradient g_i and the weight w_i of rank i, each step takes::

        g = (w_1 g_1 + ... + w_N g_N) / (w_1 + ... + w_N)

    Gradients are averaged in `step`, in place, or before it in `average_gradients`. All ranks start with the
    parameters, state and hyperparameters of the first one. A parameter without a gradient on some ranks counts as zero
    there, and gets the mean; one that has none on any rank is left alone. On one rank nothing is changed.

    Args:
        optimizer, group, model, buffers: as for `LocalSGD`; buffers are averaged with each step.

    Attributes:
        weight: this rank's in the next mean, such as the number of examples in its batch; 1 unless set. With 0 its
            gradients count for nothing, whatever they hold; some rank's has to be more.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ; before anything is changed.
        RoundError: on all ranks, if gradients cannot be averaged, or ranks call different wrappers. The parameters are
            then those of the last step. Ranks that are all there go on with the next one; see `rebind` for where not.
    """

    def __init__(
        self, optimizer: Any, group: Any = None, *, model: Any = None, buffers: Any = None
    ) -> None:
        self._wrap(optimizer, group, model, buffers)
        self.weight: float = 1.0
        self._steps = 0
        self._averaged = False
        self._start(0, model)

    def check_step_in_backward(self) -> None:
        """Raise a ValueError: a backward pass that steps does so with this rank's gradients alone."""
        raise ValueError("optimizer: DataParallel cannot go with step_in_backward")

    def _meet(self, status: int) -> None:
        self._follow_first(self._introduce(status))

    def _follow_first(self, statuses: list[int]) -> None:
        """Take what the rank with the most steps has; a status is 1 more than those, and 0 of a new rank."""
        source = statuses.index(max(statuses))
        state = self._state_of(source)
        self._take_values(source)
        if self.group.rank != source:
            self.optimizer.load_state_dict(state)
        self._steps = max(0, statuses[source] - 1)
        self._averaged = self._verified = False

    def _collect(self, grads: Sequence[Any] | None) -> list[Any]:
        """Return gradients, or None: those given or the parameters' own, laid out as the parameters are."""
        own = self._parameters
        found = [parameter.grad for parameter in own.all] if grads is None else list(grads)
        if len(found) != len(own.all):
            raise ValueError(
                f"grads: expected {len(own.all)} gradients, one for each parameter, got {len(found)}"
            )
        for i, gradient in enumerate(found):
            if gradient is None:
                continue
            label, expected, got = own.labels[i], tuple(own.data[i].shape), tuple(gradient.shape)
            if got != expected:
                raise ValueError(f"the gradient of {label}: expected shape {expected}, got {got}")
            found[i] = _flat.laid_out(gradient, own.data[i])
            if not is_torch(gradient) and not found[i].flags.writeable:
                found[i] = gradient.copy()
            if grads is None and found[i] is not gradient:
                own.all[i].grad = found[i]
        return found

    def _average(self, grads: Sequence[Any] | None = None, idle: bool = False) -> list[Any]:
        """Return the means of gradients, given or the parameters' own; none if this rank and all others are idle."""
        try:
            return self._take_part(grads, idle)
        except Exception as error:
            self._averaged = False
            step, place = self._steps + 1, f"rank {self.group.rank} of {self.group.size}"
            message = (
                f"step {step} failed on {place}; parameters are those of step {step - 1}: {error}"
            )
            raise RoundError(message, step, True) from error

    def _take_part(self, grads: Sequence[Any] | None, idle: bool) -> list[Any]:
        parameters, gradients = self._parameters, list[Any]()

        def prepare() -> dict[str, Any]:
            gradients[:] = [None] * len(parameters.all) if idle else self._collect(grads)
            return {
                "missing": [i for i, each in enumerate(gradients) if each is None],
                "weight": 0.0 if idle else check_number("weight", self.weight),
                "active": not idle,
            }

        headers = self._exchange("a step", prepare)
        active, total = headers["active"], sum(headers["weight"])
        if not any(active):
            return []
        self._verify(headers, "parameters, which were changed on some ranks only", active)
        if total == 0:
            raise ValueError("weight: expected more than 0 on some rank")
        wanted = anywhere(headers["missing"], len(gradients))
        views = []
        for i, label in enumerate(() if idle else parameters.labels):
            if wanted[i] and gradients[i] is None:
                gradients[i] = _flat.zeros_like(parameters.data[i])
                if grads is None:  # a buffer's parameter keeps it in memory of its own
                    parameters.all[i].grad = gradients[i]
                    gradients[i] = parameters.all[i].grad
            views.append(_flat.flat(gradients[i], label) if wanted[i] else None)
        factor = headers["weight"][self.group.rank] / total
        parameters.averager().average(self.group, views, factor, wanted)
        self._buffers.average(self.group, (not idle) / sum(active), active.index(True))
        return gradients

    def average_gradients(self) -> None:
        """Average the gradients now, on all ranks, to look at them or clip them; the next step does not do it again."""
        if self.group.size > 1:
            self._average()
        self._averaged = True

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Call the inner optimizer's; means are forgotten, so call it on all ranks, after a skipped step as well."""
        self._averaged = False
        self.optimizer.zero_grad(*args, **kwargs)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Average the gradients, unless that was done, and let the inner optimizer step, with its arguments.

        The arrays of ``grads`` are overwritten by the means. Returns what the closure returns, which is called first.
        """
        loss = None if closure is None else closure()
        grads = kwargs.get("grads")
        if not self._averaged and self.group.size > 1:
            means = self._average(grads)
            kwargs |= {} if grads is None else {"grads": means}
        self.optimizer.step(**kwargs)
        self._averaged = False
        self._steps += 1
        return loss

    def finish(self) -> None:
        """End training: take part in the others' averages until all ranks are here, whatever their numbers of steps.

        A rank that has no more data weighs nothing in the means. In the end, unless all took as many steps and have
        equal parameters, all take the parameters and the optimizer's whole state of the first rank with the most steps.
        After a RoundError, call it again as long as others go on.
        """
        if self.group.size == 1:
            return
        while self._average(idle=True):
            pass
        ends = self._ranks().gather((self._steps + 1, self._checksums()))
        if len(set(ends)) > 1:
            self._follow_first([status for status, _ in ends])

    def rebind(self, group: Any = None) -> None:
        """Go on with other ranks: those left after a failure, and new ones that construct their DataParallel now.

        All take the parameters and the optimizer's whole state of the rank with the most steps.
        """
        self.group = as_process_group(group)
        self._parameters.follow()
        self._meet(self._steps + 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state dict, on all ranks; the next step compares their parameters."""
        self.optimizer.load_state_dict(state_dict)
        self._verified = False
