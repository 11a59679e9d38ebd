"""Aggregated momentum."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

from sgdcore._hyperparameters import float_of
from sgdcore.optimizer import Optimizer, ParamsLike

__all__ = ["AggMo"]


class AggMo(Optimizer):
    """Aggregated momentum: the mean of three momentum buffers, each with a beta of its own."""

    rule = "aggmo"

    def __init__(
        self,
        params: ParamsLike,
        lr: float = 1e-3,
        beta_1: float = 0,
        beta_2: float = 0.9,
        beta_3: float = 0.99,
        *,
        maximize: bool = False,
        momentum_dtype: DTypeLike | None = None,
    ) -> None:
        betas = {"beta_1": beta_1, "beta_2": beta_2, "beta_3": beta_3}
        own = {"maximize": maximize, "momentum_dtype": momentum_dtype}
        defaults = {"lr": lr, **betas, **own}
        self._normalize_group(defaults)
        super().__init__(params, defaults)

    def _normalize_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "beta_1", "beta_2", "beta_3"):
            if not float_of(key, group[key]) >= 0:
                raise ValueError(f"Invalid {key}: {group[key]}")
        super()._normalize_group(group)
