"""ParameterBuffer: its layout in memory, how long that memory lives, and who else may look at it.

Covers DLPack in both directions as well, for buffers and for parameters of their own.
"""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import _core
from sgdcore.reference import ReferenceSGD
from support import (
    BFLOAT16,
    STORAGE_TYPES,
    Array,
    assert_same_bits,
    assert_same_training,
    momentum_of,
    numbers,
    parameters_of,
)

FULL = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}
SHAPES: dict[str, Any] = {"w": (2, 3), "scalar": (), "empty": (0, 4), "b": 3, "cube": [2, 1, 2]}
SIZE = 6 + 1 + 0 + 3 + 4
MIB = 2**20


def address(array: Array) -> int:
    return array.__array_interface__["data"][0]


def filled(dtype: Any = np.float32) -> sgdcore.ParameterBuffer:
    """A buffer with numbers in its parameters and gradients."""
    buffer = sgdcore.ParameterBuffer(SHAPES, dtype)
    buffer.data[:] = numbers(0, (SIZE,), buffer.dtype)
    buffer.grad[:] = numbers(1, (SIZE,), buffer.dtype)
    return buffer


# --- Layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_parameters_lie_side_by_side(dtype: str) -> None:
    buffer = sgdcore.ParameterBuffer(SHAPES, dtype)
    assert list(buffer) == list(SHAPES)
    assert [p.shape for p in buffer.values()] == [(2, 3), (), (0, 4), (3,), (2, 1, 2)]
    assert len(buffer) == 5
    assert buffer.size == buffer.data.size == buffer.grad.size == SIZE
    assert buffer.dtype == buffer.data.dtype == buffer.grad.dtype == STORAGE_TYPES[dtype]
    assert not buffer.data.any()
    assert not buffer.grad.any()
    for flat, views in [
        (buffer.data, [p.data for p in buffer.values()]),
        (buffer.grad, [p.grad for p in buffer.values()]),
    ]:
        assert flat.ndim == 1
        assert flat.flags.c_contiguous
        assert flat.flags.writeable
        flat[:] = np.arange(SIZE)
        end = address(flat)
        for view in views:
            assert view.flags.c_contiguous
            assert address(view) == end or view.size == 0
            end += view.nbytes
        assert end == address(flat) + flat.nbytes
        assert_same_bits(np.concatenate([view.ravel() for view in views]), flat)
        views[0][1, 2] = 99
        assert flat[5] == 99


@pytest.mark.parametrize("elements", [1, 1000, MIB - 1, MIB, MIB + 1, 3 * MIB])
def test_alignment(elements: int) -> None:
    buffer = sgdcore.ParameterBuffer({"a": (1,), "rest": (elements - 1,)})
    optimizer = sgdcore.SGD(buffer, lr=0.1, momentum=0.9)
    optimizer.step()
    arrays = (buffer.data, buffer.grad, momentum_of(optimizer)[0])
    assert all(address(array) % 64 == 0 for array in arrays)
    if buffer.data.nbytes < 2 * _core.huge_page:
        return
    assert all(address(array) % _core.huge_page < 1 << 15 for array in arrays)
    # A multiple of a large power of two apart they would be slow: csrc/buffer.cpp.
    assert len({address(array) % _core.huge_page // 4096 for array in arrays}) == 3


def test_mapping() -> None:
    buffer = filled()
    assert "w" in buffer
    assert "v" not in buffer
    assert buffer.get("v") is None
    assert buffer.parameters() == list(buffer.values())
    assert buffer.named_parameters() == list(buffer.items())
    assert [p.name for p in buffer.values()] == list(SHAPES)
    assert all(p.buffer is buffer for p in buffer.values())
    same = buffer
    assert buffer == same
    assert buffer != sgdcore.ParameterBuffer(SHAPES)
    assert len({buffer, buffer["w"], buffer["b"]}) == 3
    assert repr(buffer) == (
        "ParameterBuffer({'w': (2, 3), 'scalar': (), 'empty': (0, 4), 'b': (3,), 'cube': (2, 1, 2)}, "
        "dtype=float32)"
    )
    assert repr(buffer["b"]) == "Parameter(name='b', shape=(3,), dtype=float32)"
    assert [(p.size, p.dtype) for p in buffer.values()] == [
        (size, np.float32) for size in (6, 1, 0, 3, 4)
    ]


def test_buffer_of_nothing() -> None:
    for shapes in ({}, {"empty": (3, 0)}):
        buffer = sgdcore.ParameterBuffer(shapes)
        assert buffer.data.shape == buffer.grad.shape == (0,)
        optimizer = sgdcore.SGD(buffer, **FULL)
        optimizer.step()
        optimizer.step(zero_grad=True)
        optimizer.zero_grad()
        assert_same_training(optimizer, copy.deepcopy(optimizer))


# --- Where the values come from -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_values_are_copied_from_arrays(dtype: str) -> None:
    storage = STORAGE_TYPES[dtype]
    a = numbers(0, (2, 3), storage)
    b = np.asfortranarray(numbers(1, (3, 4), storage))
    c = sgdcore.Parameter(numbers(2, (), storage))
    d = numbers(3, (8,), storage)[::-2]
    d.flags.writeable = False
    buffer = sgdcore.ParameterBuffer({"a": a, "b": b, "c": c, "d": d})
    assert buffer.dtype == storage
    for name, value in {"a": a, "b": b, "c": c.data, "d": d}.items():
        assert_same_bits(buffer[name].data, np.array(value))
        assert not np.shares_memory(buffer[name].data, value)
    assert buffer["b"].data.flags.c_contiguous
    assert not buffer.grad.any()


def test_shapes_and_arrays_may_be_mixed() -> None:
    buffer = sgdcore.ParameterBuffer({"w": numbers(0, (2, 3), np.float64), "b": (3,)})
    assert buffer.dtype == np.float64
    assert_same_bits(buffer.data, np.concatenate([numbers(0, (6,), np.float64), np.zeros(3)]))


@pytest.mark.parametrize("target", STORAGE_TYPES)
@pytest.mark.parametrize("source", STORAGE_TYPES)
def test_arrays_are_converted_to_a_dtype_that_is_asked_for(source: str, target: str) -> None:
    values = numbers(0, (5,), STORAGE_TYPES[source])
    buffer = sgdcore.ParameterBuffer({"v": values, "w": numbers(1, (2,))}, target)
    assert_same_bits(buffer["v"].data, values.astype(STORAGE_TYPES[target]))
    assert_same_bits(buffer["w"].data, numbers(1, (2,)).astype(STORAGE_TYPES[target]))


def test_buffer_from_a_buffer() -> None:
    first = filled()
    second = sgdcore.ParameterBuffer(first, "float64")
    assert_same_bits(second.data, first.data.astype(np.float64))
    assert not np.shares_memory(first.data, second.data)


def test_gradients_of_their_own_dtype() -> None:
    buffer = sgdcore.ParameterBuffer(SHAPES, "bfloat16", grad_dtype=np.float32)
    assert buffer.dtype == BFLOAT16
    assert buffer.grad.dtype == buffer["w"].grad.dtype == np.float32
    buffer.data[:] = numbers(0, (SIZE,), BFLOAT16)
    reference = ReferenceSGD([buffer.data], **FULL)
    optimizer = sgdcore.SGD(buffer, **FULL)
    for step in range(2):
        buffer.grad[:] = numbers(step, (SIZE,))
        reference.step([buffer.grad])
        optimizer.step()
    assert_same_bits(buffer.data, reference.params[0])


def test_memory_of_the_caller_is_used_as_it_is() -> None:
    memory, grads = numbers(0, (SIZE,), np.float64), numbers(1, (SIZE,))
    buffer = sgdcore.ParameterBuffer(SHAPES, data=memory, grad=grads)
    assert buffer.data is memory
    assert buffer.grad is grads
    assert_same_bits(memory, numbers(0, (SIZE,), np.float64))
    assert_same_bits(grads, numbers(1, (SIZE,)))
    assert np.shares_memory(buffer["cube"].data, memory[-4:])
    assert np.shares_memory(buffer["cube"].grad, grads[-4:])
    reference = ReferenceSGD([memory], **FULL)
    reference.step([grads])
    optimizer = sgdcore.SGD(buffer, **FULL)
    optimizer.step(zero_grad=True)
    assert_same_bits(memory, reference.params[0])
    assert not grads.any()


def test_memory_of_the_caller_takes_the_values_of_given_arrays() -> None:
    memory = numbers(0, (5,))
    buffer = sgdcore.ParameterBuffer({"a": (2,), "b": numbers(1, (3,))}, data=memory)
    assert_same_bits(memory, np.concatenate([numbers(0, (5,))[:2], numbers(1, (3,))]))
    assert buffer.grad.dtype == np.float32
    assert not buffer.grad.any()


def test_arrays_may_lie_in_the_memory_they_are_copied_to() -> None:
    memory = np.arange(6, dtype=np.float32)
    parameters = {"a": memory[3:], "b": sgdcore.Parameter(memory[:3])}
    sgdcore.ParameterBuffer(parameters, data=memory)
    assert_same_bits(memory, np.array([3, 4, 5, 0, 1, 2], np.float32))


def test_memory_of_the_caller_may_be_unaligned_and_not_its_own() -> None:
    memory = np.frombuffer(bytearray(4 * 70_000 + 1), np.float32, offset=1)
    memory[:] = numbers(0, (70_000,))
    buffer = sgdcore.ParameterBuffer({"a": 30_000, "b": (200, 200)}, data=memory)
    buffer.grad[:] = numbers(1, (70_000,))
    reference = ReferenceSGD([np.array(memory)], **FULL)
    reference.step([buffer.grad])
    sgdcore.SGD(buffer, **FULL).step()
    assert_same_bits(memory, reference.params[0])


def test_tensor_as_memory_of_the_caller() -> None:
    tensor = torch.zeros(SIZE)
    buffer = sgdcore.ParameterBuffer(SHAPES, data=tensor.numpy())
    buffer["b"].data[:] = 7
    assert tensor[7:10].tolist() == [7, 7, 7]


# --- Gradients ------------------------------------------------------------------------------------

ASSIGNMENTS: dict[str, Callable[[], Any]] = {
    "float32": lambda: numbers(5, (2, 3)),
    "float64": lambda: numbers(5, (2, 3), np.float64),
    "bfloat16": lambda: numbers(5, (2, 3), BFLOAT16),
    "transposed": lambda: numbers(5, (3, 2)).T,
    "broadcast": lambda: np.broadcast_to(numbers(5, (3,)), (2, 3)),
    "tensor": lambda: torch.from_numpy(numbers(5, (2, 3))),
    "bfloat16 tensor": lambda: torch.from_numpy(numbers(5, (2, 3))).bfloat16(),
    "parameter": lambda: sgdcore.Parameter(numbers(5, (2, 3))),
}


@pytest.mark.parametrize("kind", ASSIGNMENTS)
def test_assigned_gradient_is_copied_into_the_buffer(kind: str) -> None:
    buffer = filled()
    view, rest = buffer["w"].grad, buffer.grad[6:].copy()
    grad = ASSIGNMENTS[kind]()
    buffer["w"].grad = grad
    assert buffer["w"].grad is view
    if isinstance(grad, torch.Tensor):
        grad = grad.float().numpy()
    assert_same_bits(view, np.asarray(grad).astype(np.float32))
    assert_same_bits(buffer.grad[:6], view.ravel())
    assert_same_bits(buffer.grad[6:], rest)


def test_assigned_gradient_of_the_same_memory() -> None:
    buffer = filled()
    expected = buffer["w"].grad.copy()
    buffer["w"].grad = buffer["w"].grad
    buffer["w"].grad = buffer.grad[:6].reshape(2, 3)
    assert_same_bits(buffer["w"].grad, expected)
    buffer["b"].grad = buffer["b"].grad[::-1]
    assert_same_bits(buffer["b"].grad, numbers(1, (SIZE,))[7:10][::-1])


def test_gradient_added_to_in_place() -> None:
    buffer = filled()
    view = buffer["b"].grad
    expected = view + numbers(9, (3,))
    buffer["b"].grad += numbers(9, (3,))
    assert buffer["b"].grad is view
    assert_same_bits(buffer.grad[7:10], expected)
    buffer["scalar"].grad += 1
    assert buffer.grad[6] == numbers(1, (SIZE,))[6] + 1


def test_none_skips_until_the_next_assignment() -> None:
    buffer = filled()
    optimizer = sgdcore.SGD(buffer, **FULL)
    reference = ReferenceSGD([p.data for p in buffer.values()], **FULL)

    def step() -> None:
        reference.step([None if p.grad is None else p.grad.copy() for p in buffer.values()])
        optimizer.step()
        for parameter, expected in zip(buffer.values(), reference.params, strict=True):
            assert_same_bits(parameter.data, expected, parameter.name)
        for got, expected in zip(momentum_of(optimizer), reference.momentum_buffers, strict=True):
            assert_same_bits(got, expected)

    view = buffer["b"].grad
    step()
    buffer["b"].grad = None
    assert buffer["b"].grad is None
    buffer.grad[:] = numbers(2, (SIZE,))
    step()
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    assert buffer["b"].grad is None
    # Not cleared either: it is not a gradient now.
    assert_same_bits(view, numbers(2, (SIZE,))[7:10])
    step()
    buffer["b"].grad = numbers(3, (3,))
    assert buffer["b"].grad is view
    step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_keeps_the_views(set_to_none: bool) -> None:
    buffer = filled()
    optimizer = sgdcore.SGD(buffer, **FULL)
    optimizer.step()
    views = [p.grad for p in buffer.values()]
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is view for p, view in zip(buffer.values(), views, strict=True))
    assert not buffer.grad.any()
    reference = ReferenceSGD([buffer.data], **FULL)
    reference.momentum_buffers = [momentum_of(optimizer)[0].base.copy()]
    optimizer.step()
    reference.step([np.zeros(SIZE, np.float32)])
    assert_same_bits(buffer.data, reference.params[0])


# --- The step over a buffer -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["own", "given", "zero_grad"])
@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_flat_and_separate_give_the_same_bits(dtype: str, way: str) -> None:
    storage = STORAGE_TYPES[dtype]
    buffer = filled(storage)
    apart = [sgdcore.Parameter(p.data.copy()) for p in buffer.values()]
    flat, separate = sgdcore.SGD(buffer, **FULL), sgdcore.SGD(apart, **FULL)
    for step in range(3):
        grads = [numbers(10 * step + i, p.shape, storage) for i, p in enumerate(apart)]
        for parameter, grad in zip(apart, grads, strict=True):
            parameter.grad = grad.copy()
        separate.step()
        if way == "given":
            flat.step(grads=grads)
        else:
            for parameter, grad in zip(buffer.values(), grads, strict=True):
                parameter.grad = grad
            flat.step(zero_grad=way == "zero_grad")
            assert buffer.grad.any() == (way == "own")
        assert_same_training(flat, separate)


def test_momentum_is_one_flat_array() -> None:
    buffer = filled()
    optimizer = sgdcore.SGD(buffer, **FULL)
    optimizer.step()
    momentum = momentum_of(optimizer)
    flat = momentum[0].base
    assert all(each.base is flat for each in momentum)
    assert flat.size == SIZE
    assert_same_bits(np.concatenate([each.ravel() for each in momentum]), flat)
    assert address(momentum[3]) == address(flat) + 4 * 7


def test_groups_of_one_buffer_share_a_flat_momentum() -> None:
    buffer = filled()
    w, scalar, empty, b, cube = buffer.values()
    optimizer = sgdcore.SGD(
        [{"params": [w, empty]}, {"params": [b, cube], "lr": 0.5}, {"params": scalar}], **FULL
    )
    reference = [ReferenceSGD([p.data], **FULL) for p in parameters_of(optimizer)]
    for each in reference[2:4]:
        each.hyper["lr"] = 0.5
    for step in range(2):
        buffer.grad[:] = numbers(step, (SIZE,))
        for each, parameter in zip(reference, parameters_of(optimizer), strict=True):
            each.step([parameter.grad])
        optimizer.step()
    for each, parameter in zip(reference, parameters_of(optimizer), strict=True):
        assert_same_bits(parameter.data, each.params[0])
    assert len({id(each.base) for each in momentum_of(optimizer)}) == 1


def test_momentum_of_several_buffers_and_dtypes() -> None:
    first, second = filled(), filled(np.float64)
    optimizer = sgdcore.SGD(
        [
            {"params": first},
            {"params": second, "momentum_dtype": "float32"},
            {"params": numbers(0, (2,))},
        ],
        **FULL,
    )
    optimizer.step(grads=[p.grad for b in (first, second) for p in b.values()] + [numbers(1, (2,))])
    momentum = momentum_of(optimizer)
    assert len({id(each.base) for each in momentum[:5]}) == 1
    assert len({id(each.base) for each in momentum[5:10]}) == 1
    assert momentum[0].base is not momentum[5].base
    assert {each.dtype.name for each in momentum} == {"float32"}
    assert momentum[10].base is None


def test_buffer_as_named_parameters() -> None:
    buffer = filled()
    optimizer = sgdcore.SGD(buffer.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == list(SHAPES)
    assert parameters_of(optimizer) == buffer.parameters()


# --- Lifetimes ------------------------------------------------------------------------------------


def test_views_outlive_the_buffer_and_the_optimizer() -> None:
    def make() -> dict[str, Array]:
        buffer = filled()
        optimizer = sgdcore.SGD(buffer, **FULL)
        optimizer.step()
        return {
            "flat": buffer.data,
            "view": buffer["w"].data,
            "row": buffer["w"].data[1],
            "grad": buffer.grad,
            "grad view": buffer["b"].grad,
            "momentum": momentum_of(optimizer)[3],
            "exported": np.from_dlpack(buffer),
        }

    views = make()
    expected = {name: view.copy() for name, view in views.items()}
    gc.collect()
    for i in range(50):  # would take the memory over if it were free
        sgdcore.ParameterBuffer(SHAPES).data[:] = i
    for name, view in views.items():
        assert_same_bits(view, expected[name], name)
    for view in views.values():
        view[...] = 1
    only_row = views.pop("row")
    views.clear()
    gc.collect()
    assert only_row.tolist() == [1, 1, 1]


def test_parameter_keeps_its_buffer() -> None:
    parameter = filled()["b"]
    gc.collect()
    assert parameter.buffer["b"] is parameter
    assert_same_bits(parameter.buffer.data, numbers(0, (SIZE,)))


class _Canary:
    """Memory whose end can be seen: an array over it keeps it alive."""

    def __init__(self, size: int) -> None:
        self._array = numbers(0, (size,))
        self.__array_interface__ = self._array.__array_interface__


def watched(size: int) -> tuple[Array, weakref.ref[_Canary]]:
    canary = _Canary(size)
    return np.asarray(canary), weakref.ref(canary)


def _in_a_cycle(thing: Any) -> None:
    holder = [thing]
    holder.append(holder)


def test_buffer_is_collected() -> None:
    """A buffer and its parameters refer to each other; so does an optimizer, through its hooks."""
    memory, alive = watched(SIZE)
    buffer = sgdcore.ParameterBuffer(SHAPES, data=memory)
    dead = [weakref.ref(buffer), weakref.ref(buffer["w"])]
    optimizer = sgdcore.SGD(buffer, **FULL)
    optimizer.step()
    optimizer.register_step_post_hook(partial(print, optimizer))
    dead.append(weakref.ref(optimizer))
    del memory, buffer, optimizer
    gc.collect()
    assert [each() for each in dead] == [None] * 3
    assert alive() is None


@pytest.mark.parametrize("what", ["data", "grad", "momentum", "state", "optimizer", "group"])
def test_cycles_through_a_parameter_are_collected(what: str) -> None:
    class Holder(np.ndarray):
        """An array that may carry attributes."""

    memory, alive = watched(4)
    parameter = sgdcore.Parameter(memory if what != "data" else memory.view(Holder))
    optimizer = sgdcore.SGD([parameter], **FULL)
    parameter.grad = numbers(1, (4,)).view(Holder)
    optimizer.step()
    if what == "data":
        parameter.data.owner = parameter
    elif what == "grad":
        parameter.grad.owner = optimizer
    elif what == "momentum":
        momentum = numbers(2, (4,)).view(Holder)
        momentum.owner = optimizer
        optimizer.state[parameter]["momentum_buffer"] = momentum
        del momentum
    elif what == "state":
        optimizer.state[parameter]["mine"] = optimizer
    elif what == "optimizer":
        parameter.optimizer = optimizer
    else:
        optimizer.param_groups[0]["owner"] = optimizer
    dead = [weakref.ref(parameter), weakref.ref(optimizer)]
    del memory, parameter, optimizer
    gc.collect()
    assert [each() for each in dead] == [None, None]
    assert alive() is None


def test_collecting_while_in_use_harms_nothing() -> None:
    buffer = filled()
    optimizer = sgdcore.SGD(buffer, **FULL)
    twin = sgdcore.SGD(filled(), **FULL)
    for _ in range(3):
        gc.collect()
        optimizer.step()
        twin.step()
    assert_same_training(optimizer, twin)


@pytest.mark.parametrize("what", ["parameter", "grad", "given", "momentum", "data"])
def test_replaced_and_given_arrays_are_let_go(what: str) -> None:
    memory, alive = watched(4)
    parameter = sgdcore.Parameter(memory if what in ("parameter", "data") else numbers(0, (4,)))
    optimizer = sgdcore.SGD([parameter], **FULL)
    parameter.grad = memory if what == "grad" else numbers(1, (4,))
    optimizer.step(grads=[memory] if what == "given" else None)
    if what == "momentum":
        optimizer.state[parameter]["momentum_buffer"] = memory
        optimizer.step()
        del optimizer.state[parameter]["momentum_buffer"]
    elif what == "grad":
        optimizer.zero_grad()
    elif what == "data":
        parameter.data = numbers(2, (4,))
    elif what == "parameter":
        del parameter, optimizer
    del memory
    gc.collect()
    assert alive() is None


def test_array_in_use_cannot_be_resized() -> None:
    data, grad, given = numbers(0, (4,)), numbers(1, (4,)), numbers(2, (4,))
    parameter = sgdcore.Parameter(data)
    parameter.grad = grad
    optimizer = sgdcore.SGD([parameter], **FULL)
    optimizer.step()
    momentum = momentum_of(optimizer)[0]
    for array in (data, grad, momentum):
        with pytest.raises(
            ValueError, match="cannot resize an array that references or is referenced"
        ):
            array.resize(10_000)
    optimizer.step(grads=[given])
    given.resize(8)  # a given gradient is held during its step only
    parameter.grad = None
    grad.resize(8)


def test_arrays_of_a_buffer_cannot_be_resized() -> None:
    buffer = filled()
    for array in (buffer.data, buffer.grad, buffer["w"].data):
        with pytest.raises(ValueError, match="cannot resize this array: it does not own its data"):
            array.resize(10_000)


def test_old_array_sees_the_new_one_in_its_place() -> None:
    """Releasing an array may run Python code, which must not meet a half-assigned parameter."""

    class Memory:
        """Steps the optimizer when its array goes."""

        def __init__(self, seed: int) -> None:
            self._array = numbers(seed, (4,))
            self.__array_interface__ = self._array.__array_interface__

        def __del__(self) -> None:
            self._array[:] = np.nan
            optimizer.step()

    parameter = sgdcore.Parameter(numbers(0, (4,)))
    optimizer = sgdcore.SGD([parameter], **FULL)
    reference = ReferenceSGD([numbers(0, (4,))], **FULL)

    parameter.grad = np.asarray(Memory(1))
    parameter.grad = numbers(2, (4,))
    reference.step([numbers(2, (4,))])
    assert_same_bits(parameter.data, reference.params[0])

    parameter.grad = np.asarray(Memory(1))
    parameter.grad = None  # the step finds no gradient
    assert_same_bits(parameter.data, reference.params[0])

    parameter.grad = numbers(3, (4,))
    before = reference.params[0].copy()
    parameter.data = np.asarray(Memory(1))
    parameter.data = before
    reference.step([numbers(3, (4,))])
    assert_same_bits(parameter.data, reference.params[0])

    optimizer.state[parameter]["momentum_buffer"] = np.asarray(Memory(1))
    optimizer.state[parameter]["momentum_buffer"] = numbers(4, (4,))
    reference.momentum_buffers = [numbers(4, (4,))]
    reference.step([numbers(3, (4,))])
    assert_same_bits(parameter.data, reference.params[0])
    assert_same_bits(momentum_of(optimizer)[0], reference.momentum_buffers[0])


# --- DLPack: others look at our memory --------------------------------------------------------------

EXPORTS: dict[str, Callable[[], Any]] = {
    "buffer": filled,
    "parameter in a buffer": lambda: filled()["w"],
    "parameter": lambda: sgdcore.Parameter(numbers(0, (2, 3), np.float64)),
    "scalar": lambda: sgdcore.Parameter(numbers(0, ())),
    "empty": lambda: filled()["empty"],
    "Fortran order": lambda: sgdcore.Parameter(np.array(numbers(0, (2, 3)), order="F")),
    "permuted": lambda: sgdcore.Parameter(numbers(0, (4, 2, 3), np.float16).transpose(1, 2, 0)),
}


@pytest.mark.parametrize("consumer", [np.from_dlpack, torch.from_dlpack], ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", EXPORTS)
def test_export_shares_memory(kind: str, consumer: Any) -> None:
    thing = EXPORTS[kind]()
    view = consumer(thing)
    array = view if isinstance(view, np.ndarray) else view.numpy()
    assert_same_bits(array, thing.data)
    assert array.strides == thing.data.strides or array.size == 0
    assert array.flags.writeable
    if array.size:
        assert np.shares_memory(array, thing.data)
        array[...] = 5
        assert thing.data.all()


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_export_of_bfloat16_to_torch(kind: str) -> None:
    buffer = filled(BFLOAT16)
    thing = buffer if kind == "buffer" else buffer["w"]
    tensor = torch.from_dlpack(thing)
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == thing.data.astype(np.float32).tolist()
    tensor.mul_(2)
    assert_same_bits(
        thing.data.ravel(), numbers(0, (SIZE,), BFLOAT16)[: tensor.numel()] * BFLOAT16.type(2)
    )
    assert torch.utils.dlpack.from_dlpack(buffer["b"].__dlpack__()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "dltensor"),
        ({"max_version": None}, "dltensor"),
        ({"max_version": (0, 8)}, "dltensor"),
        ({"max_version": (1, 0)}, "dltensor_versioned"),
        ({"max_version": (1, 1), "dl_device": (1, 0), "copy": None}, "dltensor_versioned"),
        ({"max_version": (2, 0), "stream": None, "copy": True}, "dltensor_versioned"),
    ],
    ids=str,
)
def test_export_versions(arguments: dict[str, Any], name: str) -> None:
    for thing in (filled(), filled()["w"]):
        assert f'"{name}"' in repr(thing.__dlpack__(**arguments))
        assert thing.__dlpack_device__() == (1, 0)


@pytest.mark.parametrize("thing", ["buffer", "parameter"])
def test_export_copies_if_asked_to(thing: str) -> None:
    exported = EXPORTS[thing]()
    for consumer in (np.from_dlpack, torch.from_dlpack):
        copied = np.asarray(consumer(exported, copy=True))
        assert_same_bits(copied, exported.data)
        assert not np.shares_memory(copied, exported.data)
        assert np.shares_memory(np.asarray(consumer(exported, copy=False)), exported.data)


@pytest.mark.parametrize("version", [None, (1, 0)], ids=["unversioned", "versioned"])
@pytest.mark.parametrize(
    "fate", ["never taken", "taken by torch", "taken by sgdcore", "taken by NumPy"]
)
def test_exported_memory_is_freed(fate: str, version: Any) -> None:
    memory, alive = watched(6)
    parameter = sgdcore.Parameter(memory)
    del memory

    class Old:
        """A producer of one version only."""

        def __init__(self, capsule: Any) -> None:
            self.capsule = capsule

        def __dlpack__(self, **_: Any) -> Any:
            return self.capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    taken: Any = Old(parameter.__dlpack__(max_version=version))
    if fate == "taken by torch":
        taken = torch.from_dlpack(taken)
    elif fate == "taken by sgdcore":
        taken = sgdcore._core.from_dlpack(taken)
    elif fate == "taken by NumPy":
        taken = np.from_dlpack(taken)
    del parameter
    gc.collect()
    assert alive() is not None
    if fate != "never taken":
        assert np.array_equal(np.asarray(taken), numbers(0, (6,)))
    del taken
    gc.collect()
    assert alive() is None


def test_exports_do_not_pile_up() -> None:
    parameter = sgdcore.Parameter(numbers(0, (6,)))
    references = sys.getrefcount(parameter.data)
    for _ in range(100):
        torch.from_dlpack(parameter)
        np.from_dlpack(parameter)
        parameter.__dlpack__(max_version=(1, 0))
        parameter.__dlpack__()
    references_now = sys.getrefcount(parameter.data)
    assert references_now == references


def test_capsule_is_taken_only_once() -> None:
    class Twice:
        def __init__(self) -> None:
            self.capsule = filled().__dlpack__()

        def __dlpack__(self, **_: Any) -> Any:
            return self.capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    twice = Twice()
    taken = sgdcore._core.from_dlpack(twice)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer called with incorrect name"):
        sgdcore._core.from_dlpack(twice)
    assert_same_bits(taken, numbers(0, (SIZE,)))


# --- DLPack: we look at the memory of others -------------------------------------------------------

TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "float64": lambda: torch.from_numpy(numbers(0, (2, 3), np.float64)),
    "float32": lambda: torch.from_numpy(numbers(0, (2, 3))),
    "float16": lambda: torch.from_numpy(numbers(0, (2, 3), np.float16)),
    "bfloat16": lambda: torch.from_numpy(numbers(0, (2, 3))).bfloat16(),
    "transposed": lambda: torch.from_numpy(numbers(0, (2, 3))).T,
    "part of a larger one": lambda: torch.from_numpy(numbers(0, (5, 3)))[1:4],
    "channels last": lambda: torch.from_numpy(numbers(0, (2, 3, 4, 4))).contiguous(
        memory_format=torch.channels_last
    ),
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.empty(0, 3),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensor_as_parameter_is_trained_where_it_is(kind: str) -> None:
    tensor = TENSORS[kind]()
    before = tensor.clone(memory_format=torch.preserve_format)
    parameter = sgdcore.Parameter(tensor)
    assert parameter.shape == tuple(tensor.shape)
    if tensor.numel():
        assert address(parameter.data) == tensor.data_ptr()
        strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
        assert parameter.data.strides == strides
    assert str(parameter.dtype) == str(tensor.dtype).removeprefix("torch.")
    optimizer = sgdcore.SGD([parameter], lr=1)
    parameter.grad = torch.ones_like(tensor)
    optimizer.step()
    assert torch.equal(tensor, before - 1)


def test_tensor_is_kept_alive_and_let_go() -> None:
    memory, alive = watched(4)
    tensor = torch.from_numpy(memory)
    tensor.fill_(1)
    parameter = sgdcore.Parameter(tensor)
    data = parameter.data
    del memory, tensor, parameter
    gc.collect()
    assert data.tolist() == [1, 1, 1, 1]
    del data
    gc.collect()
    assert alive() is None


def test_read_only_array_is_not_exported_to_an_old_consumer() -> None:
    memory = numbers(0, (3,))
    parameter = sgdcore.Parameter(memory)
    parameter.data.flags.writeable = False
    assert not np.from_dlpack(parameter).flags.writeable
    with pytest.raises(
        BufferError, match=r"^a read-only array needs a consumer that understands DLPack 1\.0$"
    ):
        parameter.__dlpack__()


def test_parameter_of_a_parameter_shares_its_memory() -> None:
    first = filled()["w"]
    second = sgdcore.Parameter(first)
    assert np.shares_memory(first.data, second.data)
    with pytest.raises(ValueError, match="overlap in memory"):
        sgdcore.SGD([first, second])


def test_parameter_as_an_array() -> None:
    parameter = filled()["w"]
    assert np.shares_memory(np.asarray(parameter), parameter.data)
    assert np.asarray(parameter, np.float64).dtype == np.float64
    assert not np.shares_memory(np.array(parameter), parameter.data)
    assert_same_bits(np.add(parameter, 1), parameter.data + 1)
    with pytest.raises(ValueError, match=r"avoid copy|Unable to avoid"):
        np.asarray(parameter, np.float64, copy=False)


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE_TYPES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling(protocol: int, dtype: str) -> None:
    buffer = filled(dtype)
    buffer["b"].grad = None
    parameter, other, same = pickle.loads(
        pickle.dumps((buffer["w"], buffer, buffer["w"]), protocol)
    )
    assert parameter is other["w"] is same
    assert repr(other) == repr(buffer)
    assert_same_bits(other.data, buffer.data)
    assert_same_bits(other.grad, buffer.grad)
    assert other["b"].grad is None
    assert other.data.flags.writeable
    assert address(other.data) % 64 == 0
    other["b"].grad = numbers(5, (3,))
    assert_same_bits(other.grad[7:10], numbers(5, (3,)).astype(other.dtype))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_copying_makes_new_memory(way: Any) -> None:
    memory = numbers(0, (SIZE,))
    buffer = sgdcore.ParameterBuffer(SHAPES, data=memory, grad_dtype="float64")
    other = way(buffer)
    assert_same_bits(other.data, memory)
    assert other.grad.dtype == np.float64
    assert not np.shares_memory(other.data, memory)
    other["w"].data[...] = 0
    assert memory.all()


class Model(sgdcore.ParameterBuffer):
    """A buffer with a method."""

    def norm(self) -> float:
        return float(np.linalg.norm(self.data))


def test_subclass_stays_one_when_copied() -> None:
    model = Model({"w": numbers(0, (3,))})
    other = pickle.loads(pickle.dumps(model))
    assert isinstance(other, Model)
    assert other.norm() == model.norm() > 0
