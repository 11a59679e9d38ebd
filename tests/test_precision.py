"""Precisions of 16-bit parameters: split, kahan and stochastic."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sgdcore
from sgdcore import reference
from sgdcore._rules import rule_of
from sgdcore.reference import (
    join_kahan,
    join_split,
    part_kahan,
    part_split,
    random_bits,
    round_stochastically,
)
from support import STORAGE_TYPES, WHOLE, Array, assert_same_bits, numbers
from test_rules import CLASSES, RULES, full_setting, settings_of, state_dtypes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
# Of each precision with the parameters that it is for.
KINDS = [
    ("split", "bfloat16"),
    ("kahan", "bfloat16"),
    ("kahan", "float16"),
    ("stochastic", "bfloat16"),
    ("stochastic", "float16"),
]


def float32_words() -> np.ndarray:
    """Every upper half of a float32 with lower halves around all boundaries."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.uint32([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (upper | lower).ravel()


class TestOracles:
    def test_split_masters_come_back(self):
        words = float32_words()
        visible, low = part_split(words.view(np.float32))
        back = join_split(visible, low).view(np.uint32)
        changed = back != words
        np.testing.assert_array_equal(changed, (words & 0x7FFF8000) == 0x7FFF8000)
        np.testing.assert_array_equal(words[changed] ^ back[changed], 0x8000)
        quiet = np.isnan(words.view(np.float32)) & (words & 0x00400000 != 0)
        assert np.isnan(visible[quiet].view(BFLOAT16).astype(np.float32)).all()

    def test_split_shows_the_nearest_bfloat16(self):
        words = float32_words()
        values = words.view(np.float32)
        visible, _ = part_split(values)
        seen = visible.view(BFLOAT16).astype(np.float32)
        with np.errstate(all="ignore"):
            even = values.astype(BFLOAT16).astype(np.float32)
        number, tie = ~np.isnan(values), words & 0xFFFF == 0x8000
        np.testing.assert_array_equal(seen[number & ~tie], even[number & ~tie])
        farther = (words + np.uint32(0x8000)).view(np.float32)
        np.testing.assert_array_equal(seen[number & tie], farther[number & tie])

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_kahan_keeps_about_twice_the_digits(self, dtype):
        values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
        back = join_kahan(*part_kahan(values, dtype))
        digits = 11 if dtype == FLOAT16 else 8
        bound = np.maximum(np.abs(values) * 2.0 ** (-2 * digits), 2.0**-25)
        assert (np.abs(back - values) <= bound).all()

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_stochastic_rounding_takes_a_neighbour(self, dtype):
        words = float32_words()
        largest = 65504 if dtype == FLOAT16 else np.inf
        values = words.view(np.float32)
        values = values[np.isfinite(values) & (np.abs(values) <= largest)]
        with np.errstate(all="ignore"):
            exact = values.astype(dtype).astype(np.float32) == values
        for random in (0, 1, 32768, 65535):
            rounded = round_stochastically(values, dtype, np.full(values.shape, random))
            back = rounded.astype(np.float32)
            np.testing.assert_array_equal(back[exact], values[exact])
            np.testing.assert_array_equal(np.signbit(back), np.signbit(values))
            if random == 0:
                assert (np.abs(back) <= np.abs(values)).all()


class TestRandomBits:
    """Every bound is the statistic's standard deviation times four, over 2**20 draws."""

    N = 1 << 20
    KEYS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 5, 10**6))

    def uniform(self, seed: int, position: int, steps: int) -> np.ndarray:
        return (random_bits(seed, position, steps, np.arange(self.N)) + 0.5) / 65536

    def correlation(self, a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean((a - 0.5) * (b - 0.5)) * 12 * np.sqrt(a.size))

    @pytest.mark.parametrize("key", KEYS)
    def test_mean_and_variance(self, key):
        u = self.uniform(*key)
        assert abs(u.mean() - 0.5) * np.sqrt(12 * self.N) < 4
        assert abs(np.mean((u - 0.5) ** 2) * 12 - 1) * np.sqrt(self.N / 0.8) < 4

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64, 1024, 4096, 65536])
    def test_neighbours_are_uncorrelated(self, lag):
        for key in self.KEYS:
            u = self.uniform(*key)
            assert abs(self.correlation(u[:-lag], u[lag:])) < 4

    @pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)])
    def test_seeds_parameters_and_steps_are_uncorrelated(self, other):
        u = self.uniform(0, 0, 0)
        v = self.uniform(*other)
        assert abs(self.correlation(u, v)) < 4
        # Nor is one a shifted copy of the other.
        assert all(abs(self.correlation(u[k:], v[: -k or None])) < 4.5 for k in range(1, 64))

    @pytest.mark.parametrize("key", KEYS)
    def test_values_and_pairs_of_neighbours_are_uniform(self, key):
        bits = random_bits(*key, np.arange(self.N)).astype(np.int64)
        upper, lower = bits >> 8, bits & 255
        tables = {
            "values": bits,
            "neighbours, upper": upper[0::2] * 256 + upper[1::2],
            "neighbours, lower": lower[0::2] * 256 + lower[1::2],
            "across pairs": upper[1:-1:2] * 256 + upper[2::2],
        }
        for name, cells in tables.items():
            expected = cells.size / 65536
            chi = ((np.bincount(cells, minlength=65536) - expected) ** 2).sum() / expected
            assert abs(chi - 65535) / np.sqrt(2 * 65535) < 4, name

    def test_an_element_over_steps(self):
        for element in (0, 1, 1000):
            u = np.array([random_bits(0, 0, step, [element])[0] for step in range(4096)]) / 65536
            assert abs(u.mean() - 0.5) * np.sqrt(12 * u.size) < 4
            assert abs(self.correlation(u[:-1], u[1:])) < 4

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_rounding_is_unbiased(self, dtype):
        for value in (1.001, -3.14159, 0.1, 6e-8, 1234.5):
            values = np.full(self.N, value, dtype=np.float32)
            rounded = round_stochastically(
                values, dtype, random_bits(1, 2, 3, np.arange(self.N))
            ).astype(np.float64)
            spread = rounded.std()
            assert abs(rounded.mean() - float(values[0])) <= 4 * spread / np.sqrt(self.N) + 2**-41


class Oracle:
    """A parameter that is kept by the oracles, and updated by the rule's reference."""

    def __init__(
        self,
        rule: str,
        param: Array,
        precision: str,
        *,
        seed: int = 0,
        position: int = 0,
        state_dtype: Any = None,
        **hyper: Any,
    ) -> None:
        self.rule, self.precision, self.seed, self.position = rule, precision, seed, position
        self.progress, self.counts = reference.progress.get(rule), rule_of(rule).counts
        self.param, self.rest, self.steps = param.copy(), None, 0
        self.states: list[Any] = [None] * len(rule_of(rule).states)
        self.hyper = hyper | state_dtypes(rule, state_dtype or param.dtype)

    def master(self) -> Array:
        if self.rest is None:
            return self.param.astype(np.float32)
        join = join_split if self.precision == "split" else join_kahan
        return join(self.param, self.rest)

    def step(self, grad: Array | None) -> None:
        """Take a step; without a gradient, only count it as one of the group."""
        if grad is not None:
            self.update(grad)
        if self.progress is not None:
            numbers = self.progress(**self.hyper)
            self.hyper |= {key: numbers[key] for key in self.counts}

    def update(self, grad: Array) -> None:
        value, *self.states = reference.updates[self.rule](
            self.master(), grad, *self.states, **self.hyper
        )
        dtype = self.param.dtype
        if self.precision == "split":
            visible, self.rest = part_split(value)
            self.param = visible.view(dtype)
        elif self.precision == "kahan":
            self.param, self.rest = part_kahan(value, dtype)
        else:
            index = np.arange(value.size).reshape(value.shape)
            random = random_bits(self.seed, self.position, self.steps, index)
            self.param = round_stochastically(value, dtype, random)
        self.steps += 1

    def check(
        self, optimizer: sgdcore.Optimizer, parameter: sgdcore.Parameter, what: str = ""
    ) -> None:
        assert_same_bits(parameter.data, self.param, what)
        assert_same_bits(optimizer.master(parameter), self.master(), what + " master")
        state = optimizer.state[parameter]
        for declared, array in zip(rule_of(self.rule).states, self.states, strict=True):
            assert_same_bits(state.get(declared.key), array, what + " " + declared.key)
        key = {"split": "master_low", "kahan": "compensation"}.get(self.precision)
        if key is not None:
            assert_same_bits(state[key], self.rest, what + " " + key)
        else:
            assert state["steps_taken"] == self.steps


# Beside the edges of vectors, pairs, blocks and threads' shares.
SIZES = [0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 255, 256, 257, 513, 1025, 4099, 70_001]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("precision", "dtype"), KINDS)
class TestBits:
    @pytest.mark.parametrize(
        ("grad_dtype", "state_dtype"),
        [
            ("bfloat16", "bfloat16"),
            ("bfloat16", "float32"),
            ("float16", "float16"),
            ("float32", "float32"),
            ("float64", "bfloat16"),
            ("float32", "float64"),
        ],
    )
    def test_storage_types(self, isa, rule, precision, dtype, grad_dtype, state_dtype):
        hyper = full_setting(rule)
        for size in SIZES:
            # Odd addresses of elements: pairs begin anywhere in a vector.
            data = numbers(size + 1, (size + 1,), STORAGE_TYPES[dtype])[1:]
            parameter = sgdcore.Parameter(data)
            oracle = Oracle(
                rule, data, precision, seed=7, state_dtype=STORAGE_TYPES[state_dtype], **hyper
            )
            optimizer = CLASSES[rule](
                [parameter], **hyper, **state_dtypes(rule, state_dtype), precision=precision, seed=7
            )
            for step in range(3):
                grad = numbers(size + step + 2, (size,), STORAGE_TYPES[grad_dtype])
                parameter.grad = grad
                optimizer.step()
                if size:
                    oracle.step(grad)
            if size:
                oracle.check(optimizer, parameter, f"{size} elements")

    def test_settings(self, rule, precision, dtype):
        for hyper in settings_of(rule):
            data = numbers(1, (300,), STORAGE_TYPES[dtype])
            parameter = sgdcore.Parameter(data)
            oracle = Oracle(rule, data, precision, **hyper)
            optimizer = CLASSES[rule]([parameter], **hyper, precision=precision)
            for step in range(3):
                parameter.grad = numbers(step, (300,), STORAGE_TYPES[dtype])
                oracle.step(parameter.grad)
                optimizer.step()
            oracle.check(optimizer, parameter, str(hyper))

    @pytest.mark.parametrize("order", ["C", "F", "middle"])
    def test_layouts(self, rule, precision, dtype, order):
        """A random number belongs to an element's index, wherever the element lies; gradients lie in C order."""
        hyper = full_setting(rule)
        data = numbers(1, (7, 33, 12), STORAGE_TYPES[dtype])
        oracle = Oracle(rule, data, precision, seed=2**64 - 1, **hyper)
        if order == "F":
            data = np.asfortranarray(data)
        elif order == "middle":
            data = np.ascontiguousarray(data.transpose(0, 2, 1)).transpose(0, 2, 1)
        parameter = sgdcore.Parameter(data)
        optimizer = CLASSES[rule]([parameter], **hyper, precision=precision, seed=2**64 - 1)
        for step in range(3):
            grad = numbers(step, data.shape)
            parameter.grad = grad
            oracle.step(grad)
            optimizer.step()
        oracle.check(optimizer, parameter)

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_threads(self, rule, precision, dtype, threads):
        hyper = full_setting(rule)
        sgdcore.set_num_threads(threads)
        data = [
            numbers(i, (size,), STORAGE_TYPES[dtype]) for i, size in enumerate((100_003, 5, 66_001))
        ]
        oracles = [
            Oracle(rule, each, precision, seed=1, position=i, **hyper)
            for i, each in enumerate(data)
        ]
        parameters = [sgdcore.Parameter(each) for each in data]
        optimizer = CLASSES[rule](parameters, **hyper, precision=precision, seed=1)
        for step in range(2):
            for parameter, oracle in zip(parameters, oracles, strict=True):
                parameter.grad = numbers(step, parameter.shape, STORAGE_TYPES[dtype])
                oracle.step(parameter.grad)
            optimizer.step(zero_grad=True)
        for parameter, oracle in zip(parameters, oracles, strict=True):
            oracle.check(optimizer, parameter)
        sgdcore.set_num_threads(0)

    def test_a_buffer_and_late_gradients(self, rule, precision, dtype):
        """Neighbours in memory are one array to the core, and each parameter counts its own steps."""
        hyper = full_setting(rule)
        buffer = sgdcore.ParameterBuffer(
            {"a": (3, 5), "b": (7,), "c": (2, 2)}, dtype=STORAGE_TYPES[dtype]
        )
        parameters = buffer.parameters()
        for i, parameter in enumerate(parameters):
            parameter.data[...] = numbers(i, parameter.shape, STORAGE_TYPES[dtype])
        oracles = [
            Oracle(rule, p.data, precision, seed=3, position=i, **hyper)
            for i, p in enumerate(parameters)
        ]
        optimizer = CLASSES[rule](parameters, **hyper, precision=precision, seed=3)
        for step in range(4):
            grads: list[Any] = [
                numbers(step + 10 * i, p.shape) if i != 1 or step > 1 else None
                for i, p in enumerate(parameters)
            ]
            optimizer.step(grads=grads)
            for oracle, grad in zip(oracles, grads, strict=True):
                oracle.step(grad)
        for parameter, oracle in zip(parameters, oracles, strict=True):
            oracle.check(optimizer, parameter)

    def test_checkpoints(self, rule, precision, dtype):
        hyper = full_setting(rule) | {"precision": precision}

        def made() -> tuple[Any, Any]:
            parameter = sgdcore.Parameter(numbers(1, (4, 9), STORAGE_TYPES[dtype]))
            return parameter, CLASSES[rule]([parameter], **hyper, seed=5)

        def train(parameter: Any, optimizer: Any, first: int) -> None:
            for step in range(first, first + 3):
                optimizer.step(grads=[numbers(step, (4, 9))])

        parameter, optimizer = made()
        train(parameter, optimizer, 0)
        saved = copy.deepcopy(optimizer.state_dict()), parameter.data.copy()
        pickled = pickle.dumps(optimizer)
        train(parameter, optimizer, 3)

        other, loaded = made()
        other.data[...] = saved[1]
        loaded.load_state_dict(saved[0])
        train(other, loaded, 3)
        assert_same_bits(other.data, parameter.data)
        assert_same_bits(loaded.master(other), optimizer.master(parameter))

        unpickled = pickle.loads(pickled)
        (again,) = unpickled.param_groups[0]["params"]
        train(again, unpickled, 3)
        assert_same_bits(again.data, parameter.data)

        # The checkpoint decides, as of every hyperparameter.
        plain = sgdcore.Parameter(saved[1].copy())
        became = CLASSES[rule]([plain], **full_setting(rule))
        became.load_state_dict(saved[0])
        train(plain, became, 3)
        assert_same_bits(plain.data, parameter.data)


class TestPromises:
    def test_split_is_float32(self):
        """10,000 steps give the bits of float32 parameters that are fed the same gradients."""
        data = numbers(0, (257,), BFLOAT16)
        split, full = sgdcore.Parameter(data), sgdcore.Parameter(data.astype(np.float32))
        hyper = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
        a = sgdcore.SGD([split], **hyper, precision="split", momentum_dtype="float32")
        b = sgdcore.SGD([full], **hyper)
        rng = np.random.default_rng(1)
        for step in range(10_000):
            grad = rng.standard_normal(257).astype(np.float32)
            a.step(grads=[grad])
            b.step(grads=[grad])
            if step % 1000 == 999:
                assert_same_bits(a.master(split), full.data)
                visible, _ = part_split(full.data)
                assert_same_bits(split.data, visible.view(BFLOAT16))

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_kahan_follows_float32_where_plain_parameters_stand_still(self, dtype):
        """Each step rounds what is lost: 10,000 steps stay within 10,000 halves of its last bit."""
        data = np.ones(64, dtype)
        lr, steps = 1e-5, 10_000
        parameters = [sgdcore.Parameter(data.astype(d)) for d in (dtype, dtype, np.float32)]
        optimizers = [
            sgdcore.SGD([p], lr=lr, precision=precision)
            for p, precision in zip(parameters, ("kahan", None, None), strict=True)
        ]
        grad = np.linspace(0.5, 1, 64, dtype=np.float32)
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.step(grads=[grad])
        kahan, plain, full = parameters
        assert_same_bits(plain.data, data)
        master = optimizers[0].master(kahan)
        digits = 8 if dtype == BFLOAT16 else 11
        assert (np.abs(master - full.data) <= steps * 2.0 ** (-2 * digits - 2)).all()
        assert (np.abs(full.data - 1) > 0.04).all()

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_stochastic_is_unbiased(self, dtype):
        """The mean of 10**6 roundings is the value, to four standard deviations of the mean."""
        n, update = 1_000_000, 1e-4
        parameter = sgdcore.Parameter(np.ones(n, dtype))
        optimizer = sgdcore.SGD([parameter], lr=update, precision="stochastic", seed=11)
        optimizer.step(grads=[np.ones(n, np.float32)])
        values = parameter.data.astype(np.float64)
        assert values.std() > 0
        assert abs(
            values.mean() - float(np.float32(1 - np.float32(update)))
        ) <= 4 * values.std() / np.sqrt(n)

    @pytest.mark.skipif(
        not WHOLE, reason="four billion words: SGDCORE_WHOLE=1, as .ci/nightly does"
    )
    def test_every_word_comes_back(self):
        """A step by zero leaves the two halves of every float32 that is no NaN as they are."""
        size = 1 << 22
        low = np.arange(size, dtype=np.uint32)
        for first in range(0, 1 << 32, size):
            words = low + np.uint32(first)
            visible, rest = part_split(words.view(np.float32))
            parameter = sgdcore.Parameter(visible.view(BFLOAT16).copy())
            optimizer = sgdcore.SGD([parameter], lr=0.0, precision="split")
            optimizer.state[parameter]["master_low"] = rest.copy()
            optimizer.step(grads=[np.zeros(size, np.float32)])
            number = ~np.isnan(words.view(np.float32))
            np.testing.assert_array_equal(
                optimizer.master(parameter).view(np.uint32)[number], words[number]
            )
            assert np.isnan(parameter.data[~number].astype(np.float32)).all()


class TestWritesFromOutside:
    @pytest.mark.parametrize("precision", ["split", "kahan"])
    def test_a_write_takes_the_place_of_the_visible_half(self, precision):
        parameter = sgdcore.Parameter(numbers(0, (1000,), BFLOAT16))
        optimizer = sgdcore.SGD([parameter], lr=0.1, precision=precision)
        optimizer.step(grads=[numbers(1, (1000,))])
        written = numbers(2, (1000,), BFLOAT16)
        parameter.data[...] = written
        master = optimizer.master(parameter)
        state = optimizer.state[parameter]
        if precision == "split":
            assert_same_bits(master, join_split(written, state["master_low"]))
            unit = 2.0 ** (np.frexp(written.astype(np.float32))[1] - 8)
            assert (np.abs(master - written.astype(np.float32)) <= unit / 2).all()
        else:
            assert_same_bits(master, join_kahan(written, state["compensation"]))

    def test_deleting_the_second_half_starts_from_what_is_seen(self):
        parameter = sgdcore.Parameter(numbers(0, (10,), BFLOAT16))
        optimizer = sgdcore.SGD([parameter], lr=0.1, precision="split")
        optimizer.step(grads=[numbers(1, (10,))])
        del optimizer.state[parameter]["master_low"]
        assert_same_bits(optimizer.master(parameter), parameter.data.astype(np.float32))
        optimizer.step(grads=[np.zeros(10, np.float32)])
        assert (optimizer.state[parameter]["master_low"] == 0).all()

    def test_the_models_and_then_the_optimizers_checkpoint_restore_the_master(self):
        parameter = sgdcore.Parameter(numbers(0, (10,), BFLOAT16))
        optimizer = sgdcore.SGD([parameter], lr=0.1, precision="split")
        optimizer.step(grads=[numbers(1, (10,))])
        model, saved = parameter.data.copy(), copy.deepcopy(optimizer.state_dict())
        master = optimizer.master(parameter)
        optimizer.step(grads=[numbers(2, (10,))])
        parameter.data[...] = model
        optimizer.load_state_dict(saved)
        assert_same_bits(optimizer.master(parameter), master)


class TestMasters:
    @pytest.mark.parametrize(("precision", "dtype"), KINDS)
    def test_values_are_stored_as_a_step_stores_them(self, precision, dtype):
        data = np.asfortranarray(numbers(0, (6, 5), STORAGE_TYPES[dtype]))
        parameter = sgdcore.Parameter(data)
        optimizer = sgdcore.SGD([parameter], lr=0.0, precision=precision)
        values = numbers(1, (6, 5))
        optimizer.set_master(parameter, values)
        if precision == "split":
            assert_same_bits(optimizer.master(data), values)
        elif precision == "kahan":
            assert_same_bits(
                optimizer.master(parameter), join_kahan(*part_kahan(values, STORAGE_TYPES[dtype]))
            )
        else:
            assert_same_bits(parameter.data, values.astype(STORAGE_TYPES[dtype]))
        before = optimizer.master(parameter)
        optimizer.step(grads=[np.zeros((6, 5), np.float32)])
        assert_same_bits(optimizer.master(parameter), before)

    def test_refusals(self):
        optimizer = sgdcore.SGD([np.ones(3, BFLOAT16)], precision="split")
        for call in (optimizer.master, lambda p: optimizer.set_master(p, p)):
            with pytest.raises(ValueError, match="parameter: expected one of the optimizer's"):
                call(np.ones(3))
        (parameter,) = optimizer.param_groups[0]["params"]
        with pytest.raises(ValueError, match="values: expected shape"):
            optimizer.set_master(parameter, np.ones(2))

    def test_other_dtypes_are_their_own_masters(self):
        for dtype, wide in (("float64", np.float64), ("float32", np.float32)):
            data = np.ones(3, dtype)
            master = sgdcore.SGD([data]).master(data)
            assert master.dtype == wide
            assert not np.shares_memory(master, data)


class TestGroups:
    def test_a_precision_for_each_group(self):
        data = [numbers(i, (50,), BFLOAT16) for i in range(4)]
        parameters = [sgdcore.Parameter(each) for each in data]
        kinds: list[Any] = ["split", "kahan", "stochastic", None]
        groups = [
            {"params": [p], "precision": kind} for p, kind in zip(parameters, kinds, strict=True)
        ]
        optimizer = sgdcore.SGD(groups, lr=0.1, seed=4)
        oracles = [
            Oracle("sgd", each, kind, seed=4, position=i, lr=0.1)
            for i, (each, kind) in enumerate(zip(data[:3], kinds[:3], strict=True))
        ]
        plain = data[3].copy()
        for step in range(3):
            grads = [numbers(step * 4 + i, (50,)) for i in range(4)]
            optimizer.step(grads=grads)
            for oracle, grad in zip(oracles, grads[:3], strict=True):
                oracle.step(grad)
            plain, _ = reference.sgd_update(plain, grads[3], lr=0.1)
        for oracle, parameter in zip(oracles, parameters[:3], strict=True):
            oracle.check(optimizer, parameter)
        assert_same_bits(parameters[3].data, plain)
        assert [list(optimizer.state[p]) for p in parameters] == [
            ["master_low"],
            ["compensation"],
            ["steps_taken"],
            [],
        ]

    def test_keys_stand_where_they_are_set(self):
        parameter = sgdcore.Parameter(np.ones(2, BFLOAT16))
        assert "precision" not in sgdcore.SGD([parameter], precision=None).param_groups[0]
        assert (
            "seed"
            not in sgdcore.SGD([parameter], precision="split").state_dict()["param_groups"][0]
        )
        group = sgdcore.SGD([parameter], precision="stochastic", seed=3).state_dict()[
            "param_groups"
        ][0]
        assert (group["precision"], group["seed"]) == ("stochastic", 3)
        exempt = sgdcore.SGD([{"params": [parameter], "precision": None}], precision="split")
        assert exempt.param_groups[0]["precision"] is None
        exempt.load_state_dict(exempt.state_dict())
        assert exempt.param_groups[0]["precision"] is None

    @pytest.mark.parametrize(
        ("dtype", "options", "error", "message"),
        [
            (
                "float32",
                {"precision": "split"},
                TypeError,
                "'split' is for parameters of dtype bfloat16, and",
            ),
            ("float16", {"precision": "split"}, TypeError, r"params\[0\] has float16"),
            ("float64", {"precision": "kahan"}, TypeError, "bfloat16 or float16"),
            ("float32", {"precision": "stochastic"}, TypeError, "bfloat16 or float16"),
            ("bfloat16", {"precision": "exact"}, ValueError, "precision: expected one of 'split'"),
            ("bfloat16", {"precision": 3}, ValueError, "precision: expected one of"),
            (
                "bfloat16",
                {"precision": "stochastic", "seed": -1},
                ValueError,
                "seed: expected an integer from 0",
            ),
            ("bfloat16", {"precision": "stochastic", "seed": 2**64}, ValueError, "seed: expected"),
            (
                "bfloat16",
                {"precision": "stochastic", "seed": 0.5},
                TypeError,
                "seed: expected an integer",
            ),
        ],
    )
    def test_refusals(self, dtype, options, error, message):
        data = np.ones(3, STORAGE_TYPES[dtype])
        with pytest.raises(error, match=message):
            sgdcore.SGD([data], **options)

    def test_a_group_that_changes_between_steps(self):
        parameter = sgdcore.Parameter(np.ones(3, np.float32))
        optimizer = sgdcore.SGD([parameter], lr=0.5)
        optimizer.param_groups[0]["precision"] = "split"
        with pytest.raises(TypeError, match="split is for bfloat16, and parameter 0 is of float32"):
            optimizer.step(grads=[np.ones(3)])
        optimizer.param_groups[0]["precision"] = "bits"
        with pytest.raises(ValueError, match=r"param_groups\[0\]\['precision'\]: expected 'split'"):
            optimizer.step(grads=[np.ones(3)])
        optimizer.param_groups[0] |= {"precision": "stochastic", "seed": "x"}
        with pytest.raises(ValueError, match=r"param_groups\[0\]\['seed'\]: expected an integer"):
            optimizer.step(grads=[np.ones(3)])
        assert (parameter.data == 1).all()

    def test_states_of_another_dtype_are_refused(self):
        parameter = sgdcore.Parameter(np.ones(3, BFLOAT16))
        optimizer = sgdcore.SGD([parameter], precision="kahan")
        with pytest.raises(TypeError, match="compensation: expected dtype bfloat16, got float32"):
            optimizer.state[parameter]["compensation"] = np.ones(3, np.float32)
        with pytest.raises(TypeError, match="master_low: expected dtype int16, got float32"):
            optimizer.state[parameter]["master_low"] = np.ones(3, np.float32)

    def test_a_checkpoint_that_the_parameters_do_not_fit(self):
        parameter = sgdcore.Parameter(np.ones(3, BFLOAT16))
        saved = sgdcore.SGD([parameter], precision="split").state_dict()
        optimizer = sgdcore.SGD([np.ones(3, np.float32)])
        with pytest.raises(TypeError, match="'split' is for parameters of dtype bfloat16"):
            optimizer.load_state_dict(saved)
