"""torch.optim.SGD, with the update in the core."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from sgdcore._options import Options
from sgdcore.sgd import check_hyperparameters
from sgdcore.torch._compile import not_compiled
from sgdcore.torch.optimizer import Optimizer, number_of

__all__ = ["SGD"]


class SGD(Optimizer, torch.optim.SGD):  # type: ignore[override]  # `state` is an attribute there
    """Stochastic gradient descent for torch parameters on the CPU and CUDA; takes the place of torch.optim.SGD.

    For each parameter p with gradient g and momentum buffer b, all of one shape::

        g = -g                                          if maximize
        g = fma(weight_decay, p, g)                     if weight_decay != 0
        b = g                                           if momentum != 0, on the parameter's first step
        b = fma(1 - dampening, g, round(momentum * b))  if momentum != 0, on later steps
        g = fma(momentum, b, g)                         if momentum != 0 and nesterov
        g = b                                           if momentum != 0 and not nesterov
        p = fma(-lr, g, p)

    ``fma(x, y, z)`` is x * y + z, rounded once. For float32 and float64 parameters every bit equals
    torch.optim.SGD(foreach=False); complex ones agree to a few roundings. bfloat16 and float16 are computed in float32
    and rounded once per stored value. docs/torch.md says what is equal, better, and refused.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups, as in torch.
        lr: learning rate, a number or a tensor of one element. On the parameters' CUDA device it is read there, also
            by a captured graph; so is weight_decay.
        momentum: the part of the buffer that survives a step.
        dampening: the part of the gradient that an existing buffer does not receive.
        weight_decay: weight decay (L2 penalty), a number or a tensor of one element.
        nesterov: use Nesterov momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        foreach, fused: accepted and kept in the groups; there is one path here.
        differentiable: let autograd record the step, with torch's own (slow) code.
        momentum_dtype: type of new momentum buffers, one of float64, float32, float16, bfloat16, or its name; the
            parameter's if None. A state dict has its name. float32 for bfloat16 parameters keeps small gradients from
            being rounded away.
        sparse_mode: what a sparse gradient means. ``"dense"``: what the same gradient means as a dense tensor, so
            that weight decay and momentum act on all rows. ``"lazy"``: only the rows that it names are touched.
        **options: clip_value, max_grad_norm and skip_nonfinite, which every optimizer takes; `sgdcore.Options`
            explains them.

    Raises:
        ValueError, TypeError: for hyperparameters out of range, worded as torch does.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
    in the form that torch.optim.SGD gave it.
    """

    rule = "sgd"

    @not_compiled
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_dtype: torch.dtype | str | None = None,
        sparse_mode: str = "dense",
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_hyperparameters(defaults, number_of, nan_is_valid=True)
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        own = {"momentum_dtype": momentum_dtype, "sparse_mode": sparse_mode}
        Optimizer.__init__(self, params, defaults, own, options)

    @staticmethod
    def by_operations(
        parameter: Tensor, grad: Tensor, states: list[Tensor | None], group: dict[str, Any]
    ) -> list[Tensor | None]:
        """Update a tensor by torch.optim.SGD's own loop; see `Optimizer.by_operations`."""
        momentum_buffers = list(states)
        torch_sgd(
            [parameter],
            [grad],
            momentum_buffers,
            has_sparse_grad=False,
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        return momentum_buffers

    def _step_recorded(self) -> None:
        # torch's own step, which autograd records as a graph of tensor operations.
        step = torch.optim.SGD.step
        if getattr(step, "hooked", False):  # torch's wrapper would call the hooks a second time
            step = step.__wrapped__  # type: ignore[attr-defined]
        step(self)
