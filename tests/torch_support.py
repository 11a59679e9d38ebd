"""Helpers of the tests of sgdcore.torch: pairs of optimizers in lockstep, comparing bits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sgdcore
from sgdcore.torch import _interface

Hyper = dict[str, Any]

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# From when on torch's optimizers have names of parameters, and refuse a learning rate of several elements.
needs_torch_2_6 = pytest.mark.skipif(TORCH < (2, 6), reason="needs torch 2.6")


def access_without_cpp_functions() -> Any:
    """Return how torch's tensors are read, without the C++ functions: other versions of torch may lack them."""
    if _interface._tensor_access is None:
        pytest.skip("this version of torch has no such functions at all")
    offset, addresses, codes = _interface._tensor_access
    assert len(addresses) == 12
    return offset, (*addresses[:8], 0, 0, 0, 0), codes


# All meaningful combinations of the hyperparameters: each term absent and present.
HYPERS: list[Hyper] = [
    {
        "lr": 0.1,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for momentum, dampening, weight_decay, nesterov, maximize in itertools.product(
        [0.0, 0.9], [0.0, 0.3], [0.0, 0.01], [False, True], [False, True]
    )
    if not (nesterov and (momentum == 0 or dampening != 0))
    and not (momentum == 0 and dampening != 0)
]


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    if actual is None or expected is None:
        assert actual is expected, what
        return
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    unequal = bits(actual) != bits(expected)
    assert not unequal.any(), f"{what}: {int(unequal.sum())} of {unequal.numel()} elements differ"


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    return optimizer.state.get(parameter, {}).get("momentum_buffer")


def assert_same_training(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Compare the parameters and the momentum of two optimizers in every bit."""
    for i, (a, b) in enumerate(zip(ours.param_groups, theirs.param_groups, strict=True)):
        for j, (p, q) in enumerate(zip(a["params"], b["params"], strict=True)):
            assert_same_bits(p, q, f"parameter {j} of group {i}")
            assert_same_bits(
                momentum_of(ours, p), momentum_of(theirs, q), f"momentum {j} of group {i}"
            )


def parameters(tensors: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """Parameters with the values, and the strides, of the tensors."""
    return [torch.nn.Parameter(t.clone()) for t in tensors]


class Pair:
    """Ours and torch's loop, over equal parameters."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        group: Callable[[list[torch.nn.Parameter]], Any] = lambda params: params,
        **hyper: Any,
    ) -> None:
        self.ours_params, self.torch_params = parameters(tensors), parameters(tensors)
        self.ours = sgdcore.torch.SGD(group(self.ours_params), **hyper)
        self.torch = torch.optim.SGD(group(self.torch_params), foreach=False, **hyper)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for params in (self.ours_params, self.torch_params):
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = None if grad is None else grad.clone()
        self.ours.step()
        self.torch.step()

    def check(self) -> None:
        assert_same_training(self.ours, self.torch)


def parameter(values: Any, grad: Any = None, **kwargs: Any) -> torch.nn.Parameter:
    result = torch.nn.Parameter(torch.as_tensor(values, **kwargs))
    if grad is not None:
        grad = grad if isinstance(grad, Tensor) else torch.as_tensor(grad, **kwargs)
        if grad.dtype != result.dtype:
            if not hasattr(torch.Tensor, "grad_dtype"):
                pytest.skip("this torch takes only gradients of the parameter's dtype")
            result.grad_dtype = None  # any
        result.grad = grad
    return result


def assert_ranks_pass(scenario: str, folder: Path) -> None:
    """Run a scenario of torch_worker.py on two ranks, and expect none to fail."""
    script = Path(__file__).with_name("torch_worker.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), scenario, str(rank), "2", str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
