"""Precisions of 16-bit torch parameters: the bits of the class for arrays, and what goes with them."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore._rules import rule_of
from sgdcore.torch import step_in_backward
from support import BFLOAT16, Array, assert_same_bits, numbers
from test_precision import KINDS
from test_rules import CLASSES, RULES, TORCH_CLASSES, full_setting

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def tensor_of(seed: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.from_numpy(numbers(seed, shape)).to(DTYPES[dtype])


def array_of(tensor: torch.Tensor) -> Array:
    """The tensor's values as an array in C order."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(BFLOAT16)
    return tensor.numpy().copy()


SHAPES = [(37, 41), (), (3, 5, 7, 2), (70_001,)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("precision", "dtype"), KINDS)
class TestBits:
    def made(self, rule: str, precision: str, dtype: str) -> tuple[Any, ...]:
        hyper = full_setting(rule) | {"precision": precision, "seed": 5}
        tensors = [torch.nn.Parameter(tensor_of(i, s, dtype)) for i, s in enumerate(SHAPES)]
        tensors[2].data = tensors[2].data.to(memory_format=torch.channels_last)
        arrays = [sgdcore.Parameter(array_of(t).copy()) for t in tensors]
        return (
            tensors,
            TORCH_CLASSES[rule](tensors, **hyper),
            arrays,
            CLASSES[rule](arrays, **hyper),
        )

    def train(self, tensors: Any, optimizer: Any, arrays: Any, oracle: Any, first: int = 0) -> None:
        for step in range(first, first + 3):
            grads = [numbers(step * 7 + i, s) for i, s in enumerate(SHAPES)]
            # Gradients come late, and in another memory order.
            for tensor, grad in zip(tensors, grads, strict=True):
                tensor.grad = torch.from_numpy(grad.copy()).to(tensor.dtype)
            if step == 0:
                tensors[1].grad = None
            optimizer.step()
            oracle.step(
                grads=[
                    g.astype(a.dtype) if t.grad is not None else None
                    for g, a, t in zip(grads, arrays, tensors, strict=True)
                ]
            )

    def check(self, tensors: Any, optimizer: Any, arrays: Any, oracle: Any) -> None:
        for tensor, array in zip(tensors, arrays, strict=True):
            assert_same_bits(array_of(tensor), array.data)
            assert_same_bits(array_of(optimizer.master(tensor)), oracle.master(array))
            ours, theirs = optimizer.state[tensor], oracle.state[array]
            assert set(ours) == set(theirs)
            for key in ours:
                if key == "steps_taken":
                    assert ours[key] == theirs[key]
                else:
                    assert_same_bits(array_of(ours[key]), theirs[key], key)

    def test_steps(self, rule, precision, dtype):
        trained = self.made(rule, precision, dtype)
        self.train(*trained)
        self.check(*trained)

    def test_checkpoints_and_copies(self, rule, precision, dtype):
        tensors, optimizer, arrays, oracle = self.made(rule, precision, dtype)
        self.train(tensors, optimizer, arrays, oracle)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        others = [torch.nn.Parameter(t.detach().clone()) for t in tensors]
        loaded = TORCH_CLASSES[rule](others, lr=0.5)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        copied_tensors, copied = copy.deepcopy((tensors, optimizer))
        state = copy.deepcopy(optimizer.state_dict())
        self.train(tensors, optimizer, arrays, oracle, 3)
        self.check(tensors, optimizer, arrays, oracle)
        for again, continued in ((others, loaded), (copied_tensors, copied)):
            for step in range(3, 6):
                for i, tensor in enumerate(again):
                    grad = numbers(step * 7 + i, SHAPES[i])
                    tensor.grad = torch.from_numpy(grad).to(tensor.dtype)
                continued.step()
            self.check(again, continued, arrays, oracle)
        # The class for arrays takes the checkpoint, and gives its own.
        back = CLASSES[rule]([sgdcore.Parameter(a.data.copy()) for a in arrays], lr=0.5)
        back.load_state_dict(
            {"state": _as_arrays(state["state"]), "param_groups": state["param_groups"]}
        )
        loaded.load_state_dict(copy.deepcopy(oracle.state_dict()))
        self.check(others, loaded, arrays, oracle)

    def test_steps_in_the_backward_pass(self, rule, precision, dtype):
        if rule_of(rule).counts:
            pytest.skip("the rule counts whole steps")
        hyper = full_setting(rule) | {"precision": precision}
        model = torch.nn.Linear(8, 8).to(DTYPES[dtype])
        twin = copy.deepcopy(model)
        optimizer = TORCH_CLASSES[rule](model.parameters(), **hyper)
        if precision == "stochastic":
            with pytest.raises(
                ValueError, match="precision: 'stochastic' rounds by the parameter's position"
            ):
                step_in_backward(optimizer)
            return
        usual = TORCH_CLASSES[rule](twin.parameters(), **hyper)
        with step_in_backward(optimizer):
            for step in range(3):
                x = tensor_of(step, (4, 8), dtype)
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                twin(x).square().mean().backward()
                usual.step()
                usual.zero_grad()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same_bits(array_of(ours), array_of(theirs))
            assert_same_bits(array_of(optimizer.master(ours)), array_of(usual.master(theirs)))


def _as_arrays(state: Any) -> Any:
    return {
        position: {
            key: array_of(v) if isinstance(v, torch.Tensor) else v for key, v in values.items()
        }
        for position, values in state.items()
    }


class TestWrites:
    def test_the_models_and_then_the_optimizers_checkpoint_restore_the_master(self):
        model = torch.nn.Linear(8, 8).bfloat16()
        optimizer = sgdcore.torch.SGD(model.parameters(), lr=0.1, precision="split")

        def train() -> None:
            model(torch.ones(2, 8).bfloat16()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        train()
        saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        masters = [optimizer.master(p) for p in model.parameters()]
        train()
        model.load_state_dict(saved[0])
        # The lower halves are still those of the later step: at most half a unit away.
        for p in model.parameters():
            assert (optimizer.master(p) - p.float()).abs().max() <= p.float().abs().max() * 2**-8
        optimizer.load_state_dict(saved[1])
        for p, master in zip(model.parameters(), masters, strict=True):
            assert_same_bits(array_of(optimizer.master(p)), array_of(master))

    def test_a_state_that_a_user_replaced(self):
        p = torch.nn.Parameter(tensor_of(0, (9,), "bfloat16"))
        optimizer = sgdcore.torch.SGD([p], lr=0.1, precision="split")
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["master_low"] = torch.zeros(9, dtype=torch.int16)
        assert_same_bits(array_of(optimizer.master(p)), array_of(p.detach().float()))
        optimizer.step()
        optimizer.state[p]["master_low"] = torch.zeros(9, dtype=torch.float32)
        with pytest.raises(TypeError, match="precision: 'split' is for dense tensors"):
            optimizer.step()


@pytest.mark.parametrize(("precision", "dtype"), KINDS)
def test_values_are_set_as_those_of_arrays(precision, dtype):
    values = numbers(1, (2, 3, 4, 5))
    values.flat[:4] = [np.nan, np.inf, -0.0, 1.00390625]
    tensor = torch.nn.Parameter(
        tensor_of(0, values.shape, dtype).to(memory_format=torch.channels_last)
    )
    array = sgdcore.Parameter(array_of(tensor))
    ours = sgdcore.torch.SGD([tensor], precision=precision)
    theirs = sgdcore.SGD([array], precision=precision)
    ours.set_master(tensor, torch.from_numpy(values))
    theirs.set_master(array, values)
    np.testing.assert_array_equal(array_of(ours.master(tensor)), theirs.master(array))
    np.testing.assert_array_equal(array_of(tensor.float()), array.data.astype(np.float32))
    with pytest.raises(ValueError, match="values: expected shape"):
        ours.set_master(tensor, torch.ones(3))


class TestRefusals:
    @pytest.mark.parametrize("precision", ["split", "kahan", "stochastic"])
    def test_irregular_parameters(self, precision):
        def optimizer_of(tensor: torch.Tensor) -> Any:
            return sgdcore.torch.SGD([tensor], lr=0.1, precision=precision)

        sparse = torch.nn.Parameter(torch.ones(4, 2).bfloat16())
        optimizer = optimizer_of(sparse)
        with torch.sparse.check_sparse_tensor_invariants():
            sparse.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2).bfloat16(), (4, 2))
        with pytest.raises(
            TypeError, match=r"for param_groups\[0\].* got a gradient of layout torch.sparse_coo"
        ):
            optimizer.step()
        gaps = torch.ones(4, 4).bfloat16()[:, ::2].requires_grad_()
        optimizer = optimizer_of(gaps)
        gaps.grad = torch.ones_like(gaps)
        with pytest.raises(TypeError, match=r"strides \(4, 2\)"):
            optimizer.step()
        assert (gaps == 1).all()
        assert (sparse == 1).all()

    def test_dtypes_and_arguments(self):
        p = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(
            TypeError,
            match=r"of dtype bfloat16, and params\[0\] has float32",
        ):
            sgdcore.torch.SGD([p], precision="split")
        h = torch.nn.Parameter(torch.ones(3).bfloat16())
        with pytest.raises(ValueError, match="precision: expected one of"):
            sgdcore.torch.SGD([h], precision="exact")
        with pytest.raises(ValueError, match="differentiable"):
            sgdcore.torch.SGD([h], precision="split", differentiable=True)
        optimizer = sgdcore.torch.SGD([h], lr=0.1)
        with pytest.raises(TypeError, match=r"params\[0\] has float32"):
            optimizer.add_param_group({"params": [p], "precision": "kahan"})
        assert len(optimizer.param_groups) == 1
        optimizer.param_groups[0]["precision"] = "split"
        h.data = h.data.float()
        h.grad = torch.ones(3)
        with pytest.raises(
            TypeError,
            match=r"param_groups\[0\]\['params'\]\[0\] is of float32",
        ):
            optimizer.step()
        assert "precision" not in sgdcore.torch.SGD([h]).param_groups[0]

    def test_a_count_that_is_none(self):
        p = torch.nn.Parameter(torch.ones(3).bfloat16())
        optimizer = sgdcore.torch.SGD([p], lr=0.1, precision="stochastic")
        optimizer.state[p]["steps_taken"] = "many"
        p.grad = torch.ones_like(p)
        with pytest.raises(TypeError, match="the steps_taken of parameter 0: expected an integer"):
            optimizer.step()
        assert (p == 1).all()


def test_a_group_that_gets_a_precision_later():
    p = torch.nn.Parameter(tensor_of(0, (100,), "bfloat16"))
    optimizer = sgdcore.torch.SGD([p], lr=1e-3, momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert_same_bits(np.float32(optimizer.master(p)), np.float32(p.detach().float()))
    optimizer.param_groups[0]["precision"] = "split"
    before = p.detach().float()
    optimizer.step()
    momentum = optimizer.state[p]["momentum_buffer"].float()
    assert (optimizer.master(p) - (before - 1e-3 * momentum)).abs().max() < 1e-5
