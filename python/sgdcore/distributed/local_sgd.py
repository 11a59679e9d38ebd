"""Local SGD: each rank steps by itself, and now and then all average their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sgdcore.distributed import _flat
from sgdcore.distributed._checks import check_count, check_wire, integer
from sgdcore.distributed.anchor import Anchor
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.checkpoint import add_to_state, split_state
from sgdcore.distributed.errors import RoundError
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.distributed.header import (
    Headers,
    any_flags,
    checksum,
    gather_objects,
    pack_flags,
    require_equal,
)
from sgdcore.distributed.outer import Outer, OuterSGD, SlowMo
from sgdcore.distributed.round import Round
from sgdcore.distributed.schedules import Schedule
from sgdcore.distributed.settings import share_settings, take_settings
from sgdcore.distributed.wrapper import Wrapper

_KEY = "local_sgd"  # in state dicts

# What a rank says of itself when ranks meet: all take the parameters of the first one whose status is highest.
_BROKEN = 0  # its parameters are left in the middle of a round
_NEW = 1  # it has just been constructed
_INTACT = 2  # its parameters are whole; the number of rounds that it has completed is added

# What a rank says of itself in a round.
_STEPPING, _SYNCING, _FINISHING = range(3)


@dataclasses.dataclass(frozen=True)
class _Options:
    """The constructor's arguments, but for the optimizer, the model and the groups."""

    sync_every: int | Schedule
    warmup_steps: int
    momentum_sync: str
    outer: OuterSGD | SlowMo | None
    wire_dtype: str | None
    transactional: bool
    exclude_nonfinite: bool

    @property
    def need_anchor(self) -> bool:
        """Whether the parameters are needed as they were at the start of the round."""
        return self.transactional or self.outer is not None or self.wire_dtype is not None

    def facts(self) -> dict[str, str]:
        """Return what has to be equal on all ranks."""
        facts = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        schedule = self.sync_every
        if not (isinstance(schedule, int) or dataclasses.is_dataclass(schedule)):
            facts["sync_every"] = type(schedule).__qualname__
        return facts


class LocalSGD(Wrapper):
    r"""Steps of an optimizer on each rank's own gradients, with the ranks' parameters averaged every few steps.

    A round of H steps on N ranks, from equal parameters x::

        x_i = H steps of the optimizer on rank i, from x
        x   = mean of x_1 ... x_N, or what `outer` makes of it

    Constructing one gives all ranks the parameters of rank 0. Between rounds nothing is sent. Parameters are averaged
    where they are, all of them, with or without a gradient on this rank; afterwards they are equal on all ranks in
    every bit. On one rank nothing is changed. Batch norm's running statistics are no parameters: pass `model` or
    `buffers` to average them, too.

    Stands in for the optimizer: ``param_groups``, ``state``, ``zero_grad`` and hooks are the inner one's, and around a
    torch optimizer it is a ``torch.optim.Optimizer``. Give it to schedulers and to GradScaler, of which each rank has
    its own; a step that GradScaler skips still counts as one of the round.

    Args:
        optimizer: `sgdcore.SGD`, `sgdcore.torch.SGD`, or any optimizer of torch.optim but LBFGS.
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
        exclude_nonfinite: leave a rank whose values are not all finite out of the round: it gets the others' mean, and
            its momentum's values that are not finite become 0. Costs a pass over the parameters. False: a round with
            such a rank fails, and the error names it.
        model: the torch module that is trained. Its parameters that the optimizer does not have are made equal at
            construction, its buffers are averaged with each round, and its parameters' names are compared.
        buffers: what is averaged with each round beside parameters, such as ``model.buffers()`` or a mapping of arrays;
            integers are taken from the group's rank 0. Default: those of `model`.

    Memory, in words per parameter, beside p, g and momentum: +1 for `transactional`, `outer` and `wire_dtype` together
    (the values at the start of the round), +1 for the momentum of `transactional`, +1 for that of `outer`, +1 for the
    residuals of `wire_dtype`.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ in it or in their parameters' names or layout;
            before anything is changed.
        RoundError: from `step`, `sync` and `finish`, if a round fails; see `rebind`. Also where ranks call different
            wrappers.

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
        exclude_nonfinite: bool = False,
        model: Any = None,
        buffers: Any = None,
    ) -> None:
        schedule = _schedule(sync_every)
        check_count("warmup_steps", warmup_steps, 0)
        if momentum_sync not in ("keep", "average", "reset"):
            raise ValueError(
                f"momentum_sync: expected 'keep', 'average' or 'reset', got {momentum_sync!r}"
            )
        if outer is not None and not isinstance(outer, OuterSGD | SlowMo):
            raise TypeError(f"outer: expected an OuterSGD, a SlowMo or None, got {outer!r}")
        self._wrap(optimizer, group, model, buffers)
        self._options = _Options(
            schedule,
            int(warmup_steps),
            momentum_sync,
            outer,
            check_wire(wire_dtype, self._group),
            bool(transactional),
            bool(exclude_nonfinite),
        )
        self._levels = _levels(levels)
        self._refuse_step_in_backward()
        self._round = Round()
        self._anchor = Anchor(self._options.transactional)
        self._outer: Outer | None = None
        self._parameters = self._read_parameters()
        self._allocate()
        self._meet(_NEW)
        self._other_parameters().broadcast(self._group, 0)

    # Setting up

    def check_step_in_backward(self) -> None:
        """Raise a ValueError if the parameters are needed as they were before the round's first step."""
        if self._options.need_anchor:
            raise ValueError(
                "optimizer: outer, wire_dtype and transactional cannot go with step_in_backward"
            )

    def _allocate(self) -> None:
        """Make what the options need beside the parameters, for those parameters that have none yet."""
        own, parameters = self._options, self._parameters
        self._bind()
        if own.wire_dtype is not None:
            self._feedback.grow(parameters.flats)
        if own.outer is not None:
            groups: list[list[Any]] = [[] for _ in self._optimizer.param_groups]
            for values, i in zip(self._anchor.values, parameters.group_of, strict=True):
                groups[i].append(values)
            if self._outer is None:
                self._outer = Outer(own.outer, groups)
            else:
                self._outer.add(groups[-1])

    def _bind(self) -> None:
        """Find the memory that is copied."""
        own = self._options
        if own.need_anchor:
            self._anchor.bind(self._parameters)
        self._feedback.anchors = self._anchor.values
        # Nothing else needs the last anchor any more.
        alone = own.wire_dtype is not None and own.outer is None and not own.transactional
        self._feedback.renews = alone and self._group.size > 1

    def _meet(self, status: int) -> None:
        """Meet the other ranks: see that all agree, and bring those behind to where the first one is."""
        group, parameters = self._group, self._parameters
        first, facts = parameters.labels[0], self._facts()
        headers = self._caller.meet(group, self._like, first, facts=facts, status=status)
        everyone = headers["status"]
        best = max(everyone)
        source = everyone.index(best)
        if best == _BROKEN:
            raise RuntimeError(
                "rebind: every rank's parameters are left in the middle of a round; load a checkpoint on all ranks, "
                "then rebind"
            )
        if best >= _INTACT and min(everyone) == best and not self._options.transactional:
            # Nobody is behind: no rank's steps since then have to be given up.
            self._average_all(_SYNCING)
        # Also where all took as many rounds: not necessarily with each other.
        parameters.averager().broadcast(group, parameters.flats, source)
        if best >= _INTACT:
            self._receive(source, everyone)
        self._buffers.broadcast(group, source)
        self._feedback.clear()
        self._round.begin()
        self._anchor.valid = False
        self._round.broken = False

    def _facts(self) -> dict[str, str]:
        return {
            "parameters": self._parameters.layout,
            "buffers": self._buffers.layout,
            "levels": str([every for _, every in self._levels]),
            **self._options.facts(),
        }

    def _receive(self, source: int, everyone: list[int]) -> None:
        """Take from a rank what is not a parameter."""
        group, like, outer, counts = self._group, self._like, self._outer, self._round
        parameters, momenta = self._parameters, self._parameters.momenta
        own = counts.numbers(), outer and outer.lrs, pack_flags(momenta.present())
        numbers, lrs, flags = gather_objects(group, like, own)[source]
        counts.take(numbers)
        counts.steps += counts.active  # they are in the parameters that all have now
        if outer is not None:
            outer.lrs = lrs
            values = outer.momenta()
            Averager(values, [[i] for i in range(len(values))]).broadcast(group, values, source)
        is_new, averages = everyone[group.rank] == _NEW, self._options.momentum_sync == "average"
        if _NEW in everyone:
            # A rank that joins has neither momentum nor the learning rates that schedulers have changed.
            settings = share_settings(group, self._optimizer, parameters, source)
            if is_new:
                take_settings(self._optimizer, parameters, settings)
        if _NEW in everyone or averages:
            wanted = any_flags([flags], len(parameters.all))
            momenta.broadcast(group, wanted, source, keep=not is_new and not averages)

    @property
    def round(self) -> int:
        """The number of rounds completed."""
        return self._round.number

    @property
    def step_in_round(self) -> int:
        """The number of steps since the last round's end; 0 right after it, when all ranks are equal."""
        return self._round.position

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
            RuntimeError: after a round that failed and left the parameters in the middle of it, see `rebind`.
            TypeError, ValueError: if the schedule's period is no integer of at least 1.
        """
        self._refuse_broken()
        self._make_sure_of_anchor()
        try:
            result = self._inner_step(closure, kwargs)
            loss = result if loss is None else loss
            if loss is not None and not isinstance(self._options.sync_every, int):
                self._round.count_loss(loss)
            self._round.active += 1
            self._advance(1, _STEPPING)
        except BaseException:
            self._forget_scaling()
            raise
        return result

    def sync(self) -> None:
        """End the round, on all ranks: average, or take the outer step. Does nothing after no step.

        Ranks that are here take part in the others' averages until all are.

        Raises:
            RoundError: if that failed.
            RuntimeError: after a round that failed and left the parameters in the middle of it; see `rebind`.
        """
        self._end(_SYNCING)

    def finish(self) -> None:
        """End training: take part in the others' rounds until all ranks are here, whatever their numbers of steps.

        Afterwards all ranks' parameters are equal. A ``with`` block calls it at its end, unless an exception is on its
        way.

        Raises:
            RoundError: if a round failed.
            RuntimeError: after a round that failed and left the parameters in the middle of it; see `rebind`.
        """
        self._end(_FINISHING)

    def _end(self, ending: int) -> None:
        self._refuse_broken()
        self._make_sure_of_anchor()
        ended = False
        while not ended:
            if self._levels:
                ended = self._advance(self._until_next_average(), ending)
            else:
                ended = self._average_all(ending)

    def _refuse_broken(self) -> None:
        if self._round.broken:
            raise RuntimeError(
                "a round failed, or was interrupted, and left the parameters in the middle of it; rebind to the ranks "
                "that are left, for the last round's with transactional=True and else for those of an intact rank, or "
                "load a checkpoint"
            )

    def _until_next_average(self) -> int:
        """Return the number of steps until something is due."""
        self._find_period()
        done = self._round.position
        steps = [every - done % every for _, every in self._levels]
        return min([max(1, self._round.period - done), *steps])

    def _find_period(self) -> None:
        own = self._options
        if self._round.period:
            return
        lr = float(self._optimizer.param_groups[0].get("lr", 0.0))
        self._round.find_period(own.sync_every, own.warmup_steps, lr)
        if self._levels and not isinstance(own.sync_every, int):
            # Ranks that differed would wait for each other, one for a level's average and another for the round's end.
            with self._failures_as_round_errors():
                self._exchange(self._group, "a period", _STEPPING)

    def _advance(self, steps: int, ending: int) -> bool:
        """Count steps; average what is due. Returns whether that ended `sync` or `finish`."""
        self._find_period()
        self._round.position += steps
        if self._round.position >= self._round.period:
            return self._average_all(ending)
        for group, every in reversed(self._levels):
            if self._round.position % every == 0:
                together = self._average_level(group, ending)
                # Where all ranks of the widest level wait for the others, no level's average is due before the round's.
                if together and group is self._levels[-1][0]:
                    return self._average_all(ending)
                break
        return False

    # Averaging

    @contextmanager
    def _failures_as_round_errors(self) -> Iterator[None]:
        """Average in here: what fails becomes a RoundError."""
        try:
            yield
        except Exception as error:
            raise self._failure(error) from error

    def _exchange(self, group: ProcessGroup, operation: str, ending: int) -> Headers:
        """Tell the ranks of a group where this one is; returns their headers, once all can average."""
        own, counts, like = self._options, self._round, self._like
        failed: Exception | None = None
        flags, loss, nonfinite = b"", 0.0, False
        try:
            self._follow_moves()
            self._make_sure_of_anchor()
            loss = float(counts.losses)
            if own.momentum_sync == "average":
                flags = pack_flags(self._parameters.momenta.present())
            if own.exclude_nonfinite:
                values = *self._parameters.flats, *self._buffers.floats
                nonfinite = not all(map(_flat.all_finite, values))
        except Exception as error:  # noqa: BLE001 (raised below, on all ranks)
            failed = error
        headers = self._caller.exchange(
            group,
            like,
            operation,
            failed,
            flags=flags,
            layout=self._parameters.fingerprint,
            lrs=self._learning_rates(),
            active=counts.active,
            period=counts.period,
            ending=ending,
            unverified=not self._anchor.verified,
            nonfinite=nonfinite,
            loss=loss,
            losses=counts.losses_count,
        )
        what = "parameters: the layout in memory changed on some ranks since they were wrapped"
        require_equal(group, like, what, self._parameters.layout, headers["layout"])
        period, text = headers["period"], f"{counts.period} steps"
        require_equal(group, like, "the round's period", text, period, among=period)
        if all(headers["nonfinite"]):
            raise RuntimeError("no rank has parameters that are all finite")
        return headers

    def _learning_rates(self) -> str:
        """Return what an outer step needs of the inner optimizer's groups, one a line."""
        if not isinstance(self._options.outer, SlowMo):
            return ""
        groups = enumerate(self._optimizer.param_groups)
        return "\n".join(f"param_groups[{i}]['lr'] = {float(g['lr'])!r}" for i, g in groups)

    def _average_level(self, group: ProcessGroup, ending: int) -> bool:
        """Average within a level; returns whether all its ranks are in `sync` or `finish`."""
        with self._failures_as_round_errors():
            headers = self._exchange(group, "a level's average", ending)
            if any(headers["active"]):
                self._round.broken = True
                self._average(group, headers, None)
                self._round.broken = False
        return _STEPPING not in headers["ending"]

    def _average(self, group: ProcessGroup, headers: Headers, wire: str | None) -> float:
        """Average the parameters; returns this rank's weight."""
        excluded = headers["nonfinite"]
        factor = 0.0 if excluded[group.rank] else 1 / excluded.count(False)
        if group.size == 1:
            return factor
        look = not self._options.exclude_nonfinite
        averager = self._parameters.averager(wire, self._feedback if wire else None)
        bad = averager.average(group, self._parameters.flats, factor, look)
        if bad:
            raise RuntimeError(
                f"rank {bad[0]} has parameters that are not finite (exclude_nonfinite=True leaves them out)"
            )
        if factor == 0:
            self._feedback.clear()
            for momentum in self._parameters.momenta.existing():
                _flat.zero_nonfinite(momentum)
        return factor

    def _average_all(self, ending: int) -> bool:
        """End the round; returns whether `sync` or `finish`, if it is in one of them, is at its end."""
        with self._failures_as_round_errors():
            headers = self._exchange(self._group, "a round", ending)
            self._verify(headers)
            if any(headers["active"]):
                self._take_round(headers)
            else:
                self._round.begin()  # steps were passed over only
        if any(headers["active"]):
            self._make_sure_of_anchor(after_round=True)
        return all(each >= max(ending, _SYNCING) for each in headers["ending"])

    def _take_round(self, headers: Headers) -> None:
        group, own, momenta = self._group, self._options, self._parameters.momenta
        self._round.broken = True
        factor = self._average(group, headers, own.wire_dtype)
        if group.size > 1:
            if own.momentum_sync == "average":
                wanted = any_flags(headers["flags"], len(self._parameters.all))
                momenta.average(group, wanted, factor)
            self._buffers.average(group, factor, headers["nonfinite"].index(False))
        # What follows is for each rank by itself.
        steps, losses = max(headers["active"]), sum(headers["losses"])
        if group.size > 1 and self._outer and self._round.steps + steps > own.warmup_steps:
            self._take_outer_step(self._outer)
        if group.size > 1 and own.momentum_sync == "reset":
            for momentum in momenta.existing():
                momentum[...] = 0
        self._anchor.valid = self._feedback.renews  # any other is the last round's
        self._round.complete(steps, sum(headers["loss"]) / losses if losses else None)

    def _take_outer_step(self, outer: Outer) -> None:
        """Let the outer optimizer move the anchors, and the parameters, which hold the average, after them."""
        self._anchor.subtract_parameters()
        lrs = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._anchor.valid = False
        outer.step(self._parameters.flats, lrs)
        self._anchor.to_parameters()

    # What an outer step, or a return to the last round, starts from

    def _verify(self, headers: Headers) -> None:
        """Compare what enters an outer step, and what ranks have loaded since that was compared; raise on all."""
        group, like, labels = self._group, self._like, self._parameters.labels
        what = "the learning rates of an outer step"
        require_equal(group, like, what, self._learning_rates, headers["lrs"])
        if not any(headers["unverified"]) or not self._options.need_anchor:
            return
        kept = [("the anchor of", self._anchor.values)]
        if self._outer is not None:
            kept.append(("the outer momentum of", self._outer.saved()))
        lines = [
            f"{name} {label}: {'none' if value is None else hex(checksum(value))}"
            for name, values in kept
            for label, value in zip(labels, values, strict=True)
        ]
        lines.append(f"the last learning rates {self._outer and self._outer.lrs}")
        what = "the state before this round, which was loaded on some ranks only"
        require_equal(group, like, what, "\n".join(lines))
        self._anchor.verified = True

    def _make_sure_of_anchor(self, after_round: bool = False) -> None:
        """Take the anchor where none is: this rank has taken no step since all were equal."""
        if self._options.need_anchor and not self._anchor.valid:
            self._follow_moves()
            if not after_round:
                self._anchor.verified = False
            self._anchor.take(self._parameters, self._buffers)

    def _restore(self) -> None:
        """Return to the end of the last round."""
        self._round.broken = True
        self._anchor.restore(self._parameters, self._buffers, self._optimizer.state)
        self._feedback.clear()
        self._round.begin()
        self._round.broken = False

    def _failure(self, error: Exception) -> RoundError:
        """Leave a failed round behind in a state that is known; returns what to raise."""
        group, counts, transactional = self._group, self._round, self._options.transactional
        number = counts.number + 1
        # Parameters that were moved are somewhere else by now, where they could not be followed.
        found = not self._parameters.moved()
        if transactional and self._anchor.valid and found:
            self._restore()
        # Where there was no anchor to return to, this rank has taken no step yet.
        restored = transactional and found and not counts.broken
        if restored:
            outcome = f"parameters and momentum are those of the end of round {self.round}"
        elif not counts.broken:
            outcome = "parameters are as this rank's last step left them"
        elif transactional:
            outcome = "parameters are left in the middle of the outer step"
        else:
            outcome = (
                "parameters are left in the middle of it (transactional=True would restore them)"
            )
        return RoundError(
            f"round {number} of Local SGD failed on rank {group.rank} of {group.size}; {outcome}: {error}",
            number,
            restored,
        )

    def _follow_moves(self) -> None:
        parameters = self._parameters
        if parameters.moved():
            before = parameters.data
            parameters.read()
            outer_momenta = [] if self._outer is None else self._outer.saved()
            for kept in (self._feedback.residuals, self._anchor.values, outer_momenta):
                parameters.reorder(kept, before)
            self._bind()

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, on all ranks at the start of a round; they get rank 0's values.

        Raises:
            RuntimeError: in the middle of a round.
            TypeError, ValueError: as the inner optimizer does.
        """
        if self._round.position > 0:
            raise RuntimeError(
                f"add_param_group: expected the start of a round, got step {self._round.position} of it; "
                "call sync() first"
            )
        self._follow_moves()
        self._optimizer.add_param_group(param_group)
        self._parameters = self._read_parameters()
        self._caller.exchange(self._group, self._like, "to add a group", facts=self._facts())
        self._allocate()
        self._parameters.averager().broadcast(self._group, self._parameters.flats)
        self._anchor.valid = False

    def rebind(self, group: Any = None, levels: Sequence[tuple[Any, int]] | None = None) -> None:
        """Go on with other ranks: those that are left after a failure, and new ones that construct their LocalSGD now.

        With `transactional`, all ranks return to the end of the last round that any of them completed. Otherwise ranks
        whose round failed get the parameters of one that is intact; if all are, they average their steps since. All
        parameters are then equal in every bit, and a new round begins. A new rank gets momentum and hyperparameters,
        too, of a rank that has completed the most rounds.

        Args:
            group: a process group of the ranks that go on, as in the constructor.
            levels: as in the constructor.

        Raises:
            RuntimeError: if no rank's parameters are intact.
            ValueError: if the group cannot add up `wire_dtype`, or ranks differ in options or layout.
        """
        group, levels = as_process_group(group), _levels(levels)
        check_wire(self._options.wire_dtype, group)
        self._group, self._levels = group, levels
        self._follow_moves()
        if self._options.transactional and self._anchor.valid:
            self._restore()
        self._bind()
        self._meet(_BROKEN if self._round.broken else _INTACT + self._round.number)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with all in it that makes resuming exact, of this rank.

        In the middle of a round ranks differ: save one for each, beside its parameters. After `sync` or `finish` any
        rank's will do for all, if momentum is averaged or reset.
        """
        self._follow_moves()
        numbers, shaped = self._round.numbers(), self._parameters.shaped
        arrays: dict[str, Sequence[Any]] = {"residual": shaped(self._feedback.residuals)}
        if self._anchor.valid:
            arrays |= {"anchor": shaped(self._anchor.values), "momentum": self._anchor.momenta}
        if self._outer is not None:
            arrays["outer_momentum"] = shaped(self._outer.saved())
            numbers |= {f"outer_lr.{i}": lr for i, lr in enumerate(self._outer.lrs)}
        numbers["transactional"] = self._options.transactional
        return add_to_state(self._optimizer.state_dict(), _KEY, numbers, arrays)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, or an inner optimizer's state dict, which begins a new round.

        Load the model's parameters after constructing the LocalSGD, which gives all ranks those of rank 0.

        Raises:
            ValueError: if it does not match the parameters or the options; the optimizer is then as it was.
        """
        self._follow_moves()
        inner, numbers, arrays = split_state(state_dict, _KEY, self._parameters)
        if numbers:
            self._check_state(numbers, arrays)
        self._optimizer.load_state_dict(inner)
        self._anchor.verified = self._anchor.valid = False
        self._round.begin()
        self._feedback.clear()
        if numbers:
            self._take_state(numbers, arrays)
        self._round.broken = False

    def _check_state(self, numbers: dict[str, float], arrays: dict[str, list[Any]]) -> None:
        own, in_round = self._options, numbers["position"] > 0
        if (
            (in_round and own.need_anchor and "anchor" not in arrays)
            or (in_round and own.transactional and not numbers["transactional"])
            or (self._outer is not None and "outer_lr.0" not in numbers)
            or any(value is None for value in arrays.get("anchor", ()))
        ):
            raise ValueError(
                "state_dict: it was saved with other options and lacks what outer, wire_dtype or transactional need"
            )

    def _take_state(self, numbers: dict[str, float], arrays: dict[str, list[Any]]) -> None:
        own, anchor, load = self._options, self._anchor, self._parameters.load
        complete, none = bool(numbers["transactional"]), [None] * len(self._parameters.all)
        self._round.take({name: numbers[name] for name in self._round.numbers()})
        if "anchor" in arrays and own.need_anchor:
            load(anchor.values, arrays["anchor"])
            if complete:
                anchor.keep(arrays.get("momentum", none), self._buffers)
            anchor.valid = complete or not own.transactional
        load(self._feedback.residuals, arrays.get("residual", []))
        if self._outer is not None:
            for momentum in self._outer.momenta():
                momentum[...] = 0
            load(self._outer.momenta(), arrays.get("outer_momentum", none))
            self._outer.lrs = [numbers[f"outer_lr.{i}"] for i in range(len(self._outer.lrs))]


def _schedule(sync_every: Any) -> int | Schedule:
    if isinstance(sync_every, Schedule) and not isinstance(sync_every, type):
        return sync_every
    if integer(sync_every) is None:
        raise TypeError(
            f"sync_every: expected an integer or an object with a method period(progress), got {sync_every!r}"
        )
    return check_count("sync_every", sync_every, 1)


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
