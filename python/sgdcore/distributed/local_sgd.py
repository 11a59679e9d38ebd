"""Local SGD: each rank steps by itself, and now and then all average their parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sgdcore.distributed._agreement import (
    add_up,
    check_failures,
    check_fingerprints,
    compare,
    machine_fingerprint,
)
from sgdcore.distributed._checks import check_count, check_wire, integer
from sgdcore.distributed._flat import alike, copied, join, numbers, reorder
from sgdcore.distributed._traffic import Averager, Differences
from sgdcore.distributed._views import Momenta, Views
from sgdcore.distributed._wrapper import Wrapper
from sgdcore.distributed.errors import RoundError
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.distributed.outer import Outer, OuterSGD, SlowMo
from sgdcore.distributed.schedules import Progress, Schedule

__all__ = ["LocalSGD"]

_KEY = "local_sgd"  # in state dicts

# What a rank says of itself when ranks meet: all take the parameters of the first one that says most.
# Its parameters are left in the middle of a round.
_BROKEN = 0
# It has just been constructed.
_NEW = 1
# Its parameters are whole; it adds the number of rounds that it has completed.
_INTACT = 2

# They need the parameters as they were before the round's first step.
_STEPS_IN_BACKWARD = "outer, wire_dtype and transactional cannot go with step_in_backward"


class LocalSGD(Wrapper):
    r"""Steps of an optimizer on each rank's own gradients, with the ranks' parameters averaged every few steps.

    A round of H steps on N ranks, from equal parameters x::

        x_i = H steps of the optimizer on rank i, from x
        x   = mean of x_1 ... x_N, or what `outer` makes of it

    Constructing one gives all ranks the parameters of rank 0. In between rounds nothing is sent. Parameters are
    averaged where they are, all of them, with or without a gradient on this rank; afterwards they are equal on all
    ranks in every bit. On one rank nothing is changed. Only parameters (and momentum, if asked for) are averaged:
    batch norm's running statistics stay each rank's own.

    Stands in for the optimizer: ``param_groups``, ``state``, ``zero_grad`` and hooks are the inner one's, and around a
    torch optimizer it is a ``torch.optim.Optimizer``. Give it to schedulers and to GradScaler, of which each rank has
    its own; a step that GradScaler skips still counts as one of the round.

    Args:
        optimizer: `sgdcore.SGD`, `sgdcore.torch.SGD`, or any optimizer of torch.optim.
        group: see `as_process_group`; by default all ranks.
        sync_every: the steps H of a round, or a schedule: `PostLocal`, `Stagewise`, `AdaComm`, or any object with a
            method ``period(progress)``.
        warmup_steps: the first steps, after each of which parameters are averaged (plainly, without `outer`).
        momentum_sync: what becomes of ``"momentum_buffer"`` at the end of a round: ``"keep"`` each rank's own,
            ``"average"`` them (twice the traffic), or ``"reset"`` them to zero.
        outer: `OuterSGD` or `SlowMo`; None for plain averaging.
        levels: (group, every) pairs, from the narrowest on: every so many steps within a round the ranks of that group
            average among themselves, plainly, as those of one machine can do often.
        wire_dtype: ``"bfloat16"`` or ``"float16"`` (or ``"float32"`` for float64): parameters then travel as
            differences to their values at the start of the round, rounded to this type; what rounding leaves over, the
            residual, is added to the next difference (error feedback). Sums of such a type round as well.
        transactional: keep what is needed to return to the end of the last round if one fails.

    Memory, in words per parameter, beside p, g and momentum: +1 for `transactional`, `outer` and `wire_dtype` together
    (the values at the start of the round), +1 for the momentum of `transactional`, +1 for that of `outer`, +1 for the
    residuals of `wire_dtype`.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ in it or in their parameters' layout; before
            anything is changed.
        RoundError: from `step`, `sync` and `finish`, if a round fails; see `rebind`.

    Example (with one process; start several by torchrun or mpiexec)::

        optimizer = sgdcore.distributed.LocalSGD(sgdcore.SGD(buffer, lr=0.1, momentum=0.9), sync_every=16)
        with optimizer:
            for x, y in shard:
                optimizer.zero_grad()
                backward(x, y)
                optimizer.step()

    Source: Stich, "Local SGD converges fast and communicates little", ICLR 2019 (arXiv 1805.09767).
    """

    def __init__(
        self,
        optimizer: Any,
        group: Any = None,
        sync_every: int | Schedule = 16,
        *,
        warmup_steps: int = 0,
        momentum_sync: str = "keep",
        outer: OuterSGD | SlowMo | None = None,
        levels: Sequence[tuple[Any, int]] | None = None,
        wire_dtype: Any = None,
        transactional: bool = False,
    ) -> None:
        self._schedule = _schedule(sync_every)
        self._warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        if momentum_sync not in ("keep", "average", "reset"):
            raise ValueError(
                f"momentum_sync: expected 'keep', 'average' or 'reset', got {momentum_sync!r}"
            )
        self._momentum_sync = momentum_sync
        if outer is not None and not isinstance(outer, OuterSGD | SlowMo):
            raise TypeError(f"outer: expected an OuterSGD, a SlowMo or None, got {outer!r}")
        self._outer_spec = outer
        self._transactional = bool(transactional)
        self._wrap(optimizer, group)
        self._wire = check_wire(wire_dtype, self._group)
        self._levels = _levels(levels)
        if self._needs_anchor and self._steps_in_backward():
            raise ValueError(f"optimizer: {_STEPS_IN_BACKWARD}")

        self._steps = self._round = 0
        self._last_period = 0
        self._last_loss: float | None = None
        self._first_loss: float | None = None
        self._start_round()
        # The parameters are in the middle of an average, or were left there. Set before they are overwritten, cleared
        # as the last thing that a round does, so that it holds wherever an exception, or an interrupt, ends that.
        self._broken = False
        self._views = Views(optimizer)
        self._anchors: list[Any] = []
        self._residuals: list[Any] = []
        self._momentum = Momenta(optimizer, self._views)
        self._kept_momenta: list[Any] = []  # as they were at the end of the last round
        self._outer: Outer | None = None
        # The anchor and the kept momenta are those of the end of the last round.
        self._anchored = False
        self._allocate()
        self._join(_NEW)

    # Setting up

    def _start_round(self) -> None:
        self._step_in_round = 0
        self._active_steps = 0  # of these, those that were not idle ones of `finish`
        self._period = 0  # found out when the round's first step is there
        self._losses: Any = 0.0
        self._losses_count = 0

    @property
    def _needs_anchor(self) -> bool:
        return self._transactional or self._outer_spec is not None or self._wire is not None

    @property
    def _renews_anchor(self) -> bool:
        """Whether averaging leaves the anchor behind, too: nothing needs the last one any more."""
        only_wire = self._wire is not None and self._outer_spec is None and not self._transactional
        return only_wire and self._group.size > 1

    def _allocate(self) -> None:
        """Make what the options need beside the parameters, for those parameters that have none yet."""
        flats = self._views.flats
        if self._needs_anchor:
            self._anchors += alike(flats[len(self._anchors) :])
        if self._wire is not None:
            self._add_residuals(flats)
        if self._outer_spec is not None:
            groups: list[list[Any]] = [[] for _ in self._optimizer.param_groups]
            for anchor, i in zip(self._anchors, self._views.group_of, strict=True):
                groups[i].append(anchor)
            if self._outer is None:
                self._outer = Outer(self._outer_spec, groups)
            else:
                self._outer.add(groups[-1])
        self._bind()

    def _bind(self) -> None:
        """Find the memory that is sent and copied."""
        views = self._views
        self._plain = Averager(views.flats, views.runs)
        self._averager = self._plain
        self._regions: list[tuple[Any, Any]] = []
        if self._needs_anchor:
            self._regions = [
                (join([views.flats[i] for i in run]), join([self._anchors[i] for i in run]))
                for run in views.runs
            ]
        if self._wire is not None:
            codec = Differences(
                views.flats, self._anchors, self._residuals, self._group.size, self._renews_anchor
            )
            self._averager = Averager(views.flats, views.runs, codec, wire=self._wire)

    def _facts(self) -> dict[str, str]:
        options = {
            "sync_every": _text(self._schedule),
            "warmup_steps": self._warmup_steps,
            "momentum_sync": self._momentum_sync,
            "outer": self._outer_spec,
            "levels": [every for _, every in self._levels],
            "wire_dtype": self._wire,
            "transactional": self._transactional,
        }
        return {"parameters": self._views.layout(), **{k: str(v) for k, v in options.items()}}

    def _join(self, status: int) -> None:
        """Meet the other ranks: see that all agree, and bring those behind to where the first one is."""
        like = self._views.flats[0]
        compare(self._group, like, {"optimizer": type(self).__name__})
        compare(self._group, like, self._facts())
        statuses = numbers(like, [0.0] * self._group.size)
        self._group.all_gather(statuses, numbers(like, [status])).wait()
        everyone = [int(value) for value in statuses.tolist()]
        best = max(everyone)
        if best == _BROKEN:
            raise RuntimeError(
                "rebind: every rank's parameters are left in the middle of a round; load a checkpoint on all ranks, "
                "then rebind"
            )
        if best >= _INTACT and min(everyone) == best and not self._transactional:
            # Nobody is behind: no rank's steps since then have to be given up.
            self._average_all()
        # Also where all took as many rounds: not necessarily with each other.
        self._plain.broadcast(self._group, everyone.index(best))
        if best >= _INTACT:
            self._receive(everyone.index(best))
        self._clear_residuals()
        self._start_round()
        self._anchored = False
        self._broken = False

    def _receive(self, source: int) -> None:
        """Bring what is not a parameter to all ranks."""
        like = self._views.flats[0]
        absent = math.nan
        lrs = self._outer.lrs if self._outer is not None else []
        state = numbers(
            like,
            [
                self._steps,
                self._round,
                self._last_period,
                absent if self._last_loss is None else self._last_loss,
                absent if self._first_loss is None else self._first_loss,
                *lrs,
            ],
        )
        self._group.broadcast(state, source).wait()
        step, rounds, period, last, first, *lrs = state.tolist()
        self._steps, self._round, self._last_period = int(step), int(rounds), int(period)
        self._last_loss = None if math.isnan(last) else last
        self._first_loss = None if math.isnan(first) else first
        if self._outer is not None:
            self._outer.lrs = lrs
            momenta = self._outer.momenta()
            Averager(momenta, [[i] for i in range(len(momenta))]).broadcast(self._group, source)
        if self._momentum_sync == "average":
            self._momentum.broadcast(self._group, source)

    @property
    def round(self) -> int:
        """The number of rounds completed."""
        return self._round

    @property
    def step_in_round(self) -> int:
        """The number of steps since the last round's end; 0 right after it, when all ranks are equal."""
        return self._step_in_round

    # Training

    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Any = None, **kwargs: Any
    ) -> Any:
        """Let the inner optimizer step; at the end of a round, average.

        Args:
            closure: as the inner optimizer takes it.
            loss: the loss of this step, for schedules that need it; default: what the closure returned.
            **kwargs: further arguments of the inner optimizer's step, such as ``grads``.

        Raises:
            RoundError: if the round, or a level's part of it, ended here and could not be averaged.
            RuntimeError: after a round that failed and left the parameters in the middle of it, see `rebind`; or if
                step_in_backward was turned on and does not go with the options.
            TypeError, ValueError: if the schedule's period is no integer of at least 1.
        """
        self._refuse_broken()
        if self._needs_anchor and self._steps_in_backward():
            raise RuntimeError(f"optimizer: {_STEPS_IN_BACKWARD}")
        self._make_sure_of_anchor()
        try:
            result = self._inner_step(closure, kwargs)
            self._count_loss(result if loss is None else loss)
            self._active_steps += 1
            self._advance()
        except BaseException:
            self._forget_scaling()
            raise
        return result

    def _count_loss(self, loss: Any) -> None:
        if loss is not None and not isinstance(self._schedule, int):
            self._losses = self._losses + (loss.detach() if hasattr(loss, "detach") else loss)
            self._losses_count += 1

    def sync(self) -> None:
        """End the round here, on all ranks: average, or take the outer step. Does nothing after no step.

        Raises:
            RoundError: if that failed.
            RuntimeError: after a round that failed and left the parameters in the middle of it; see `rebind`.
        """
        self._refuse_broken()
        self._average_all()

    def finish(self) -> None:
        """End training: take part in the others' rounds until all ranks are here, whatever their numbers of steps.

        Afterwards all ranks' parameters are equal. A ``with`` block calls it at its end, unless an exception is on its
        way.

        Raises:
            RoundError: if a round failed.
            RuntimeError: after a round that failed and left the parameters in the middle of it; see `rebind`.
        """
        self._refuse_broken()
        self._make_sure_of_anchor()
        training: int | None = None
        while training != 0:
            training = self._advance(self._until_next_average())

    def _refuse_broken(self) -> None:
        if self._broken:
            raise RuntimeError(
                "a round failed, or was interrupted, and left the parameters in the middle of it; rebind to the ranks "
                "that are left, for the last round's with transactional=True and else for those of an intact rank, or "
                "load a checkpoint"
            )

    def _until_next_average(self) -> int:
        """Return the number of steps until something is due."""
        if self._period == 0:
            self._period = self._next_period()
        done = self._step_in_round
        steps = [every - done % every for _, every in self._levels]
        return min([max(1, self._period - done), *steps])

    def _advance(self, steps: int = 1) -> int | None:
        """Count steps; average what is due. Returns, at the end of a round, how many ranks stepped in it."""
        if self._period == 0:
            self._period = self._next_period()
        self._steps += steps
        self._step_in_round += steps
        if self._step_in_round >= self._period:
            return self._average_all()
        for group, every in reversed(self._levels):
            if self._step_in_round % every == 0:
                self._average_level(group)
                break
        return None

    def _next_period(self) -> int:
        if self._steps < self._warmup_steps:
            return 1
        if isinstance(self._schedule, int):
            return self._schedule
        lr = float(self._optimizer.param_groups[0].get("lr", 0.0))
        progress = Progress(
            self._steps, self._round, self._last_period, lr, self._last_loss, self._first_loss
        )
        return check_count("the schedule's period", self._schedule.period(progress), 1)

    # Averaging

    @contextmanager
    def _failures_as_round_errors(self) -> Iterator[None]:
        """Average in here: what fails becomes a RoundError."""
        try:
            yield
        except Exception as error:
            raise self._failure(error) from error

    def _average_level(self, group: ProcessGroup) -> None:
        with self._failures_as_round_errors():
            failed = self._attempt_to_follow()
            (steps,), (failures, fingerprints, machines) = add_up(
                group,
                self._views.flats[0],
                sums=[self._active_steps],
                per_rank=[failed is not None, self._views.fingerprint, machine_fingerprint()],
            )
            check_failures(group, self._views.flats[0], failures, failed)
            check_fingerprints(fingerprints)
            if steps > 0:
                self._broken = True
                self._plain.average(group, len(set(machines)) == 1)
                self._broken = False

    def _average_all(self) -> int:
        """End the round; returns how many ranks stepped in it."""
        with self._failures_as_round_errors():
            failed = self._attempt_to_follow()
            momenta = self._momentum.all() if self._momentum_sync == "average" else []
            like = self._views.flats[0]
            (training, losses, count, *has_momentum), per_rank = add_up(
                self._group,
                like,
                sums=[
                    self._active_steps > 0,
                    self._losses,
                    self._losses_count,
                    *(momentum is not None for momentum in momenta),
                ],
                per_rank=[
                    failed is not None,
                    self._views.fingerprint,
                    self._steps,
                    machine_fingerprint(),
                ],
            )
            failures, fingerprints, steps, machines = per_rank
            check_failures(self._group, like, failures, failed)
            check_fingerprints(fingerprints)
            same_machine = len(set(machines)) == 1
            if training > 0:
                self._broken = True
                self._averager.average(self._group, same_machine)
                averager = self._momentum.averager([each > 0 for each in has_momentum])
                if averager is not None:
                    averager.average(self._group, same_machine)
                self._commit(int(max(steps)), losses / count if count > 0 else None)
        if training > 0:
            self._make_sure_of_anchor()
        else:
            self._forget_steps()  # idle ones only
        return int(training)

    def _commit(self, steps: int, loss: float | None) -> None:
        """What follows the averaging on each rank by itself.

        Args:
            steps: the most that a rank has taken; from here on all count so many.
            loss: the mean of the round's.
        """
        warmup = steps <= self._warmup_steps
        if self._outer is not None and not warmup and self._group.size > 1:
            self._take_outer_step()
        if self._momentum_sync == "reset" and self._group.size > 1:
            for momentum in self._momentum.all():
                if momentum is not None:
                    momentum[...] = 0
        self._anchored = self._renews_anchor  # any other is the last round's
        self._last_period = self._step_in_round + steps - self._steps
        self._steps = steps
        self._round += 1
        if loss is not None:
            self._last_loss = loss
            if self._first_loss is None and math.isfinite(loss):
                self._first_loss = loss
        self._start_round()
        self._broken = False

    def _take_outer_step(self) -> None:
        """Let the outer optimizer move the anchors, and the parameters, which hold the average, after them."""
        assert self._outer is not None
        # The outer gradient, anchor - average, where the average was.
        for values, anchor in self._regions:
            values *= -1
            values += anchor
        lrs = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._anchored = False
        self._outer.step(self._views.flats, lrs)
        for values, anchor in self._regions:
            values[...] = anchor

    def _make_sure_of_anchor(self) -> None:
        """Take the anchor where none is: this rank has taken no step since all were equal."""
        if self._needs_anchor and not self._anchored:
            self._follow_moves()
            self._take_anchor()

    def _take_anchor(self) -> None:
        for values, anchor in self._regions:
            anchor[...] = values
        if self._transactional:
            self._keep_momenta(self._momentum.all())
        self._anchored = True

    def _keep_momenta(self, momenta: Sequence[Any]) -> None:
        """Copy the momentum, into the memory of the last copies where there are any."""
        kept = self._kept_momenta or [None] * len(momenta)
        for i, momentum in enumerate(momenta):
            if (
                momentum is None
                or i >= len(kept)
                or kept[i] is None
                or kept[i].dtype != momentum.dtype
            ):
                kept[i : i + 1] = [copied(momentum)]
            else:
                kept[i][...] = momentum
        self._kept_momenta = kept

    def _restore(self) -> None:
        """Return to the end of the last round."""
        self._broken = True
        for values, anchor in self._regions:
            values[...] = anchor
        parameters = self._views.parameters
        for parameter, momentum, kept in zip(
            parameters, self._momentum.all(), self._kept_momenta, strict=True
        ):
            if momentum is not None and kept is not None:
                momentum[...] = kept
            elif momentum is not None:
                del self._optimizer.state[parameter]["momentum_buffer"]
        self._clear_residuals()
        self._forget_steps()
        self._broken = False

    def _forget_steps(self) -> None:
        """Begin the round again."""
        self._steps, self._step_in_round = self._steps - self._step_in_round, 0
        self._start_round()

    def _failure(self, error: Exception) -> RoundError:
        """Leave a failed round behind in a state that is known; returns what to raise."""
        number = self._round + 1
        # Else they are somewhere else by now, where they could not be followed.
        found = not self._views.moved()
        if self._transactional and self._anchored and found:
            self._restore()
        # Where there was no anchor to return to, this rank has taken no step yet.
        restored = self._transactional and found and not self._broken
        if restored:
            outcome = f"parameters and momentum are those of the end of round {self._round}"
        elif self._transactional and self._broken:
            outcome = "parameters are left in the middle of the outer step"
        elif self._broken:
            outcome = (
                "parameters are left in the middle of it (transactional=True would restore them)"
            )
        else:
            outcome = "parameters are as this rank's last step left them"
        group = self._group
        return RoundError(
            f"round {number} of Local SGD failed on rank {group.rank} of {group.size}; {outcome}: {error}",
            number,
            restored,
        )

    def _attempt_to_follow(self) -> Exception | None:
        """Follow moves and make sure of the anchor; returns what that failed with, which all ranks are to hear of.

        Raised here and now, it would leave the others waiting for what this rank has not sent.
        """
        try:
            self._follow_moves()
            self._make_sure_of_anchor()
        except Exception as error:  # noqa: BLE001 (raised later)
            return error
        return None

    def _follow_moves(self) -> None:
        views = self._views
        if views.moved():
            before = views.data
            views.read()
            self._reorder(before)
            self._bind()

    def _reorder(self, before: Sequence[Any]) -> None:
        """Bring what lies in the order of the parameters' memory into their new one."""
        self._reorder_residuals(before)
        if not self._needs_anchor:
            return
        for i, old, new in self._views.reordered(before):
            reorder(self._anchors[i], old, new)
            if self._outer is not None:
                self._outer.reorder(i, old, new)

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, on all ranks at the start of a round; they get rank 0's values.

        Raises:
            RuntimeError: in the middle of a round.
            TypeError, ValueError: as the inner optimizer does.
        """
        if self._step_in_round > 0:
            raise RuntimeError(
                f"add_param_group: expected the start of a round, got step {self._step_in_round} of it; "
                "call sync() first"
            )
        self._follow_moves()
        self._optimizer.add_param_group(param_group)
        self._views = Views(self._optimizer)
        self._momentum = Momenta(self._optimizer, self._views)
        compare(self._group, self._views.flats[0], self._facts())
        self._allocate()
        self._plain.broadcast(self._group)
        self._anchored = False

    def rebind(self, group: Any = None, levels: Sequence[tuple[Any, int]] | None = None) -> None:
        """Go on with other ranks: those that are left after a failure, and new ones that construct their LocalSGD now.

        With `transactional`, all ranks return to the end of the last round that any of them completed. Otherwise ranks
        whose round failed get the parameters of one that is intact; if all are, they average their steps since. All
        parameters are then equal in every bit, and a new round begins.

        Args:
            group: a process group of the ranks that go on, as in the constructor.
            levels: as in the constructor.

        Raises:
            RuntimeError: if no rank's parameters are intact.
            ValueError: if the group cannot add up `wire_dtype`, or ranks differ in options or layout.
        """
        group, levels = as_process_group(group), _levels(levels)
        check_wire(self._wire, group)
        self._group, self._levels = group, levels
        self._follow_moves()
        if self._transactional and self._anchored:
            self._restore()
        self._bind()
        self._join(_BROKEN if self._broken else _INTACT + self._round)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict with one more key: all that makes resuming exact, of this rank.

        In the middle of a round ranks differ: save one for each, beside its parameters. After `sync` or `finish` any
        rank's will do for all, if momentum is averaged or reset.
        """
        self._follow_moves()  # what is saved is in the order of the parameters that are saved beside it
        state: dict[str, Any] = dict(self._optimizer.state_dict())
        state[_KEY] = {
            "steps": self._steps,
            "round": self._round,
            "step_in_round": self._step_in_round,
            "active_steps": self._active_steps,
            "period": self._period,
            "last_period": self._last_period,
            "losses": float(self._losses),
            "losses_count": self._losses_count,
            "last_loss": self._last_loss,
            "first_loss": self._first_loss,
            "anchors": list(self._anchors) if self._anchored else None,
            "momenta": list(self._kept_momenta) if self._anchored and self._transactional else None,
            "residuals": list(self._residuals),
            "outer": None if self._outer is None else self._outer.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, or an inner optimizer's state dict, which begins a new round.

        Load the model's parameters after constructing the LocalSGD, which gives all ranks those of rank 0.

        Raises:
            ValueError: if it does not match the parameters or the options; the optimizer is then as it was.
        """
        self._follow_moves()
        state_dict = dict(state_dict)
        own = state_dict.pop(_KEY, None)
        if own is not None:
            self._check_state(own)
        self._optimizer.load_state_dict(state_dict)
        self._broken = False
        self._start_round()
        self._anchored = False
        self._clear_residuals()
        if own is None:
            return
        self._steps, self._round = own["steps"], own["round"]
        self._step_in_round, self._active_steps = own["step_in_round"], own["active_steps"]
        self._period, self._last_period = own["period"], own["last_period"]
        self._losses, self._losses_count = own["losses"], own["losses_count"]
        self._last_loss, self._first_loss = own["last_loss"], own["first_loss"]
        if own["anchors"] is not None:
            _copy(self._anchors, own["anchors"])
            complete = own["momenta"] is not None or not self._transactional
            self._anchored = self._needs_anchor and complete
        if own["momenta"] is not None:
            self._keep_momenta(own["momenta"])
        _copy(self._residuals, own["residuals"])
        if self._outer is not None:
            self._outer.load_state_dict(own["outer"])

    def _check_state(self, own: dict[str, Any]) -> None:
        sizes = [len(view) for view in self._views.flats]
        for name, needed in (
            ("anchors", self._needs_anchor),
            ("residuals", self._wire is not None),
        ):
            kept = own[name]
            if kept and needed and [len(each) for each in kept] != sizes:
                raise ValueError(
                    f"state_dict['{_KEY}']['{name}']: expected sizes {sizes}, got {[len(each) for each in kept]}"
                )
        in_round = own["step_in_round"] > 0
        lacks_anchor = in_round and self._needs_anchor and not own["anchors"]
        lacks_anchor |= in_round and self._transactional and own["momenta"] is None
        if lacks_anchor or (self._outer is not None and own["outer"] is None):
            raise ValueError(
                f"state_dict['{_KEY}']: it was saved with other options and lacks what outer, wire_dtype or "
                "transactional need"
            )


def _copy(targets: Sequence[Any], sources: Sequence[Any]) -> None:
    if targets and sources:
        for target, source in zip(targets, sources, strict=True):
            target[...] = source


def _schedule(sync_every: Any) -> int | Schedule:
    if isinstance(sync_every, Schedule) and not isinstance(sync_every, type):
        return sync_every
    if integer(sync_every) is None:
        raise TypeError(
            f"sync_every: expected an integer or an object with a method period(progress), got {sync_every!r}"
        )
    return check_count("sync_every", sync_every, 1)


def _text(schedule: int | Schedule) -> str:
    """Return what can be compared between processes."""
    plain = isinstance(schedule, int) or dataclasses.is_dataclass(schedule)
    return str(schedule) if plain else type(schedule).__qualname__


def _levels(levels: Sequence[tuple[Any, int]] | None) -> list[tuple[ProcessGroup, int]]:
    if levels is not None and not isinstance(levels, Sequence):
        raise TypeError(f"levels: expected a list of pairs (group, every), got {levels!r}")
    result = []
    for i, level in enumerate(levels or ()):
        try:
            group, every = level
        except (TypeError, ValueError):
            raise TypeError(f"levels[{i}]: expected a pair (group, every), got {level!r}") from None
        if group is None:
            raise TypeError(f"levels[{i}]: expected a group, got None")
        result.append((as_process_group(group), check_count(f"levels[{i}]", every, 1)))
    return result
