"""Outer optimizers: what becomes of the average of the ranks' parameters, seen as one large step.

The parameters x at the start of a round are the anchor; the difference between it and the ranks' average after the
round takes the place of a gradient. The step is computed by the core's own kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sgdcore.distributed._flat import compute_dtype, dtype_name, is_torch, item_bytes
from sgdcore.distributed.parameters import momentum_of, set_zero_momentum
from sgdcore.sgd import SGD


@dataclass(frozen=True)
class OuterSGD:
    """SGD over rounds.

    With the anchor x, the ranks' average a, and the outer momentum u::

        g = x - a
        u = g  in the first round,  momentum * u + g  afterwards
        x = x - lr * (g + momentum * u  if nesterov, else u)

    With ``lr=1`` and ``momentum=0`` this is plain averaging. DiLoCo used ``lr=0.7, momentum=0.9, nesterov=True``, for
    inner optimizers with adaptive steps; for SGD it lowered the training loss and the validation accuracy.

    Source: Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023 (arXiv
    2311.08105).
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_hyper(self.lr, self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: expected a momentum to go with it, got momentum=0")


@dataclass(frozen=True)
class SlowMo:
    """Slow momentum.

    With the anchor x, the ranks' average a, and the inner learning rate r of the round::

        u = momentum * u + (x - a) / r
        x = x - lr * r * u

    The momentum is kept as ``r * u``, which needs no division of the parameters; where r is 0, it starts anew.

    Source: Wang et al., "SlowMo: improving communication-efficient distributed SGD with slow momentum", ICLR 2020
    (arXiv 1910.00643).
    """

    momentum: float
    lr: float = 1.0

    def __post_init__(self) -> None:
        _check_hyper(self.lr, self.momentum)


def _check_hyper(lr: float, momentum: float) -> None:
    for name, value in (("lr", lr), ("momentum", momentum)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not value >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")


class Outer:
    """An outer optimizer and its state: a core optimizer whose parameters are the anchors, group by group."""

    def __init__(self, spec: OuterSGD | SlowMo, anchors: Sequence[Sequence[Any]]) -> None:
        self._spec = spec
        # For SlowMo the learning rate of each of the inner optimizer's groups in the last round; 0 before the first.
        self.lrs = [0.0] * len(anchors)
        self._torch = any(is_torch(anchor) for each in anchors for anchor in each)
        cls: Any = SGD
        if self._torch:
            from sgdcore.torch import SGD as cls
        self._optimizer = cls([self._group(each) for each in anchors], **asdict(spec))

    def _group(self, anchors: Sequence[Any]) -> dict[str, Any]:
        dtypes = (compute_dtype(dtype_name(anchor.dtype)) for anchor in anchors)
        dtype: Any = max(dtypes, key=item_bytes, default="float32")
        if self._torch:
            dtype = getattr(sys.modules["torch"], dtype)
        return {"params": list(anchors), "momentum_dtype": dtype}

    def add(self, anchors: Sequence[Any]) -> None:
        """Add those of a new group."""
        self._optimizer.add_param_group(self._group(anchors))
        self.lrs.append(0.0)

    def step(self, differences: Sequence[Any], lrs: Sequence[float]) -> None:
        """Update the anchors by anchor - average for each of them, and the learning rates of the inner groups."""
        if isinstance(self._spec, SlowMo):
            self._follow(lrs)
        if not self._torch:
            self._optimizer.step(grads=differences)
            return
        for (parameter, _), difference in zip(self._anchors(), differences, strict=True):
            parameter.grad = difference
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _follow(self, lrs: Sequence[float]) -> None:
        """Rescale the slow momentum to the new learning rates, as part of the step."""
        for i, (group, lr) in enumerate(zip(self._optimizer.param_groups, lrs, strict=True)):
            group["momentum"] = self._spec.momentum
            if lr > 0 and self.lrs[i] > 0:
                group["momentum"] *= lr / self.lrs[i]
            else:
                for parameter in group["params"]:
                    self._optimizer.state[parameter].pop("momentum_buffer", None)
            self.lrs[i] = lr

    def momenta(self) -> list[Any]:
        """Return the outer momentum of each anchor, zeros where there is none yet."""
        for parameter, group in self._anchors():
            if momentum_of(self._optimizer, parameter) is None:
                set_zero_momentum(self._optimizer, parameter, group)
        return self.saved()

    def saved(self) -> list[Any]:
        """Return the outer momentum of each anchor, or None where there is none."""
        return [momentum_of(self._optimizer, parameter) for parameter, _ in self._anchors()]

    def _anchors(self) -> list[tuple[Any, dict[str, Any]]]:
        return [(p, group) for group in self._optimizer.param_groups for p in group["params"]]
