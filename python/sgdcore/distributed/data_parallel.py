"""Synchronous SGD: each step with the mean of all ranks' gradients."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from sgdcore.distributed._agreement import (
    add_up,
    check_failures,
    check_fingerprints,
    compare,
    fingerprint,
    share_settings,
    take_settings,
)
from sgdcore.distributed._checks import check_count, check_wire
from sgdcore.distributed._flat import (
    divide_into,
    dtype_name,
    element_strides,
    empty,
    flat,
    is_torch,
    join,
    numbers,
    zero_nonfinite,
    zeros_like,
)
from sgdcore.distributed._traffic import (
    SLICE_BYTES,
    Averager,
    Pace,
    drain,
    places,
    plan_slices,
    wire_name,
)
from sgdcore.distributed._views import Momenta, Views
from sgdcore.distributed._wrapper import Wrapper, call_closure
from sgdcore.distributed.errors import RoundError
from sgdcore.distributed.groups import Work, as_process_group, break_off

__all__ = ["DataParallel"]

_KEY = "data_parallel"  # in state dicts


_STEPS_IN_BACKWARD = (
    "DataParallel cannot go with step_in_backward, which steps with this rank's gradients alone"
)


class DataParallel(Wrapper):
    r"""Steps of an optimizer with the gradients' mean over all ranks, which keeps the ranks' parameters equal.

    With the gradient g_i and the weight w_i of rank i, each step takes::

        g = (w_1 g_1 + ... + w_N g_N) / (w_1 + ... + w_N)

    For torch parameters this happens within the backward pass: slices of the gradients are on their way as soon as they
    are complete, and ``p.grad`` holds the mean when ``backward()`` returns, ready for clipping and GradScaler. For
    arrays it happens in `step`, in place, or before it in `average_gradients`.

    All ranks start with the parameters, state and hyperparameters of the first one. A parameter without a gradient on
    some ranks counts as zero there, and gets the mean; one that has none on any rank is left alone, as an optimizer
    does: its momentum does not decay. On one rank nothing is changed.

    Args:
        optimizer: `sgdcore.SGD`, `sgdcore.torch.SGD`, or any optimizer of torch.optim.
        group: see `as_process_group`; by default all ranks.
        slice_bytes: the most bytes that travel in one operation.
        wire_dtype: ``"bfloat16"`` or ``"float16"`` (or ``"float32"`` for float64): gradients travel rounded to this
            type; what rounding leaves over, the residual, is added to the next gradient (error feedback; +1 word of
            memory per parameter).
        overlap: average within the backward pass; False: in `step`.

    Attributes:
        weight: this rank's weight in the next mean, such as the number of examples in its batch; 1 unless set. Set it
            before the backward pass. With 0 this rank's gradients count for nothing, whatever they hold; some rank's
            has to be more.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ in it or in their parameters' layout; before
            anything is changed.
        RoundError: on all ranks, also from ``backward()``, if gradients cannot be averaged. The parameters are then
            those of the last step. Where the ranks are all there, they go on with the next one; see `rebind` for where
            not.

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
        slice_bytes: int = SLICE_BYTES,
        wire_dtype: Any = None,
        overlap: bool = True,
    ) -> None:
        self._slice_bytes = check_count("slice_bytes", slice_bytes, 8)
        self._wrap(optimizer, group)
        if self._steps_in_backward():
            raise ValueError(f"optimizer: {_STEPS_IN_BACKWARD}")
        self._wire = check_wire(wire_dtype, self._group)
        self._overlap = bool(overlap)
        self._weight = 1.0
        self._steps = 0
        self._hooks: list[Any] = []
        self._residuals: list[Any] = []
        self._syncing = True
        self._forget_means()
        self._set_up()
        self._join()

    def _set_up(self) -> None:
        """Cut the gradients into slices, in the order of the backward pass."""
        before = self._views.data if self._residuals else []
        self._views = views = Views(self._optimizer)
        self._reorder_residuals(before)
        self._momentum = Momenta(self._optimizer, views)
        self._wires = [wire_name(dtype_name(view.dtype), self._wire) for view in views.flats]
        self._trained = self._requires_grad()
        self._fingerprint = fingerprint(f"{views.layout()}\n{self._trained}")
        # Frozen parameters get no gradients, and are left out.
        sizes = [
            len(view) if trained else 0
            for view, trained in zip(views.flats, self._trained, strict=True)
        ]
        pace = Pace(self._slice_bytes, self._slice_bytes)
        self._slices = plan_slices(views.runs[::-1], sizes, self._wires, pace)
        self._staging: dict[int, Any] = {}
        if self._wire is not None:
            self._add_residuals(views.flats)
        self._waiting_for: list[set[int]] = [
            {part.index for part in piece.parts} for piece in self._slices
        ]
        self._begin()
        self._hook()

    def _requires_grad(self) -> list[bool]:
        parameters = self._views.parameters
        if not is_torch(self._views.flats[0]):
            return [True] * len(parameters)
        return [parameter.requires_grad for parameter in parameters]

    def _follow_changes(self) -> None:
        """Start anew if parameters were frozen or unfrozen, or were given other memory."""
        if self._views.moved() or self._trained != self._requires_grad():
            self._set_up()

    def _hook(self) -> None:
        _remove(self._hooks)
        self._index = {id(p): i for i, p in enumerate(self._views.parameters)}
        self._slices_of: list[list[int]] = [[] for _ in self._views.parameters]
        for number, indexes in enumerate(self._waiting_for):
            for i in indexes:
                self._slices_of[i].append(number)
        if self._overlap and is_torch(self._views.flats[0]) and self._group.size > 1:
            method = weakref.WeakMethod(self._gradient_is_there)
            for parameter in self._views.parameters:
                if parameter.requires_grad:
                    hook = partial(_call, method)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
            # The parameters must neither keep this object alive nor be averaged once it is gone.
            weakref.finalize(self, _remove, self._hooks)

    def _join(self, status: int = 0) -> None:
        """Meet the other ranks: see that all agree; take the parameters of the one with the most steps."""
        like = self._views.flats[0]
        facts = {
            "parameters": self._views.layout(),
            "slice_bytes": str(self._slice_bytes),
            "wire_dtype": str(self._wire),
            "requires_grad": str(self._trained),
        }
        compare(self._group, like, {"optimizer": type(self).__name__})
        compare(self._group, like, facts)
        self._follow_first(status)

    def _follow_first(self, status: int, together: bool = False) -> None:
        """Take parameters, the optimizer's state and count of steps of the rank with the highest status.

        Args:
            status: 0 on a new rank, else the number of steps taken, plus 1.
            together: ranks that took as many steps took them together, and are equal.
        """
        statuses = numbers(self._views.flats[0], [0.0] * self._group.size)
        own = numbers(self._views.flats[0], [status])
        self._group.all_gather(statuses, own).wait()
        everyone = statuses.tolist()
        if together and min(everyone) == max(everyone):
            return
        source = everyone.index(max(everyone))
        settings = share_settings(self._group, self._optimizer, self._views, source)
        Averager(self._views.flats, self._views.runs).broadcast(self._group, source)
        self._momentum.broadcast(self._group, source)
        if self._group.rank != source:
            take_settings(self._optimizer, self._views, settings)
        if max(everyone) > 0:
            self._steps = int(max(everyone)) - 1

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
    #
    # A step's operations are the same on all ranks, whatever goes wrong on one: the sum of the weights, if there is a
    # wire dtype; each slice's sum, in order; then a few numbers of each rank, among them whether it failed. So an error
    # is kept by `_attempt`, zeros travel instead of what could not be had, and at the end `_average` raises on all.

    def _begin(self) -> None:
        """Start anew: nothing is on its way."""
        self._failed: Exception | None = None  # what the other ranks are to hear of
        self._next = 0
        self._pending: list[tuple[int, Any, Work]] = []
        self._missing = [set(indexes) for indexes in self._waiting_for]
        self._in_backward = False
        self._at_the_end: Any = None  # a weak reference to what this backward pass calls then
        # The sum of all ranks' weights, by which what a wire dtype rounds is divided: on its way, and when it is known.
        self._weighing: tuple[Any, Work] | None = None
        self._scale: float | None = None

    def _gradient_is_there(self, parameter: Any) -> None:
        """Called by torch in the backward pass."""
        if not self._syncing:
            self._forget_means()  # this adds to the means what is this rank's own
            return
        if self._in_backward and self._at_the_end() is None:
            self._give_up_backward()
        if not self._in_backward:
            self._refuse_step_in_backward()
            self._attempt(self._follow_changes)
            self._in_backward = True
            torch = sys.modules["torch"]
            at_the_end = partial(_call_end, weakref.WeakMethod(self._finish_backward))
            self._at_the_end = weakref.ref(at_the_end)  # a pass that raises drops it
            torch.autograd.Variable._execution_engine.queue_callback(at_the_end)
        try:
            self._attempt(self._arrive, self._index[id(parameter)])
            while (
                self._next < len(self._slices)
                and not self._missing[self._next]
                and self._weighed(self.weight)
            ):
                gradients = self._attempt(self._gradients) or self._none()
                self._send(self._next, gradients, self.weight)
            if self._pending:
                self._pending[0][2].test()  # MPI makes progress only when asked
        except Exception as error:
            raise self._failure(error) from error

    def _arrive(self, i: int) -> None:
        """Take note that a gradient is complete."""
        for number in self._slices_of[i]:
            if number < self._next:
                raise RuntimeError(
                    f"{self._label(i)} changed after it was sent, as it does where a parameter is used both inside and "
                    "outside of a reentrant checkpoint; pass use_reentrant=False to it, or overlap=False here"
                )
            self._missing[number].discard(i)

    def _attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; if it raises, return None, and let `_average` raise on all ranks.

        Raised here and now, the error would leave the other ranks waiting for what this one has not sent.
        """
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 (raised later)
            self._failed = self._failed or error
            return None

    def _none(self) -> list[Any]:
        return [None] * len(self._views.parameters)

    def _give_up_backward(self) -> None:
        """Forget a backward pass that raised.

        Raises:
            RoundError: on all ranks, if part of it was sent, which stands for another step on the others.
        """
        if self._next == 0 and self._weighing is None:
            self._begin()
        else:
            self._failed = RuntimeError(
                "a backward pass that raised when part of its gradients had been sent"
            )
            self._average(None)

    def _refuse_step_in_backward(self) -> None:
        if self._steps_in_backward():
            raise RuntimeError(f"optimizer: {_STEPS_IN_BACKWARD}")

    def _finish_backward(self) -> None:
        self._average(self._attempt(self._gradients))
        self._averaged = self._averaged_in_backward = True

    def _gradients(self) -> list[Any]:
        """Return the parameters' gradients, laid out as the parameters are."""
        gradients = []
        for i, parameter in enumerate(self._views.parameters):
            gradient = self._laid_out(i, parameter.grad)
            if gradient is not parameter.grad:
                parameter.grad = gradient
            gradients.append(gradient)
        return gradients

    def _laid_out(self, i: int, gradient: Any) -> Any:
        """Return the gradient, or a copy that has the parameter's order in memory and can be written to."""
        data = self._views.data[i]
        if gradient is None:
            return None
        if tuple(gradient.shape) != tuple(data.shape):
            raise ValueError(
                f"{self._label(i)}: expected shape {tuple(data.shape)}, the parameter's, got {tuple(gradient.shape)}"
            )
        if is_torch(gradient) and gradient.is_sparse:
            raise TypeError(f"{self._label(i)}: expected a dense tensor, got a sparse one")
        writable = is_torch(gradient) or gradient.flags.writeable
        if writable and element_strides(gradient) == element_strides(data):
            return gradient
        copy = zeros_like(data, gradient.dtype)
        copy[...] = gradient
        return copy

    def _send(self, number: int, gradients: Sequence[Any], weight: float) -> None:
        """Put a slice on its way; gradients that are None count as zeros."""
        array = self._attempt(self._load, number, gradients, weight)
        if array is None:
            array = self._load(number, self._none(), 0.0)
        self._pending.append((number, array, self._group.all_reduce(array)))
        self._next = number + 1

    def _load(self, number: int, gradients: Sequence[Any], weight: float) -> Any:
        """Return the array that travels."""
        array = self._memory(number, gradients)
        if array is None:
            array = self._pack(number, gradients, weight)
        elif weight == 0:
            array[...] = 0  # a product would keep NaN
        elif weight != 1:
            array *= weight
        return array

    def _weighed(self, weight: float, wait: bool = False) -> bool:
        """Return whether slices can be packed; a wire dtype needs the sum of weights first, which is asked for here."""
        if self._wire is None or self._scale is not None:
            return True
        if self._weighing is None:
            total = numbers(self._views.flats[0], [weight])
            self._weighing = total, self._group.all_reduce(total)
        total, work = self._weighing
        if not wait and not work.test():
            return False
        work.wait()
        self._scale = total.tolist()[0] or 1.0
        return True

    def _memory(self, number: int, gradients: Sequence[Any]) -> Any:
        """Return the gradients' own memory, if a slice of it can travel as it is."""
        if self._wire is not None:
            return None
        piece = self._slices[number]
        views = []
        for part in piece.parts:
            gradient = gradients[part.index]
            if gradient is None or dtype_name(gradient.dtype) != piece.dtype:
                return None
            views.append(flat(gradient, self._label(part.index))[part.start : part.stop])
        return join(views)

    def _label(self, i: int) -> str:
        return f"the gradient of {self._views.labels[i]}"

    def _pack(self, number: int, gradients: Sequence[Any], weight: float) -> Any:
        piece = self._slices[number]
        array = self._staging.get(number)
        if array is None:
            like = self._views.flats[piece.parts[0].index]
            array = self._staging[number] = empty(like, piece.size, piece.dtype)
        for part, place in places(piece, array):
            gradient, where = gradients[part.index], slice(part.start, part.stop)
            if self._wire is not None:
                self._compress(part.index, where, gradient, weight, place)
            elif gradient is None or weight == 0:
                place[...] = 0
            else:
                place[...] = flat(gradient, self._label(part.index))[where]
                if weight != 1:
                    place *= weight
        return array

    def _compress(self, i: int, where: slice, gradient: Any, weight: float, place: Any) -> None:
        if gradient is None:
            # Where no rank has one, nobody takes the sum: what is left over has to stay here.
            place[...] = 0
            return
        residual = self._residuals[i][where]
        # Divided before the sum, which could leave float16's range.
        if weight != 0:
            share = empty(residual, len(residual), dtype_name(residual.dtype))
            share[...] = flat(gradient, self._label(i))[where]
            assert self._scale is not None
            share *= weight / self._scale
            residual += share
        place[...] = residual
        residual -= place
        zero_nonfinite(residual)  # an overflow is not carried into the steps that follow it

    def _average(self, gradients: list[Any] | None, given: bool = False) -> int:
        """Send what is not on its way yet, and take the means; returns how many ranks are not idle.

        Args:
            gradients: the parameters' gradients, changed in place, replaced where there are none. None: this rank is
                idle, or failed; it sends zeros with the weight 0.
            given: new gradients are not the parameters' own.
        """
        idle = gradients is None
        weight = 0.0 if idle else self.weight
        gradients = self._none() if gradients is None else gradients
        group, like = self._group, self._views.flats[0]
        try:
            self._weighed(weight, wait=True)
            while self._next < len(self._slices):
                self._send(self._next, gradients, weight)
            (weights, training, *present), (failures, fingerprints) = add_up(
                group,
                like,
                sums=[weight, not idle, *(gradient is not None for gradient in gradients)],
                per_rank=[self._failed is not None, self._fingerprint],
            )
            check_failures(group, like, failures, self._failed)
            check_fingerprints(fingerprints)
            if training > 0 and weights == 0:
                raise ValueError("weight: expected more than 0 on some rank")
            for i, (trained, count) in enumerate(zip(self._trained, present, strict=True)):
                if count > 0 and not trained:
                    raise ValueError(
                        f"{self._label(i)}: expected None where requires_grad is False, got one on some rank; "
                        "it is not averaged"
                    )
            for number, array, work in self._pending:
                work.wait()
                if not idle:
                    self._take(number, array, weights, gradients, present, given)
        except Exception as error:
            own = self._failed
            if isinstance(own, TypeError | ValueError):  # bad input is just that on its own rank
                self._forget_step()
                raise own from None
            # Under no name here: with its traceback that would be a cycle, which keeps what was under way.
            raise self._failure(error) from error
        except BaseException:  # an interrupt: the others take a step that this rank does not
            break_off(group)
            raise
        self._begin()
        return int(training)

    def _take(
        self,
        number: int,
        array: Any,
        weights: float,
        gradients: list[Any],
        present: Sequence[float],
        given: bool,
    ) -> None:
        """Turn a slice's sum into the mean, where the gradients are."""
        piece = self._slices[number]
        if array is not self._staging.get(number):
            divide_into(array, array, weights)
            return
        for part, place in places(piece, array):
            i = part.index
            if present[i] == 0:
                continue
            if gradients[i] is None:
                gradients[i] = zeros_like(self._views.data[i])
                if not given:
                    self._views.parameters[i].grad = gradients[i]
                    gradients[i] = self._views.parameters[i].grad  # a buffer's own memory
            target = flat(gradients[i], self._label(i))[part.start : part.stop]
            if self._wire is not None:
                target[...] = place  # was divided before it was rounded
            else:
                divide_into(target, place, weights)

    # Training

    def average_gradients(self) -> None:
        """Average the gradients now, on all ranks; the next step does not do it again.

        For whoever looks at them before the step, to clip them for instance. Does nothing where the backward pass has
        done it since the last step and `zero_grad`; a second call averages the means, which stay what they are up to
        rounding.

        Raises:
            TypeError, ValueError: if gradients of this rank do not fit the parameters; a RoundError on the others.
            RoundError: if that failed.
        """
        if self._in_backward:
            self._give_up_backward()
        if not self._averaged_in_backward and self._group.size > 1:
            self._average_own()
        self._averaged = True

    def _forget_means(self) -> None:
        """Let the next step average: the gradients are this rank's own."""
        self._averaged = self._averaged_in_backward = False

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Call the inner optimizer's; means are forgotten, so call it on all ranks, after a skipped step as well."""
        self._forget_means()
        self._optimizer.zero_grad(*args, **kwargs)

    def _average_own(self) -> None:
        self._attempt(self._follow_changes)
        self._average(self._attempt(self._gradients))

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
        self._refuse_step_in_backward()
        if self._in_backward:  # of a pass that never came to its end
            self._give_up_backward()
        loss = None if closure is None else call_closure(closure, self._views.data[0])
        try:
            if not self._averaged and self._group.size > 1:
                if "found_inf" in self.__dict__:
                    raise RuntimeError(
                        "GradScaler looks at gradients before the step: call average_gradients() before it does, "
                        "or leave that to the backward pass, with overlap=True"
                    )
                if kwargs.get("grads") is not None:
                    kwargs["grads"] = self._average_given(kwargs["grads"])
                else:
                    self._average_own()
            self._inner_step(None, kwargs)
        except BaseException:
            self._forget_scaling()
            raise
        self._forget_means()
        self._steps += 1
        return loss

    def _average_given(self, grads: Sequence[Any]) -> Any:
        self._attempt(self._follow_changes)
        gradients = self._attempt(self._given, grads)
        self._average(gradients, given=True)
        return gradients

    def _given(self, grads: Sequence[Any]) -> list[Any]:
        if len(grads) != len(self._views.parameters):
            raise ValueError(
                f"grads: expected {len(self._views.parameters)} gradients, one for each parameter, got {len(grads)}"
            )
        return [self._laid_out(i, gradient) for i, gradient in enumerate(grads)]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward passes in this context accumulate gradients without averaging them."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def finish(self) -> None:
        """End training: take part in the others' averages until all ranks are here, whatever their numbers of steps.

        A rank that has no more data weighs nothing in the means. In the end all take the parameters, the optimizer's
        state and its hyperparameters of the rank with the most steps. (What a scheduler counts by itself stays each
        rank's own.)

        Raises:
            RoundError: if an average failed. As long as others go on, call it again.
            TypeError: if pickle does not take something of that rank's state or hyperparameters.
        """
        if self._group.size == 1:
            return
        if self._in_backward:
            self._give_up_backward()
        self._attempt(self._follow_changes)
        while self._average(None) > 0:
            pass
        self._follow_first(self._steps + 1, together=True)

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, on all ranks; they get rank 0's values.

        Raises:
            RoundError: if a backward pass raised when part of its gradients had been sent.
            TypeError, ValueError: as the inner optimizer does.
        """
        if self._in_backward:
            self._give_up_backward()
        self._optimizer.add_param_group(param_group)
        self._set_up()
        self._join(self._steps + 1)

    def rebind(self, group: Any = None) -> None:
        """Go on with other ranks: those left after a failure, and new ones that construct their DataParallel now.

        All take the parameters and the momentum of the rank with the most steps.

        Where a backward pass raised when part of its gradients had been sent, the ranks of the group so far hear of it
        first.

        Args:
            group: a process group of the ranks that go on, as in the constructor.

        Raises:
            ValueError: if the group cannot add up `wire_dtype`, or ranks differ in options or layout.
        """
        group = as_process_group(group)
        check_wire(self._wire, group)
        if self._in_backward:
            with suppress(RoundError):
                self._give_up_backward()
        self._drain()  # of an average that was interrupted
        self._group = group
        self._forget_means()
        self._set_up()
        self._join(self._steps + 1)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict with one more key: the count of steps, and this rank's residuals."""
        state: dict[str, Any] = dict(self._optimizer.state_dict())
        state[_KEY] = {"steps": self._steps, "residuals": list(self._residuals)}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, or an inner optimizer's state dict.

        Raises:
            ValueError: if it does not match the parameters; the optimizer is then as it was.
        """
        state_dict = dict(state_dict)
        own = state_dict.pop(_KEY, None)
        saved = [] if own is None else own["residuals"]
        sizes, saved_sizes = ([len(each) for each in some] for some in (self._residuals, saved))
        if saved and sizes and saved_sizes != sizes:
            raise ValueError(
                f"state_dict['{_KEY}']['residuals']: expected sizes {sizes}, got {saved_sizes}"
            )
        self._optimizer.load_state_dict(state_dict)
        for i, residual in enumerate(self._residuals):
            residual[...] = saved[i] if saved else 0
        if own is not None:
            self._steps = own["steps"]

    def _drain(self) -> None:
        drain(work for _, _, work in self._pending)
        if self._weighing is not None:
            drain([self._weighing[1]])

    def _forget_step(self) -> None:
        self._drain()
        self._begin()
        self._forget_means()
        self._clear_residuals()  # some are of this step's gradients

    def _failure(self, error: Exception) -> RoundError:
        """Return what to raise, once nothing is on its way any more."""
        self._forget_step()
        group = self._group
        return RoundError(
            f"the gradients of step {self._steps + 1} could not be averaged on rank {group.rank} of {group.size}; "
            f"parameters are those of step {self._steps}, gradients are of no use: {error}",
            self._steps + 1,
            True,
        )


def _call(method: weakref.WeakMethod[Any], parameter: Any) -> None:
    target = method()
    if target is not None:
        target(parameter)


def _call_end(method: weakref.WeakMethod[Any]) -> None:
    target = method()
    if target is not None:
        target()


def _remove(hooks: list[Any]) -> None:
    for handle in hooks:
        handle.remove()
    hooks.clear()
