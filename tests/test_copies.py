"""Copies and pickles: over read-only memory, of subclasses, with the attributes that users added."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest

import sgdcore
from support import Array, assert_same_bits, assert_same_training, numbers, parameters_of

FULL = {"lr": 0.1, "momentum": 0.9}


class Scaled(sgdcore.Parameter):
    """Made of other arguments than a Parameter, with a slot."""

    __slots__ = ("scale",)

    def __init__(self, scale: float, *shape: int) -> None:
        super().__init__(numbers(0, shape), name="scaled")
        self.scale = scale
        self.tag = ["a"]


class Model(sgdcore.ParameterBuffer):
    """Made of other arguments than a ParameterBuffer."""

    def __init__(self, width: int) -> None:
        super().__init__({"w": numbers(0, (2, width)), "b": numbers(1, (width,))})
        self.width = width


class Counting(sgdcore.SGD):
    """Counts its steps."""

    def __init__(self, params: Any, label: str, **hyper: Any) -> None:
        super().__init__(params, **hyper)
        self.label = label
        self.steps = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        return super().step(*args, **kwargs)


def _out_of_band(value: Any) -> Any:
    """Through protocol 5, the arrays' memory in buffers that are bytes, which nothing may write."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(each) for each in buffers])


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle 2": lambda value: pickle.loads(pickle.dumps(value, 2)),
    "pickle 5": lambda value: pickle.loads(pickle.dumps(value, 5)),
    "out of band": _out_of_band,
}
WAYS = pytest.mark.parametrize("way", COPIES)


def _trained() -> tuple[sgdcore.Parameter, sgdcore.SGD]:
    parameter = sgdcore.Parameter(np.asfortranarray(numbers(0, (3, 2))), name="w")
    optimizer = sgdcore.SGD([parameter, numbers(1, (4,))], **FULL)
    optimizer.step(grads=[numbers(2, (3, 2)), numbers(3, (4,))])
    parameter.grad = numbers(4, (3, 2))
    return parameter, optimizer


# --- Over read-only memory ----------------------------------------------------------------------------


def test_parameter_over_bytes_is_copied() -> None:
    parameter = _trained()[0]
    other = _out_of_band(parameter)
    assert_same_bits(other.data, parameter.data)
    assert_same_bits(other.grad, parameter.grad)
    assert other.data.strides == parameter.data.strides
    other.grad += 1
    sgdcore.SGD([other], lr=1).step(zero_grad=True)
    assert_same_bits(other.data, parameter.data - (parameter.grad + 1))


def test_optimizer_over_bytes_goes_on() -> None:
    parameter, optimizer = _trained()
    again, other = _out_of_band((parameter, optimizer))
    assert parameters_of(other)[0] is again
    for each in (optimizer, other):
        parameters_of(each)[1].grad = numbers(5, (4,))
        each.step(zero_grad=True)
    assert_same_training(other, optimizer)


def test_buffer_over_bytes_goes_on() -> None:
    buffer = sgdcore.ParameterBuffer({"w": numbers(0, (2, 3)), "b": numbers(1, (3,))})
    optimizer = sgdcore.SGD(buffer, **FULL)
    buffer.grad[:] = numbers(2, (9,))
    optimizer.step()
    other_buffer, other, w = _out_of_band((buffer, optimizer, buffer["w"]))
    assert w is other_buffer["w"] is parameters_of(other)[0]
    assert np.shares_memory(w.data, other_buffer.data)
    assert np.shares_memory(w.grad, other_buffer.grad)
    for each in (optimizer, other):
        each.step(zero_grad=True)
    assert_same_training(other, optimizer)


def test_parameters_of_one_array_share_its_copy() -> None:
    array = numbers(0, (3,))
    first, second = _out_of_band((sgdcore.Parameter(array), sgdcore.Parameter(array)))
    assert first.data is second.data
    apart = _out_of_band(sgdcore.Parameter(array))
    assert not np.shares_memory(apart.data, first.data)


def test_writable_buffers_are_not_copied() -> None:
    parameter = _trained()[0]
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(parameter, protocol=5, buffer_callback=buffers.append)
    memory = [bytearray(each.raw()) for each in buffers]
    other = pickle.loads(data, buffers=memory)
    assert np.shares_memory(other.data, np.frombuffer(memory[0], np.uint8))


def test_joblib_maps_a_file_read_only(tmp_path: Path) -> None:
    parameter, optimizer = _trained()
    joblib.dump((parameter, optimizer), tmp_path / "model")
    contents = (tmp_path / "model").read_bytes()
    again, other = joblib.load(tmp_path / "model", mmap_mode="r")
    assert type(again.data) is np.ndarray
    for each in (optimizer, other):
        parameters_of(each)[1].grad = numbers(5, (4,))
        each.step()
    assert_same_training(other, optimizer)
    assert (tmp_path / "model").read_bytes() == contents


def _steps_once(parameter: sgdcore.Parameter, optimizer: sgdcore.SGD) -> Array:
    optimizer.step()
    return parameter.data


def test_joblib_runs_in_workers_on_copies() -> None:
    """Large arrays reach a worker as a file that is mapped read-only."""
    parameter, optimizer = _trained()
    parallel = joblib.Parallel(n_jobs=2, max_nbytes=1)
    found = parallel(joblib.delayed(_steps_once)(parameter, optimizer) for _ in range(2))
    optimizer.step()
    for data in found:
        assert_same_bits(data, parameter.data)


# --- Classes and attributes ---------------------------------------------------------------------------


@WAYS
def test_parameter_keeps_class_attributes_and_slots(way: str) -> None:
    parameter = Scaled(0.5, 2, 3)
    parameter.owner = parameter  # type: ignore[attr-defined]
    other = COPIES[way](parameter)
    assert type(other) is Scaled
    assert (other.name, other.scale, other.tag) == ("scaled", 0.5, ["a"])
    assert other.owner is other
    assert other.tag is not parameter.tag
    assert_same_bits(other.data, parameter.data)
    assert not np.shares_memory(other.data, parameter.data)


def test_shallow_copy_of_a_parameter_shares_array_and_attributes() -> None:
    parameter = Scaled(0.5, 2, 3)
    other = copy.copy(parameter)
    assert type(other) is Scaled
    assert other.data is parameter.data
    assert (other.scale, other.tag) == (0.5, parameter.tag)
    assert other.tag is parameter.tag
    other.tag = ["b"]
    assert parameter.tag == ["a"]


@WAYS
def test_buffer_keeps_class_and_attributes_also_of_its_parameters(way: str) -> None:
    model = Model(3)
    model.layers = [model["w"]]  # type: ignore[attr-defined]
    model["w"].decay = False  # type: ignore[attr-defined]
    model["b"].owner = model  # type: ignore[attr-defined]
    other = COPIES[way](model)
    assert type(other) is Model
    assert other.width == 3
    assert other.layers == [other["w"]]
    assert other["w"].decay is False
    assert not hasattr(other["b"], "decay")
    assert other["b"].owner is other
    assert_same_bits(other.data, model.data)
    alone = COPIES[way](model["w"])
    assert alone.decay is False
    assert alone.buffer.width == 3


@pytest.mark.parametrize("way", [copy.copy, *COPIES.values()], ids=["copy", *COPIES])
def test_optimizer_keeps_class_and_attributes(way: Any) -> None:
    optimizer = Counting([sgdcore.Parameter(numbers(0, (3,)))], "mine", **FULL)
    parameters_of(optimizer)[0].grad = numbers(1, (3,))
    optimizer.step()
    optimizer.first = parameters_of(optimizer)[0]  # type: ignore[attr-defined]
    other = way(optimizer)
    assert type(other) is Counting
    assert (other.label, other.steps) == ("mine", 1)
    assert other.first is parameters_of(other)[0]
    other.step()
    assert (other.steps, optimizer.steps) == (2, 1)


def test_function_in_the_place_of_a_method_stays_with_the_original() -> None:
    """As a scheduler's counter around `step`: in a copy it would step the original."""
    optimizer = sgdcore.SGD([numbers(0, (3,))], **FULL)
    called = []
    optimizer.step = lambda **_: called.append(1)  # type: ignore[method-assign, assignment]
    other = copy.deepcopy(optimizer)
    other.step(grads=[numbers(1, (3,))])
    assert not called
    assert len(other.state) == 1


def test_array_given_to_a_copied_optimizer_still_has_no_place_for_gradients() -> None:
    other = copy.deepcopy(sgdcore.SGD([numbers(0, (3,))], **FULL))
    with pytest.raises(TypeError, match=r"^grads: no parameter has a gradient, "):
        other.step()


def test_state_of_earlier_versions_without_attributes() -> None:
    optimizer = sgdcore.SGD([numbers(0, (3,))], **FULL)
    state = optimizer.__getstate__()
    del state["attributes"]
    other = sgdcore.SGD.__new__(sgdcore.SGD)
    other.__setstate__(state)
    assert other.defaults == optimizer.defaults
