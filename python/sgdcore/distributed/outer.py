"""Outer optimizers: what becomes of the average of the ranks' parameters, seen as one large step.

The parameters x at the start of a round are the anchor; the difference between it and the ranks' average after the
round takes the place of a gradient. The step is computed by the core's own kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sgdcore.distributed._checks import check_number
from sgdcore.distributed._flat import ITEM_BYTES, compute_dtype, dtype_name, flat, is_torch
from sgdcore.distributed.parameters import Parameters
from sgdcore.sgd import SGD


@dataclass(frozen=True)
class OuterSGD:
    """SGD over rounds.

    With the anchor x, the ranks' average a, and the outer momentum u::

        g = x - a
        u = g  in the first round,  momentum * u + g  afterwards
        x = x - lr * (g + momentum * u  if nesterov, else u)

    With ``lr=1`` and ``momentum=0`` this is plain averaging. DiLoCo used ``lr=0.7, momentum=0.9, nesterov=True``, for
    inner optimizers with adaptive steps.

    Source: Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023 (arXiv
    2311.08105).
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_number("lr", self.lr)
        check_number("momentum", self.momentum)
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
        check_number("lr", self.lr)
        check_number("momentum", self.momentum)


class Outer:
    """An outer optimizer and its state: a core optimizer whose parameters are the anchors, group by group.

    Attributes:
        lrs: for SlowMo the learning rate of each of the inner optimizer's groups in the last round; 0 before the first.
    """

    def __init__(self, spec: OuterSGD | SlowMo, anchors: Sequence[Sequence[Any]]) -> None:
        self._spec = spec
        self.lrs = [0.0] * len(anchors)
        self._torch = any(is_torch(anchor) for group in anchors for anchor in group)
        cls: Any = SGD
        if self._torch:
            from sgdcore.torch import SGD as cls
        self._optimizer = cls([self._group(each) for each in anchors], **asdict(spec))
        self._anchors = Parameters(self._optimizer)

    def _group(self, anchors: Sequence[Any]) -> dict[str, Any]:
        dtypes = (compute_dtype(dtype_name(flat(each, "anchor").dtype)) for each in anchors)
        dtype: Any = max(dtypes, key=ITEM_BYTES.__getitem__, default="float32")
        if self._torch:
            dtype = getattr(sys.modules["torch"], dtype)
        return {"params": list(anchors), "momentum_dtype": dtype}

    def step(self, differences: Sequence[Any], lrs: Sequence[float]) -> None:
        """Update the anchors by anchor - average for each of them, and the learning rates of the inner groups."""
        if isinstance(self._spec, SlowMo):
            self._follow(lrs)
        if not self._torch:
            self._optimizer.step(grads=differences)
            return
        for anchor, difference in zip(self._anchors.all, differences, strict=True):
            anchor.grad = difference
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _follow(self, lrs: Sequence[float]) -> None:
        """Rescale the slow momentum to the new learning rates, as part of the step."""
        for i, (group, lr) in enumerate(zip(self._optimizer.param_groups, lrs, strict=True)):
            group["momentum"] = self._spec.momentum
            if lr > 0 and self.lrs[i] > 0:
                group["momentum"] *= lr / self.lrs[i]
            else:
                for anchor in group["params"]:
                    self._optimizer.state[anchor].pop("momentum_buffer", None)
            self.lrs[i] = lr

    def momenta(self) -> list[Any]:
        """Return the outer momentum of each anchor, or None where there is none."""
        return self._anchors.momenta()

    def take(self, momenta: Sequence[Any], lrs: Sequence[float]) -> None:
        """Take over another one's `momenta` and `lrs`, which may lack the last groups'."""
        self.lrs[: len(lrs)] = lrs
        for i, momentum in enumerate(momenta):
            if momentum is None:
                self._optimizer.state[self._anchors.all[i]].pop("momentum_buffer", None)
            else:
                self._anchors.momentum(i)[...] = momentum
