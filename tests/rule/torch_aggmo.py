"""Aggregated momentum, for torch parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sgdcore.torch.optimizer import Optimizer

__all__ = ["AggMo"]


class AggMo(Optimizer):
    """Aggregated momentum: the mean of three momentum buffers, each with a beta of its own."""

    rule = "aggmo"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        beta_1: float = 0,
        beta_2: float = 0.9,
        beta_3: float = 0.99,
        *,
        maximize: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        sparse_mode: str = "dense",
    ) -> None:
        betas = {"beta_1": beta_1, "beta_2": beta_2, "beta_3": beta_3}
        defaults = {"lr": lr, **betas, "maximize": maximize}
        own = {"momentum_dtype": momentum_dtype, "sparse_mode": sparse_mode}
        super().__init__(params, defaults, own)

    @staticmethod
    def by_operations(
        parameter: Tensor, grad: Tensor, states: list[Tensor | None], group: dict[str, Any]
    ) -> list[Tensor | None]:
        """Update a tensor by torch's operations."""
        grad = -grad if group["maximize"] else grad
        betas = [group["beta_1"], group["beta_2"], group["beta_3"]]
        buffers = [
            grad.clone() if state is None else state.mul_(beta).add_(grad)
            for beta, state in zip(betas, states, strict=True)
        ]
        parameter.add_(buffers[0] + buffers[1] + buffers[2], alpha=-group["lr"] / 3)
        return [None if beta == 0 and i == 0 else buffers[i] for i, beta in enumerate(betas)]
