"""The options that every optimizer takes beside the hyperparameters of its rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from sgdcore import _core
from sgdcore._arrays import storage_dtype
from sgdcore._averages import EMA, Averages, Polyak
from sgdcore._hyperparameters import float_of
from sgdcore._precision import PRECISION_KEYS

__all__ = ["HasOptions", "Options"]


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, of arrays and of torch's tensors. All are optional.

    They belong to the optimizer, not to its groups. Only ``precision`` and ``seed`` are a group's: each group may have
    its own, and a state dict has them in its groups, where they are set. Pickles and copies of an optimizer keep all
    options that are set. A state dict, which has torch's layout, holds none of the others; with averages it holds
    these, and of which kind they are.

    Args:
        average: `EMA` or `Polyak`: keep an average of each parameter, ``"average"`` in its state, which each step
            updates together with the parameter. ``with optimizer.averaged():`` puts the averages where the parameters
            are. A parameter without a gradient takes part; a step that is skipped does not. Default None: no averages.
        average_dtype: the storage type of new averages. Default None: the parameter's.
        precision: how 16-bit parameters are kept, so that updates too small for 16 bits add up. ``"split"``, for
            bfloat16: each parameter is an exact float32, the upper half of which the model sees; the other 16 bits are
            ``"master_low"`` in its state. ``"kahan"``, for float16 too: what rounding a parameter lost is kept in
            ``"compensation"``, in the parameter's dtype. ``"stochastic"``, for float16 too: parameters are rounded up
            or down by chance; ``"steps_taken"`` counts their steps. `master` gives the values in float32. Default
            None: parameters are rounded to the nearest value after each step.
        seed: of stochastic rounding, an integer from 0 to 2**64 - 1. The same seed gives the same bits, whatever the
            number of threads, the instruction set and the memory layout. Default None: 0.
        clip_value: limit each element of a gradient to [-clip_value, clip_value] before the step uses it, as
            ``torch.nn.utils.clip_grad_value_`` does; a number > 0. A NaN stays a NaN. The gradient in memory stays as
            it is. It is limited after the scale of a GradScaler was undone, in the type that the step computes in.
            Default None: no limit.
        max_grad_norm: scale the gradients of a step, all of them by one factor, so that their norm is at most this;
            a number > 0; infinity only measures the norm. The norm is the square root of the sum of the squares of all
            elements of all gradients of all groups, in float64, after the scale of a GradScaler was undone and
            `clip_value` was applied. The factor is that of ``torch.nn.utils.clip_grads_with_norm_``:
            ``min(1, max_grad_norm / (norm + 1e-6))``, in float64, then rounded to the type that the step computes in.
            The gradient in memory stays as it is. Default None: nothing is scaled.
        skip_nonfinite: leave a step out, before anything of it is changed, if an element of a gradient is infinite or
            NaN. ``zero_grad=True`` still clears the gradients. Default False.

    `HasOptions` has them as attributes, which may be changed between steps, and what steps found.
    """

    average: EMA | Polyak | None
    average_dtype: Any
    precision: str | None
    seed: int | None
    clip_value: float | None
    max_grad_norm: float | None
    skip_nonfinite: bool


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
            if name not in ("average", "average_dtype", *PRECISION_KEYS):
                setattr(self, name, value)

    def _plans(self) -> list[Any]:
        """Return the plans of the optimizer's steps."""
        return [self._plan]

    def _share_clipping(self) -> None:
        """Give the plans what is done to the gradients."""
        if self._clipping is not None:
            self._clipping.new_result = self._new_result
            self._clipping.left_out = self._left_out
        for plan in self._plans():
            plan.clipping = self._clipping

    @staticmethod
    def _new_result(device: int) -> tuple[Any, int]:
        """Return an array of four float64 on a device, all 0, and its address.

        A step writes there the norm, the factor of the gradients, 1 if the step was left out or else 0, and the number
        of steps that were left out.
        """
        raise NotImplementedError

    @staticmethod
    def _left_out(result: Any) -> bool:
        """Return whether the last step was left out. Waits for the device."""
        return bool(result[2:3].numpy()[0])

    @staticmethod
    def _norm_in(result: Any) -> Any:
        """Return the norm of the last step on a device."""
        return float(result[0:1].numpy()[0])

    @staticmethod
    def _skipped_in(result: Any) -> int:
        """Return the number of steps that were left out on a device. Waits for it."""
        return int(result[3:4].numpy()[0])

    def _clips(self) -> _core.Clipping:
        """Return what is done to the gradients of each step, which the plan reads, too."""
        if self._clipping is None:
            self._clipping = _core.Clipping()
            self._share_clipping()
        return self._clipping

    @property
    def clip_value(self) -> float | None:
        """The limit of each element of a gradient, or None; see `Options`. May be changed between steps."""
        return None if self._clipping is None else self._clipping.clip_value

    @clip_value.setter
    def clip_value(self, value: float | None) -> None:
        if value is not None:
            value = _positive("clip_value", value)
        if value is not None or self._clipping is not None:
            self._clips().clip_value = value

    @property
    def max_grad_norm(self) -> float | None:
        """The largest norm of a step's gradients, or None; see `Options`. May be changed between steps."""
        return None if self._clipping is None else self._clipping.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None:
            value = _positive("max_grad_norm", value)
            self._require_measurable("max_grad_norm")
        if value is not None or self._clipping is not None:
            self._clips().max_norm = value

    @property
    def skip_nonfinite(self) -> bool:
        """Whether steps whose gradients are not finite are left out; see `Options`. May be changed between steps."""
        return self._clipping is not None and self._clipping.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"skip_nonfinite: expected True or False, got {value!r}")
        if value:
            self._require_measurable("skip_nonfinite")
        if value or self._clipping is not None:
            self._clips().skip_nonfinite = bool(value)

    def _clipping_in_use(self) -> str | None:
        """Return the name of one of the options that are set; None if none is."""
        names = ("clip_value", "max_grad_norm", "skip_nonfinite")
        return next((name for name in names if getattr(self, name) not in (None, False)), None)

    def _require_measurable(self, option: str) -> None:
        """Raise if steps do not have all gradients together, which `option` needs."""

    @property
    def grad_norm(self) -> Any:
        """The norm of the gradients of the last step, before they were scaled by `max_grad_norm`.

        It is the sum of exact arithmetic, rounded to float64, and its square root, rounded: the same bits for every
        number of threads and instruction set. It is infinite or NaN if a gradient is. None before the first step with
        `max_grad_norm` or `skip_nonfinite`; without these options, and in a step that a GradScaler skips, it stays as
        it was.

        After a step of torch's tensors on a CUDA device it is a tensor of no dimensions on that device, of which nobody
        has waited; elsewhere a float. Arrays on a device are waited for.
        """
        if self._clipping is None:
            return None
        clipping = self._clipping
        return self._norm_in(clipping.result) if clipping.on_device else clipping.norm

    @property
    def skipped_steps(self) -> int:
        """How many steps `skip_nonfinite` has left out. A GradScaler's are not counted. Waits for a device."""
        if self._clipping is None:
            return 0
        result = self._clipping.result
        return self._clipping.skipped + (0 if result is None else self._skipped_in(result))


def _positive(name: str, value: Any) -> float:
    """Return an option, a number > 0, as a float."""
    number = float_of(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number > 0, or None for no limit, got {value!r}")
    return number
