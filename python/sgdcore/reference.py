"""Stochastic gradient descent in NumPy: the definition of what sgdcore computes.

Read `sgd_update` to learn the algorithm. Every other implementation in sgdcore, for every storage
dtype, instruction set and device, must give the same bits as this one. That is possible because
each operation rounds in one specified way. One of them, `fma`, the multiply-add with a single
rounding, is missing in NumPy and is built here from operations that are not.

Nothing here is fast, and this file needs nothing else of the package: the standard library and NumPy
are enough. Arrays of dtype bfloat16 come from whichever package registers that dtype with
NumPy (such as ml_dtypes); they are recognised by the dtype's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = [
    "ReferenceSGD",
    "compute_dtype",
    "ema_update",
    "fma",
    "join_kahan",
    "join_split",
    "lion_update",
    "moved_toward",
    "part_kahan",
    "part_split",
    "polyak_update",
    "progress",
    "random_bits",
    "round_stochastically",
    "schedule_free_numbers",
    "schedule_free_sgd_update",
    "sgd_update",
    "sgdw_update",
    "signum_update",
    "updates",
]

Array = NDArray[Any]

STORAGE_DTYPES = ("float64", "float32", "float16", "bfloat16")


# --- The algorithm --------------------------------------------------------------------------------


def compute_dtype(*dtypes: DTypeLike) -> np.dtype[Any]:
    """The dtype that an update is computed in, given the dtypes its operands are stored in.

    Equation::

        float64 if any operand is stored as float64, else float32

    Every operand converts to it without rounding.

    Args:
        *dtypes: storage dtypes: float64, float32, float16 or bfloat16.

    Raises:
        TypeError: a dtype is not one of the four.

    Example:
        >>> compute_dtype("float16", "float32")
        dtype('float32')
        >>> compute_dtype("float16", "float64")
        dtype('float64')

    Source: sgdcore's own rule. The formats are those of IEEE 754-2019, and bfloat16, which is the
    upper half of a float32.
    """
    names = [np.dtype(dtype).name for dtype in dtypes]
    for name in names:
        if name not in STORAGE_DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(STORAGE_DTYPES)}, got {name}")
    return np.dtype(np.float64 if "float64" in names else np.float32)


def sgd_update(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    momentum_dtype: DTypeLike | None = None,
) -> tuple[Array, Array | None]:
    """One step of stochastic gradient descent on one tensor: its new values, its new momentum.

    Equations, for each element with parameter p, gradient g and momentum b::

        g = -g                                          if maximize
        g = fma(weight_decay, p, g)                     if weight_decay != 0
        b = g                                           if momentum != 0, on the first step
        b = fma(1 - dampening, g, round(momentum * b))  if momentum != 0, on later steps
        g = fma(momentum, b, g)                         if momentum != 0 and nesterov
        g = b                                           if momentum != 0 and not nesterov
        p = fma(-lr, g, p)

    All of it happens in the compute dtype (see `compute_dtype`). Operands are converted to it
    exactly; the coefficients, among them ``1 - dampening`` and ``-lr``, are formed in double
    precision and then rounded to it. At the end p and b are rounded to their storage dtypes, once.

    Args:
        param: array of any shape; float64, float32, float16 or bfloat16.
        grad: array of param's shape; any of these dtypes.
        momentum_buffer: array of param's shape and any of these dtypes, or None, which makes this
            the first step. Default None. If momentum is 0, it is returned as it is.
        lr: learning rate.
        momentum: the part of the buffer that survives a step. Default 0: no momentum.
        dampening: the part of the gradient that an existing buffer does not receive. Default 0.
        weight_decay: coefficient of the L2 penalty. Default 0.
        nesterov: move along the gradient plus momentum times the buffer, rather than along the
            buffer. Default False.
        maximize: ascend instead of descend. Default False.
        momentum_dtype: dtype of a buffer made by the first step. Default None: param's dtype.

    Returns:
        The new parameter and the new momentum buffer, or None if there is none. They are new arrays
        (except a buffer that is returned as it is); the inputs are untouched.

    Raises:
        TypeError: an array's dtype is not a storage dtype.
        ValueError: grad or momentum_buffer has another shape than param.

    Example:
        >>> param = np.array([1.0, -2.0])
        >>> param, buffer = sgd_update(param, np.array([0.5, 0.5]), lr=0.5, momentum=0.5)
        >>> param, buffer
        (array([ 0.75, -2.25]), array([0.5, 0.5]))
        >>> sgd_update(param, np.array([0.25, 0.0]), buffer, lr=0.5, momentum=0.5)
        (array([ 0.5  , -2.375]), array([0.5 , 0.25]))

    Source: momentum after Polyak (1964), "Some methods of speeding up the convergence of iteration
    methods"; Nesterov's form after Sutskever, Martens, Dahl and Hinton (2013), "On the importance
    of initialization and momentum in deep learning". The order of operations and the roundings are
    those of ``torch.optim.SGD(foreach=False)`` for float32 and float64 on a processor with fused
    multiply-add.
    """
    return _update(
        param,
        grad,
        momentum_buffer,
        decoupled_decay=0.0,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        momentum_dtype=momentum_dtype,
    )


def sgdw_update(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    scale_decay_by_lr: bool = True,
    **hyper: Any,
) -> tuple[Array, Array | None]:
    """One step of SGD with decoupled weight decay on one tensor: its new values, its new momentum.

    Equations, for each element with parameter p: first ::

        p = round((1 - lr * weight_decay) * p)  if weight_decay != 0 and scale_decay_by_lr
        p = round((1 - weight_decay) * p)       if weight_decay != 0 and not scale_decay_by_lr

    and then those of `sgd_update` without weight decay. The factor of p is formed in double precision and then rounded
    to the compute dtype.

    Args:
        param: as in `sgd_update`, as are `grad` and `momentum_buffer`.
        grad: see `param`.
        momentum_buffer: see `param`.
        lr: learning rate.
        weight_decay: the part of the parameter that a step takes away. Default 0.
        scale_decay_by_lr: whether that part is multiplied by the learning rate. Default True.
        **hyper: the other keyword arguments of `sgd_update`, with its defaults.

    Returns:
        As `sgd_update`.

    Raises:
        TypeError: as `sgd_update`.
        ValueError: as `sgd_update`.

    Example:
        >>> sgdw_update(np.array([1.0]), np.array([0.5]), lr=0.5, weight_decay=0.5)[0]
        array([0.5])

    Source: Loshchilov and Hutter (2019), "Decoupled Weight Decay Regularization", algorithm 1; the learning rate scales
    the decay in timm's SGDW.
    """
    decay = (lr if scale_decay_by_lr else 1.0) * weight_decay
    return _update(param, grad, momentum_buffer, lr=lr, decoupled_decay=decay, **hyper)


def signum_update(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    maximize: bool = False,
    momentum_dtype: DTypeLike | None = None,
) -> tuple[Array, Array | None]:
    """One step of Signum on one tensor: its new values, its new momentum.

    Equations, for each element with parameter p, gradient g and momentum b::

        g = -g                                         if maximize
        b = fma(1 - momentum, g, round(momentum * b))  if momentum != 0
        g = b                                          if momentum != 0
        p = fma(-lr, sign(g), round((1 - lr * weight_decay) * p))

    with the roundings of `sgd_update`. The sign of 0 is 0, and that of a NaN the NaN.

    Args:
        param: as in `sgd_update`, as is `grad`.
        grad: see `param`.
        momentum_buffer: array of param's shape and any storage dtype, or None, which stands for zeros. Default None. If
            momentum is 0, it is returned as it is.
        lr: learning rate: the length of an element's step.
        momentum: the part of the buffer that survives a step. Default 0.9; 0: no momentum.
        weight_decay: the part of the parameter that a step takes away, times lr. Default 0.
        maximize: ascend instead of descend. Default False.
        momentum_dtype: dtype of a buffer made by the first step. Default None: param's dtype.

    Returns:
        As `sgd_update`.

    Raises:
        TypeError: as `sgd_update`.
        ValueError: as `sgd_update`.

    Example:
        >>> signum_update(np.array([1.0, 2.0]), np.array([0.1, -3.0]), lr=0.5)[0]
        array([0.5, 2.5])

    Source: Bernstein, Wang, Azizzadenesheli and Anandkumar (2018), "signSGD: Compressed
    Optimisation for Non-Convex Problems", algorithms 1 and 2.
    """
    _require_shape("grad", grad, param)
    states = []
    if momentum != 0:
        states.append(_state_from_zeros("momentum_buffer", momentum_buffer, param, momentum_dtype))
    compute = compute_dtype(param.dtype, grad.dtype, *(state.dtype for state in states))
    with np.errstate(all="ignore"):
        g = grad.astype(compute)
        if maximize:
            g = -g
        for state in states:
            b = compute.type(momentum) * state.astype(compute)
            g = fma(compute.type(1.0 - float(momentum)), g, b)
            momentum_buffer = _round_to(state.dtype, g)
        return _step_by_sign(param, g, lr, weight_decay), momentum_buffer


def lion_update(
    param: Array,
    grad: Array,
    exp_avg: Array | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    maximize: bool = False,
    exp_avg_dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """One step of Lion on one tensor: its new values, its new momentum.

    Equations, for each element with parameter p, gradient g and momentum m::

        g = -g                                   if maximize
        c = fma(1 - beta1, g, round(beta1 * m))
        m = fma(1 - beta2, g, round(beta2 * m))
        p = fma(-lr, sign(c), round((1 - lr * weight_decay) * p))

    with the roundings of `sgd_update`. The sign of 0 is 0, and that of a NaN the NaN.

    Args:
        param: as in `sgd_update`, as is `grad`.
        grad: see `param`.
        exp_avg: array of param's shape and any storage dtype, or None, which stands for zeros. Default None.
        lr: learning rate: the length of an element's step.
        beta1: the part of the momentum in the direction of a step. Default 0.9.
        beta2: the part of the momentum that survives a step. Default 0.99.
        weight_decay: the part of the parameter that a step takes away, times lr. Default 0.
        maximize: ascend instead of descend. Default False.
        exp_avg_dtype: dtype of a momentum made by the first step. Default None: param's dtype.

    Returns:
        The new parameter and the new momentum. They are new arrays; the inputs are untouched.

    Raises:
        TypeError: as `sgd_update`.
        ValueError: grad or exp_avg has another shape than param.

    Example:
        >>> lion_update(np.array([1.0, 2.0]), np.array([0.1, -3.0]), lr=0.5)[0]
        array([0.5, 2.5])

    Source: Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms", algorithm 2.
    """
    _require_shape("grad", grad, param)
    exp_avg = _state_from_zeros("exp_avg", exp_avg, param, exp_avg_dtype)
    compute = compute_dtype(param.dtype, grad.dtype, exp_avg.dtype)
    with np.errstate(all="ignore"):
        g = grad.astype(compute)
        if maximize:
            g = -g
        m = exp_avg.astype(compute)
        direction = fma(compute.type(1.0 - float(beta1)), g, compute.type(beta1) * m)
        m = fma(compute.type(1.0 - float(beta2)), g, compute.type(beta2) * m)
        return _step_by_sign(param, direction, lr, weight_decay), _round_to(exp_avg.dtype, m)


def schedule_free_numbers(
    *,
    lr: float,
    warmup_steps: float = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    k: int = 0,
    weight_sum: float = 0.0,
    lr_max: float = -1.0,
    **_: Any,
) -> dict[str, Any]:
    """The numbers of one step of schedule-free SGD, in float64.

    Equations::

        lr = lr * (k + 1) / warmup_steps  if k + 1 < warmup_steps
        lr_max = max(lr_max, lr)
        weight = (k + 1)**r * lr_max**weight_lr_power
        weight_sum = weight_sum + weight
        c = weight / weight_sum           0 if weight_sum is 0
        k = k + 1

    Args:
        lr: learning rate.
        warmup_steps: the number of steps over which the learning rate grows. Default 0.
        r: the power of the step's number in its weight. Default 0.
        weight_lr_power: the power of the largest learning rate so far. Default 2.
        k: the number of steps before this one. Default 0.
        weight_sum: the sum of the weights before this step. Default 0.
        lr_max: the largest learning rate before this step. Default -1.
        **_: other hyperparameters, which have no effect.

    Returns:
        ``lr``, the learning rate of the step; ``c``; and ``k``, ``weight_sum`` and ``lr_max`` after the step.

    Example:
        >>> schedule_free_numbers(lr=2.0, warmup_steps=4)
        {'lr': 0.5, 'c': 1.0, 'k': 1, 'weight_sum': 0.25, 'lr_max': 0.5}

    Source: the package schedulefree.
    """
    lr = float(lr)
    if k + 1 < warmup_steps:
        lr *= (k + 1) / warmup_steps
    lr_max = max(lr_max, lr)
    weight = _power(float(k + 1), r) * _power(lr_max, weight_lr_power)
    weight_sum += weight
    c = weight / weight_sum if weight_sum != 0 else 0.0
    return {"lr": lr, "c": c, "k": k + 1, "weight_sum": weight_sum, "lr_max": lr_max}


def schedule_free_sgd_update(
    param: Array,
    grad: Array,
    z: Array | None = None,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    maximize: bool = False,
    z_dtype: DTypeLike | None = None,
    **numbers: Any,
) -> tuple[Array, Array]:
    """One step of schedule-free SGD on one tensor: its new values, its new iterate.

    Equations, with lr and c as `schedule_free_numbers` gives them, for each element with parameter y, gradient g and
    iterate z::

        g = -g                                        if maximize
        g = fma(weight_decay, y, g)                   if weight_decay != 0
        y = fma(c, round(z - y), y)                   if c < 0.5
        y = fma(c - 1, round(z - y), z)               if c >= 0.5
        y = fma(lr * (momentum * (1 - c) - 1), g, y)
        z = fma(-lr, g, z)

    with the roundings of `sgd_update`.

    Args:
        param: as in `sgd_update`, as is `grad`.
        grad: see `param`.
        z: array of param's shape and any storage dtype, or None, which stands for the parameter. Default None.
        lr: learning rate.
        momentum: where between z and the average gradients are taken. Default 0.9.
        weight_decay: coefficient of the L2 penalty. Default 0.
        maximize: ascend instead of descend. Default False.
        z_dtype: dtype of a z made by the first step. Default None: param's dtype.
        **numbers: the other keyword arguments of `schedule_free_numbers`.

    Returns:
        The new parameter and the new iterate. They are new arrays; the inputs are untouched.

    Raises:
        TypeError: as `sgd_update`.
        ValueError: grad or z has another shape than param.

    Example:
        >>> y, z = schedule_free_sgd_update(np.array([1.0]), np.array([0.5]), lr=0.5)
        >>> y, z
        (array([0.75]), array([0.75]))
        >>> schedule_free_sgd_update(y, np.array([0.5]), z, lr=0.5, k=1, weight_sum=0.25, lr_max=0.5)
        (array([0.6125]), array([0.5]))

    Source: Defazio et al. (2024), "The Road Less Scheduled", in the form of the package
    schedulefree, which rounds more often.
    """
    _require_shape("grad", grad, param)
    if z is None:
        dtype = np.dtype(param.dtype if z_dtype is None else z_dtype)
    else:
        _require_shape("z", z, param)
        dtype = z.dtype
    compute = compute_dtype(param.dtype, grad.dtype, dtype)
    step = schedule_free_numbers(lr=lr, **numbers)
    lr, c = step["lr"], step["c"]
    with np.errstate(all="ignore"):
        g = grad.astype(compute)
        y = param.astype(compute)
        iterate = y if z is None else z.astype(compute)
        if maximize:
            g = -g
        if weight_decay != 0:
            g = fma(compute.type(weight_decay), y, g)
        if c < 0.5:
            y = fma(compute.type(c), iterate - y, y)
        else:
            y = fma(compute.type(c - 1.0), iterate - y, iterate)
        y = fma(compute.type(lr * (float(momentum) * (1.0 - c) - 1.0)), g, y)
        iterate = fma(compute.type(-lr), g, iterate)
        return _round_to(param.dtype, y), _round_to(dtype, iterate)


def moved_toward(start: Array, end: Array, weight: float) -> Array:
    """An array that has moved to another one, by a part of the distance: schedule-free SGD's x from y, y from x.

    Equation, in the compute dtype of the two, and at the end rounded to the dtype of `start`::

        round(start + round(weight * round(end - start)))

    Args:
        start: array of any storage dtype.
        end: array of the same shape and any storage dtype.
        weight: the part of the distance; rounded to the compute dtype.

    Example:
        >>> moved_toward(np.array([1.0]), np.array([2.0]), 0.25)
        array([1.25])

    Source: sgdcore's own rule.
    """
    compute = compute_dtype(start.dtype, end.dtype)
    with np.errstate(all="ignore"):
        a = start.astype(compute)
        return _round_to(start.dtype, a + (end.astype(compute) - a) * compute.type(weight))


#: What a step makes of the numbers that a group counts, by the rule's name, for rules that count:
#: ``(**hyperparameters) -> numbers``, among which are the counted ones by their keys.
progress: dict[str, Callable[..., dict[str, Any]]] = {"schedule_free_sgd": schedule_free_numbers}

#: The oracle of each rule by the rule's name: ``(param, grad, *states, **hyperparameters) -> (param, *states)``.
updates: dict[str, Callable[..., tuple[Array | None, ...]]] = {
    "sgd": sgd_update,
    "sgdw": sgdw_update,
    "signum": signum_update,
    "lion": lion_update,
    "schedule_free_sgd": schedule_free_sgd_update,
}


def _power(base: float, exponent: float) -> float:
    """base**exponent, exactly rounded for the usual exponents 0 and 2."""
    if exponent == 0:
        return 1.0
    return base * base if exponent == 2 else float(base**exponent)


def _require_shape(name: str, array: Array, param: Array) -> None:
    if array.shape != param.shape:
        raise ValueError(f"{name} must have param's shape {param.shape}, got {array.shape}")


def _state_from_zeros(
    name: str, state: Array | None, param: Array, dtype: DTypeLike | None
) -> Array:
    """A state as it is, or zeros where there is none."""
    if state is None:
        return np.zeros(param.shape, param.dtype if dtype is None else dtype)
    _require_shape(name, state, param)
    return state


def _step_by_sign(param: Array, direction: Array, lr: float, weight_decay: float) -> Array:
    """The parameter after its decoupled decay and a step of length lr against the signs of `direction`."""
    compute = direction.dtype
    kept = compute.type(1.0 - float(lr) * float(weight_decay)) * param.astype(compute)
    sign = np.where(np.isnan(direction), direction, np.copysign(compute.type(1), direction))
    moved = fma(compute.type(-float(lr)), sign, kept)
    return _round_to(param.dtype, np.where(direction == 0, kept, moved))


def _update(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    decoupled_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    momentum_dtype: DTypeLike | None = None,
) -> tuple[Array, Array | None]:
    """`sgd_update`, whose parameter first loses the part `decoupled_decay` of itself."""
    _require_shape("grad", grad, param)
    operand_dtypes = [param.dtype, grad.dtype]
    if momentum != 0:
        if momentum_buffer is None:
            buffer_dtype = np.dtype(param.dtype if momentum_dtype is None else momentum_dtype)
        else:
            _require_shape("momentum_buffer", momentum_buffer, param)
            buffer_dtype = momentum_buffer.dtype
        operand_dtypes.append(buffer_dtype)
    compute = compute_dtype(*operand_dtypes)

    # Overflow, underflow and invalid operations have defined results here; they need no warning.
    with np.errstate(all="ignore"):
        minus_lr = compute.type(-float(lr))
        momentum_factor = compute.type(momentum)
        one_minus_dampening = compute.type(1.0 - float(dampening))
        weight_decay_factor = compute.type(weight_decay)
        decay_factor = compute.type(1.0 - decoupled_decay)

        p = param.astype(compute)
        g = grad.astype(compute)
        if maximize:
            g = -g
        # A term whose coefficient is zero is left out, not multiplied: 0 * inf would be nan. What
        # decides is the coefficient as given, even if it rounds to zero in the compute dtype.
        if decoupled_decay != 0:
            p = decay_factor * p
        if weight_decay != 0:
            g = fma(weight_decay_factor, p, g)
        if momentum != 0:
            if momentum_buffer is None:
                b = g
            else:
                b = fma(one_minus_dampening, g, momentum_factor * momentum_buffer.astype(compute))
            momentum_buffer = _round_to(buffer_dtype, b)
            # b itself stays unrounded: a coarsely stored buffer does not make this step coarse.
            g = fma(momentum_factor, b, g) if nesterov else b
        p = fma(minus_lr, g, p)
        return _round_to(param.dtype, p), momentum_buffer


def ema_update(
    average: Array | None,
    param: Array,
    *,
    decay: float,
    average_dtype: DTypeLike | None = None,
) -> Array:
    """The exponential moving average of a parameter after one more step.

    Equations, for each element with average a and parameter p, where w = 1 - decay is formed in double precision and
    rounded to the compute dtype::

        a = p                      on the first step, where average is None
        a = fma(w, p - a, a)       afterwards, if w < 0.5
        a = fma(w - 1, p - a, p)   afterwards, if w >= 0.5

    The differences are rounded to the compute dtype.

    Args:
        average: the average before the step, in any storage dtype, of param's shape; None before the first step.
        param: the parameter after the step, in any storage dtype.
        decay: the part of the average that the step leaves.
        average_dtype: the dtype of a new average; the parameter's if None.

    Returns:
        A new array; the inputs are untouched.

    Example:
        >>> ema_update(np.array([1.0]), np.array([2.0]), decay=0.75)
        array([1.25])

    Source: the arithmetic of ``torch.lerp``, which ``torch.optim.swa_utils.get_ema_multi_avg_fn`` uses.
    """
    return _moved(average, param, 1.0 - decay, average_dtype)


def polyak_update(
    average: Array | None,
    param: Array,
    averaged: int,
    *,
    average_dtype: DTypeLike | None = None,
) -> Array:
    """The mean of a parameter over steps, after one more step.

    Equations: those of `ema_update` with w = 1 / (averaged + 1).

    Args:
        average: as in `ema_update`, as are `param` and `average_dtype`.
        param: see `average`.
        averaged: the number of steps that are in the average.
        average_dtype: see `average`.

    Example:
        >>> polyak_update(np.array([1.0]), np.array([5.0]), 3)
        array([2.])

    Source: ``torch.optim.swa_utils.get_swa_multi_avg_fn``.
    """
    return _moved(average, param, 1.0 / (averaged + 1), average_dtype)


def _moved(average: Array | None, param: Array, weight: float, dtype: DTypeLike | None) -> Array:
    if average is None:
        stored = np.dtype(param.dtype if dtype is None else dtype)
        return _round_to(stored, param.astype(compute_dtype(param.dtype, stored)))
    compute = compute_dtype(average.dtype, param.dtype)
    with np.errstate(all="ignore"):
        w = compute.type(weight)
        a, p = average.astype(compute), param.astype(compute)
        far = not abs(w) < 0.5
        moved = fma(w - compute.type(1) if far else w, p - a, p if far else a)
        return _round_to(average.dtype, moved)


class ReferenceSGD:
    """Stochastic gradient descent over a list of arrays, for tests and for reading.

    Equation, for each array whose gradient is not None::

        param, momentum_buffer = sgd_update(param, grad, momentum_buffer, **hyper)

    Being at the first step is a property of each array: its buffer comes with its first gradient.

    Args:
        params: arrays of any shapes; float64, float32, float16 or bfloat16. They are copied.
        **hyper: the keyword arguments of `sgd_update`, with its defaults; ``lr`` is required.

    Attributes:
        params: the current parameters.
        momentum_buffers: for each parameter its buffer, or None as long as there is none.
        hyper: the keyword arguments; they may be changed between steps.

    Raises:
        TypeError: from `step`, as `sgd_update` does.
        ValueError: from `step`, as `sgd_update` does, or if there are not as many gradients as
            parameters.

    Example:
        >>> sgd = ReferenceSGD([np.array([1.0]), np.array([2.0])], lr=0.5)
        >>> sgd.step([np.array([1.0]), None])
        >>> sgd.params
        [array([0.5]), array([2.])]

    Source: see `sgd_update`.
    """

    def __init__(self, params: Sequence[Array], **hyper: Any) -> None:
        self.params = [param.copy() for param in params]
        self.momentum_buffers: list[Array | None] = [None] * len(self.params)
        self.hyper = hyper

    def step(self, grads: Sequence[Array | None]) -> None:
        """Update each parameter by its gradient; where that is None, leave everything as it is."""
        if len(grads) != len(self.params):
            raise ValueError(f"grads must have {len(self.params)} entries, got {len(grads)}")
        for index, grad in enumerate(grads):
            if grad is not None:
                self.params[index], self.momentum_buffers[index] = sgd_update(
                    self.params[index], grad, self.momentum_buffers[index], **self.hyper
                )


# --- Precisions of 16-bit parameters --------------------------------------------------------------
#
# With ``precision="split"``, ``"kahan"`` or ``"stochastic"`` a step reads a float32 value of a parameter and stores the
# float32 result of its rule, by the functions below. In between the update is the rule's, on a float32 parameter.


def part_split(master: Array) -> tuple[Array, Array]:
    """Part a float32 master into what the model sees and the 16 bits that are missing there.

    Equations, on the bits of a master m::

        visible = (bits + 0x8000) >> 16          m rounded to nearest, ties away from zero
        low = bits - (visible << 16)             in [-0x8000, 0x7fff]

    Of a nan whose bits without the sign are 0x7fff8000 to 0x7fffffff, bit 15 is cleared first: rounded, it would be a
    zero.

    Args:
        master: array of any shape; float32.

    Returns:
        The visible half, the bits of a bfloat16 as uint16, and the low half, int16.

    Example:
        >>> part_split(np.float32([1.00390625]))
        (array([16257], dtype=uint16), array([-32768], dtype=int16))

    Source: sgdcore's own.
    """
    bits = np.asarray(master, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = np.where((bits & 0x7FFF8000) == 0x7FFF8000, bits & 0xFFFF7FFF, bits)
    visible = ((bits + 0x8000) >> 16 & 0xFFFF).astype(np.uint16)
    return visible, (bits & 0xFFFF).astype(np.uint16).view(np.int16)


def join_split(visible: Array, low: Array) -> Array:
    """Return the float32 master of two halves.

    Equation, on bits::

        master = (visible << 16) + low           modulo 2**32

    Args:
        visible: array of any shape; bfloat16, or its bits as uint16.
        low: array of the same shape; int16, or its bits as uint16.

    Example:
        >>> join_split(np.uint16([16257]), np.int16([-32768]))
        array([1.0039062], dtype=float32)

    Source: sgdcore's own.
    """
    upper = visible.view(np.uint16).astype(np.int64) << 16
    bits = (upper + low.view(np.int16).astype(np.int64)) & 0xFFFFFFFF
    return bits.astype(np.uint32).view(np.float32)


def part_kahan(value: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Part a float32 value into what the model sees and what its rounding lost.

    Equations, with the rounding to the nearest value of `dtype`, ties to even in float16 and away from zero in
    bfloat16::

        visible = round(value)
        compensation = round(value - visible)    0 where that is not finite

    Args:
        value: array of any shape; float32.
        dtype: float16 or bfloat16.

    Returns:
        Two arrays of that dtype.

    Example:
        >>> part_kahan(np.float32([2049.0]), np.float16)
        (array([2.048e+03], dtype=float16), array([1.], dtype=float16))

    Source: the compensation of Kahan (1965), "Further remarks on reducing truncation errors", kept between steps as in
    Zamirai, Zhang, Aberger and De Sa (2020), "Revisiting BFloat16 training" (arXiv 2010.06192).
    """
    value, dtype = np.asarray(value, dtype=np.float32), np.dtype(dtype)

    def rounded(values: Array) -> Array:
        return values.astype(dtype) if dtype == np.float16 else part_split(values)[0].view(dtype)

    with np.errstate(all="ignore"):
        visible = rounded(value)
        lost = value - visible.astype(np.float32)
        return visible, rounded(np.where(np.isfinite(lost), lost, np.float32(0)))


def join_kahan(visible: Array, compensation: Array) -> Array:
    """Return the float32 value of a parameter and its compensation, ``round(visible + compensation)``.

    Args:
        visible: array of any shape; float16 or bfloat16.
        compensation: array of that shape and dtype.

    Example:
        >>> join_kahan(np.float16([2048]), np.float16([1]))
        array([2049.], dtype=float32)

    Source: see `part_kahan`.
    """
    with np.errstate(all="ignore"):
        value: Array = visible.astype(np.float32) + compensation.astype(np.float32)
    return value


def random_bits(seed: int, position: int, steps: int, index: ArrayLike) -> Array:
    """Return 16 random bits for each element of a parameter in one step.

    Equations, on unsigned integers, with mixed(x) the finaliser of SplitMix64 and c = 0x9e3779b97f4a7c15::

        key = mixed(mixed(mixed(seed + c) + position + c) + steps + c)
        key = mixed(key + (index >> 33))         if index >= 2**33
        x = (index >> 1) * 0x9e3779b9 + key      32 bits from here on
        x = (x ^ (x >> 16)) * 0x7feb352d
        x = ((x ^ (x >> 15)) + (key >> 32)) * 0x846ca68b
        x = x ^ (x >> 16)
        the lower half of x for an even index, the upper half for an odd one

    Args:
        seed: the group's seed, in [0, 2**64).
        position: the parameter's position in the optimizer, counted over all groups.
        steps: the number of steps that the parameter has taken.
        index: the elements' indices in logical order: C order of the shape, whatever the memory layout.

    Returns:
        Numbers in [0, 65536), uint32.

    Example:
        >>> random_bits(0, 0, 0, [0, 1, 2])
        array([ 5845, 30484, 10871], dtype=uint32)

    Source: sgdcore's own. SplitMix64 is by Steele, Lea and Flood (2014), "Fast splittable pseudorandom number
    generators".
    """
    mask, constant = (1 << 64) - 1, 0x9E3779B97F4A7C15
    key = 0
    for number in (seed, position, steps):
        key = _mixed((key + number + constant) & mask)
    indices = np.asarray(index, dtype=np.uint64)
    upper = indices >> np.uint64(33)
    keys = np.full(indices.shape, key, dtype=np.uint64)
    for each in np.unique(upper[upper != 0]):
        keys[upper == each] = _mixed((key + int(each)) & mask)
    x = (indices >> np.uint64(1)).astype(np.uint32) * np.uint32(0x9E3779B9) + keys.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) + (keys >> np.uint64(32)).astype(np.uint32)
    x = x * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    bits: Array = np.where(indices % 2 == 0, x & np.uint32(0xFFFF), x >> np.uint32(16))
    return bits


def round_stochastically(value: Array, dtype: DTypeLike, random: Array) -> Array:
    """Round float32 values to a 16-bit dtype, up or down as random numbers say.

    Equations, with ``below`` the largest magnitude of the dtype that is at most the value's, and ``above`` the next,
    as if exponents had no end::

        distance = (|value| - below) / (above - below)
        result = above  if floor(65536 * distance) + random >= 65536,  else  below

    with the value's sign. Magnitudes beyond the dtype's largest become infinite. A nan stays one.

    Args:
        value: array of any shape; float32.
        dtype: float16 or bfloat16.
        random: array of that shape; integers in [0, 65536).

    Example:
        >>> round_stochastically(np.float32([2049, 2049]), np.float16, np.array([32767, 32768]))
        array([2.048e+03, 2.050e+03], dtype=float16)

    Source: Gupta, Agrawal, Gopalakrishnan and Narayanan (2015), "Deep learning with limited numerical precision".
    """
    dtype = np.dtype(dtype)
    fraction_bits, least_exponent = (10, -14) if dtype == np.float16 else (7, -126)
    value = np.asarray(value, dtype=np.float32)
    wide = np.abs(value.astype(np.float64))
    finite = np.where(np.isfinite(wide), wide, 0.0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, least_exponent)
    steps = np.ldexp(finite, fraction_bits - exponent)
    whole = np.floor(steps)
    whole += np.floor((steps - whole) * 65536) + random >= 65536
    rounded = np.where(np.isfinite(wide), np.ldexp(whole, exponent - fraction_bits), wide)
    with np.errstate(all="ignore"):
        # float32 has every result but those that become infinite.
        result: Array = np.copysign(rounded, value).astype(np.float32).astype(dtype)
    return result


def _mixed(x: int) -> int:
    """The finaliser of SplitMix64."""
    mask = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


# --- Rounding -------------------------------------------------------------------------------------


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> Array:
    """Fused multiply-add: a * b + c of each element, rounded once.

    Equation::

        fma(a, b, c) = round(a * b + c)         to nearest, ties to even

    The sum is exact before it is rounded. So the result is that of a processor's fused multiply-add
    in every case: subnormal numbers, overflow, infinities, nan, and the signs of zeros. (Only the
    payload and sign of a nan are not defined.)

    Args:
        a: array or NumPy scalar; float32 or float64.
        b: the same dtype; the shapes broadcast.
        c: the same dtype; the shapes broadcast.

    Raises:
        TypeError: the dtypes differ, or are neither float32 nor float64.

    Example:
        The square of 1 + 2**-30 ends in 2**-60. The product drops it, the fused operation sees it:

        >>> a = np.array([1 + 2**-30])
        >>> fma(a, a, -(a * a)) == 2**-60
        array([ True])

    Source: Boldo and Melquiond (2008), "Emulation of a FMA and correctly rounded sums: proved
    algorithms using rounding to odd".
    """
    a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
    if not a.dtype == b.dtype == c.dtype:
        raise TypeError(f"a, b and c must have one dtype, got {a.dtype}, {b.dtype} and {c.dtype}")
    if a.dtype not in (np.float32, np.float64):
        raise TypeError(f"a, b and c must be float32 or float64, got {a.dtype}")
    a, b, c = np.broadcast_arrays(a, b, c)
    with np.errstate(all="ignore"):
        return _fma_float32(a, b, c) if a.dtype == np.float32 else _fma_float64(a, b, c)


def _fma_float32(a: Array, b: Array, c: Array) -> Array:
    """`fma` for float32, by way of float64, where no product of two float32 over- or underflows."""
    # Two significands of 24 bits make one of at most 48: the product is exact.
    product = a.astype(np.float64) * b.astype(np.float64)
    # The sum may need more than 53 bits. Rounded to nearest here, it could become a tie for the
    # second rounding without being one; rounded to odd, it cannot.
    return _add_to_odd(product, c.astype(np.float64)).astype(np.float32)


def _fma_float64(a: Array, b: Array, c: Array) -> Array:
    """`fma` for float64, by whichever method is right for an element."""
    # A product with an infinity, a nan or a zero needs no rounding, so only the sum rounds.
    product_is_exact = ~(np.isfinite(a) & np.isfinite(b)) | (a == 0) | (b == 0)
    # Otherwise the product is finite (even where a * b overflows) and changes no infinity or nan.
    result_is_c = ~np.isfinite(c)
    # With moderate factors the error-free transformations work, whatever c is. The product's last
    # bit is worth at least 2**-960 * 2**-104, which float64 can still represent; and the product is
    # at most 2**960, which is too small to make any c overflow.
    smaller, larger = np.minimum(np.abs(a), np.abs(b)), np.maximum(np.abs(a), np.abs(b))
    is_moderate = (smaller >= 2.0**-480) & (larger <= 2.0**480)

    result: Array = np.where(
        product_is_exact, a * b + c, np.where(result_is_c, c, _fma_of_moderate_float64(a, b, c))
    )
    for index in np.argwhere(~(product_is_exact | result_is_c | is_moderate)):
        element = tuple(index)
        result[element] = _fma_of_rationals(float(a[element]), float(b[element]), float(c[element]))
    return result


def _fma_of_moderate_float64(a: Array, b: Array, c: Array) -> Array:
    """`fma` for float64 with factors of moderate magnitude, by error-free transformations."""
    # Rewrite a * b + c as large + middle + small, losing nothing.
    product, product_error = _two_product(a, b)
    middle, small = _two_sum(product_error, c)
    large, middle = _two_sum(product, middle)
    # The last addition rounds to nearest. The one before it rounds to odd, so that what it drops
    # still tells the last one on which side of a tie it is.
    result: Array = large + _add_to_odd(middle, small)
    return result


def _fma_of_rationals(a: float, b: float, c: float) -> float:
    """`fma` for finite numbers with a * b != 0, in rational arithmetic: right everywhere."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        # Python rounds the quotient of two integers correctly, subnormal results included.
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its error: a + b == sum + error, exactly (Knuth's TwoSum).

    Where the sum is infinite or nan, the error is nan.
    """
    rounded = a + b
    b_part = rounded - a
    a_part = rounded - b_part
    return rounded, (a - a_part) + (b - b_part)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded float64 product and its error: a * b == product + error, exactly (Dekker)."""
    rounded = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    # Products of halves are exact, and so are these additions in this order.
    return rounded, (a_high * b_high - rounded) + a_high * b_low + a_low * b_high + a_low * b_low


def _split(a: Array) -> tuple[Array, Array]:
    """Two float64 of at most 26 significant bits each, whose sum is a, exactly (Veltkamp)."""
    shifted = (2.0**27 + 1) * a
    high = shifted - (shifted - a)
    return high, a - high


def _add_to_odd(a: Array, b: Array) -> Array:
    """Add float64, rounding to odd."""
    return _to_odd(*_two_sum(a, b))


def _to_odd(nearest: Array, error: Array) -> Array:
    """Round to odd, given the result of rounding to nearest and the error this made.

    Of the two numbers around an inexact value, rounding to odd takes the one whose last bit is 1.
    In a format at least two bits shorter, such a number is neither representable nor halfway
    between two representable ones. So rounding it once more, to that format, gives the same as
    rounding the exact value directly.
    """
    bits: Array = nearest.view(np.int64 if nearest.dtype == np.float64 else np.int32)
    # Magnitudes order like their bits, infinity included, so the neighbour is one step away.
    away_from_zero = np.signbit(nearest) == np.signbit(error)
    neighbour = np.where(away_from_zero, bits + 1, bits - 1)
    # Both comparisons are false for the nan that stands for the error of an infinity or nan.
    is_inexact = (error < 0) | (error > 0)
    rounded: Array = np.where(is_inexact & (bits & 1 == 0), neighbour, bits)
    return rounded.view(nearest.dtype)


def _round_to(dtype: np.dtype[Any], value: Array) -> Array:
    """Make an array of a storage dtype, each element rounded once, to nearest, ties to even."""
    if value.dtype == np.float64 and dtype.name == "bfloat16":
        # The conversion between these two may pass through float32 and round twice. Rounding to
        # odd on that way makes the second rounding the only one that counts.
        nearest = value.astype(np.float32)
        value = _to_odd(nearest, value - nearest)
    return np.array(value, dtype=dtype)
