"""Arrays on CUDA devices in sgdcore.SGD and ParameterBuffer, on devices that are simulated on the CPU.

The kernel itself, its tables and streams are tested in tests/cpp; here it is what happens before they are reached.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import sgdcore
from processes import allow_fork, in_fork, stepping
from sgdcore import _core, _devices
from sgdcore.__main__ import main
from sgdcore.device_array import DeviceArray, device_number
from simulated import Simulated
from support import (
    BFLOAT16,
    STORAGE_TYPES,
    Array,
    assert_same_bits,
    numbers,
    parameters_of,
    refused,
)

SHAPES = {"w": (3, 5), "b": (5,), "empty": (0, 4), "v": (2, 20_000)}
HYPERS: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"lr": 0.3, "momentum": 0.5, "dampening": 0.5, "maximize": True},
]


@pytest.fixture
def device() -> Iterator[Simulated]:
    yield Simulated()
    _core.use_runtime(None)


def on_device(values: Array, device: int = 0) -> DeviceArray:
    array = DeviceArray.zeros(values.shape, values.dtype, device)
    array.assign(values)
    return array


class Interface:
    """An array of another library that has only __cuda_array_interface__, strided as it likes."""

    def __init__(self, array: DeviceArray, description: Array | None = None) -> None:
        self._array = array  # keeps the memory
        shown = (array._description if description is None else description).__array_interface__
        self.__cuda_array_interface__ = {
            key: shown[key] for key in ("shape", "typestr", "data", "strides")
        } | {"version": 3}


def same_training(ours: sgdcore.SGD, cpu: sgdcore.SGD) -> None:
    for group, other in zip(ours.param_groups, cpu.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert_same_bits(DeviceArray.of(p.data).numpy(), q.data, "parameter")
            momentum, expected = (
                ours.state[p].get("momentum_buffer"),
                cpu.state[q].get("momentum_buffer"),
            )
            assert (momentum is None) == (expected is None)
            if momentum is not None:
                assert_same_bits(momentum.numpy(), expected, "momentum")


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_buffer_on_a_device_has_the_cpus_bits(
    device: Simulated, dtype: str, hyper: dict[str, Any]
) -> None:
    values = {
        name: numbers(i, shape, STORAGE_TYPES[dtype])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    buffers = sgdcore.ParameterBuffer(values, device="cuda"), sgdcore.ParameterBuffer(values)
    ours, cpu = (sgdcore.SGD(buffer, **hyper) for buffer in buffers)
    for step in range(3):
        grad = numbers(10 + step, (buffers[1].size,), STORAGE_TYPES[dtype])
        buffers[0].grad.assign(grad)
        buffers[1].grad[:] = grad
        before = device["launches"]
        for optimizer in (ours, cpu):
            optimizer.step(zero_grad=step == 2)
        assert device["launches"] == before + 1
    same_training(ours, cpu)
    assert not buffers[0].grad.numpy().astype(np.float64).any()


def test_parameters_gradients_and_momentum_of_all_kinds(device: Simulated) -> None:
    rng = np.random.default_rng(1)
    pairs = []
    for p in STORAGE_TYPES.values():
        for g in STORAGE_TYPES.values():
            value, grad = numbers(len(pairs), (7, 3), p), numbers(100 + len(pairs), (7, 3), g)
            ours, cpu = sgdcore.Parameter(on_device(value)), sgdcore.Parameter(value.copy())
            ours.grad, cpu.grad = on_device(grad), grad
            pairs.append((ours, cpu))
    rng.shuffle(pairs)
    for momentum_dtype in STORAGE_TYPES:
        groups = [
            [{"params": [pair[i]], "lr": 0.1 / (j + 1)} for j, pair in enumerate(pairs)]
            for i in range(2)
        ]
        optimizers = [
            sgdcore.SGD(group, momentum=0.9, weight_decay=0.01, momentum_dtype=momentum_dtype)
            for group in groups
        ]
        before = device["launches"]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
        assert device["launches"] == before + 2
        same_training(*optimizers)


def test_layouts(device: Simulated) -> None:
    """Parameters in any order of axes; gradients transposed, reversed, repeated; through either protocol."""
    value, base = numbers(1, (4, 6)), numbers(2, (6, 4))
    gradients = {
        "transposed": (base, lambda a: a.T),
        "reversed": (numbers(3, (4, 6)), lambda a: a[::-1, ::-1]),
        "row repeated": (numbers(4, (1, 6)), lambda a: np.broadcast_to(a, (4, 6))),
        "every other": (numbers(5, (4, 12)), lambda a: a[:, ::2]),
    }
    for order in "CF":
        for name, (memory, view) in gradients.items():
            start = np.array(value, order=order)
            flat = on_device(np.ravel(start, order="K"))
            description = flat._description.reshape((4, 6), order=order)
            ours = sgdcore.Parameter(Interface(flat, description))
            held = on_device(memory)
            ours.grad = Interface(held, view(held._description))
            cpu = sgdcore.Parameter(start.copy(order="K"))
            cpu.grad = view(memory)
            optimizers = [sgdcore.SGD([p], lr=0.1, momentum=0.9) for p in (ours, cpu)]
            for _ in range(2):
                for optimizer in optimizers:
                    optimizer.step()
            assert_same_bits(flat.numpy(), np.ravel(cpu.data, order="K"), f"{order}, {name}")
            momentum, expected = (
                next(iter(o.state.values()))["momentum_buffer"] for o in optimizers
            )
            assert momentum.strides == expected.strides
            assert_same_bits(momentum.numpy(), expected, f"{order}, {name}")


def test_several_devices_and_the_cpu_in_one_optimizer(device: Simulated) -> None:
    values = [numbers(i, (50,)) for i in range(5)]
    places = [0, 1, None, 1, 0]
    ours = [
        sgdcore.Parameter(v.copy() if place is None else on_device(v, place))
        for v, place in zip(values, places, strict=True)
    ]
    cpu = [sgdcore.Parameter(v.copy()) for v in values]
    for i, (p, q) in enumerate(zip(ours, cpu, strict=True)):
        q.grad = numbers(20 + i, (50,))
        p.grad = q.grad if places[i] is None else on_device(q.grad, places[i] or 0)
    optimizers = [sgdcore.SGD(params, lr=0.1, momentum=0.9) for params in (ours, cpu)]
    before = device["launches"]
    for optimizer in optimizers:
        optimizer.step()
    assert device["launches"] == before + 2  # one for each device
    for p, q in zip(ours, cpu, strict=True):
        array = p.data if isinstance(p.data, np.ndarray) else p.data.numpy()
        assert_same_bits(array, q.data)


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_of_a_device_says_which_were_stepped(device: Simulated, failing: int) -> None:
    value, grad = numbers(1, (50,)), numbers(2, (50,))
    params = [sgdcore.Parameter(on_device(value, number)) for number in (1, 0)]
    for number, parameter in zip((1, 0), params, strict=True):
        parameter.grad = on_device(grad, number)
    cpu = sgdcore.Parameter(value.copy())
    cpu.grad = grad
    optimizer = sgdcore.SGD([*params, cpu], lr=0.1)
    device.fail("launch", failing)
    stepped = "; before that, the parameters were updated on CUDA device 0" if failing else ""
    with pytest.raises(_core.CudaError, match=f"^launch on device {failing}: .* told to{stepped}$"):
        optimizer.step()
    assert_same_bits(params[0].data.numpy(), value)
    assert_same_bits(cpu.data, value)
    assert (params[1].data.numpy() == value).all() == (failing == 0)


def test_numbers_on_the_device_are_read_there(device: Simulated) -> None:
    value, grad = numbers(1, (30,)), numbers(2, (30,))
    lr, weight_decay = on_device(np.float32([0.1])), on_device(np.float64([0.0]))
    ours, cpu = sgdcore.Parameter(on_device(value)), sgdcore.Parameter(value.copy())
    on_cpu_too = sgdcore.Parameter(value.copy())  # needs the numbers on the host
    optimizers = []
    for params in ([ours, on_cpu_too], [cpu]):
        optimizers.append(sgdcore.SGD(params, lr=0.1, momentum=0.9))
        for parameter in params:
            parameter.grad = grad if parameter is not ours else on_device(grad)
    optimizers[0].param_groups[0].update(lr=lr, weight_decay=weight_decay)
    for rate, decay in ((0.1, 0.0), (0.05, 0.01), (0.5, 0.0)):
        lr.assign(np.float32([rate]))
        weight_decay.assign([decay])
        optimizers[1].param_groups[0].update(lr=float(np.float32(rate)), weight_decay=decay)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(ours.data.numpy(), cpu.data)
    assert_same_bits(on_cpu_too.data, cpu.data)


def test_checkpoints_go_between_devices_and_the_cpu(device: Simulated) -> None:
    values = {"w": numbers(1, (3, 4)), "b": numbers(2, (4,))}
    grad = numbers(3, (16,))
    buffers = [sgdcore.ParameterBuffer(values, device=d) for d in ("cuda:1", None)]
    ours, cpu = (sgdcore.SGD(buffer, lr=0.1, momentum=0.9) for buffer in buffers)
    buffers[0].grad.assign(grad)
    buffers[1].grad[:] = grad
    for optimizer in (ours, cpu):
        optimizer.step()
    other = sgdcore.SGD(sgdcore.ParameterBuffer(buffers[1], device="cuda"), lr=0.5)
    other.load_state_dict(cpu.state_dict())
    same_training(other, cpu)
    back = sgdcore.SGD(sgdcore.ParameterBuffer(buffers[1]), lr=0.5)
    back.load_state_dict(ours.state_dict())
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        same_training(copied, cpu)
        assert copied.param_groups[0]["params"][0].buffer.data.device == 1
        copied.step()
    cpu.step()
    back.step()
    ours.step()
    same_training(ours, cpu)


def test_checkpoint_in_another_memory_order_on_the_device(device: Simulated) -> None:
    values, momentum = numbers(1, (3, 4)), numbers(2, (3, 4))
    ours = sgdcore.Parameter(on_device(values))
    optimizer = sgdcore.SGD([ours], lr=0.1, momentum=0.9)
    ours.grad = on_device(numbers(3, (3, 4)))
    optimizer.step()
    checkpoint = optimizer.state_dict()
    flat = on_device(np.ravel(momentum, order="F"))
    fortran = Interface(flat, flat._description.reshape((3, 4), order="F"))
    checkpoint["state"][0] = {"momentum_buffer": fortran, "note": 1}
    optimizer.load_state_dict(checkpoint)
    loaded = optimizer.state[ours]["momentum_buffer"]
    assert loaded.strides == ours.data.strides
    assert_same_bits(loaded.numpy(), momentum)
    assert optimizer.state[ours]["note"] == 1


def test_failed_copy_of_a_checkpoint_leaves_the_state(
    device: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = sgdcore.Parameter(on_device(numbers(1, (4,))))
    optimizer = sgdcore.SGD([ours], lr=0.1, momentum=0.9)
    ours.grad = on_device(numbers(2, (4,)))
    optimizer.step()
    before = optimizer.state[ours]["momentum_buffer"]

    def fail(*_: Any) -> None:
        raise _core.CudaError("copy on device 0: failed as it was told to")

    monkeypatch.setattr(DeviceArray, "assign", fail)
    with pytest.raises(_core.CudaError):
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[ours]["momentum_buffer"] is before


def test_gradients_in_a_buffer_and_given_to_the_step(device: Simulated) -> None:
    values = {"w": numbers(1, (3, 4)), "b": numbers(2, (4,))}
    buffers = [sgdcore.ParameterBuffer(values, device=d) for d in ("cuda", None)]
    ours, cpu = (sgdcore.SGD(buffer, lr=0.1) for buffer in buffers)
    grads = [numbers(3, (3, 4)), numbers(4, (4,))]
    for (name, p), grad in zip(buffers[0].items(), grads, strict=True):
        p.grad = grad  # copied from the host
        buffers[1][name].grad = grad
    for optimizer in (ours, cpu):
        optimizer.step()
    ours.step(grads=[on_device(g) for g in grads])
    cpu.step(grads=grads)
    same_training(ours, cpu)
    ours.zero_grad()
    assert not buffers[0].grad.numpy().any()
    buffers[0]["b"].grad = on_device(grads[1])
    assert_same_bits(buffers[0].grad.numpy()[12:], grads[1])


def test_zero_grad_of_what_cannot_be_zeroed_clears_nothing(device: Simulated) -> None:
    values = numbers(1, (3, 4))
    plain, other = (sgdcore.Parameter(on_device(values)) for _ in range(2))
    plain.grad = on_device(values)
    held = on_device(numbers(2, (4, 3)))
    other.grad = Interface(held, held._description.T)
    optimizer = sgdcore.SGD([plain, other], lr=0.1)
    with pytest.raises(
        ValueError, match=r"^grad: .* of shape \(3, 4\) on a CUDA device does not lie"
    ):
        optimizer.zero_grad(set_to_none=False)
    assert_same_bits(plain.grad.numpy(), values)
    optimizer.zero_grad()
    assert plain.grad is other.grad is None


class WithReference(DeviceArray):
    """An array that refers to something else."""

    to: Any


def test_cycles_through_arrays_on_a_device_are_collected(device: Simulated) -> None:
    arrays = [WithReference.zeros(4) for _ in range(4)]
    data, grad, momentum, buffer_grad = arrays
    parameter = sgdcore.Parameter(data)
    parameter.grad = grad
    optimizer = sgdcore.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = momentum
    data.to = grad.to = momentum.to = optimizer
    in_a_buffer = _core.Parameter(DeviceArray.zeros(4), buffer_grad=buffer_grad)
    buffer_grad.to = in_a_buffer
    alive = [weakref.ref(array) for array in arrays]
    gc.collect()
    assert all(ref() is not None for ref in alive)
    del arrays, data, grad, momentum, buffer_grad, parameter, optimizer, in_a_buffer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_memory_that_is_given_to_a_buffer(device: Simulated) -> None:
    data, grad = on_device(numbers(1, (6,))), on_device(numbers(2, (6,)))
    buffer = sgdcore.ParameterBuffer({"a": (2, 2), "b": 2}, data=data, grad=grad, device=0)
    sgdcore.SGD(buffer, lr=1.0).step()
    assert_same_bits(data.numpy(), numbers(1, (6,)) - numbers(2, (6,)))
    for _, kwargs, error in (
        ("a NumPy array", {"data": np.zeros(6, np.float32), "device": 0}, TypeError),
        ("a device's array for the CPU", {"data": data}, TypeError),
        ("another device", {"data": data, "device": 1}, ValueError),
        ("another size", {"data": on_device(numbers(1, (5,))), "device": 0}, ValueError),
        ("no such device", {"device": 2}, ValueError),
        ("no device at all", {"device": "tpu"}, ValueError),
        ("a flag", {"device": True}, ValueError),
    ):
        with pytest.raises(error, match=r"^(data|device): expected "):
            sgdcore.ParameterBuffer({"a": (2, 2), "b": 2}, **kwargs)


@pytest.mark.parametrize("place", [None, "cpu", -1, "cuda", "cuda:1", 0, np.int64(1)])
def test_a_parameters_device_places_another_buffer(device: Simulated, place: Any) -> None:
    first = sgdcore.ParameterBuffer({"w": 3}, device=place)["w"]
    second = sgdcore.ParameterBuffer({"w": 3}, device=first.device)["w"]
    assert first.device == second.device == device_number(place)
    assert isinstance(second.data, np.ndarray if place in (None, "cpu", -1) else DeviceArray)


@pytest.mark.parametrize("place", [-2, "-1", "cuda:-1", "cuda:", 1.0])
def test_no_device(device: Simulated, place: Any) -> None:
    expected = r"'cpu', 'cuda', 'cuda:<number>', a number from 0 on or -1 for the CPU"
    with pytest.raises(ValueError, match=f"^device: expected {expected}, got {place!r}$"):
        sgdcore.ParameterBuffer({"w": 3}, device=place)
    assert device["allocations"] == 0


def test_refusals_change_nothing(device: Simulated) -> None:
    value = numbers(1, (4,))
    ours = sgdcore.Parameter(on_device(value), "w")
    ours.grad = on_device(value)
    optimizer = sgdcore.SGD([ours], lr=0.1, momentum=0.9)
    optimizer.step()
    before = ours.data.numpy()

    def set_momentum(array: Any) -> None:
        optimizer.state[ours]["momentum_buffer"] = array

    def set_grad(array: Any) -> None:
        ours.grad = array

    def set_data(array: Any) -> None:
        ours.data = array

    places: dict[str, Any] = {
        "grad": set_grad,
        "data": set_data,
        "momentum_buffer": set_momentum,
        "grads[0]": lambda array: optimizer.step(grads=[array]),
    }
    for name, assign in places.items():
        start = "^" + name.replace("[", r"\[").replace("]", r"\]")
        for array, words in (
            (
                value.copy(),
                "expected an array on CUDA device 0, where the parameter is, got one on the CPU",
            ),
            (on_device(value, 1), "got one on CUDA device 1"),
            (on_device(numbers(1, (5,))), "expected shape"),
        ):
            with pytest.raises(ValueError, match=f"{start}: .*{words}"):
                assign(array)
    cpu = sgdcore.Parameter(value.copy())
    with pytest.raises(
        ValueError,
        match=r"^grad: expected an array on the CPU, where the parameter is, got one on CUDA",
    ):
        cpu.grad = ours.data
    integers = Interface(on_device(value), on_device(value)._description.view(np.int32))
    with pytest.raises(TypeError, match=r"^data: expected dtype"):
        sgdcore.Parameter(integers)
    with pytest.raises(ValueError, match=r"^data: expected memory of a CUDA device"):
        sgdcore.Parameter(Interface(on_device(value), value))
    with pytest.raises(ValueError, match="overlap in memory"):
        sgdcore.SGD([ours, sgdcore.Parameter(ours.data[1:3])], lr=0.1)
    odd = on_device(np.zeros(8, np.float32))
    shifted = np.ndarray((4,), np.float32, odd._description.data, offset=2)
    misaligned = sgdcore.Parameter(Interface(odd, shifted))
    misaligned.grad = on_device(value)
    with pytest.raises(ValueError, match=r"address of a parameter, .*, is not a multiple"):
        sgdcore.SGD([misaligned], lr=0.1).step()
    assert_same_bits(ours.data.numpy(), before)
    with pytest.raises(TypeError, match="on CUDA device 0"):
        np.asarray(ours)


def test_device_array_shares_copies_and_refuses(device: Simulated) -> None:
    array = on_device(numbers(1, (3, 4)))
    again = DeviceArray.of(Interface(array))
    again.assign(np.ones((3, 4)))
    assert_same_bits(array.numpy(), np.ones((3, 4), np.float32))
    array[1:2].fill_zero()
    assert array.numpy().sum() == 8
    assert array.__dlpack_device__() == (2, 0)
    other = DeviceArray.zeros((3, 4), BFLOAT16)
    other.assign(numbers(2, (3, 4), BFLOAT16))
    parameter = sgdcore.Parameter(other)  # through DLPack, which has bfloat16
    assert parameter.dtype == BFLOAT16
    assert parameter.data is other
    assert not hasattr(other, "__cuda_array_interface__")
    assert float(on_device(np.float32([2.5]))) == 2.5
    copied = pickle.loads(pickle.dumps(other))
    assert_same_bits(copied.numpy(), other.numpy())
    with pytest.raises(TypeError, match="expected a slice"):
        array[0]  # type: ignore[index]
    with pytest.raises(ValueError, match="expected an array of dtype"):
        array.assign(other)
    with pytest.raises(ValueError, match="expected one on a CUDA device"):
        DeviceArray.of(np.zeros(3))


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("numpy", ()), ("assign", (1,)), ("fill_zero", ()), ("reshape", (-1,))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_device_array_with_gaps_is_refused(
    device: Simulated, method: str, arguments: tuple[Any, ...]
) -> None:
    values = numbers(1, (3, 4))
    array = on_device(values)
    flat = array._description.reshape(-1)  # of which any order is a view
    fortran = DeviceArray(flat.reshape((4, 3), order="F"), 0, array)
    for view, dense in (
        (array[::2], False),
        (array[::-1], False),
        (DeviceArray(array._description[:, :2], 0, array), False),
        (fortran[:2], False),
        (fortran, True),
    ):
        if dense and method != "reshape":
            continue
        with pytest.raises(ValueError, match=r"expected a contiguous array, .* strides \("):
            getattr(view, method)(*arguments)
    assert_same_bits(array.numpy(), values)
    assert_same_bits(fortran.numpy(), values.reshape(-1).reshape((4, 3), order="F"))


def test_the_state_is_untouched_where_a_step_is_refused(device: Simulated) -> None:
    cpu, ours = sgdcore.Parameter(numbers(1, (4,))), sgdcore.Parameter(on_device(numbers(2, (4,))))
    optimizer = sgdcore.SGD([cpu], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [ours], "lr": 0.2})
    cpu.grad = numbers(3, (4,))
    ours.grad = on_device(numbers(4, (4,)))
    before = cpu.data.copy()
    optimizer.param_groups[1]["lr"] = "fast"
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['lr'\]: expected a number"):
        optimizer.step()
    assert_same_bits(cpu.data, before)
    for bad, words in [
        (on_device(np.float32([0.1, 0.2])), "a number, got "),
        (Interface(on_device(np.float32([0])), np.int32([0])), "dtype float64, .* got dtype"),
    ]:
        for key in ("lr", "weight_decay"):
            optimizer.param_groups[1] |= {"lr": 0.1, "weight_decay": 0.0, key: bad}
            expected = rf"^param_groups\[1\]\['{key}'\]: expected {words}"
            with pytest.raises(TypeError, match=expected):
                optimizer.step()
            assert_same_bits(cpu.data, before)
    assert device["launches"] == 0


def test_memory_pass_exchanges_and_refuses(device: Simulated) -> None:
    values = {name: numbers(i, (64,)) for i, name in enumerate(("param", "grad", "state"))}
    arrays = {name: on_device(value) for name, value in values.items()}
    bits = {name: value.view(np.uint32) for name, value in values.items()}
    _core.memory_pass_on_device(**arrays, stream=0)
    expected = {**bits, "param": bits["state"] ^ bits["grad"], "state": bits["param"]}
    for name, array in arrays.items():
        assert (array.numpy().view(np.uint32) == expected[name]).all()

    odd = on_device(numbers(0, (65,)))[1:]
    for name, bad, error, words in [
        ("param", values["param"], ValueError, "expected an array on a CUDA device, .* the CPU"),
        ("grad", values["grad"], ValueError, "expected an array on CUDA device 0, .* on the CPU"),
        ("grad", on_device(values["grad"], 1), ValueError, ".* got one on CUDA device 1"),
        ("grad", arrays["grad"][1:], ValueError, r"expected shape \(64,\), .* got \(63,\)"),
        ("state", on_device(np.zeros(64)), TypeError, "expected dtype float32, .* got float64"),
        ("state", odd, ValueError, "expected an address .* multiple of 16, .* 4 bytes behind"),
    ]:
        with pytest.raises(error, match=f"^{name}: {words}"):
            _core.memory_pass_on_device(**{**arrays, name: bad}, stream=0)
    for name, bad, error, words in [
        ("param", arrays["param"], ValueError, "expected an array on the CPU, .* CUDA device 0"),
        ("grad", arrays["grad"], ValueError, "expected an array on the CPU, .* on CUDA device 0"),
        ("grad", values["grad"][1:], ValueError, r"expected shape \(64,\), .* got \(63,\)"),
        ("state", np.zeros(64), TypeError, "expected dtype float32, .* got float64"),
    ]:
        with refused(error, f"^{name}: {words}", None, *values.values()):
            _core.memory_pass(**{**values, name: bad})
    with pytest.raises(ValueError, match=r"^source: expected 256 bytes, as `to` has, got 16$"):
        _core.copy_array(arrays["param"]._description, np.zeros(2), 0, 0)


# What arrays on a device say of themselves; without a runtime nothing more is asked of them.
ON_CUDA = [
    type("OnCuda", (), {"__cuda_array_interface__": {}}),
    type("OnCuda", (), {"__dlpack__": None, "__dlpack_device__": lambda _: (2, 0)}),
]


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_the_module_the_reason_is_given(
    broken: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(name: str) -> Any:
        assert name == "sgdcore._cuda"
        if broken:
            raise ImportError("undefined symbol: something")
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_devices.importlib, "import_module", find)
    _core.use_runtime(None)
    info = sgdcore.build_info()
    assert not info["cuda_built"]
    assert not info["cuda"]
    words = "undefined symbol" if broken else "no CUDA module, because no CUDA compiler"
    assert words in info["cuda_reason"]
    with pytest.raises(RuntimeError, match=words):
        DeviceArray.zeros(3)
    for kind in ON_CUDA:
        with refused(ValueError, f"^data: an array on a CUDA device cannot be used: .*{words}"):
            sgdcore.Parameter(kind())
    assert main(["info"]) == 0
    assert words in capsys.readouterr().out


def test_without_a_device_the_reason_is_given() -> None:
    info = sgdcore.build_info()
    if info["cuda"]:
        pytest.skip("CUDA can be used here")
    assert info["cuda_reason"]
    with pytest.raises(RuntimeError, match=r".+") as caught:
        sgdcore.ParameterBuffer({"w": 3}, device="cuda")
    assert str(caught.value) == info["cuda_reason"]
    for kind in ON_CUDA:
        with refused(ValueError, "^data: an array on a CUDA device cannot be used: .+"):
            sgdcore.Parameter(kind())


@allow_fork
def test_child_steps_while_another_thread_of_the_parent_steps_on_the_device(
    device: Simulated,
) -> None:
    """Neither the device nor the tables of the lost thread's step are as they were left."""
    buffer = sgdcore.ParameterBuffer({"a": 20_000, "b": 7}, device="cuda")
    optimizer = sgdcore.SGD(buffer, lr=1, momentum=0.5)

    def child() -> list[float]:
        other = sgdcore.SGD([on_device(np.zeros(3, np.float32))], lr=1)
        other.step(grads=[on_device(np.ones(3, np.float32))])
        buffer.grad.assign(np.ones(20_007, np.float32))
        optimizer.step()
        values = buffer.data.numpy()
        assert (values == values[0]).all()
        return [float(values[0]), float(parameters_of(other)[0].data.numpy()[0])]

    with stepping(optimizer.step):
        for _ in range(20):
            assert in_fork(child) == [-1, -1]


def test_the_norm_of_arrays_on_a_device(device: Simulated) -> None:
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (9000,), (1,)]
    values = {
        str(i): rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)
    }
    options = {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 2.0, "skip_nonfinite": True}
    buffers = [
        sgdcore.ParameterBuffer(values, device="cuda"),
        sgdcore.ParameterBuffer(values),
    ]
    optimizers = [sgdcore.SGD(buffer, **options) for buffer in buffers]
    assert optimizers[0].grad_norm is None
    for step, bad in enumerate([True, False, False, True]):
        grads = {
            name: rng.standard_normal(v.shape).astype(np.float32) for name, v in values.items()
        }
        if bad:
            grads["1"][8000] = np.nan
        for buffer, optimizer in zip(buffers, optimizers, strict=True):
            for name, grad in grads.items():
                buffer[name].grad = grad
            optimizer.step(zero_grad=step == 2)
        on_device, on_cpu = optimizers
        np.testing.assert_array_equal(on_device.grad_norm, on_cpu.grad_norm)
        assert on_device.skipped_steps == on_cpu.skipped_steps
        for name in values:
            pair = [buffer[name] for buffer in buffers]
            np.testing.assert_array_equal(pair[0].data.numpy(), pair[1].data)
            np.testing.assert_array_equal(pair[0].grad.numpy(), pair[1].grad)
    assert on_device.skipped_steps == 2
