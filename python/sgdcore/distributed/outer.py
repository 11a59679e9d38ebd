"""Outer optimizers: what becomes of the average of the ranks' parameters, seen as one large step from the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sgdcore.distributed._flat import dtype_name, flat, is_torch
from sgdcore.distributed.parameters import Parameters
from sgdcore.sgd import SGD


@dataclass(frozen=True)
class OuterSGD:
    """SGD over rounds.

    With the anchor x, the ranks' average a, and the outer momentum u::

        g = x - a
        u = g  in the first round,  momentum * u + g  afterwards
        x = x - lr * (g + momentum * u  if nesterov, else u)

    With ``lr=1`` and ``momentum=0`` this is plain averaging. DiLoCo used ``lr=0.7, momentum=0.9, nesterov=True``.

    Source: Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023 (arXiv
    2311.08105).
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False


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


class Outer:
    """A core optimizer whose parameters are the anchors; for SlowMo with the inner groups' `lrs` in the last round."""

    def __init__(
        self, spec: OuterSGD | SlowMo, anchors: Sequence[Any], group_of: Sequence[int]
    ) -> None:
        self._slow = spec.momentum if isinstance(spec, SlowMo) else None
        self._torch = is_torch(anchors[0])
        groups: list[Any] = [
            {"params": [], "momentum_dtype": "float32"} for _ in range(group_of[-1] + 1)
        ]
        for anchor, i in zip(anchors, group_of, strict=True):
            groups[i]["params"].append(anchor)
            if dtype_name(flat(anchor, "anchor").dtype) == "float64":
                groups[i]["momentum_dtype"] = "float64"
        self.lrs = [0.0] * len(groups)
        cls: Any = SGD
        if self._torch:
            from sgdcore.torch import SGD as cls
        self._optimizer = cls(groups, **asdict(spec))
        self._anchors = Parameters(self._optimizer)

    def step(self, averages: Sequence[Any], lrs: Sequence[float]) -> None:
        """Move the anchors, given the ranks' averages, which are overwritten, and the inner groups' learning rates."""
        for i, group in enumerate(() if self._slow is None else self._optimizer.param_groups):
            # The slow momentum is rescaled to the new learning rate, as part of the step.
            group["momentum"] = self._slow
            if lrs[i] > 0 and self.lrs[i] > 0:
                group["momentum"] *= lrs[i] / self.lrs[i]
            else:
                for anchor in group["params"]:
                    self._optimizer.state[anchor].pop("momentum_buffer", None)
            self.lrs[i] = lrs[i]
        rows = zip(self._anchors.all, self._anchors.data, averages, strict=True)
        for anchor, values, difference in rows:
            difference *= -1
            difference += values
            if self._torch:
                anchor.grad = difference
        self._optimizer.step(**({} if self._torch else {"grads": averages}))
        self._optimizer.zero_grad()

    def momenta(self) -> list[Any]:
        """Return the outer momentum of each anchor, or None where there is none."""
        return self._anchors.states()["momentum_buffer"]

    def take(self, momenta: Sequence[Any], lrs: Sequence[float]) -> None:
        """Take over another one's `momenta` and `lrs`."""
        self.lrs = list(lrs)
        self._anchors.restore_states({"momentum_buffer": momenta})
