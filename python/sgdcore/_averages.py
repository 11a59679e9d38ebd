"""Averages of the parameters over steps: what an optimizer is told, keeps and saves of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sgdcore import _core
from sgdcore._hyperparameters import float_of
from sgdcore._rules import EXTRA_STATES, State

__all__ = [
    "AVERAGE",
    "EMA",
    "Averages",
    "Polyak",
    "exchanged",
    "taken_steps",
    "without_saved",
]

#: The state that holds an average.
AVERAGE: State = next(state for state in EXTRA_STATES if state.key == "average")

# The keys of the groups of a state dict.
_KIND, _STEPS = "average", "average_steps"


@dataclass(frozen=True)
class EMA:
    """The exponential moving average of a parameter, for an optimizer's ``average=``.

    After each step, with the parameter p as it then is and its average a, of one shape::

        a = p                           after the first step
        a = fma(1 - decay, p - a, a)    afterwards, if decay > 0.5
        a = fma(-decay, p - a, p)       afterwards, if decay <= 0.5

    ``fma(x, y, z)`` is x * y + z, rounded once; ``1 - decay`` is formed in float64. Arithmetic is float64 if p or a is
    stored as float64, else float32. The bits are those of ``torch.optim.swa_utils.AveragedModel`` with
    ``get_ema_multi_avg_fn(decay)``. As there, a parameter without a gradient takes part: its average moves towards it.

    Args:
        decay: the part of the average that a step leaves, from 0 to 1. Default 0.999.

    Raises:
        TypeError, ValueError: if decay is not such a number.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992, for averaging as such.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        decay = float_of("decay", self.decay)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number from 0 to 1, got {self.decay!r}")
        object.__setattr__(self, "decay", decay)


@dataclass(frozen=True)
class Polyak:
    """The mean of a parameter over steps, for an optimizer's ``average=``.

    After each step from ``start`` on, with the parameter p as it then is, its average a, of one shape, and the number n
    of steps averaged before::

        a = p                              if n == 0
        a = fma(-1/2, p - a, p)            if n == 1
        a = fma(1 / (n + 1), p - a, a)     afterwards

    ``fma(x, y, z)`` is x * y + z, rounded once; ``1 / (n + 1)`` is formed in float64. Arithmetic is float64 if p or a
    is stored as float64, else float32. For float32 the bits are those of ``torch.optim.swa_utils.AveragedModel`` with
    ``get_swa_multi_avg_fn()``. As there, a parameter without a gradient takes part. A parameter that joins later
    counts as if its first averaged value had been its value before.

    Args:
        start: the number of steps before the first one that is averaged. Default 0.

    Raises:
        TypeError, ValueError: if start is not such a number.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    start: int = 0

    def __post_init__(self) -> None:
        try:
            start = operator.index(self.start)
        except TypeError:
            raise TypeError(f"start: expected an integer, got {self.start!r}") from None
        if not 0 <= start < 2**62:
            raise ValueError(f"start: expected a number of steps, 0 or more, got {self.start!r}")
        object.__setattr__(self, "start", start)


class Averages:
    """The averages of an optimizer's parameters, apart from the arrays, which are in the optimizer's state.

    Args:
        kind: how steps are averaged.
        dtype: the storage type of new averages, as the optimizer's groups name storage types; None for the parameter's.

    Attributes:
        kind, dtype: as given.
        steps: what the plan reads and counts.
        loaded: the number of steps of a checkpoint that is being loaded.

    Raises:
        TypeError: if `kind` is neither an EMA nor a Polyak.
    """

    def __init__(self, kind: EMA | Polyak, dtype: Any) -> None:
        if not isinstance(kind, EMA | Polyak):
            raise TypeError(
                f"average: expected sgdcore.EMA(decay), sgdcore.Polyak(start) or None, got {kind!r}"
            )
        self.kind = kind
        self.dtype = dtype
        self.loaded = 0
        if isinstance(kind, EMA):
            self.steps = _core.AveragedSteps(kind.decay, 0)
        else:
            self.steps = _core.AveragedSteps(None, kind.start)

    @property
    def named_dtype(self) -> Mapping[str, Any]:
        """The storage type of new averages as a group would name it."""
        return {AVERAGE.dtype_key: self.dtype}

    def __reduce__(self) -> Any:
        return _restore, (self.kind, self.dtype, self.steps.taken)

    def saved(self) -> dict[str, Any]:
        """Return what each group of a state dict says of the averages."""
        if isinstance(self.kind, EMA):
            return {_KIND: "EMA"}
        return {_KIND: "Polyak", _STEPS: self.steps.taken}

    def require_parameters(self, what: str) -> None:
        """Raise a RuntimeError while the averages are where the parameters belong."""
        if self.steps.in_place:
            raise RuntimeError(
                f"{what}: the optimizer's parameters hold their averages inside of averaged()"
            )


def _restore(kind: EMA | Polyak, dtype: Any, taken: int) -> Averages:
    averages = Averages(kind, dtype)
    averages.steps.taken = taken
    return averages


def taken_steps(averages: Averages | None, state_dict: Mapping[str, Any]) -> int:
    """Return the number of steps that a checkpoint says its optimizer has taken, where averages need it, else 0.

    Raises:
        ValueError: if the checkpoint's averages are not of the optimizer's kind, or it has means without their number
            of steps, as torch's flattened state dicts do.
        TypeError: if the number of steps is none.
    """
    own = None if averages is None else type(averages.kind).__name__
    taken, found = 0, False
    for i, group in enumerate(state_dict["param_groups"]):
        saved = group.get(_KIND)
        if saved is None:
            continue
        label = f"state_dict['param_groups'][{i}]"
        if saved != own:
            made = "without average=" if own is None else f"with average=sgdcore.{own}(...)"
            raise ValueError(
                f"{label}[{_KIND!r}]: the checkpoint has averages of the kind {saved!r}, and the optimizer was made "
                f"{made}"
            )
        steps = group.get(_STEPS, 0)
        if not isinstance(steps, int) or not 0 <= steps < 2**62:
            raise TypeError(f"{label}[{_STEPS!r}]: expected a number of steps, got {steps!r}")
        taken, found = steps, True
    if own == Polyak.__name__ and not found:
        for key, values in state_dict["state"].items():
            if isinstance(values, Mapping) and values.get(AVERAGE.key) is not None:
                raise ValueError(
                    f"state_dict['state'][{key!r}]: it has an {AVERAGE.key}, and param_groups lack {_KIND!r} and "
                    f"{_STEPS!r}, without which a mean cannot go on; torch's flattened state dicts drop them"
                )
    return taken


def without_saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group of a state dict without what `Averages.saved` adds."""
    return {key: value for key, value in group.items() if key not in (_KIND, _STEPS)}


@contextmanager
def exchanged(
    steps: _core.AveragedSteps,
    pairs: Iterable[tuple[Any, Any]],
    copy_of: Callable[[Any], Any],
    assign: Callable[[Any, Any], object],
) -> Iterator[None]:
    """Put averages where the parameters are, and both back afterwards.

    A parameter and an average of one storage type change places, so that there is one more copy of a pair at a time.
    Otherwise the parameters are kept in copies.

    Args:
        steps: notes that the averages are in place.
        pairs: each parameter and its average.
        copy_of: returns a copy of an array.
        assign: ``assign(array, values)`` copies values into an array, rounding them to its storage type.
    """
    if steps.in_place:
        raise RuntimeError("averaged: the parameters hold their averages already")
    # What restores each pair: (parameter, average, the parameter's values, the average's values or None).
    restore: list[tuple[Any, Any, Any, Any]] = []
    steps.in_place = True
    try:
        for parameter, average in pairs:
            values = copy_of(parameter)
            if parameter.dtype != average.dtype:
                restore.append((parameter, average, values, None))
                assign(parameter, average)
                continue
            # Until both are written, the pair is restored from copies.
            restore.append((parameter, average, values, copy_of(average)))
            assign(parameter, average)
            assign(average, values)
            restore[-1] = (parameter, average, None, None)
        yield
    finally:
        while restore:
            parameter, average, values, average_values = restore[-1]
            if values is None:
                values, average_values = copy_of(average), copy_of(parameter)
                restore[-1] = (parameter, average, values, average_values)
            assign(parameter, values)
            if average_values is not None:
                assign(average, average_values)
            restore.pop()
        steps.in_place = False
