"""Synchronous SGD: each step with the mean of all ranks' gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sgdcore.distributed._checks import check_count, check_wire
from sgdcore.distributed.checkpoint import add_to_state, split_state
from sgdcore.distributed.errors import RoundError
from sgdcore.distributed.gradients import Gradients
from sgdcore.distributed.groups import as_process_group
from sgdcore.distributed.header import (
    Headers,
    any_flags,
    checksum,
    fingerprint,
    pack_flags,
    require_equal,
)
from sgdcore.distributed.settings import hyperparameters, numbers_of, share_settings, take_settings
from sgdcore.distributed.wrapper import Wrapper, call_closure

_KEY = "data_parallel"  # in state dicts


class DataParallel(Wrapper):
    r"""Steps of an optimizer with the gradients' mean over all ranks, which keeps the ranks' parameters equal.

    With the gradient g_i and the weight w_i of rank i, each step takes::

        g = (w_1 g_1 + ... + w_N g_N) / (w_1 + ... + w_N)

    Gradients are averaged in `step`, in place, or before it in `average_gradients`. (torch's DistributedDataParallel
    around the model, with our optimizer in it, averages while the backward pass still computes.)

    All ranks start with the parameters, state and hyperparameters of the first one. A parameter without a gradient on
    some ranks counts as zero there, and gets the mean; one that has none on any rank is left alone, as an optimizer
    does: its momentum does not decay. On one rank nothing is changed.

    Args:
        optimizer: `sgdcore.SGD`, `sgdcore.torch.SGD`, or any optimizer of torch.optim but LBFGS.
        group: see `as_process_group`; by default all ranks.
        chunk_bytes: the most bytes that travel in one operation; None for what suits the engine.
        wire_dtype: ``"bfloat16"`` or ``"float16"`` (or ``"float32"`` for float64): gradients travel rounded to this
            type; what rounding leaves over, the residual, is added to the next gradient (error feedback; +1 word of
            memory per parameter).
        model: the torch module that is trained. Its parameters that the optimizer does not have are made equal at
            construction, its buffers are averaged with each step, and its parameters' names are compared.
        buffers: what is averaged with each step beside gradients, such as ``model.buffers()`` or a mapping of arrays;
            integers are taken from the group's rank 0. Default: those of `model`.

    Attributes:
        weight: this rank's weight in the next mean, such as the number of examples in its batch; 1 unless set. With 0
            this rank's gradients count for nothing, whatever they hold; some rank's has to be more.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ in it or in their parameters' names or layout;
            before anything is changed.
        RoundError: on all ranks, if gradients cannot be averaged, or ranks call different wrappers. The parameters are
            then those of the last step. Where the ranks are all there, they go on with the next one; see `rebind` for
            where not.

    Example (with one process; start several by torchrun or mpiexec)::

        optimizer = sgdcore.distributed.DataParallel(sgdcore.SGD(buffer, lr=0.1, momentum=0.9))
        for x, y in shard:
            optimizer.zero_grad()
            optimizer.weight = len(x)
            backward(x, y)
            optimizer.step()
        optimizer.finish()  # for shards of unequal length
    """

    def __init__(
        self,
        optimizer: Any,
        group: Any = None,
        *,
        chunk_bytes: int | None = None,
        wire_dtype: Any = None,
        model: Any = None,
        buffers: Any = None,
    ) -> None:
        if chunk_bytes is not None:
            chunk_bytes = check_count("chunk_bytes", chunk_bytes, 8)
        self._wrap(optimizer, group, model, buffers)
        self._refuse_step_in_backward()
        self._weight = 1.0
        self._steps = 0
        self._averaged = self._verified = False
        self._set_up(check_wire(wire_dtype, self._group), chunk_bytes)
        self._meet(0)
        self._other_parameters().broadcast(self._group, 0)

    def check_step_in_backward(self) -> None:
        """Raise a ValueError: a backward pass that steps does so with this rank's gradients alone."""
        raise ValueError(
            "optimizer: DataParallel cannot go with step_in_backward, which steps with this rank's gradients alone"
        )

    def _set_up(self, wire: str | None, chunk_bytes: int | None) -> None:
        self._parameters = self._read_parameters()
        if wire is not None:
            self._feedback.grow(self._parameters.flats)
        self._gradients = Gradients(self._parameters, self._feedback, wire, chunk_bytes)

    def _follow_changes(self) -> None:
        """Start anew if parameters were frozen or unfrozen, or were given other memory."""
        if self._gradients.changed():
            before = self._parameters.data
            self._set_up(*self._gradients.options)
            self._parameters.reorder(self._feedback.residuals, before)

    def _meet(self, status: int) -> None:
        """Meet the other ranks: see that all agree; take the parameters of the one with the most steps.

        Args:
            status: 0 on a new rank, else the number of steps taken, plus 1.
        """
        wire, chunk_bytes = self._gradients.options
        facts = {
            "parameters": self._parameters.layout,
            "buffers": self._buffers.layout,
            "chunk_bytes": str(chunk_bytes),
            "wire_dtype": str(wire),
            "requires_grad": str(self._gradients.trained),
        }
        flags = pack_flags(self._parameters.momenta.present())
        group, first = self._group, self._parameters.labels[0]
        said = {"status": status, "flags": flags}
        self._follow_first(self._caller.meet(group, self._like, first, facts=facts, **said))

    def _follow_first(self, headers: Headers) -> None:
        """Take parameters, the optimizer's state and the count of steps of the rank with the most steps."""
        group, parameters, status = self._group, self._parameters, headers["status"]
        source = status.index(max(status))
        settings = share_settings(group, self._optimizer, parameters, source)
        parameters.averager().broadcast(group, parameters.flats, source)
        wanted = any_flags([headers["flags"][source]], len(parameters.all))
        parameters.momenta.broadcast(group, wanted, source, keep=False)
        self._buffers.broadcast(group, source)
        if group.rank != source:
            take_settings(self._optimizer, parameters, settings)
        self._steps = max(0, status[source] - 1)
        self._verified = False

    @property
    def weight(self) -> float:
        """Return the weight of this rank in the next mean."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        try:
            weight = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"weight: expected a number, got {value!r}") from None
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight: expected a finite number >= 0, got {value}")
        self._weight = weight

    # Averaging

    def _average(self, collect: Callable[[], list[Any]] | None, given: bool = False) -> list[Any]:
        """Average gradients with the other ranks.

        What goes wrong on this rank alone is told to all in the header, before anything is averaged.

        Args:
            collect: returns this rank's gradients; they are changed in place, and zeros are put where it has none and
                another rank has. None: this rank is idle.
            given: new gradients are not the parameters' own.

        Returns:
            The means; none on an idle rank where all others are idle, too.
        """
        failed: Exception | None = None
        gradients: list[Any] = [None] * len(self._parameters.all)
        try:
            self._follow_changes()
            gradients = gradients if collect is None else collect()
        except Exception as error:  # noqa: BLE001 (raised below, on all ranks)
            failed = error
        try:
            return self._exchange(gradients, failed, collect is None, given)
        except Exception as error:
            self._averaged = False
            self._feedback.clear()  # some of it is of this step's gradients
            if isinstance(failed, TypeError | ValueError):  # bad input is just that on its own rank
                raise failed from None
            # Under no name here: with its traceback that would be a cycle, which keeps what was under way.
            raise self._failure(error) from error

    def _exchange(
        self, gradients: list[Any], failed: Exception | None, idle: bool, given: bool
    ) -> list[Any]:
        group = self._group
        headers = self._caller.exchange(
            group,
            self._like,
            "a step",
            failed,
            flags=pack_flags(gradient is not None for gradient in gradients),
            layout=self._gradients.fingerprint,
            hyper=hash(tuple(value for _, _, value in numbers_of(self._optimizer))),
            active=not idle,
            weight=0.0 if idle else self.weight,
            unverified=not self._verified,
        )
        active = headers["active"]
        if not any(active):
            return []
        self._check(headers)
        total = sum(headers["weight"])
        if total == 0:
            raise ValueError("weight: expected more than 0 on some rank")
        wanted = any_flags(headers["flags"], len(gradients))
        factor = headers["weight"][group.rank] / total
        self._gradients.average(group, [] if idle else gradients, factor, wanted, given)
        self._buffers.average(group, (not idle) / sum(active), active.index(True))
        return gradients

    def _check(self, headers: Headers) -> None:
        """Raise on all ranks if ranks would take different steps."""
        group, like, active = self._group, self._like, headers["active"]
        what = "parameters: the layout in memory, or which are frozen, changed on some ranks since they were wrapped"
        require_equal(group, like, what, self._gradients.layout, headers["layout"])
        text = partial(hyperparameters, self._optimizer)
        require_equal(group, like, "hyperparameters", text, headers["hyper"], active)
        if any(headers["unverified"]):
            what = "the parameters before this step, which were changed on some ranks only"
            require_equal(group, like, what, self._checksums(), among=active)
            self._verified = True

    def _checksums(self) -> str:
        pairs = zip(self._parameters.labels, self._parameters.flats, strict=True)
        return "\n".join(f"{label}: {checksum(values):x}" for label, values in pairs)

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
            self._average(self._own)
        self._averaged = True

    def _own(self) -> list[Any]:
        return self._gradients.own()

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
            TypeError, ValueError: if gradients of this rank do not fit the parameters; a RoundError on the others.
            RoundError: if the gradients cannot be averaged; before the step.
        """
        loss = None if closure is None else call_closure(closure, self._like)
        try:
            if not self._averaged and self._group.size > 1:
                self._average_for_step(kwargs)
            self._inner_step(None, kwargs)
        except BaseException:
            self._forget_scaling()
            raise
        self._averaged = False
        self._steps += 1
        return loss

    def _average_for_step(self, kwargs: dict[str, Any]) -> None:
        if "found_inf" in self.__dict__:
            raise RuntimeError(
                "GradScaler looks at gradients before the step: call average_gradients() before it does"
            )
        grads: Sequence[Any] | None = kwargs.get("grads")
        if grads is None:
            self._average(self._own)
        else:
            kwargs["grads"] = self._average(lambda: self._gradients.given(grads), given=True)

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
        while self._average(None):
            pass
        headers = self._caller.exchange(
            self._group,
            self._like,
            "to end",
            flags=pack_flags(self._parameters.momenta.present()),
            status=self._steps + 1,
            layout=fingerprint(self._checksums()),
        )
        if any(len(set(headers[name])) > 1 for name in ("status", "layout")):
            self._follow_first(headers)

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, on all ranks; they get rank 0's values.

        Raises:
            TypeError, ValueError: as the inner optimizer does.
        """
        self._follow_changes()
        self._optimizer.add_param_group(param_group)
        self._set_up(*self._gradients.options)
        self._meet(self._steps + 1)

    def rebind(self, group: Any = None) -> None:
        """Go on with other ranks: those left after a failure, and new ones that construct their DataParallel now.

        All take the parameters, the optimizer's state and its hyperparameters of the rank with the most steps.

        Args:
            group: a process group of the ranks that go on, as in the constructor.

        Raises:
            ValueError: if the group cannot add up `wire_dtype`, or ranks differ in options or layout.
        """
        group = as_process_group(group)
        check_wire(self._gradients.options[0], group)
        self._group = group
        self._averaged = False
        self._follow_changes()
        self._meet(self._steps + 1)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with the count of steps and this rank's residuals in it."""
        self._follow_changes()
        arrays = {"residual": self._parameters.shaped(self._feedback.residuals)}
        return add_to_state(self._optimizer.state_dict(), _KEY, {"steps": self._steps}, arrays)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, or an inner optimizer's state dict.

        Raises:
            ValueError: if it does not match the parameters; the optimizer is then as it was.
        """
        self._follow_changes()
        inner, numbers, arrays = split_state(state_dict, _KEY, self._parameters)
        self._optimizer.load_state_dict(inner)
        self._feedback.clear()
        self._verified = False
        self._parameters.load(self._feedback.residuals, arrays.get("residual", []))
        self._steps = int(numbers.get("steps", self._steps))

    def _failure(self, error: Exception) -> RoundError:
        group, step = self._group, self._steps + 1
        return RoundError(
            f"the gradients of step {step} could not be averaged on rank {group.rank} of {group.size}; "
            f"parameters are those of step {step - 1}, gradients are of no use: {error}",
            step,
            True,
        )
