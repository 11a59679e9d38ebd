"""Schedule-free stochastic gradient descent: an average of the iterates takes the place of a schedule."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
from numpy.typing import DTypeLike

from sgdcore._arrays import Array
from sgdcore._hyperparameters import FROM_ZERO, check_ranges, float_of
from sgdcore._options import Options
from sgdcore.device_array import DeviceArray
from sgdcore.optimizer import Optimizer, ParamsLike
from sgdcore.reference import moved_toward

__all__ = ["PROGRESS", "ScheduleFreeSGD", "check_schedule_free", "refuse_averages"]

# The numbers of a group that steps count, as they are before the first step, and the mode.
PROGRESS = {"train_mode": True, "k": 0, "weight_sum": 0.0, "lr_max": -1.0}


class ScheduleFreeSGD(Optimizer):
    r"""Schedule-free SGD: the average of SGD's iterates takes the place of a learning rate schedule.

    There are three sequences: SGD's iterates z, their weighted average x, and y between the two, where the gradients
    are taken. In training the parameters hold y, and the state holds z. `eval` makes the parameters x, for an
    evaluation or to save the model, and `train` makes them y again. The optimizer begins in training; a step in eval
    mode is refused.

    One step first computes for each group, in float64, from the numbers k, weight_sum and lr_max of the group::

        lr = lr * (k + 1) / warmup_steps                if k + 1 < warmup_steps
        lr_max = max(lr_max, lr)
        weight = (k + 1)**r * lr_max**weight_lr_power
        weight_sum = weight_sum + weight
        c = weight / weight_sum
        k = k + 1

    The step keeps the last four in the group: a checkpoint has them, a step that fails or is left out changes none.
    ``group["lr"]`` stays as it is. Then each parameter y, given its gradient g and its iterate z, all of one shape, is
    updated::

        g = -g                                          if maximize
        g = fma(weight_decay, y, g)                     if weight_decay != 0
        y = fma(c, round(z - y), y)                     if c < 0.5; z starts as y
        y = fma(c - 1, round(z - y), z)                 if c >= 0.5
        y = fma(lr * (momentum * (1 - c) - 1), g, y)
        z = fma(-lr, g, z)

    ``fma(x, y, z)`` is x * y + z, rounded once. Arithmetic is float64 if the parameter, its gradient or its z is stored
    as float64, else float32; at the end y and z are rounded to the dtypes they are stored in, once.
    `sgdcore.reference.schedule_free_sgd_update` spells it out.

    Batch normalization: the statistics that a model collects in training are those of y. Before an evaluation, call
    `eval` and let the model see some batches in its training mode.

    Args:
        params: a `ParameterBuffer`; or an iterable of `Parameter` objects or arrays, of (name, parameter) pairs,
            or of dicts that define groups. An array has no place for its gradient: it gets one in each step, by
            ``step(grads=[...])``.
        lr: learning rate, >= 0; a number or an array of one element, read at each step. Default 1.0. A larger one than
            SGD's with a schedule is usually best, by 10 to 50 times.
        momentum: where between z and x gradients are taken, > 0 and < 1. Default 0.9.
        weight_decay: L2 penalty at y, >= 0. Default 0.
        warmup_steps: the number of steps over which the learning rate grows linearly, >= 0. Default 0.
        r: the power of the step's number in its weight in the average, >= 0. Default 0.
        weight_lr_power: the power of the largest learning rate so far in the weight, >= 0. Default 2.
        maximize: ascend instead of descend. Default False.
        z_dtype: the dtype of new z (float64, float32, float16 or bfloat16); default: the parameter's. z moves by single
            steps, which 16 bits often round away.
        **options: clip_value, which every optimizer takes; `sgdcore.Options` explains it.

    Raises:
        ValueError: if a hyperparameter is out of range, or there is an `average`.
        TypeError: if an argument is of the wrong kind.
        RuntimeError: by `step`, in eval mode.

    Warns:
        UserWarning: a group has a key that is nearly a hyperparameter's name, such as ``"learning_rate"``. Other keys
            are the user's own.

    Example:
        >>> import numpy as np
        >>> w = np.array([1.0, 2.0])
        >>> optimizer = ScheduleFreeSGD([w], lr=0.5, momentum=0.5)
        >>> for _ in range(2):
        ...     optimizer.step(grads=[np.array([1.0, 1.0])])
        >>> w
        array([0.125, 1.125])
        >>> optimizer.eval()
        >>> w
        array([0.25, 1.25])

    Source: Defazio et al., "The Road Less Scheduled", NeurIPS 2024 (arXiv 2405.15682), in the form of the package
    schedulefree, whose checkpoints load. Its optimizer begins in eval mode, writes the decayed gradient to ``.grad``,
    and rounds each product; here the optimizer begins in training, and `train` restores y in every bit.
    """

    rule = "schedule_free_sgd"

    def __init__(
        self,
        params: ParamsLike,
        lr: float | Array = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: float = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        *,
        maximize: bool = False,
        z_dtype: DTypeLike | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "maximize": maximize,
            "z_dtype": z_dtype,
            **PROGRESS,
        }
        self._normalize_group(defaults)
        refuse_averages(options)
        super().__init__(params, defaults, options)

    def _normalize_group(self, group: dict[str, Any]) -> None:
        check_schedule_free(group)
        super()._normalize_group(group)

    def eval(self) -> None:
        """Make the parameters the average x, for an evaluation or to save the model. In eval mode nothing happens.

        ::

            x = round(y + round((1 - 1 / momentum) * round(z - y)))

        Each parameter's y is kept in its state, under the key ``"y"``, until `train` is called. Parameters that have
        taken no step stay as they are.
        """
        for group in self.param_groups:
            if group["train_mode"]:
                weight = 1 - 1 / float_of("momentum", group["momentum"])
                for parameter in group["params"]:
                    state = self.state.get(parameter, {})
                    if "z" in state:
                        y, z = _values(parameter.data), _values(state["z"])
                        state["y"] = y.copy()
                        _assign(parameter.data, moved_toward(y, z, weight))
                group["train_mode"] = False

    def train(self) -> None:
        """Make the parameters y again, for further steps. In training nothing happens.

        y is what it was when `eval` was called, in every bit. A parameter that has another value than `eval` gave it,
        such as a loaded one, is taken for x, and ``y = round(x + round((1 - momentum) * round(z - x)))``.
        """
        for group in self.param_groups:
            if not group["train_mode"]:
                momentum = float_of("momentum", group["momentum"])
                for parameter in group["params"]:
                    state = self.state.get(parameter, {})
                    if "z" in state:
                        x, z, y = _values(parameter.data), _values(state["z"]), state.pop("y", None)
                        if y is None or not _same(x, moved_toward(y, z, 1 - 1 / momentum)):
                            y = moved_toward(x, z, 1 - momentum)
                        _assign(parameter.data, y)
                group["train_mode"] = True


def check_schedule_free(group: dict[str, Any], number_of: Any = float_of) -> None:
    """Check those of the rule's hyperparameters that a group has, for arrays and tensors alike.

    Raises:
        TypeError: if a hyperparameter is no number.
        ValueError: if a hyperparameter is out of range. Both name it.
    """
    keys = ("lr", "weight_decay", "warmup_steps", "r", "weight_lr_power")
    check_ranges(group, dict.fromkeys(keys, FROM_ZERO), number_of)
    if "momentum" in group and not 0 < number_of("momentum", group["momentum"]) < 1:
        raise ValueError(f"momentum: expected a number > 0 and < 1, got {group['momentum']}")


def refuse_averages(options: Options) -> None:
    """Raise a ValueError if the options name an average."""
    if options.get("average") is not None:
        raise ValueError(
            f"average: ScheduleFreeSGD averages by itself, and eval() shows its average; got {options['average']!r}"
        )


def _values(data: Any) -> Array:
    """Return an array, or a copy of an array on a device."""
    return data.numpy() if isinstance(data, DeviceArray) else np.asarray(data)


def _assign(data: Any, values: Array) -> None:
    if isinstance(data, DeviceArray):
        data.assign(values)
    else:
        data[...] = values


def _same(a: Array, b: Array) -> bool:
    """Tell whether two arrays are equal in every bit."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
