"""The options that every optimizer takes beside the hyperparameters of its rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from sgdcore import _core
from sgdcore._arrays import storage_dtype
from sgdcore._averages import EMA, Averages, Polyak
from sgdcore._hyperparameters import float_of

__all__ = ["HasOptions", "Options"]


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, of arrays and of torch's tensors. All are optional.

    They belong to the optimizer, not to its groups. Pickles and copies of an optimizer keep those that are set.
    A state dict, which has torch's layout, holds none of them; with averages it holds these, and of which kind they
    are.

    Args:
        average: `EMA` or `Polyak`: keep an average of each parameter, ``"average"`` in its state, which each step
            updates together with the parameter. ``with optimizer.averaged():`` puts the averages where the parameters
            are. A parameter without a gradient takes part; a step that is skipped does not. Default None: no averages.
        average_dtype: the storage type of new averages. Default None: the parameter's.
        clip_value: limit each element of a gradient to [-clip_value, clip_value] before the step uses it, as
            ``torch.nn.utils.clip_grad_value_`` does; a number > 0. A NaN stays a NaN. The gradient in memory stays as
            it is. It is limited after the scale of a GradScaler was undone, in the type that the step computes in.
            Default None: no limit. `HasOptions.clip_value` changes it between steps.
    """

    average: EMA | Polyak | None
    average_dtype: Any
    clip_value: float | None


class HasOptions:
    """The part of an optimizer that keeps its options."""

    _plan: Any
    # None in an optimizer without averages.
    _averages: Averages | None = None
    # None in an optimizer that leaves its gradients as they are, so that its steps notice nothing.
    _clipping: _core.Clipping | None = None

    def _take_average(self, options: Mapping[str, Any]) -> None:
        """Set the options of averages. They are needed first, since they decide on states, and do not change.

        Raises:
            TypeError, ValueError: if they are not valid.
        """
        average, dtype = options.get("average"), options.get("average_dtype")
        if average is not None:
            self._averages = Averages(average, self._named_dtype("average_dtype", dtype))
        elif dtype is not None:
            raise ValueError(f"average_dtype: expected average=, too, got {dtype!r} alone")

    def _named_dtype(self, name: str, dtype: Any) -> Any:
        """Return the storage type of states as groups name it."""
        return None if dtype is None else storage_dtype(dtype, name).name

    @property
    def average(self) -> EMA | Polyak | None:
        """How the parameters are averaged; None if they are not."""
        return None if self._averages is None else self._averages.kind

    def _take_options(self, options: Mapping[str, Any]) -> None:
        """Set the options that were given.

        Raises:
            TypeError: if an option is unknown, as Python raises it for an unexpected argument; or of the wrong kind.
            ValueError: if an option is out of range.
        """
        for name in options:
            if name not in Options.__annotations__:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}"
                )
        for name, value in options.items():
            if value is not None and name not in ("average", "average_dtype"):
                setattr(self, name, value)

    def _plans(self) -> list[Any]:
        """Return the plans of the optimizer's steps."""
        return [self._plan]

    def _clips(self) -> _core.Clipping:
        """Return what is done to the gradients of each step, which the plan reads, too."""
        if self._clipping is None:
            self._clipping = _core.Clipping()
            for plan in self._plans():
                plan.clipping = self._clipping
        return self._clipping

    @property
    def clip_value(self) -> float | None:
        """The limit of each element of a gradient, or None; see `Options`. May be changed between steps."""
        return None if self._clipping is None else self._clipping.clip_value

    @clip_value.setter
    def clip_value(self, value: float | None) -> None:
        if value is not None or self._clipping is not None:
            checked = None if value is None else _positive("clip_value", value)
            self._clips().clip_value = checked


def _positive(name: str, value: Any) -> float:
    """Return an option, a number > 0, as a float."""
    number = float_of(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number > 0, or None for no limit, got {value!r}")
    return number
