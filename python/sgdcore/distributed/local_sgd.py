"""Local SGD: each rank steps by itself, and now and then all average their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sgdcore.distributed import _flat
from sgdcore.distributed._checks import check_choice, check_count, integer
from sgdcore.distributed.averager import ErrorFeedback
from sgdcore.distributed.checkpoint import add_to_state, split_state
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.distributed.header import Headers, RoundError, any_flags, checksums, compare
from sgdcore.distributed.outer import Outer, OuterSGD, SlowMo
from sgdcore.distributed.round import Anchor, Round
from sgdcore.distributed.schedules import Schedule
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

    Constructing one gives all ranks the parameters of rank 0. Between rounds nothing is sent. All parameters are
    averaged, where they are, and are then equal on all ranks in every bit. On one rank nothing is changed. It stands in
    for the optimizer: groups, state, `zero_grad` and hooks are the inner one's, and around a torch optimizer it is a
    ``torch.optim.Optimizer``, for schedulers and GradScaler, of which each rank has its own.

    Args:
        optimizer: `sgdcore.SGD`, `sgdcore.torch.SGD`, or any optimizer of torch.optim but LBFGS.
        group: see `as_process_group`; by default all ranks.
        sync_every: the steps H of a round, or a schedule: an object with a method ``period(progress)``.
        warmup_steps: the first steps, after each of which parameters are averaged (plainly, without `outer`).
        momentum_sync: what becomes of ``"momentum_buffer"`` at the end of a round: ``"keep"`` each rank's own,
            ``"average"`` them (twice the traffic), or ``"reset"`` them to zero.
        outer: `OuterSGD` or `SlowMo`; None for plain averaging.
        levels: (group, every) pairs, from the narrowest on: every so many steps within a round the ranks of that group
            average among themselves, plainly, as those of one machine can do often.
        wire_dtype: ``"bfloat16"`` or ``"float16"`` (or ``"float32"`` for float64): parameters travel as differences to
            their values at the start of the round, rounded to this type; what rounding leaves over, the residual, is
            added to the next difference (error feedback). Sums of such a type round as well.
        transactional: keep what is needed to return to the end of the last round if one fails.
        exclude_nonfinite: leave a rank whose values are not all finite out of the round: it gets the others' mean, and
            its momentum's values that are not finite become 0. Costs a pass over the parameters. False: a round with
            such a rank fails, and the error names it.
        model: the torch module that is trained. Its parameters that the optimizer does not have are made equal at
            construction, its buffers are averaged with each round, and its parameters' names are compared.
        buffers: what is averaged with each round beside parameters, such as ``model.buffers()`` (batch norm's running
            statistics) or a mapping of arrays; integers are taken from rank 0. Default: those of `model`.

    Memory, in words per parameter, beside p, g and momentum: +1 for `transactional`, `outer` and `wire_dtype` together,
    +1 for the momentum of `transactional`, +1 for that of `outer`, +1 for the residuals of `wire_dtype`.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ in it or in their parameters' names or layout;
            before anything is changed.
        RoundError: from `step`, `sync` and `finish`, if a round fails, or ranks call different wrappers; see `rebind`.

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
        if outer is not None and not isinstance(outer, OuterSGD | SlowMo):
            raise TypeError(f"outer: expected an OuterSGD, a SlowMo or None, got {outer!r}")
        schedule, warmup_steps = _schedule(sync_every), check_count("warmup_steps", warmup_steps, 0)
        check_choice("momentum_sync", momentum_sync, ("keep", "average", "reset"))
        self._wrap(optimizer, group, model, buffers)
        self._options = _Options(
            schedule,
            warmup_steps,
            momentum_sync,
            outer,
            _wire(wire_dtype, self._group),
            bool(transactional),
            bool(exclude_nonfinite),
        )
        self._levels = _levels(levels)
        self._round, self._feedback = Round(), ErrorFeedback()
        self._anchor = Anchor(self._options.transactional)
        self._outer: Outer | None = None
        self._start(_NEW)

    def check_step_in_backward(self) -> None:
        """Raise a ValueError if the parameters are needed as they were before the round's first step."""
        if self._options.need_anchor:
            raise ValueError(
                "optimizer: outer, wire_dtype and transactional cannot go with step_in_backward"
            )

    @property
    def round(self) -> int:
        """The number of rounds completed."""
        return self._round.number

    @property
    def step_in_round(self) -> int:
        """The number of steps since the last round's end; 0 right after it, when all ranks are equal."""
        return self._round.position

    def _bind(self) -> None:
        own, parameters, anchor = self._options, self._parameters, self._anchor
        if own.need_anchor:
            anchor.follow(parameters)
        if own.wire_dtype is not None:
            self._feedback.follow(parameters.data, parameters.flats, anchor.values)
        if own.outer is not None:
            groups: list[list[Any]] = [[] for _ in self._optimizer.param_groups]
            for values, i in zip(anchor.values, parameters.group_of, strict=True):
                groups[i].append(values)
            before, self._outer = self._outer, Outer(own.outer, groups)
            if before is not None:
                self._outer.take(before.momenta(), before.lrs)

    # Meeting other ranks

    def _facts(self) -> dict[str, str]:
        levels = str([every for _, every in self._levels])
        return {**super()._facts(), "levels": levels, **self._options.facts()}

    def _status(self) -> int:
        return _BROKEN if self._round.broken else _INTACT + self._round.number

    def _meet(self, status: int) -> None:
        """See that ranks agree, and bring those behind to where the first one with the most rounds is."""
        group, parameters, own = self._group, self._parameters, self._options
        everyone = self._introduce(status)
        best = max(everyone)
        source = everyone.index(best)
        if best == _BROKEN:
            raise RuntimeError(
                "rebind: every rank's parameters are left in the middle of a round; load a checkpoint on all ranks, "
                "then rebind"
            )
        if best >= _INTACT and min(everyone) == best and not own.transactional:
            # Nobody is behind: no rank's steps since then have to be given up.
            self._average(_SYNCING)
        # Also where all took as many rounds: not necessarily with each other.
        parameters.averager().broadcast(group, parameters.flats, source)
        self._buffers.broadcast(group, source)
        self._feedback.load()
        self._anchor.valid = False
        if best >= _INTACT:
            # A rank that joins has neither momentum nor the learning rates that schedulers have changed.
            self._receive(source, everyone, status == _NEW)
        self._round.begin()
        self._round.broken = False

    def _receive(self, source: int, everyone: list[int], is_new: bool) -> None:
        """Take from a rank what is not a parameter; only a new one takes hyperparameters."""
        averages = self._options.momentum_sync == "average"
        whole = _NEW in everyone or averages
        blank = {"state": {}, "param_groups": [{"params": [*range(len(self._parameters.all))]}]}
        state = self._state_of(
            source, lambda: self._add_own(self._optimizer.state_dict() if whole else blank)
        )
        inner, numbers, arrays = split_state(state, _KEY, self._parameters)
        if self._group.rank != source and (is_new or averages):
            groups = inner if is_new else self._optimizer.state_dict()
            self._load_inner({**inner, "param_groups": groups["param_groups"]})
        self._take(numbers, arrays)
        self._round.steps += self._round.active  # they are in the parameters that all have now

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, on all ranks at the start of a round; they get the values of one rank.

        Raises:
            RuntimeError: in the middle of a round.
            TypeError, ValueError: as the inner optimizer does, or where ranks add different ones.
        """
        if self._round.position > 0:
            raise RuntimeError(
                f"add_param_group: expected the start of a round, got step {self._round.position} of it; "
                "call sync() first"
            )
        super().add_param_group(param_group)
        self._anchor.valid = False

    def rebind(self, group: Any = None, levels: Sequence[tuple[Any, int]] | None = None) -> None:
        """Go on with other ranks: those that are left after a failure, and new ones that construct their LocalSGD now.

        With `transactional`, all ranks return to the end of the last round that any of them completed. Otherwise ranks
        whose round failed get the parameters of one that is intact; if all are, they average their steps since. All
        parameters are then equal in every bit, and a new round begins. A new rank gets momentum and hyperparameters,
        too, of a rank that has completed the most rounds. `group` and `levels` are as in the constructor.

        Raises:
            RuntimeError: if no rank's parameters are intact.
            ValueError: if the group cannot add up `wire_dtype`, or ranks differ in options or layout.
        """
        group, levels = as_process_group(group), _levels(levels)
        _wire(self._options.wire_dtype, group)
        self._group, self._levels = group, levels
        self._follow_moves()
        if self._options.transactional and self._anchor.valid:
            self._restore()
        self._meet(self._status())

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
        step = self._optimizer.step
        result = step(**kwargs) if closure is None else step(closure, **kwargs)
        loss = result if loss is None else loss
        if loss is not None and not isinstance(self._options.sync_every, int):
            self._round.count_loss(loss)
        self._round.active += 1
        self._advance(1, _STEPPING)
        return result

    def sync(self) -> None:
        """End the round, on all ranks: average, or take the outer step. Does nothing after no step.

        Ranks that are here take part in the others' averages until all are. Raises as `step` does.
        """
        self._end(_SYNCING)

    def finish(self) -> None:
        """End training: take part in the others' rounds until all ranks are here, whatever their numbers of steps.

        Afterwards all ranks' parameters are equal. A ``with`` block calls it at its end, unless an exception is on its
        way. Raises as `step` does.
        """
        self._end(_FINISHING)

    def _end(self, ending: int) -> None:
        self._refuse_broken()
        self._make_sure_of_anchor()
        ended = False
        while not ended:
            steps = 0
            if self._levels:  # those until something is due
                self._find_period()
                done = self._round.position
                left = max(1, self._round.period - done)
                steps = min(left, *(every - done % every for _, every in self._levels))
            ended = self._advance(steps, ending) if steps else self._average(ending)

    def _refuse_broken(self) -> None:
        if self._round.broken:
            raise RuntimeError(
                "a round failed, or was interrupted, and left the parameters in the middle of it; rebind to the ranks "
                "that are left, for the last round's with transactional=True and else for those of an intact rank, or "
                "load a checkpoint"
            )

    def _find_period(self) -> None:
        own = self._options
        if self._round.period:
            return
        lr = float(self._optimizer.param_groups[0].get("lr", 0.0))
        self._round.find_period(own.sync_every, own.warmup_steps, lr)
        if self._levels and not isinstance(own.sync_every, int):
            # Ranks that differed would wait for each other, one for a level's average and another for the round's end.
            with self._failures_as_round_errors():
                self._tell("a period", _STEPPING)

    def _advance(self, steps: int, ending: int) -> bool:
        """Count steps; average what is due. Returns whether that ended `sync` or `finish`."""
        self._find_period()
        self._round.position += steps
        if self._round.position >= self._round.period:
            return self._average(ending)
        for group, every in reversed(self._levels):
            if self._round.position % every == 0:
                together = self._average(ending, group)
                # Where all ranks of the widest level wait for the others, no level's average is due before the round's.
                if together and group is self._levels[-1][0]:
                    return self._average(ending)
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

    def _tell(self, operation: str, ending: int, group: ProcessGroup | None = None) -> Headers:
        """Tell the ranks of a group where this one is; returns their headers, once all can average."""
        headers = self._exchange(operation, self._prepare, group, ending=ending)
        period = headers["period"]
        compare("the round's period", [f"{steps} steps" for steps in period], period)
        if all(headers["nonfinite"]):
            raise RuntimeError("no rank has parameters that are all finite")
        return headers

    def _prepare(self) -> dict[str, Any]:
        """Return where this rank is, and make sure that it can average."""
        self._make_sure_of_anchor()
        own, counts, groups = self._options, self._round, self._optimizer.param_groups
        momenta = self._parameters.momenta() if own.momentum_sync == "average" else []
        values = *self._parameters.flats, *self._buffers.floats
        lrs = [
            f"param_groups[{i}]['lr'] = {float(group['lr'])!r}"
            for i, group in enumerate(groups)
            if isinstance(own.outer, SlowMo)
        ]
        return {
            "active": counts.active,
            "period": counts.period,
            "loss": (float(counts.losses), counts.losses_count),
            "lrs": "\n".join(lrs),
            "nonfinite": own.exclude_nonfinite and not all(map(_flat.all_finite, values)),
            "present": np.packbits(np.array([each is not None for each in momenta], bool)),
        }

    def _average(self, ending: int, level: ProcessGroup | None = None) -> bool:
        """Average within a level, or end the round.

        Returns:
            Whether all ranks of the level are in `sync` or `finish`; of the round: in what this rank is in, if it is.
        """
        with self._failures_as_round_errors():
            headers = self._tell("a level's average" if level else "a round", ending, level)
            stepped = any(headers["active"])
            if level is None:
                compare("the learning rates of an outer step", headers["lrs"])
                what = "the state before this round, which was loaded on some ranks only"
                self._verify(headers, what)
            if stepped:
                self._round.broken = True
                factor = self._average_parameters(headers, level)
                if level is None:
                    self._end_round(headers, factor)
                self._round.broken = False
            elif level is None:
                self._round.begin()  # steps were passed over only
        if stepped and level is None:
            self._make_sure_of_anchor(after_round=True)
        return all(each >= max(_SYNCING, 0 if level else ending) for each in headers["ending"])

    def _average_parameters(self, headers: Headers, level: ProcessGroup | None) -> float:
        """Average the parameters; returns this rank's weight."""
        group, wire = (self._group, self._options.wire_dtype) if level is None else (level, None)
        excluded, parameters = headers["nonfinite"], self._parameters
        factor = 0.0 if excluded[group.rank] else 1 / excluded.count(False)
        if group.size == 1:
            return factor
        options: dict[str, Any] = {"feedback": self._feedback if wire else None}
        options["look"] = not self._options.exclude_nonfinite
        bad = parameters.averager(wire).average(group, parameters.flats, factor, **options)
        if bad:
            raise RuntimeError(
                f"rank {bad[0]} has parameters that are not finite (exclude_nonfinite=True leaves them out)"
            )
        if factor == 0:
            self._feedback.load()
            for momentum in parameters.momenta():
                if momentum is not None:
                    _flat.zero_nonfinite(momentum)
        return factor

    def _end_round(self, headers: Headers, factor: float) -> None:
        group, own, parameters = self._group, self._options, self._parameters
        if group.size > 1:
            if own.momentum_sync == "average":
                wanted = any_flags(headers["present"], len(parameters.all))
                parameters.average_momenta(group, wanted, factor)
            self._buffers.average(group, factor, headers["nonfinite"].index(False))
        # What follows is for each rank by itself.
        steps, losses = max(headers["active"]), sum(count for _, count in headers["loss"])
        if group.size > 1 and self._outer and self._round.steps + steps > own.warmup_steps:
            # The outer optimizer moves the anchors, and the parameters, which hold the average, follow them.
            self._anchor.subtract_from(parameters)
            lrs = [float(group["lr"]) for group in self._optimizer.param_groups]
            self._anchor.valid = False
            self._outer.step(parameters.data, lrs)
            self._anchor.to_parameters(parameters)
        if group.size > 1 and own.momentum_sync == "reset":
            for momentum in parameters.momenta():
                if momentum is not None:
                    momentum[...] = 0
        self._anchor.valid = False  # it is the last round's
        total = sum(loss for loss, _ in headers["loss"])
        self._round.complete(steps, total / losses if losses else None)

    # What an outer step, or a return to the last round, starts from

    def _checksums(self) -> str:
        """Return what enters a round beside parameters, which ranks may have loaded since it was compared."""
        if not self._options.need_anchor:
            return ""
        kept, outer = {"the anchor of": self._anchor.values}, self._outer
        if outer is not None:
            kept["the outer momentum of"] = outer.momenta()
        lines = [
            f"{name} {line}"
            for name, arrays in kept.items()
            for line in checksums(self._parameters.labels, arrays)
        ]
        return "\n".join([*lines, f"the last learning rates {outer and outer.lrs}"])

    def _make_sure_of_anchor(self, after_round: bool = False) -> None:
        """Take the anchor where none is: this rank has taken no step since all were equal."""
        if self._options.need_anchor and not self._anchor.valid:
            self._follow_moves()
            if not after_round:
                self._verified = False
            self._anchor.take(self._parameters, self._buffers)

    def _restore(self) -> None:
        """Return to the end of the last round."""
        self._round.broken = True
        self._anchor.restore(self._parameters, self._buffers, self._optimizer.state)
        self._feedback.load()
        self._round.begin()
        self._round.broken = False

    def _failure(self, error: Exception) -> RoundError:
        """Leave a failed round behind in a state that is known; returns what to raise."""
        group, counts, transactional = self._group, self._round, self._options.transactional
        # Parameters that were moved are somewhere else by now, where they could not be followed.
        found = not self._parameters.moved()
        if transactional and self._anchor.valid and found:
            self._restore()
        # Where there was no anchor to return to, this rank has taken no step yet.
        restored = transactional and found and not counts.broken
        outcome = "parameters are as this rank's last step left them"
        if restored:
            outcome = f"parameters and momentum are those of the end of round {self.round}"
        elif counts.broken:
            middle = (
                "the outer step" if transactional else "it (transactional=True would restore them)"
            )
            outcome = f"parameters are left in the middle of {middle}"
        number, place = counts.number + 1, f"rank {group.rank} of {group.size}"
        message = f"round {number} of Local SGD failed on {place}; {outcome}: {error}"
        return RoundError(message, number, restored)

    # Checkpoints

    def _add_own(self, inner: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the inner optimizer's state dict with what the wrapper keeps in it."""
        numbers, anchor = self._round.saved(), self._anchor
        arrays: dict[str, Sequence[Any]] = {"residual": self._feedback.residuals}
        if anchor.valid:
            arrays |= {"anchor": anchor.values, "momentum": anchor.momenta}
        if self._outer is not None:
            arrays["outer_momentum"] = self._outer.momenta()
            numbers["outer_lrs"] = list(self._outer.lrs)
        numbers["transactional"] = self._options.transactional
        return add_to_state(inner, _KEY, numbers, arrays)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with all in it that makes resuming exact, of this rank.

        In the middle of a round ranks differ: save one for each, beside its parameters. After `sync` or `finish` any
        rank's will do for all, if momentum is averaged or reset.
        """
        self._follow_moves()
        return self._add_own(self._optimizer.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, or an inner optimizer's state dict, which begins a new round.

        Load the model's parameters after constructing the LocalSGD, which gives all ranks those of rank 0.

        Raises:
            ValueError: if it does not match the parameters or the options; the optimizer is then as it was.
        """
        self._follow_moves()
        inner, numbers, arrays = split_state(state_dict, _KEY, self._parameters)
        own, in_round = self._options, numbers.get("position", 0) > 0
        if numbers and (
            (in_round and own.need_anchor and "anchor" not in arrays)
            or (in_round and own.transactional and not numbers["transactional"])
            or (own.outer is not None and "outer_lrs" not in numbers)
            or any(value is None for value in arrays.get("anchor", ()))
        ):
            raise ValueError(
                "state_dict: it was saved with other options and lacks what outer, wire_dtype or transactional need"
            )
        self._optimizer.load_state_dict(inner)
        self._verified = self._anchor.valid = False
        self._round.begin()
        self._feedback.load()
        if numbers:
            self._take(numbers, arrays)
        self._round.broken = False

    def _take(self, numbers: dict[str, Any], arrays: dict[str, list[Any]]) -> None:
        """Take over what `_add_own` added on a rank."""
        own, anchor, complete = self._options, self._anchor, numbers["transactional"]
        none = [None] * len(self._parameters.all)
        self._round = Round(**{name: numbers[name] for name in vars(self._round)})
        self._feedback.load(arrays.get("residual", ()))
        if "anchor" in arrays and own.need_anchor:
            for target, source in zip(anchor.values, arrays["anchor"], strict=True):
                target[...] = source
            if complete:
                anchor.keep(arrays.get("momentum", none), self._buffers)
            anchor.valid = complete or not own.transactional
        if self._outer is not None:
            self._outer.take(arrays.get("outer_momentum", none), numbers["outer_lrs"])


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


def _wire(wire_dtype: Any, group: ProcessGroup) -> str | None:
    """Return the name of a dtype that the group can add up; None for None."""
    if wire_dtype is None:
        return None
    try:
        name = _flat.dtype_name(wire_dtype)
    except TypeError:
        name = ""
    if name not in _flat.FLOATS[1:]:
        expected = ", ".join(_flat.FLOATS[1:])
        raise TypeError(f"wire_dtype: expected one of {expected} or None, got {wire_dtype!r}")
    if name not in group.dtypes:
        able = ", ".join(sorted(group.dtypes))
        raise ValueError(f"wire_dtype: {group!r} cannot add up {name}, only {able}")
    return name
