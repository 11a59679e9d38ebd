"""Local SGD: each rank steps by itself, and now and then all average their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sgdcore._kept import has_masters, require_no_counts
from sgdcore.distributed import _flat
from sgdcore.distributed._checks import check_choice, check_count
from sgdcore.distributed.averager import ErrorFeedback
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.distributed.header import Headers, RoundError, anywhere, checksums, compare
from sgdcore.distributed.outer import Outer, OuterSGD, SlowMo
from sgdcore.distributed.round import Anchor, Round, add_to_state, split_state
from sgdcore.distributed.schedules import Progress, Schedule, Stagewise
from sgdcore.distributed.wrapper import Wrapper

# What a rank says of itself when ranks meet: its parameters are left in the middle of a round; it has just been
# constructed; or they are whole, and the number of completed rounds is added. All take those of the first highest one.
_BROKEN, _NEW, _INTACT = range(3)
# What a rank says of itself in a round.
_STEPPING, _SYNCING, _FINISHING = range(3)


@dataclasses.dataclass(frozen=True)
class _Options:
    """The constructor's arguments, but for the optimizer, the model and the groups."""

    sync_every: Schedule
    momentum_sync: str
    outer: OuterSGD | SlowMo | None
    wire_dtype: str | None
    transactional: bool
    exclude_nonfinite: bool

    @property
    def need_anchor(self) -> bool:
        """Whether the parameters are needed as they were at the start of the round."""
        return self.transactional or self.outer is not None or self.wire_dtype is not None


class LocalSGD(Wrapper):
    r"""Steps of an optimizer on each rank's own gradients, with the ranks' parameters averaged every few steps.

    A round of H steps on N ranks, from equal parameters x::

        x_i = H steps of the optimizer on rank i, from x
        x   = mean of x_1 ... x_N, or what `outer` makes of it

    Constructing one gives all ranks the parameters of rank 0. Between rounds nothing is sent. Parameters are averaged
    where they are, and are then equal on all ranks in every bit. On one rank nothing is changed. It stands in for the
    optimizer, whose groups, state, `zero_grad` and hooks it has; around a torch optimizer it is a
    ``torch.optim.Optimizer``, for schedulers and GradScaler, of which each rank has its own.

    Args:
        optimizer: one of `sgdcore`, of `sgdcore.torch`, or of torch.optim but LBFGS.
        group: see `as_process_group`; by default all ranks.
        sync_every: the steps H of a round, or a `Schedule`.
        momentum_sync: what becomes of the rule's states, such as momentum, at the end of a round: ``"keep"`` each
            rank's own, ``"average"`` them (twice the traffic), or ``"reset"`` them to zero. Of torch.optim's
            optimizers those that SGD has, too.
        outer: `OuterSGD` or `SlowMo`; None for plain averaging.
        levels: (group, every) pairs, from the narrowest on: every so many steps within a round the ranks of that group
            average among themselves, plainly.
        wire_dtype: ``"bfloat16"`` or ``"float16"`` (or ``"float32"`` for float64): parameters travel as differences to
            the round's start, rounded to this type; what rounding leaves over is added to the next difference (error
            feedback). Sums of such a type round as well.
        transactional: keep what is needed to return to the end of the last round if one fails.
        exclude_nonfinite: leave a rank whose values are not all finite out of the round: it gets the others' mean, and
            what is not finite in its momentum becomes 0. False: the round fails, and the error names the rank.
        model: the torch module that is trained. Its parameters that the optimizer does not have are made equal at
            construction, its buffers are averaged with each round, and its parameters' names are compared.
        buffers: what is averaged with each round beside parameters, such as ``model.buffers()``, or a mapping of
            arrays; integers are taken from rank 0. Default: those of `model`.

    Raises:
        TypeError, ValueError: if an argument is invalid, or ranks differ; before anything is changed.
        RoundError: from `step`, `sync` and `finish`, if a round fails, or ranks call different wrappers; see `rebind`.

    Source: Stich, "Local SGD converges fast and communicates little", ICLR 2019 (arXiv 1805.09767).
    """

    def __init__(
        self,
        optimizer: Any,
        group: Any = None,
        sync_every: int | Schedule = 16,
        *,
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
        if isinstance(sync_every, type) or not isinstance(sync_every, Schedule):
            sync_every = Stagewise({0: check_count("sync_every", sync_every, 1)})
        check_choice("momentum_sync", momentum_sync, ("keep", "average", "reset"))
        require_no_counts(
            optimizer,
            {
                "momentum_sync": momentum_sync != "average",
                "outer": outer is not None,
                "levels": bool(levels),
                "transactional": transactional,
                "exclude_nonfinite": exclude_nonfinite,
            },
        )
        self._wrap(optimizer, group, model, buffers)
        wire, flags = _wire(wire_dtype, self.group), (bool(transactional), bool(exclude_nonfinite))
        own = _Options(sync_every, momentum_sync, outer, wire, *flags)
        if own.need_anchor and has_masters(optimizer):
            text = "outer, wire_dtype and transactional cannot go with precision='split' or 'kahan'"
            raise ValueError(f"optimizer: {text}")
        self._options, self._levels, self._round = own, _levels(levels), Round()
        data, group_of = self._parameters.data, self._parameters.group_of
        self._anchor = Anchor(data if own.need_anchor else [], own.transactional)
        self._feedback = ErrorFeedback(data if wire else [], self._anchor.values)
        self._outer = None if outer is None else Outer(outer, self._anchor.values, group_of)
        self._start(_NEW, model)

    def check_step_in_backward(self) -> None:
        """Raise a ValueError with outer, wire_dtype or transactional, which need parameters from before steps."""
        if self._options.need_anchor:
            options = "outer, wire_dtype and transactional"
            raise ValueError(f"optimizer: {options} cannot go with step_in_backward")

    @property
    def round(self) -> int:
        """The number of rounds completed."""
        return self._round.number

    @property
    def step_in_round(self) -> int:
        """The number of steps since the last round's end; 0 right after it, when all ranks are equal."""
        return self._round.position

    # Meeting other ranks

    def _facts(self) -> dict[str, str]:
        facts = {name: str(value) for name, value in vars(self._options).items()}
        if not dataclasses.is_dataclass(schedule := self._options.sync_every):
            facts["sync_every"] = type(schedule).__qualname__
        return {**super()._facts(), **facts, "levels": str([every for _, every in self._levels])}

    def _meet(self, status: int) -> None:
        everyone = self._introduce(status)
        best = max(everyone)
        source = everyone.index(best)
        if best == _BROKEN:
            raise RuntimeError(
                "rebind: every rank's parameters are left in the middle of a round; load a checkpoint on all first"
            )
        if best >= _INTACT and min(everyone) == best and not self._options.transactional:
            # Nobody is behind: no rank's steps since then have to be given up.
            self._average(_SYNCING)
        # Also where all took as many rounds: not necessarily with each other.
        self._take_values(source)
        self._feedback.load()
        self._anchor.valid = self._verified = False
        if best >= _INTACT:
            inner, numbers, arrays = split_state(self._state_of(source), self._parameters)
            # A rank that joins has neither momentum nor the hyperparameters that schedulers have changed.
            is_new, averages = status == _NEW, self._options.momentum_sync == "average"
            if self.group.rank != source and (is_new or averages):
                groups = inner if is_new else self.optimizer.state_dict()
                self.optimizer.load_state_dict({**inner, "param_groups": groups["param_groups"]})
            self._take(numbers, arrays)
            self._round.steps += self._round.active  # they are in the parameters that all have now
        self._round.begin()
        self._round.broken = False

    def rebind(self, group: Any = None, levels: Sequence[tuple[Any, int]] | None = None) -> None:
        """Go on with other ranks: those that are left after a failure, and new ones that construct their LocalSGD now.

        With `transactional`, all ranks return to the end of the last round that any of them completed. Otherwise ranks
        whose round failed get the parameters of one that is intact; if all are, they average their steps since. Then a
        new round begins. A new rank gets momentum and hyperparameters, too, of a rank that has completed the most
        rounds. Raises a RuntimeError if no rank's parameters are intact, and as the constructor does.
        """
        group, levels = as_process_group(group), _levels(levels)
        _wire(self._options.wire_dtype, group)
        self.group, self._levels = group, levels
        self._parameters.follow()
        if self._options.transactional and self._anchor.valid:
            self._restore()
        self._meet(_BROKEN if self._round.broken else _INTACT + self.round)

    # Training

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Let the inner optimizer step, with its arguments, and return what that does; at a round's end, average.

        Raises:
            RoundError: if the round, or a level's part of it, ended here and could not be averaged.
            RuntimeError: after a round that failed and left the parameters in the middle of it, see `rebind`.
        """
        self._make_ready()
        step = self.optimizer.step
        result = step(**kwargs) if closure is None else step(closure, **kwargs)
        self._round.active += 1
        self._advance(1, _STEPPING)
        return result

    def sync(self) -> None:
        """End the round, on all ranks, if a step was taken; until all are here take part in the others' averages."""
        self._end(_SYNCING)

    def finish(self) -> None:
        """End training: take part in the others' rounds until all ranks are here, whatever their numbers of steps.

        Afterwards all ranks' parameters are equal. A ``with`` block ends with it, unless by an exception.
        """
        self._end(_FINISHING)

    def _end(self, ending: int) -> None:
        self._make_ready()
        ended = False
        while not ended:
            self._find_period()
            done = self._round.position  # pass over steps until something is due
            dues = [done - done % every + every for _, every in self._levels]
            ended = self._advance(min([self._round.period, *dues]) - done, ending)

    def _make_ready(self) -> None:
        if self._round.broken:
            raise RuntimeError(
                "a round failed, or was interrupted, and left the parameters in the middle; rebind or load a checkpoint"
            )
        self._make_sure_of_anchor()

    def _find_period(self) -> None:
        schedule, counts = self._options.sync_every, self._round
        if counts.period:
            return
        lr = float(self.param_groups[0].get("lr", 0.0))
        progress = Progress(counts.steps, counts.number, counts.last_period, lr)
        counts.period = check_count("the schedule's period", schedule.period(progress), 1)
        if self._levels and not isinstance(schedule, Stagewise):
            # Ranks that differed would wait for each other, one for a level's average and another for the round's end.
            with self._failures_as_round_errors():
                self._tell("a period", _STEPPING)

    def _advance(self, steps: int, ending: int) -> bool:
        """Count steps; average what is due. Returns whether that ended `sync` or `finish`."""
        self._find_period()
        self._round.position += steps
        if self._round.position >= self._round.period:
            return self._average(ending)
        due = [group for group, every in self._levels if self._round.position % every == 0]
        # Where all ranks of the widest level wait for the others, no level's average is due before the round's.
        if due and self._average(ending, due[-1]) and due[-1] is self._levels[-1][0]:
            return self._average(ending)
        return False

    @contextmanager
    def _failures_as_round_errors(self) -> Iterator[None]:
        """Average in here: what fails becomes a RoundError."""
        counts, transactional = self._round, self._options.transactional
        try:
            yield
        except Exception as error:
            # Parameters that were moved are somewhere else by now, where they could not be followed.
            found = not self._parameters.moved()
            if transactional and self._anchor.valid and found:
                self._restore()
            # Where there was no anchor to return to, this rank has taken no step yet.
            restored = transactional and found and not counts.broken
            outcome = "as this rank's last step left them"
            if restored:
                outcome = f"those of the end of round {self.round}"
            elif counts.broken:
                hint = "" if transactional else " (transactional=True would restore them)"
                outcome = f"left in the middle{hint}"
            number, place = self.round + 1, f"rank {self.group.rank} of {self.group.size}"
            message = (
                f"round {number} of Local SGD failed on {place}; parameters are {outcome}: {error}"
            )
            raise RoundError(message, number, restored) from error

    def _tell(self, operation: str, ending: int, group: ProcessGroup | None = None) -> Headers:
        """Tell the ranks of a group where this one is; returns their headers, once all can average."""

        def prepare() -> dict[str, Any]:
            self._make_sure_of_anchor()
            own, values = self._options, (*self._parameters.flats, *self._buffers.floats)
            states = self._parameters.states(own.momentum_sync == "average")
            return {
                "ending": ending,
                "active": self._round.active,
                "period": self._round.period,
                "lrs": self._lrs() if isinstance(own.outer, SlowMo) else [],
                "nonfinite": own.exclude_nonfinite and not all(map(_flat.all_finite, values)),
                "missing": {
                    key: [i for i, each in enumerate(arrays) if each is None]
                    for key, arrays in states.items()
                },
            }

        headers = self._exchange(operation, prepare, group)
        period = headers["period"]
        compare("the round's period", [f"{steps} steps" for steps in period], period)
        if all(headers["nonfinite"]):
            raise RuntimeError("no rank has parameters that are all finite")
        return headers

    def _lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self.param_groups]

    def _average(self, ending: int, level: ProcessGroup | None = None) -> bool:
        """Average within a level, or end the round; returns whether all are in `sync`, or in what this rank is in."""
        group, whole = level or self.group, level is None
        with self._failures_as_round_errors():
            headers = self._tell("a round" if whole else "a level's average", ending, group)
            stepped, excluded = any(headers["active"]), headers["nonfinite"]
            if whole:
                compare("the learning rates of an outer step", headers["lrs"])
                what = "the state before this round, which was loaded on some ranks only"
                self._verify(headers, what)
            if stepped:
                self._round.broken = True
                factor = 0.0 if excluded[group.rank] else 1 / excluded.count(False)
                if group.size > 1:
                    self._average_parameters(group, factor, whole)
                if whole:
                    self._end_round(headers, factor)
                self._round.broken = False
            elif whole:
                self._round.begin()  # steps were passed over only
        if stepped and whole:
            self._make_sure_of_anchor()
        return all(each >= max(_SYNCING, ending if whole else 0) for each in headers["ending"])

    def _average_parameters(self, group: ProcessGroup, factor: float, whole: bool) -> None:
        wire = self._options.wire_dtype if whole else None
        look = not self._options.exclude_nonfinite
        feedback, parameters = self._feedback if wire else None, self._parameters
        averager, masters = parameters.averager(wire), parameters.masters()
        bad = averager.average(group, parameters.flats, factor, feedback=feedback, look=look)
        if bad:
            raise RuntimeError(
                f"rank {bad[0]} has parameters that are not finite (exclude_nonfinite=True leaves them out)"
            )
        if masters:
            parameters.average_masters(masters, group, factor)
        if factor == 0:
            self._feedback.load()
            for state in parameters.arrays_of_states():
                state[~_flat.library(state).isfinite(state)] = 0

    def _end_round(self, headers: Headers, factor: float) -> None:
        group, parameters, steps = self.group, self._parameters, max(headers["active"])
        if group.size > 1:
            for key in headers["missing"][0]:
                wanted = anywhere([each[key] for each in headers["missing"]], len(parameters.all))
                parameters.average_state(key, group, wanted, factor)
            self._buffers.average(group, factor, headers["nonfinite"].index(False))
            # What follows is for each rank by itself.
            if self._outer is not None:
                # The outer optimizer moves the anchors; the parameters, which hold the average, follow them.
                self._anchor.valid = False
                self._outer.step(parameters.data, self._lrs())
                _flat.copy_all(parameters.data, self._anchor.values)
            if self._options.momentum_sync == "reset":
                for state in parameters.arrays_of_states():
                    state[...] = 0
        self._anchor.valid = False  # it is the last round's
        counts = self._round
        counts.last_period = steps
        counts.steps += steps
        counts.number += 1
        counts.begin()

    # What an outer step, or a return to the last round, starts from

    def _checksums(self) -> str:
        """Return what enters a round beside parameters, which ranks may have loaded since it was compared."""
        if not self._options.need_anchor:
            return ""
        outer, labels = self._outer, self._parameters.labels
        lines = [f"the anchor of {line}" for line in checksums(labels, self._anchor.values)]
        if outer is not None:
            momenta = checksums(labels, outer.momenta())
            lines += [f"the outer momentum of {line}" for line in momenta]
            lines.append(f"the last learning rates {outer.lrs}")
        return "\n".join(lines)

    def _make_sure_of_anchor(self) -> None:
        """Take the anchor where none is: this rank has taken no step since all were equal."""
        if self._options.need_anchor and not self._anchor.valid:
            self._parameters.follow()
            self._anchor.take(self._parameters, self._buffers)

    def _restore(self) -> None:
        """Return to the end of the last round."""
        self._round.broken = True
        self._anchor.restore(self._parameters, self._buffers)
        self._feedback.load()
        self._round.begin()
        self._round.broken = False

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with all in it that makes resuming exact, of this rank.

        In the middle of a round ranks differ: save one for each, beside its parameters. After `sync` or `finish` any
        rank's will do for all, if momentum is averaged or reset.
        """
        numbers = {**vars(self._round), "transactional": self._options.transactional}
        arrays: dict[str, Sequence[Any]] = {"residual": self._feedback.residuals}
        if self._anchor.valid:
            states = {f"anchor.{key}": values for key, values in self._anchor.states.items()}
            arrays |= {"anchor": self._anchor.values, **states}
        if self._outer is not None:
            arrays["outer_momentum"] = self._outer.momenta()
            numbers["outer_lrs"] = list(self._outer.lrs)
        return add_to_state(self.optimizer.state_dict(), numbers, arrays)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, or an inner optimizer's state dict, which begins a new round.

        Load the model after constructing the LocalSGD, which gives all ranks rank 0's. Buffers are not in the state: if
        the round fails, they return to what they are now. Raises a ValueError if something does not match.
        """
        self._parameters.follow()
        inner, numbers, arrays = split_state(state_dict, self._parameters)
        own, in_round = self._options, numbers.get("position", 0) > 0
        anchor = arrays.get("anchor", [None]) if in_round and own.need_anchor else []
        if numbers and (
            any(value is None for value in anchor)
            or (in_round and own.transactional and not numbers["transactional"])
            or (own.outer is not None and "outer_lrs" not in numbers)
        ):
            raise ValueError(
                "state_dict: it was saved with other options and lacks what outer, wire_dtype or transactional need"
            )
        self.optimizer.load_state_dict(inner)
        self._verified = self._anchor.valid = False
        self._round.begin()
        self._feedback.load()
        if numbers:
            self._take(numbers, arrays)
        self._round.broken = False

    def _take(self, numbers: dict[str, Any], arrays: dict[str, list[Any]]) -> None:
        """Take over what `state_dict` added on a rank."""
        none = [None] * len(self._parameters.all)
        self._round = Round(**{name: numbers[name] for name in vars(self._round)})
        self._feedback.load(arrays.get("residual", ()))
        if self._outer is not None:
            self._outer.take(arrays.get("outer_momentum", none), numbers["outer_lrs"])
        if "anchor" in arrays and self._options.need_anchor and self._round.position > 0:
            _flat.copy_all(self._anchor.values, arrays["anchor"])
            if self._options.transactional:
                keys = self._parameters.states()
                states = {key: arrays.get(f"anchor.{key}", none) for key in keys}
                self._anchor.keep(states, self._buffers)
            self._anchor.valid = True


def _levels(levels: Sequence[tuple[Any, int]] | None) -> list[tuple[ProcessGroup, int]]:
    pairs: Sequence[Any] = levels or ()
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or pair[0] is None:
            raise TypeError(f"levels: expected pairs (group, every), got {levels!r}")
    return [(as_process_group(group), check_count("levels", every, 1)) for group, every in pairs]


def _wire(wire_dtype: Any, group: ProcessGroup) -> str | None:
    """Return the name of a dtype that the group can add up; None for None."""
    if wire_dtype is None:
        return None
    name = check_choice("wire_dtype", _flat.dtype_name(wire_dtype), _flat.FLOATS[1:])
    if name not in group.dtypes:
        able = ", ".join(sorted(group.dtypes))
        raise ValueError(f"wire_dtype: {type(group).__name__} cannot add up {name}, only {able}")
    return name
