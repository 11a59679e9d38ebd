"""The oracle of aggregated momentum; test_new_rule.py appends it to sgdcore/reference.py."""

import numpy as np
from numpy.typing import DTypeLike

from sgdcore.reference import Array, _round_to, compute_dtype, fma, updates


def aggmo_update(
    param: Array,
    grad: Array,
    *momenta: Array | None,
    lr: float,
    beta_1: float = 0.0,
    beta_2: float = 0.9,
    beta_3: float = 0.99,
    maximize: bool = False,
    momentum_dtype: DTypeLike | None = None,
) -> tuple[Array | None, ...]:
    """One step of aggregated momentum; see csrc/rules/aggmo.hpp for the equations."""
    stored = np.dtype(momentum_dtype or param.dtype)
    compute = compute_dtype(param.dtype, grad.dtype, stored)
    g = grad.astype(compute)
    g = -g if maximize else g
    new = []
    for beta, old in zip((beta_1, beta_2, beta_3), momenta or (None,) * 3, strict=True):
        new.append(
            g
            if beta == 0 and not new
            else g
            if old is None
            else compute.type(beta) * old.astype(compute) + g
        )
    step = fma(compute.type(-lr / 3), new[0] + new[1] + new[2], param.astype(compute))
    kept = [None if beta_1 == 0 and i == 0 else _round_to(stored, b) for i, b in enumerate(new)]
    return (_round_to(param.dtype, step), *kept)


updates["aggmo"] = aggmo_update
