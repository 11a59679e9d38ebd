"""Every rule that the core is built with: the bits of its oracle on every path, and its states wherever states go.

What a rule is tested with follows from its declaration. tests/test_new_rule.py runs this file over a core with one more
rule.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import _core, reference
from sgdcore._checkpoint import refuse_other_optimizers
from sgdcore._rules import Rule, State, rule_of
from sgdcore.device_array import DeviceArray
from simulated import Simulated
from support import STORAGE_TYPES, Array, assert_same_bits, numbers

Hyper = dict[str, Any]


def classes_of(module: Any, base: type) -> dict[str, Any]:
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type))
    return {kind.rule: kind for kind in kinds if issubclass(kind, base) and hasattr(kind, "rule")}


CLASSES = classes_of(sgdcore, sgdcore.Optimizer)
TORCH_CLASSES = classes_of(sgdcore.torch, torch.optim.Optimizer)
RULES = list(CLASSES)
TRIPLES = list(itertools.product(STORAGE_TYPES, repeat=3))
USUAL_TRIPLES = [
    *((name, name, name) for name in STORAGE_TYPES),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "float32"),
]
# Beside the edges of vectors, blocks and chunks.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129, 1023, 1024, 1025, 4099, 65_537]


def settings_of(rule: str) -> list[Hyper]:
    """Hyperparameters that switch each of the rule's terms on and off, as far as the class takes them."""
    declared = rule_of(rule)
    keys = [key for key in declared.numbers if key != "lr"]
    found = []
    values = itertools.product(*[(0.0, 0.3)] * len(keys), *[(False, True)] * len(declared.flags))
    for each in values:
        hyper = {"lr": 0.1, **dict(zip([*keys, *declared.flags], each, strict=True))}
        try:
            CLASSES[rule]([np.ones(1)], **hyper)
        except ValueError:
            continue
        found.append(hyper)
    return found


def full_setting(rule: str) -> Hyper:
    """All terms switched on that go together."""
    return max(settings_of(rule), key=lambda hyper: sum(map(bool, hyper.values())))


def states_in_use(rule: str, hyper: Hyper) -> list[State]:
    """The states that take part in steps with these hyperparameters."""
    return rule_of(rule).states_in(CLASSES[rule]([np.ones(1)], **hyper).param_groups[0])[0]


def state_dtypes(rule: str, dtype: Any) -> Hyper:
    return {state.dtype_key: dtype for state in rule_of(rule).states}


class Oracle:
    """An array that is updated by the rule's reference."""

    def __init__(self, rule: str, param: Array, state_dtype: Any = None, **hyper: Any) -> None:
        self.update, self.progress = reference.updates[rule], reference.progress.get(rule)
        self.counts = rule_of(rule).counts
        self.param = param.copy()
        self.states: list[Any] = [None] * len(rule_of(rule).states)
        self.hyper = hyper | ({} if state_dtype is None else state_dtypes(rule, state_dtype))

    def step(self, grad: Array) -> None:
        self.param, *self.states = self.update(self.param, grad, *self.states, **self.hyper)
        if self.progress is not None:
            numbers = self.progress(**self.hyper)
            self.hyper |= {key: numbers[key] for key in self.counts}

    def assert_counts(self, group: Hyper) -> None:
        """Compare what the oracle has counted with a group's counts."""
        for key in self.counts:
            assert type(group[key]) is type(self.hyper[key])
            assert group[key] == self.hyper[key]


def states_of(optimizer: Any, parameter: Any) -> list[Any]:
    keys = [state.key for state in rule_of(optimizer.rule).states]
    return [optimizer.state[parameter].get(key) for key in keys]


def assert_follows(optimizer: Any, parameter: Any, oracle: Oracle, part: Any = slice(None)) -> None:
    assert_same_bits(parameter.data, oracle.param[part], "parameter")
    for ours, theirs in zip(states_of(optimizer, parameter), oracle.states, strict=True):
        assert_same_bits(ours, None if theirs is None else theirs[part], "state")


def parts_of(sizes: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def follow_oracle(
    rule: str, hyper: Hyper, triple: tuple[str, str, str], sizes: list[int], steps: int = 3
) -> None:
    """Train arrays of these sizes; the oracle has them end to end."""
    param_type, grad_type, state_type = (STORAGE_TYPES[name] for name in triple)
    start = numbers(0, (sum(sizes),), param_type)
    oracle = Oracle(rule, start, state_type, **hyper)
    parts = parts_of(sizes)
    params = [sgdcore.Parameter(start[part].copy()) for part in parts]
    optimizer = CLASSES[rule](params, **hyper, **state_dtypes(rule, state_type))
    for step in range(steps):
        grad = numbers(step + 1, start.shape, grad_type)
        optimizer.step(grads=[grad[part].copy() for part in parts])
        oracle.step(grad)
    for parameter, part in zip(params, parts, strict=True):
        if parameter.data.size > 0:
            assert_follows(optimizer, parameter, oracle, part)
    oracle.assert_counts(optimizer.param_groups[0])


def test_each_rule_has_its_classes_and_its_oracle() -> None:
    built = set(_core.rule_names())
    assert built == set(CLASSES) == set(TORCH_CLASSES) == set(reference.updates)
    assert sgdcore.build_info()["rules"] == _core.rule_names()
    assert set(reference.progress) == {rule for rule in built if rule_of(rule).counts}


def test_a_rule_may_have_the_keys_of_torchs_other_optimizers() -> None:
    rule = Rule("other", ("lr", "rho"), (), (State(0, "exp_avg", "exp_avg_dtype"),))
    groups = [{"params": [0], "rho": 0.5}]
    refuse_other_optimizers({"param_groups": groups, "state": {0: {"exp_avg": 1}}}, "Other", rule)
    for state_dict in (
        {"param_groups": groups, "state": {0: {"exp_avg": 1, "exp_avg_sq": 1}}},
        {"param_groups": [{"params": [0], "betas": (0.9, 0.99)}], "state": {}},
    ):
        with pytest.raises(ValueError, match=r"of another optimizer: (exp_avg_sq|betas)$"):
            refuse_other_optimizers(state_dict, "Other", rule)


@pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_every_mix_of_types_has_the_oracles_bits(rule: str, triple: tuple[str, str, str]) -> None:
    for hyper in settings_of(rule):
        follow_oracle(rule, hyper, triple, [1, 17, 1025])


@pytest.mark.parametrize("triple", USUAL_TRIPLES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_every_size_and_instruction_set_has_the_oracles_bits(
    rule: str, triple: tuple[str, str, str], isa: str
) -> None:
    for hyper in (full_setting(rule), settings_of(rule)[0]):
        follow_oracle(rule, hyper, triple, SIZES)


@pytest.mark.parametrize("triple", USUAL_TRIPLES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_a_first_step_does_not_read_what_its_states_storage_holds(
    rule: str, triple: tuple[str, str, str], isa: str
) -> None:
    param_type, grad_type, state_type = (STORAGE_TYPES[name] for name in triple)
    hyper = full_setting(rule)
    start, grad = numbers(0, (2051,), param_type), numbers(1, (2051,), grad_type)
    parameter = sgdcore.Parameter(start.copy())
    optimizer = CLASSES[rule]([parameter], **hyper, **state_dtypes(rule, state_type))
    for number in range(len(rule_of(rule).states)):
        optimizer.state[parameter].slots.reserve(number, np.full(2051, np.nan, state_type))
    optimizer.step(grads=[grad])
    oracle = Oracle(rule, start, state_type, **hyper)
    oracle.step(grad)
    assert_follows(optimizer, parameter, oracle)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rule", RULES)
def test_every_number_of_threads_has_the_oracles_bits(rule: str) -> None:
    for count in (1, 2, 3):
        sgdcore.set_num_threads(count)
        follow_oracle(rule, full_setting(rule), ("float32",) * 3, [300_001], steps=2)


@pytest.mark.parametrize("rule", RULES)
def test_strided_gradients_are_read_in_place_and_cleared(rule: str) -> None:
    hyper = full_setting(rule)
    start = numbers(0, (37, 53))
    parameter = sgdcore.Parameter(start.copy())
    optimizer = CLASSES[rule]([parameter], **hyper)
    oracle = Oracle(rule, start, **hyper)
    for step in range(3):
        grad = numbers(step + 1, (53, 37)).T
        oracle.step(grad.copy())
        parameter.grad = grad
        optimizer.step(zero_grad=True)
        assert not grad.any()
    assert_follows(optimizer, parameter, oracle)


@pytest.mark.parametrize("rule", RULES)
def test_a_buffers_states_are_flat_and_stepped_as_one(rule: str) -> None:
    hyper = full_setting(rule)
    values = {"a": numbers(0, (3, 5)), "b": numbers(1, (7,)), "c": numbers(2, (1000,))}
    buffer = sgdcore.ParameterBuffer(values)
    oracle = Oracle(rule, buffer.data.copy(), **hyper)
    optimizer = CLASSES[rule](buffer, **hyper)
    for step in range(3):
        buffer.grad[:] = numbers(step + 3, (buffer.size,))
        oracle.step(buffer.grad.copy())
        optimizer.step()
    assert_same_bits(buffer.data, oracle.param)
    for number, expected in enumerate(oracle.states):
        arrays = [states_of(optimizer, p)[number] for p in buffer.parameters()]
        if expected is not None:
            flat = arrays[0].base
            assert all(array.base is flat for array in arrays)
            assert_same_bits(flat.reshape(-1)[: buffer.size], expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_that_is_removed_makes_the_next_step_a_first_one(rule: str) -> None:
    hyper = full_setting(rule)
    for state in states_in_use(rule, hyper):
        parameter = sgdcore.Parameter(numbers(0, (9,)))
        optimizer = CLASSES[rule]([parameter], **hyper)
        optimizer.step(grads=[numbers(1, (9,))])
        del optimizer.state[parameter][state.key]
        counted = {key: optimizer.param_groups[0][key] for key in rule_of(rule).counts}
        again = Oracle(rule, parameter.data, **hyper, **counted)
        again.step(numbers(2, (9,)))
        optimizer.step(grads=[numbers(2, (9,))])
        assert_follows(optimizer, parameter, again)


@pytest.mark.parametrize("rule", RULES)
def test_states_that_overlap_are_refused_by_name(rule: str) -> None:
    hyper = full_setting(rule)
    states = states_in_use(rule, hyper)
    shared = np.zeros(12, np.float32)
    parameters = [sgdcore.Parameter(numbers(i, (8,))) for i in range(2)]
    optimizer = CLASSES[rule](parameters, **hyper)
    optimizer.state[parameters[0]][states[-1].key] = shared[:8]
    optimizer.state[parameters[1]][states[0].key] = shared[4:]
    before = [parameter.data.copy() for parameter in parameters]
    with pytest.raises(ValueError, match=f"the {states[0].key} of parameter 1"):
        optimizer.step(grads=[numbers(2, (8,))] * 2)
    for parameter, expected in zip(parameters, before, strict=True):
        assert_same_bits(parameter.data, expected)


@pytest.mark.parametrize("rule", RULES)
def test_checkpoints_and_pickles_go_on_with_the_same_bits(rule: str) -> None:
    hyper = full_setting(rule)
    start, grads = numbers(0, (65,)), [numbers(i + 1, (65,)) for i in range(4)]
    oracle = Oracle(rule, start, **hyper)
    parameter = sgdcore.Parameter(start.copy())
    optimizer = CLASSES[rule]([parameter], **hyper)
    for grad in grads[:2]:
        oracle.step(grad)
        optimizer.step(grads=[grad])
    loaded = CLASSES[rule]([sgdcore.Parameter(parameter.data.copy())], lr=1.0)
    loaded.load_state_dict(optimizer.state_dict())
    copied = pickle.loads(pickle.dumps(optimizer))
    for grad in grads[2:]:
        oracle.step(grad)
        for each in (optimizer, loaded, copied):
            each.step(grads=[grad])
    for each in (optimizer, loaded, copied):
        assert_follows(each, each.param_groups[0]["params"][0], oracle)
        for key, value in hyper.items():
            assert each.param_groups[0][key] == value
            assert f"    {key}: {value}\n" in repr(each)
        oracle.assert_counts(each.param_groups[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_state_of_another_shape_is_refused_and_nothing_changes(rule: str) -> None:
    hyper = full_setting(rule)
    optimizer = CLASSES[rule]([numbers(0, (3,))], **hyper)
    optimizer.step(grads=[numbers(1, (3,))])
    before = optimizer.state_dict()
    for state in rule_of(rule).states:
        checkpoint = {**before, "state": {0: {state.key: np.zeros(4, np.float32)}}}
        with pytest.raises(ValueError, match=rf"\['{state.key}'\]: expected shape \(3,\)"):
            optimizer.load_state_dict(checkpoint)
    after = optimizer.state_dict()
    for key, array in before["state"][0].items():
        assert_same_bits(after["state"][0][key], array)


# --- Devices, simulated on the CPU ---------------------------------------------------------------------


@pytest.fixture
def device() -> Iterator[None]:
    Simulated()
    yield
    _core.use_runtime(None)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("triple", USUAL_TRIPLES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_a_device_has_the_oracles_bits(rule: str, triple: tuple[str, str, str]) -> None:
    param_type, grad_type, state_type = (STORAGE_TYPES[name] for name in triple)
    for hyper, size in itertools.product(settings_of(rule), (17, 8193)):
        start = numbers(0, (size,), param_type)
        array = DeviceArray.zeros(start.shape, start.dtype, 0)
        array.assign(start)
        parameter = sgdcore.Parameter(array)
        optimizer = CLASSES[rule]([parameter], **hyper, **state_dtypes(rule, state_type))
        oracle = Oracle(rule, start, state_type, **hyper)
        for step in range(3):
            values = numbers(step + 1, start.shape, grad_type)
            grad = DeviceArray.zeros(start.shape, grad_type, 0)
            grad.assign(values)
            optimizer.step(grads=[grad])
            oracle.step(values)
        assert_same_bits(array.numpy(), oracle.param)
        for ours, theirs in zip(states_of(optimizer, parameter), oracle.states, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_same_bits(ours.numpy(), theirs)


# --- torch ---------------------------------------------------------------------------------------------

TORCH_TYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def array_of(tensor: torch.Tensor) -> Array:
    """The tensor's memory as an array."""
    name = str(tensor.dtype).removeprefix("torch.")
    words = tensor.detach().contiguous().view(torch.uint8).numpy()
    return words.reshape(-1).view(STORAGE_TYPES[name]).reshape(tensor.shape)


def tensor_of(array: Array) -> torch.Tensor:
    words = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    return words.view(TORCH_TYPES[array.dtype.name]).reshape(array.shape)


def assert_tensor_follows(
    optimizer: Any, parameter: torch.Tensor, oracle: Oracle, part: Any = slice(None)
) -> None:
    assert_same_bits(array_of(parameter), oracle.param[part], "parameter")
    for ours, theirs in zip(states_of(optimizer, parameter), oracle.states, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_same_bits(array_of(ours), theirs[part], "state")


@pytest.mark.parametrize("triple", USUAL_TRIPLES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_tensors_have_the_oracles_bits(rule: str, triple: tuple[str, str, str]) -> None:
    param_type, grad_type, state_type = (STORAGE_TYPES[name] for name in triple)
    sizes = [1, 8, 65, 1025]
    for hyper in settings_of(rule):
        start = numbers(0, (sum(sizes),), param_type)
        oracle = Oracle(rule, start, state_type, **hyper)
        parts = parts_of(sizes)
        params = [torch.nn.Parameter(tensor_of(start[part])) for part in parts]
        optimizer = TORCH_CLASSES[rule](params, **hyper, **state_dtypes(rule, triple[2]))
        for step in range(3):
            grad = numbers(step + 1, start.shape, grad_type)
            for parameter, part in zip(params, parts, strict=True):
                parameter.grad_dtype = TORCH_TYPES[grad_type.name]
                parameter.grad = tensor_of(grad[part])
            optimizer.step()
            oracle.step(grad)
        for parameter, part in zip(params, parts, strict=True):
            assert_tensor_follows(optimizer, parameter, oracle, part)
        oracle.assert_counts(optimizer.param_groups[0])


@pytest.mark.parametrize("rule", RULES)
def test_unusual_tensors_have_the_oracles_bits(rule: str) -> None:
    """With gaps, complex, channels last, sparse gradients: beside a usual one, in one step."""
    hyper = full_setting(rule)
    gaps = torch.nn.Parameter(tensor_of(numbers(0, (6, 8)))[:, ::2])
    reordered = torch.nn.Parameter(
        tensor_of(numbers(1, (2, 3, 4, 5))).to(memory_format=torch.channels_last)
    )
    complex_one = torch.nn.Parameter(torch.view_as_complex(tensor_of(numbers(2, (7, 2)))))
    usual = torch.nn.Parameter(tensor_of(numbers(3, (9,))))
    sparse = torch.nn.Parameter(tensor_of(numbers(4, (5, 3))))
    params = [gaps, reordered, complex_one, usual, sparse]

    def real(tensor: torch.Tensor) -> Array:
        plain = tensor.detach()
        return array_of(torch.view_as_real(plain) if plain.is_complex() else plain)

    oracles = [Oracle(rule, real(parameter), **hyper) for parameter in params]
    optimizer = TORCH_CLASSES[rule](params, **hyper)
    for step in range(3):
        for i, (parameter, oracle) in enumerate(zip(params, oracles, strict=True)):
            grad = numbers(10 * step + i, oracle.param.shape)
            if parameter is sparse:
                grad[[0, 2, 3]] = 0
            oracle.step(grad)
            dense = tensor_of(grad)
            if parameter is complex_one:
                dense = torch.view_as_complex(dense)
            parameter.grad = dense.to_sparse(1) if parameter is sparse else dense
        optimizer.step()
    for parameter, oracle in zip(params, oracles, strict=True):
        oracle.assert_counts(optimizer.param_groups[0])
        assert_same_bits(real(parameter), oracle.param)
        for ours, theirs in zip(states_of(optimizer, parameter), oracle.states, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_same_bits(real(ours), theirs)


@pytest.mark.parametrize("rule", RULES)
def test_updates_in_the_backward_pass_have_the_oracles_bits(rule: str) -> None:
    hyper = full_setting(rule)
    start = numbers(0, (33,))
    parameter = torch.nn.Parameter(tensor_of(start))
    optimizer = TORCH_CLASSES[rule]([parameter], **hyper)
    oracle = Oracle(rule, start, **hyper)
    if rule_of(rule).counts:
        with pytest.raises(
            ValueError, match=f"step_in_backward: {type(optimizer).__name__} counts"
        ):
            sgdcore.torch.step_in_backward(optimizer)
        return
    with sgdcore.torch.step_in_backward(optimizer):
        for step in range(3):
            grad = numbers(step + 1, (33,))
            (parameter * tensor_of(grad)).sum().backward()
            oracle.step(grad)
            assert_same_bits(array_of(parameter), oracle.param)
            optimizer.step()
    assert_tensor_follows(optimizer, parameter, oracle)


@pytest.mark.parametrize("rule", RULES)
def test_a_subclass_with_operations_is_stepped_by_torchs(rule: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    hyper = full_setting(rule)
    start = numbers(0, (5,), np.float64)
    parameter = torch.nn.Parameter(TwoTensor(tensor_of(start), tensor_of(start)))
    optimizer = TORCH_CLASSES[rule]([parameter], **hyper)
    oracle = Oracle(rule, start, **hyper)
    for step in range(3):
        grad = numbers(step + 1, (5,), np.float64)
        parameter.grad = TwoTensor(tensor_of(grad), tensor_of(grad))
        optimizer.step()
        oracle.step(grad)
    # torch rounds each operation by itself.
    np.testing.assert_allclose(parameter.detach().a.numpy(), oracle.param, rtol=1e-14)
    np.testing.assert_array_equal(parameter.detach().a.numpy(), parameter.detach().b.numpy())


@pytest.mark.parametrize("rule", RULES)
def test_checkpoints_go_from_arrays_to_tensors_and_back(rule: str) -> None:
    hyper = full_setting(rule)
    start, grads = numbers(0, (65,)), [numbers(i + 1, (65,)) for i in range(6)]
    oracle = Oracle(rule, start, **hyper)
    array = sgdcore.Parameter(start.copy())
    ours = CLASSES[rule]([array], **hyper)
    tensor = torch.nn.Parameter(tensor_of(start))
    theirs = TORCH_CLASSES[rule]([tensor], lr=1.0)

    def step_tensor(grad: Array) -> None:
        tensor.grad = tensor_of(grad)
        theirs.step()

    for grad in grads[:2]:
        ours.step(grads=[grad])
    with torch.no_grad():
        tensor.copy_(tensor_of(array.data))
    theirs.load_state_dict(ours.state_dict())
    for grad in grads[2:4]:
        step_tensor(grad)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    theirs = TORCH_CLASSES[rule]([tensor], lr=1.0)
    theirs.load_state_dict(torch.load(file))
    step_tensor(grads[4])
    array.data[...] = array_of(tensor)
    ours.load_state_dict(theirs.state_dict())
    ours.step(grads=[grads[5]])
    for grad in grads:
        oracle.step(grad)
    assert_follows(ours, array, oracle)


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(rule: str) -> None:
    tensor = torch.nn.Parameter(torch.ones(3))
    tensor.grad = torch.ones(3)
    adam = torch.optim.Adam([tensor])
    adam.step()
    for optimizer in (CLASSES[rule]([np.ones(3)]), TORCH_CLASSES[rule]([tensor])):
        with pytest.raises(ValueError, match=f"expected {type(optimizer).__name__}'s"):
            optimizer.load_state_dict(adam.state_dict())
