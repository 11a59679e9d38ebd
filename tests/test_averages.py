"""Averages of parameters of optimizers of arrays: against the oracle, torch's AveragedModel, and themselves."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import sgdcore
from sgdcore import EMA, Polyak, _core, reference
from sgdcore.device_array import DeviceArray
from simulated import Simulated
from support import STORAGE_TYPES, WHOLE, Array, assert_same_bits, numbers, refused

KINDS = [EMA(0.999), EMA(0.9), EMA(0.5), EMA(0.3), EMA(0.0), EMA(1.0), Polyak(), Polyak(2)]
CLASSES = {cls.rule: cls for cls in (sgdcore.SGD, sgdcore.SGDW, sgdcore.Signum, sgdcore.Lion)}
# Beside the edges of vectors, blocks and chunks.
SIZES = [
    0,
    1,
    3,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    33,
    64,
    65,
    129,
    511,
    513,
    1023,
    1024,
    1025,
    4099,
    65_537,
]


def average_of(optimizer: Any, parameter: Any) -> Any:
    return optimizer.state[parameter].get("average")


class Oracle:
    """An average by the reference."""

    def __init__(self, kind: EMA | Polyak, dtype: Any = None) -> None:
        self.kind = kind
        self.dtype = dtype
        self.steps = 0
        self.average: Array | None = None

    def step(self, param: Array) -> None:
        if isinstance(self.kind, EMA):
            self.average = reference.ema_update(
                self.average, param, decay=self.kind.decay, average_dtype=self.dtype
            )
        elif self.steps >= self.kind.start:
            n = self.steps - self.kind.start
            self.average = reference.polyak_update(self.average, param, n, average_dtype=self.dtype)
        self.steps += 1


def torch_average(kind: EMA | Polyak) -> Any:
    return get_ema_multi_avg_fn(kind.decay) if isinstance(kind, EMA) else get_swa_multi_avg_fn()


# Bits


@pytest.mark.parametrize("average", [None, *STORAGE_TYPES])
@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize("kind", KINDS if WHOLE else [EMA(0.9), EMA(0.3), Polyak(1)], ids=repr)
def test_averages_have_the_oracles_bits(
    kind: EMA | Polyak, storage: str, average: str | None, isa: str
) -> None:
    dtype = STORAGE_TYPES[storage]
    arrays = [numbers(i, (size,), dtype) for i, size in enumerate(SIZES)]
    params = [sgdcore.Parameter(array) for array in arrays]
    optimizer = sgdcore.SGD(params, lr=0.1, momentum=0.9, average=kind, average_dtype=average)
    oracles = [Oracle(kind, None if average is None else STORAGE_TYPES[average]) for _ in params]
    for step in range(5):
        grads = [numbers(1000 * step + i, array.shape, dtype) for i, array in enumerate(arrays)]
        optimizer.step(grads=grads)
        for array, oracle in zip(arrays, oracles, strict=True):
            oracle.step(array)
    for i, (parameter, oracle) in enumerate(zip(params, oracles, strict=True)):
        assert_same_bits(average_of(optimizer, parameter), oracle.average, f"average {i}")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("kind", KINDS[::2], ids=repr)
def test_averages_of_every_rule_and_way_through_the_core(
    rule: str, kind: EMA | Polyak, count: int, threads: None
) -> None:
    """Flat buffers, strided gradients, gradients that are cleared or clipped, more elements than one thread takes."""
    sgdcore.set_num_threads(count)
    shapes = {"a": (300, 401), "b": (7,), "c": (64, 3)}
    params = [sgdcore.Parameter(numbers(i, shape)) for i, shape in enumerate(shapes.values())]
    buffer = sgdcore.ParameterBuffer(shapes)
    for parameter, other in zip(params, buffer.parameters(), strict=True):
        other.data[...] = parameter.data
    made = {"lr": 0.1, "weight_decay": 0.01, "average": kind}
    plain = CLASSES[rule](params, **made)
    others: list[Any] = [CLASSES[rule](buffer, **made)]
    others.append(CLASSES[rule]([p.data.copy() for p in params], **made))
    clipped = CLASSES[rule]([p.data.copy() for p in params], clip_value=10.0, **made)
    others.append(clipped)
    for step in range(4):
        grads = [numbers(10 * step + i, shape) for i, shape in enumerate(shapes.values())]
        plain.step(grads=grads)
        others[0].step(grads=grads)
        others[1].step(grads=[np.array(g, order="F") for g in grads], zero_grad=True)
        others[2].step(grads=grads)
    for other in others:
        theirs = [p for group in other.param_groups for p in group["params"]]
        for ours, its in zip(params, theirs, strict=True):
            assert_same_bits(its.data, ours.data, "parameter")
            assert_same_bits(average_of(other, its), average_of(plain, ours), "average")


def test_memory_orders() -> None:
    arrays = [
        np.asfortranarray(numbers(0, (5, 7))),
        numbers(1, (3, 4, 5)).transpose(1, 2, 0),
    ]
    optimizer = sgdcore.SGD(arrays, lr=0.1, average=EMA(0.9))
    oracles = [Oracle(EMA(0.9)) for _ in arrays]
    for step in range(3):
        optimizer.step(grads=[numbers(step, array.shape) for array in arrays])
        for array, oracle in zip(arrays, oracles, strict=True):
            oracle.step(array)
    for p, array, oracle in zip(optimizer.param_groups[0]["params"], arrays, oracles, strict=True):
        assert average_of(optimizer, p).strides == array.strides
        assert_same_bits(average_of(optimizer, p), oracle.average)


def test_special_numbers() -> None:
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, 3e38, -3e38], np.float32)
    start, grad = (each.ravel().copy() for each in np.meshgrid(special, special))
    for kind in (EMA(0.9), EMA(0.1)):
        array = start.copy()
        optimizer = sgdcore.SGD([array], lr=1.0, average=kind)
        oracle = Oracle(kind)
        for _ in range(3):
            optimizer.step(grads=[grad])
            oracle.step(array)
        [p] = optimizer.param_groups[0]["params"]
        found = average_of(optimizer, p)
        assert oracle.average is not None
        nan = np.isnan(oracle.average)
        assert np.array_equal(np.isnan(found), nan)
        assert_same_bits(found[~nan], oracle.average[~nan])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [EMA(0.999), EMA(0.4), Polyak()], ids=repr)
def test_averages_equal_averaged_model(kind: EMA | Polyak, dtype: str) -> None:
    """Parameters without a gradient take part. (torch rounds Polyak's weight to float32.)"""
    if isinstance(kind, Polyak) and dtype == "float64":
        pytest.skip("torch rounds 1 / (n + 1) to float32 there")
    arrays = [numbers(i, (size,), dtype) for i, size in enumerate(SIZES)]
    model = torch.nn.ParameterList([torch.from_numpy(a.copy()) for a in arrays])
    averaged = AveragedModel(model, multi_avg_fn=torch_average(kind))
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    ours = sgdcore.SGD(arrays, lr=0.1, momentum=0.9, average=kind)
    for step in range(8):
        grads = [
            None if (i + step) % 3 == 0 else numbers(100 * step + i, a.shape, dtype)
            for i, a in enumerate(arrays)
        ]
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = None if grad is None else torch.from_numpy(grad)
        theirs.step()
        averaged.update_parameters(model)
        ours.step(grads=grads)
    [group] = ours.param_groups
    for p, average in zip(group["params"], averaged.module.parameters(), strict=True):
        assert_same_bits(average_of(ours, p), average.detach().numpy())


@pytest.mark.parametrize("average", [None, "float32"])
@pytest.mark.parametrize("precision", ["split", "kahan", "stochastic"])
def test_averages_beside_precisions_are_of_what_the_model_sees(
    precision: str, average: str | None
) -> None:
    options: Any = {"lr": 0.01, "momentum": 0.9, "precision": precision, "average": EMA(0.9)}
    arrays = [numbers(i, (3000,), STORAGE_TYPES["bfloat16"]) for i in range(2)]
    tensors = [
        torch.nn.Parameter(torch.from_numpy(a.copy().view(np.int16)).view(torch.bfloat16))
        for a in arrays
    ]
    ours = sgdcore.SGD(arrays, **options, average_dtype=average)
    theirs = sgdcore.torch.SGD(tensors, **options, average_dtype=average)
    oracles = [Oracle(EMA(0.9), average and STORAGE_TYPES[average]) for _ in arrays]
    for step in range(6):
        grads = [
            None if i == step % 3 else numbers(10 * step + i, (3000,), a.dtype)
            for i, a in enumerate(arrays)
        ]
        for p, grad in zip(tensors, grads, strict=True):
            p.grad = (
                None if grad is None else torch.from_numpy(grad.view(np.int16)).view(torch.bfloat16)
            )
        ours.step(grads=grads)
        theirs.step()
        for array, oracle in zip(arrays, oracles, strict=True):
            oracle.step(array)
    params = ours.param_groups[0]["params"]
    masters = [ours.master(p).copy() for p in params]
    for p, q, oracle in zip(params, tensors, oracles, strict=True):
        assert_same_bits(average_of(ours, p), oracle.average)
        found = theirs.state[q]["average"].float().numpy()
        assert oracle.average is not None
        assert_same_bits(found, oracle.average.astype(np.float32))
    with ours.averaged():
        pass
    for p, master in zip(params, masters, strict=True):
        assert_same_bits(ours.master(p), master)


# Devices


@pytest.mark.parametrize("average", [None, "float32"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", [EMA(0.9), Polyak(1)], ids=repr)
def test_devices_have_the_cpus_bits(kind: EMA | Polyak, storage: str, average: str | None) -> None:
    device = Simulated()
    try:
        arrays = [
            numbers(i, s, STORAGE_TYPES[storage]) for i, s in enumerate([(3, 5), (20_000,), (9,)])
        ]
        params = []
        for array in arrays:
            there = DeviceArray.zeros(array.shape, array.dtype)
            there.assign(array)
            params.append(sgdcore.Parameter(there))
        options: Any = {"average": kind, "average_dtype": average}
        ours = sgdcore.SGD(params, lr=0.1, momentum=0.9, **options)
        cpu = sgdcore.SGD(arrays, lr=0.1, momentum=0.9, **options)
        for step in range(4):
            grads: list[Any] = [
                None if i == step else numbers(10 * step + i, a.shape, a.dtype)
                for i, a in enumerate(arrays)
            ]
            for p, grad in zip(params, grads, strict=True):
                if grad is not None:
                    there = DeviceArray.zeros(grad.shape, grad.dtype)
                    there.assign(grad)
                    p.grad = there
                else:
                    p.grad = None
            before = device["launches"]
            ours.step()
            assert device["launches"] == before + 1
            cpu.step(grads=grads)
        for p, q in zip(params, cpu.param_groups[0]["params"], strict=True):
            assert_same_bits(average_of(ours, p).numpy(), average_of(cpu, q))
        with ours.averaged(), cpu.averaged():
            for p, array in zip(params, arrays, strict=True):
                assert_same_bits(p.data.numpy(), array)
        for p, array in zip(params, arrays, strict=True):
            assert_same_bits(p.data.numpy(), array)
    finally:
        _core.use_runtime(None)


# The block


@pytest.mark.parametrize("average", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_averaged_exchanges_and_gives_back_every_bit(storage: str, average: str | None) -> None:
    arrays = [numbers(i, (size,), STORAGE_TYPES[storage]) for i, size in enumerate((3, 2000))]
    optimizer = sgdcore.SGD(arrays, lr=0.1, average=EMA(0.9), average_dtype=average)
    for step in range(3):
        optimizer.step(grads=[numbers(step, a.shape) for a in arrays])
    arrays[0][0] = np.nan
    before = [a.copy() for a in arrays]
    averages = [average_of(optimizer, p).copy() for p in optimizer.param_groups[0]["params"]]
    for error in (None, ValueError, KeyboardInterrupt):
        expected = nullcontext() if error is None else pytest.raises(error)
        with expected, optimizer.averaged():
            for array, each in zip(arrays, averages, strict=True):
                assert_same_bits(array, each.astype(array.dtype))
            if error is not None:
                raise error
        for p, array, old, each in zip(
            optimizer.param_groups[0]["params"], arrays, before, averages, strict=True
        ):
            assert_same_bits(array, old)
            assert_same_bits(average_of(optimizer, p), each)


def test_averaged_gives_back_what_an_interrupted_exchange_had_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sgdcore import optimizer as module

    arrays = [numbers(i, (5,)) for i in range(3)]
    optimizer = sgdcore.SGD(arrays, lr=0.1, average=EMA(0.9))
    for step in range(2):
        optimizer.step(grads=[numbers(step, a.shape) for a in arrays])
    params = optimizer.param_groups[0]["params"]
    before = [(p.data.copy(), average_of(optimizer, p).copy()) for p in params]
    copy_into = module.copy_into
    for failing in range(1, 7):
        calls = itertools.count(1)

        def interrupted(
            array: Any, values: Any, calls: Any = calls, failing: int = failing
        ) -> None:
            number = next(calls)
            if number == failing:
                copy_into(array[:2], values[:2])
                raise KeyboardInterrupt
            copy_into(array, values)

        monkeypatch.setattr(module, "copy_into", interrupted)
        with pytest.raises(KeyboardInterrupt), optimizer.averaged():
            pytest.fail("the exchange was interrupted")
        for p, (values, average) in zip(params, before, strict=True):
            assert_same_bits(p.data, values, f"interrupted at {failing}")
            assert_same_bits(average_of(optimizer, p), average, f"interrupted at {failing}")
    monkeypatch.undo()
    optimizer.step(grads=[numbers(9, a.shape) for a in arrays])


def test_what_is_refused_inside_of_averaged() -> None:
    array = numbers(0, (5,))
    optimizer = sgdcore.SGD([array], lr=0.1, average=EMA(0.9))
    optimizer.step(grads=[numbers(1, (5,))])
    saved = optimizer.state_dict()
    with optimizer.averaged():
        with refused(RuntimeError, "step: .* inside of averaged", optimizer):
            optimizer.step(grads=[numbers(1, (5,))])
        with refused(RuntimeError, "hold their averages already", optimizer), optimizer.averaged():
            pass
        with refused(RuntimeError, "state_dict: ", optimizer):
            optimizer.state_dict()
        with refused(RuntimeError, "load_state_dict: ", optimizer):
            optimizer.load_state_dict(saved)
        with refused(RuntimeError, "a copy: ", optimizer):
            copy.deepcopy(optimizer)
    optimizer.step(grads=[numbers(1, (5,))])


def test_averaged_before_the_first_average_changes_nothing() -> None:
    array = numbers(0, (5,))
    optimizer = sgdcore.SGD([array], lr=0.1, average=Polyak(3))
    before = array.copy()
    with optimizer.averaged():
        assert_same_bits(array, before)
    optimizer.step(grads=[numbers(1, (5,))])
    before = array.copy()
    with optimizer.averaged():
        assert_same_bits(array, before)
    assert "average" not in optimizer.state.get(optimizer.param_groups[0]["params"][0], {})


def test_averaged_needs_averages() -> None:
    with pytest.raises(RuntimeError, match="made without average="):
        sgdcore.SGD([numbers(0, (5,))], lr=0.1).averaged()


# Arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EMA(1.5), ValueError, "decay: expected a number from 0 to 1, got 1.5"),
        (lambda: EMA(-0.1), ValueError, "decay: .* got -0.1"),
        (lambda: EMA(float("nan")), ValueError, "decay: .* got nan"),
        (lambda: EMA("0.9"), TypeError, "decay"),  # type: ignore[arg-type]
        (lambda: Polyak(-1), ValueError, "start: expected a number of steps, 0 or more, got -1"),
        (lambda: Polyak(1.5), TypeError, "start: expected an integer, got 1.5"),  # type: ignore[arg-type]
    ],
)
def test_kinds_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("cls", [*CLASSES.values(), sgdcore.torch.SGD, sgdcore.torch.SGDW])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"average": 0.9}, TypeError, r"average: expected sgdcore.EMA\(decay\), .* got 0.9"),
        ({"average": EMA}, TypeError, "average: expected"),
        ({"average": EMA(), "average_dtype": "int8"}, TypeError, "average_dtype|int8"),
        ({"average_dtype": "float32"}, ValueError, "average_dtype: expected average="),
    ],
)
def test_options_are_checked(
    cls: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    torches = issubclass(cls, torch.optim.Optimizer)
    params: list[Any] = [torch.zeros(3) if torches else np.zeros(3)]
    with pytest.raises(error, match=message):
        cls(params, lr=0.1, **options)


# First steps, late parameters, states in the user's hands


def test_a_parameter_that_joins_later_begins_with_a_copy() -> None:
    first, second = numbers(0, (5,)), numbers(1, (4,))
    optimizer = sgdcore.SGD([first], lr=0.1, average=Polyak())
    for step in range(3):
        optimizer.step(grads=[numbers(step, (5,))])
    optimizer.add_param_group({"params": [second]})
    before = second.copy()
    optimizer.step(grads=[numbers(3, (5,)), None])
    late = optimizer.param_groups[1]["params"][0]
    assert_same_bits(average_of(optimizer, late), before)
    optimizer.step(grads=[None, numbers(4, (4,))])
    assert_same_bits(average_of(optimizer, late), reference.polyak_update(before, second, 4))


def test_an_average_may_be_replaced_and_removed() -> None:
    array = numbers(0, (5,))
    optimizer = sgdcore.SGD([array], lr=0.1, momentum=0.9, average=EMA(0.9))
    optimizer.step(grads=[numbers(1, (5,))])
    [p] = optimizer.param_groups[0]["params"]
    optimizer.state[p]["average"] = np.zeros(5)
    optimizer.step(grads=[numbers(2, (5,))])
    found = average_of(optimizer, p)
    assert found.dtype == np.float64
    assert_same_bits(found, reference.ema_update(np.zeros(5), array, decay=0.9))
    momentum = optimizer.state[p]["momentum_buffer"]
    del optimizer.state[p]["average"]
    optimizer.step(grads=[numbers(3, (5,))])
    assert_same_bits(average_of(optimizer, p), array)
    assert optimizer.state[p]["momentum_buffer"] is momentum
    with refused(ValueError, "average: expected shape", optimizer):
        optimizer.state[p]["average"] = np.zeros(4)
    optimizer.state[p]["average"] = array
    with pytest.raises(ValueError, match=r"the data of .* and the average of .* overlap"):
        optimizer.step(grads=[numbers(3, (5,))])


def test_a_step_that_is_refused_does_not_average() -> None:
    arrays = [numbers(0, (5,)), numbers(1, (6,))]
    optimizer = sgdcore.SGD(arrays, lr=0.1, average=Polyak())
    optimizer.step(grads=[numbers(1, (5,)), numbers(2, (6,))])
    with refused(ValueError, None, optimizer, *arrays):
        optimizer.step(grads=[numbers(1, (5,)), numbers(2, (5,))])
    optimizer.step(grads=[numbers(3, (5,)), numbers(4, (6,))])
    assert optimizer.state_dict()["param_groups"][0]["average_steps"] == 2


def test_arrays_without_any_gradient_are_told_where_gradients_go() -> None:
    optimizer = sgdcore.SGD([numbers(0, (5,))], lr=0.1, average=EMA())
    with refused(TypeError, "no parameter has a gradient", optimizer):
        optimizer.step()


def test_an_optimizer_without_averages_keeps_the_users_value_of_that_name() -> None:
    optimizer = sgdcore.SGD([numbers(0, (5,))], lr=0.1)
    [p] = optimizer.param_groups[0]["params"]
    optimizer.state[p]["average"] = "the user's"
    optimizer.step(grads=[numbers(1, (5,))])
    assert optimizer.state[p]["average"] == "the user's"


# Checkpoints, pickles, copies


def trained(kind: EMA | Polyak | None, steps: int = 4, **options: Any) -> Any:
    arrays = [numbers(i, (size,)) for i, size in enumerate((5, 1100))]
    optimizer = sgdcore.SGD(arrays, lr=0.1, momentum=0.9, average=kind, **options)
    train(optimizer, range(steps))
    return optimizer


def train(optimizer: Any, steps: range) -> None:
    [group] = optimizer.param_groups
    for step in steps:
        optimizer.step(
            grads=[numbers(50 * step + i, p.shape) for i, p in enumerate(group["params"])]
        )


def through_a_file(optimizer: Any) -> Any:
    file = io.BytesIO()
    pickle.dump(optimizer.state_dict(), file)
    file.seek(0)
    other = trained(optimizer.average, 0)
    for a, b in zip(
        other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
    ):
        a.data[...] = b.data
    other.load_state_dict(pickle.load(file))
    return other


@pytest.mark.parametrize("kind", [EMA(0.9), Polyak(), Polyak(2), Polyak(6)], ids=repr)
@pytest.mark.parametrize(
    "way",
    [through_a_file, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["state dict", "deepcopy", "pickle"],
)
def test_training_goes_on_with_the_same_bits(way: Any, kind: EMA | Polyak) -> None:
    optimizer = trained(kind)
    other = way(optimizer)
    assert other.average == kind
    for each in (optimizer, other):
        train(each, range(4, 8))
    for a, b in zip(
        other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
    ):
        assert_same_bits(a.data, b.data)
        assert_same_bits(average_of(other, a), average_of(optimizer, b))


def test_a_checkpoint_without_averages_begins_them_anew() -> None:
    saved = trained(None).state_dict()
    assert "average" not in saved["param_groups"][0]
    optimizer = trained(Polyak())
    optimizer.load_state_dict(saved)
    [p, _] = optimizer.param_groups[0]["params"]
    assert average_of(optimizer, p) is None
    train(optimizer, range(1))
    assert_same_bits(average_of(optimizer, p), p.data)
    assert optimizer.state_dict()["param_groups"][0]["average_steps"] == 1


@pytest.mark.parametrize("saved", [EMA(0.9), Polyak()], ids=repr)
@pytest.mark.parametrize("own", [None, EMA(0.9), Polyak()], ids=repr)
def test_checkpoints_of_other_averages_are_refused(
    saved: EMA | Polyak, own: EMA | Polyak | None
) -> None:
    state_dict = trained(saved).state_dict()
    optimizer = trained(own)
    if type(own) is type(saved):
        optimizer.load_state_dict(state_dict)
        return
    message = rf"param_groups'\]\[0\]\['average'\]: .*'{type(saved).__name__}'.*made with"
    with refused(ValueError, message, optimizer):
        optimizer.load_state_dict(state_dict)


def test_a_wrong_number_of_steps_is_refused() -> None:
    state_dict = trained(Polyak()).state_dict()
    state_dict["param_groups"][0]["average_steps"] = "many"
    optimizer = trained(Polyak())
    with refused(TypeError, "average_steps'.: expected a number of steps, got 'many'", optimizer):
        optimizer.load_state_dict(state_dict)


def test_a_mean_without_its_number_of_steps_is_refused() -> None:
    state_dict = trained(Polyak()).state_dict()
    for group in state_dict["param_groups"]:
        del group["average"], group["average_steps"]
    optimizer = trained(Polyak())
    with refused(ValueError, "it has an average, and param_groups lack", optimizer):
        optimizer.load_state_dict(state_dict)
    optimizer = trained(EMA())
    optimizer.load_state_dict(state_dict)


def test_the_decay_is_the_optimizers_own() -> None:
    optimizer = trained(EMA(0.5))
    optimizer.load_state_dict(trained(EMA(0.9)).state_dict())
    assert optimizer.average == EMA(0.5)


def test_without_averages_checkpoints_and_groups_are_as_they_were() -> None:
    plain, averaging = trained(None), trained(EMA(0.9))
    assert list(plain.state_dict()["param_groups"][0]) == list(plain.param_groups[0])
    assert plain.param_groups[0].keys() == averaging.param_groups[0].keys()
    assert plain.defaults == averaging.defaults
    assert repr(plain) == repr(averaging)
