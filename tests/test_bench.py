"""``python -m sgdcore bench``: what it checks, computes, writes and returns. No test depends on a time."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for module in ("rich", "matplotlib"):
    pytest.importorskip(module)

import sgdcore
from sgdcore import _core
from sgdcore.__main__ import main
from sgdcore.bench import cases, contenders, measure, report, stats, training
from sgdcore.bench.cases import Case
from sgdcore.bench.measure import Extent, Result
from support import WHOLE

ROOT = Path(__file__).parents[1]
SHORT = Extent(rounds=3, turn=0.0, budget=0.0)
LIBRARIES = [name for name, each in contenders.CONTENDERS.items() if each.version() is not None]
STEPS = [name for name in LIBRARIES if contenders.CONTENDERS[name].kind != "ceiling"]


@pytest.fixture(autouse=True)
def same_threads_afterwards(threads: None) -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case(
    workload: str = "tiny", hyper: str = "nesterov", dtype: str = "float32", **rest: Any
) -> Case:
    return Case(workload, hyper, dtype, rest.pop("threads", 1), **rest)


def bench(*options: str) -> int:
    return main(["bench", "--rounds", "3", *options])


# --- Statistics -----------------------------------------------------------------------------------


def test_ratio_of_medians_and_interval() -> None:
    base = [1.0, 1.1, 0.9, 1.0, 1.05]
    found = stats.ratio([2 * x for x in base], base)
    assert found == (2, 2, 2)  # whatever slows both alike cancels


def test_ratio_interval_covers_what_the_samples_allow() -> None:
    rng = np.random.default_rng(1)
    found = stats.ratio(list(rng.normal(3, 0.3, 101)), list(rng.normal(1, 0.1, 101)))
    assert found.low < found.value < found.high
    assert found.low < 3 < found.high
    assert found.high - found.low < 0.3


def test_ratio_of_unequal_rounds_takes_the_shared_ones() -> None:
    assert stats.ratio([4.0, 4.0], [2.0, 2.0, 100.0, 100.0]).value == 2


def test_ratio_draws_placements_before_rounds() -> None:
    """Three placements, in each of which the ratio is the same in all rounds: 1, 2 and 3."""
    base = [1.0] * 60
    other = [1.0] * 20 + [2.0] * 20 + [3.0] * 20
    assert stats.ratio(other, base, [20, 20, 20]) == (2, 1, 3)
    assert stats.ratio(other, base) == (2, 2, 2)  # drawn one by one, rounds promise more


def test_ratio_draws_from_each_placement_its_own_rounds() -> None:
    """The second placement's three rounds vary, the first's two do not."""
    found = stats.ratio([1.0, 1.0, 5.0, 6.0, 7.0], [1.0] * 5, [2, 3])
    assert (found.value, found.low, found.high) == (5, 1, 7)


def test_ratio_of_runs_draws_them_apart() -> None:
    swapped = stats.ratio_of_runs([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert swapped.value == 1
    assert swapped.low < 1 < swapped.high
    assert stats.ratio_of_runs([2.0, 2.0], [1.0, 1.0, 1.0]) == (2, 2, 2)


def test_ratio_of_runs_draws_placements_before_rounds() -> None:
    """One run had three placements, in each of which all rounds took the same time."""
    varied, constant = [1.0] * 40 + [2.0] * 40 + [3.0] * 40, [1.0] * 120
    placed = [40, 40, 40]
    assert stats.ratio_of_runs(varied, constant, placed, placed) == (2, 1, 3)
    assert stats.ratio_of_runs(varied, constant) == (2, 2, 2)
    assert stats.ratio_of_runs(constant, varied, placed, placed) == (0.5, 1 / 3, 1)


@pytest.mark.parametrize(
    ("seconds", "expected"), [([1.0], 0), ([2.0, 2.0, 2.0], 0), ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 3)]
)
def test_spread(seconds: list[float], expected: float) -> None:
    assert stats.spread(seconds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ((0.8, 0.7, 0.9), "faster"),
        ((1.2, 1.1, 1.3), "slower"),
        ((0.9, 0.8, 1.1), "no difference seen"),
    ],
)
def test_verdict(ratio: tuple[float, float, float], expected: str) -> None:
    assert report.verdict(stats.Ratio(*ratio)) == expected


# --- Cases ----------------------------------------------------------------------------------------


def test_workloads_have_the_sizes_of_their_models() -> None:
    sizes = {name: (len(shapes), case(name).elements) for name, shapes in cases.WORKLOADS.items()}
    assert sizes["resnet50"] == (161, 25_557_032)
    assert sizes["vit_b16"] == (152, 86_567_656)
    assert sizes["gpt2"] == (148, 124_439_808)
    assert sizes["161x8"] == (161, 1288)


@pytest.mark.parametrize(
    ("hyper", "clear", "streams"),
    [
        ("plain", False, 3),
        ("momentum", False, 5),
        ("nesterov", True, 6),
        ("sgdw", False, 5),
        ("lion", False, 5),
    ],
)
def test_bytes_of_a_step(hyper: str, clear: bool, streams: int) -> None:
    assert case(hyper=hyper, dtype="bfloat16", clear=clear).bytes == 10 * 2 * streams


def test_full_covers_every_condition_of_every_workload() -> None:
    found = cases.select(cases.full(2), {})
    assert len(found) == len(set(found))
    for workload in cases.WORKLOADS:
        own = [c for c in found if c.workload == workload]
        rules = [h for h in cases.HYPERS if cases.rule_in(h) != "sgd"]
        crossed = {(h, d) for h in cases.HYPERS for d in cases.DTYPES if h not in rules}
        if own[0].elements > 2**25:
            crossed = {(h, d) for h, d in crossed if h == "nesterov" or d == "float32"}
        if workload in ("tiny", "161x8", "resnet50"):
            crossed |= {(h, d) for h in rules for d in ("float32", "bfloat16")}
        assert {(c.hyper, c.dtype, c.threads) for c in own} == {
            (*e, t) for e in crossed for t in (1, 2)
        }
        assert {(c.grads, c.clear) for c in own} == {
            (g, c) for g in ("warm", "cold") for c in (0, 1)
        }
    assert {c.workload for c in found if c.is_training} == set(cases.TRAINING)


@pytest.mark.parametrize(
    ("filters", "titles"),
    [
        ({"workload": ["mlp"]}, ["mlp, nesterov, float32, 2 threads"]),
        # Also what a quick run does not measure otherwise.
        (
            {
                "workload": ["flat64M", "tiny"],
                "dtype": ["bfloat16"],
                "grads": ["cold"],
                "clear": [True],
            },
            [f"{w}, nesterov, bfloat16, 2 threads, cold, clearing" for w in ("tiny", "flat64M")],
        ),
        ({"workload": ["train-mlp"], "dtype": ["float64"]}, []),
    ],
)
def test_filters_replace_the_values_of_their_condition(
    filters: dict[str, list[Any]], titles: list[str]
) -> None:
    assert [c.title for c in cases.select(cases.quick(2), filters)] == titles


def test_contenders_that_do_not_fit_into_memory_are_left_out_last_first() -> None:
    large = case("flat64M")
    array = large.elements * 4
    names = ["NumPy", "sgdcore", "torch fused", "sgdcore.torch"]
    assert measure.fitting(large, names, 100 * array) == names
    # Torch's have gradients of their own.
    assert measure.fitting(large, names, (6 + 3 * 2) * array) == names[1:]
    assert measure.fitting(large, names[:2], (5 + 2) * array) == names[1:2]
    assert measure.fitting(large, names, 6 * array) == []


def test_torchs_contenders_have_memory_as_torch_allocates_it() -> None:
    problem = contenders.Problem(case("161x8", clear=True))
    fused = contenders.TorchFused(problem)
    for tensor in [
        *fused.params,
        *fused.tensors[0],
        *map(torch.from_numpy, problem.torch_gradients[0]),
    ]:
        assert tensor.data_ptr() % 64 == 0
    for tensor, values in zip(fused.tensors[0], problem.gradients[0], strict=True):
        assert np.array_equal(tensor.numpy(), values)


# --- Checking and timing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clear", "grads"),
    [(False, "warm"), (True, "cold"), (False, "cold"), (True, "warm")][: 4 if WHOLE else 2],
)
@pytest.mark.parametrize("hyper", list(cases.HYPERS))
def test_everybody_computes_what_the_oracle_does(hyper: str, clear: bool, grads: str) -> None:
    names = [name for name in LIBRARIES if name != "torch compiled"]
    all_threads = len(os.sched_getaffinity(0))  # some cannot be limited
    each = case("mlp", hyper, clear=clear, grads=grads, threads=all_threads)
    found = measure.run(each, names, SHORT).results
    assert list(found) == names
    for name in names:
        result = found[name]
        cls = contenders.CONTENDERS[name]
        if cls.kind == "ceiling" or cls.rule not in (None, each.rule):
            # The arrays fit into the cache, which the ceiling of the memory is not for.
            assert result.check in ("ceiling", "unsuitable"), name
            continue
        assert result.check in (
            ("equal",) if name.startswith("sgdcore") else ("equal", "rounding")
        ), name
        assert len(result.seconds) == 3
        assert result.allocated_bytes is not None or result.kind == "jax"


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("hyper", list(cases.HYPERS))
def test_the_ceilings_of_every_rule_take_steps(
    hyper: str, clear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.WORKLOADS, "beyond the caches", [(1 << 18,)])
    each = case("beyond the caches", hyper, clear=clear)
    found = measure.run(each, ["memory streams", "empty call"], SHORT).results
    assert [(r.check, len(r.seconds)) for r in found.values()] == [("ceiling", 3)] * 2


@pytest.mark.parametrize("dtype", list(cases.DTYPES))
def test_ours_equal_the_oracle_in_every_dtype(dtype: str) -> None:
    ours = ["sgdcore", "sgdcore flat", "sgdcore.torch"]
    found = measure.run(case("mlp", dtype=dtype, threads=2), ours, SHORT).results
    assert {name: (r.check, r.roundings) for name, r in found.items()} == dict.fromkeys(
        ours, ("equal", 0)
    )


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every case count as one whose memory's place matters."""
    monkeypatch.setattr(measure, "cache_bytes", lambda: 0)


def test_large_cases_are_set_up_in_orders_that_favour_nobody(large: None) -> None:
    names = [f"contender {i}" for i in range(7)]
    orders = measure._orders(case("mlp"), names)
    assert all(sorted(order) == names for order in orders)
    for first, second in itertools.combinations(names, 2):
        assert sum(o.index(first) < o.index(second) for o in orders) == len(orders) / 2
    assert len({order[0] for order in orders}) == len(orders)


def test_each_placement_has_its_share_of_the_rounds(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SLOW", 0.0)  # relative to the fastest; 20 ms still count
    enter(monkeypatch, Slow)
    names = ["other", "sgdcore", "torch fused"]
    found = measure.run(case("mlp"), names, measure.Extent(16, 1e-4, 100.0)).results
    assert {name: result.placements for name, result in found.items()} == {
        "other": [3],
        "sgdcore": [4, 4, 4, 4],
        "torch fused": [4, 4, 4, 4],
    }
    assert {name: len(result.seconds) for name, result in found.items()} == {
        "other": 3,
        "sgdcore": 16,
        "torch fused": 16,
    }


def test_one_that_starts_slowly_is_set_up_once(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SLOW_TO_START", 0.0)
    found = measure.run(case("mlp"), ["sgdcore"], SHORT).results
    assert found["sgdcore"].placements == [3]


def test_small_cases_are_set_up_once() -> None:
    assert measure.run(case("tiny"), ["sgdcore"], SHORT).results["sgdcore"].placements == [3]


def test_one_that_is_wrong_the_second_time_is_wrong(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, Fickle)
    monkeypatch.setattr(Fickle, "made", 0)
    found = measure.run(case("mlp"), ["other", "sgdcore"], SHORT).results
    assert (found["other"].check, found["other"].seconds) == ("wrong", [])
    assert found["sgdcore"].placements == [3, 3, 3, 3]


class Broken(contenders.NumPyInPlace):
    """Changes one element of its result."""

    by = 1.0

    def result(self) -> Iterable[Any]:
        values = [param.copy() for param in self.params]
        values[-1].reshape(-1)[-1] += self.by
        return values


class Lazy(contenders.NumPyInPlace):
    """Never updates anything, whatever the rule."""

    rule = None

    def update(self, i: int, param: Any, grad: Any) -> None:
        pass


class Slow(contenders.NumPyInPlace):
    """Takes 30 ms a step."""

    def update(self, i: int, param: Any, grad: Any) -> None:
        time.sleep(0.03 if i == 0 else 0)
        super().update(i, param, grad)


class Fickle(Broken):
    """Is right when it is made first, and wrong later."""

    made = 0
    unit = 1.0

    def __init__(self, problem: contenders.Problem) -> None:
        super().__init__(problem)
        self.by = self.unit * Fickle.made
        Fickle.made += 1


class Raising(contenders.NumPyInPlace):
    """Raises in its step."""

    def update(self, i: int, param: Any, grad: Any) -> None:
        raise ArithmeticError("no such operation")


def enter(
    monkeypatch: pytest.MonkeyPatch, cls: type[contenders.Contender], name: str = "other"
) -> None:
    monkeypatch.setitem(contenders.CONTENDERS, name, cls)


@pytest.mark.parametrize(
    ("workload", "hyper", "dtype"),
    [
        (workload, hyper, dtype)
        for workload, hyper, dtype in itertools.product(["tiny", "mlp"], cases.HYPERS, cases.DTYPES)
        if WHOLE or workload == "tiny" or hyper == "nesterov"
    ],
)
def test_one_that_does_nothing_is_wrong(
    workload: str, hyper: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, Lazy)
    found = measure.run(case(workload, hyper, dtype), ["other"], SHORT).results["other"]
    assert found.check == "wrong"
    assert not found.seconds


@pytest.mark.parametrize("by", [1.0, np.nan, np.inf])
def test_a_wrong_last_element_is_found_and_printed(
    by: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Broken, "by", by)
    enter(monkeypatch, Broken)
    target = tmp_path / "r.json"
    options = ("--workload", "100x1000", "--contender", "other", "--contender", "sgdcore")
    assert bench(*options, "--json", str(target)) == 0
    output = capsys.readouterr().out
    assert "other: WRONG, not timed: differs from the oracle by" in output
    assert "1 wrong results" in output
    (found,) = json.loads(target.read_text())["cases"]
    assert found["contenders"]["other"]["seconds"] == []
    assert found["contenders"]["sgdcore"]["check"] == "equal"


def test_the_ends_of_large_tensors_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element among very many, where a loop's remainder is."""
    monkeypatch.setitem(cases.WORKLOADS, "large", [(2**21,)])
    enter(monkeypatch, Broken)
    found = measure.run(case("large"), ["other", "sgdcore"], SHORT).results
    assert (found["other"].check, found["sgdcore"].check) == ("wrong", "equal")


def test_a_wrong_result_of_ours_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, Broken, "sgdcore flat")
    assert bench("--workload", "tiny", "--contender", "sgdcore flat") == 1


def test_one_that_raises_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(monkeypatch, Raising)
    assert bench("--workload", "tiny", "--contender", "other", "--contender", "NumPy") == 0
    assert "other: FAILED, not timed: ArithmeticError: no such operation" in capsys.readouterr().out


def test_fused_bfloat16_is_judged_like_everybody() -> None:
    """Some versions of torch compute something else for whole vectors."""
    found = measure.run(case("mlp", dtype="bfloat16"), ["torch loop", "torch fused"], SHORT).results
    assert found["torch loop"].check == "rounding"
    fused = found["torch fused"]
    assert (fused.check == "wrong") == (fused.roundings is None or fused.roundings > measure.WRONG)
    assert bool(fused.seconds) == (fused.check != "wrong")


@pytest.mark.parametrize("name", ["train-mlp", "train-cnn"])
def test_training_steps(name: str) -> None:
    found = measure.run(case(name), list(training.variants()), SHORT).results
    assert {n: r.check for n, r in found.items() if n != "torch fused"} == {
        n: "equal" for n in training.variants() if n != "torch fused"
    }
    assert all(r.placements == [3] * 4 and r.allocated_bytes for r in found.values())


def test_the_resnet50_in_training_has_the_parameters_of_the_workload() -> None:
    model, _ = training._MODELS["step-resnet50"]()
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert sorted(shapes) == sorted(cases.WORKLOADS["resnet50"])


def test_a_step_in_training_is_timed_after_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Noted(training.StepInTraining):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.calls: list[str] = []
            calls.append(self.calls)

        def load(self, index: int) -> None:
            super().load(index)
            self.calls.append("load")

        def step(self) -> None:
            super().step()
            self.calls.append("step")

    monkeypatch.setattr(training, "StepInTraining", Noted)
    monkeypatch.setattr(measure, "_SLOW", 0.0)  # whoever takes long takes part all the same
    monkeypatch.setitem(training._MODELS, "step-resnet50", training._MODELS["train-cnn"])
    long = measure.Extent(3, turn=0.1, budget=10)  # in which other steps would be repeated
    found = measure.run(case("step-resnet50"), list(training.variants()), long).results
    assert found.pop(training.IN_BACKWARD).check == "unsuitable"
    assert {n: r.check for n, r in found.items() if n != "torch fused"} == {
        n: "equal" for n in found if n != "torch fused"
    }
    assert all(r.placements == [3] * 4 and r.repeats == 1 for r in found.values())
    made = [each for each in calls if each]  # not the witness's
    assert len(made) == 4 * len(found)
    for each in made:
        text = "".join(call[0] for call in each)
        assert text.startswith("lslsls")  # checked
        # Timed; a last step shows how much memory it takes.
        assert text.rstrip("s").endswith("lslsl")
        assert text.count("l") == 6


def test_trainings_are_set_up_in_the_orders_of_their_placements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    class Noted(training.Training):
        def __init__(self, case: Case, make: Any, inside: bool = False) -> None:
            super().__init__(case, make, inside)
            made.append(make)

    variants = {
        name: (functools.partial(torch.optim.SGD, foreach=False), False) for name in ("a", "b", "c")
    }
    witness = {"torch loop": (functools.partial(torch.optim.SGD, foreach=False), False)}
    monkeypatch.setattr(training, "Training", Noted)
    monkeypatch.setattr(training, "variants", lambda: {**variants, **witness})
    each = case("train-mlp")
    measure.run(each, list(variants), SHORT)
    names = {id(make): name for name, (make, _) in variants.items()}
    set_up = [names[id(make)] for make in made if id(make) in names]
    orders = measure._orders(each, list(variants))
    assert set_up == [name for order in orders for name in order]
    assert len({tuple(order) for order in orders}) > 2


def test_the_worst_rounding_of_all_placements_is_told(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, Fickle)
    monkeypatch.setattr(Fickle, "made", 0)
    monkeypatch.setattr(Fickle, "unit", 2.0**-24)
    found = measure.run(case("mlp"), ["other"], SHORT).results["other"]
    assert found.check == "rounding"
    assert found.roundings is not None
    # Three halves, of the last placement, for a value of 1 or less.
    assert 1 < found.roundings < measure.WRONG
    assert found.placements == [3, 3, 3, 3]


def test_a_wrong_training_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = training.variants()
    wrong = {"wrong": (lambda params, **hyper: torch.optim.SGD(params, lr=0.2), False)}
    monkeypatch.setattr(training, "variants", lambda: {**variants, **wrong})
    found = measure.run(case("train-mlp"), ["wrong", "torch loop"], SHORT).results
    assert (found["wrong"].check, found["torch loop"].check) == ("wrong", "equal")
    assert not found["wrong"].seconds


@pytest.mark.parametrize("clear", [False, True], ids=["keeping", "clearing"])
@pytest.mark.parametrize("momentum", [False, True], ids=["two arrays", "three arrays"])
@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
def test_memory_streams_move_every_byte(size: int, momentum: bool, clear: bool, isa: str) -> None:
    p, g, b = (
        np.random.default_rng(i).integers(1, 1 << 62, size).view(np.float64) for i in range(3)
    )
    old_p, old_g, old_b = p.copy(), g.copy(), b.copy()
    check = _core.memory_pass(p, g, b if momentum else None, clear)
    as_int = np.int64
    if momentum:
        assert (p.view(as_int) == old_b.view(as_int)).all()
        assert (b.view(as_int) == old_p.view(as_int)).all()
        assert check == np.bitwise_xor.reduce(old_g.view(np.uint64), initial=0)
    else:
        assert (p.view(as_int) == old_p.view(as_int) ^ old_g.view(as_int)).all()
        assert (b.view(as_int) == old_b.view(as_int)).all()
    assert (g.view(as_int) == (0 if clear else old_g.view(as_int))).all()


# --- The command ------------------------------------------------------------------------------------


def result(*seconds: float, kind: str = "torch", check: str = "equal") -> Result:
    return Result(kind, check, seconds=list(seconds), page_faults=0.0)


RESULTS = {
    "sgdcore": result(1.0, 1.0, 1.0, kind="numpy"),
    "sgdcore.torch": result(2.0, 2.0, 2.0),
    "torch fused": result(3.0, 3.0, 3.0),
    "NumPy": result(0.9, 0.9, 0.9, kind="numpy"),
    "empty call": result(0.1, 0.1, 0.1, kind="ceiling", check="ceiling"),
}


def test_rivals_are_compared_with_ours_of_their_kind() -> None:
    found = {r.rival: r.ratio.value for r in report.rivalries(case(), RESULTS)}
    assert found == {"torch fused": 1.5, "NumPy": 0.9}


def test_below_looks_at_the_whole_interval_of_each() -> None:
    noisy = report.Rivalry(stats.Ratio(0.5, 0.4, 1.2), "a", case())
    slower = report.Rivalry(stats.Ratio(0.8, 0.7, 0.9), "b", case())
    assert report.below([noisy, slower], 1) == [slower]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "before.json"
    report.write(path, report.document([measure.Measured(case(), RESULTS, 0.0)], [], "test"))
    return path


@pytest.mark.parametrize(("least", "code"), [("0.89", 0), ("0.95", 1), ("2", 1)])
def test_fail_below(least: str, code: int, document: Path) -> None:
    assert main(["bench", "--from", str(document), "--fail-below", least]) == code


def test_fail_below_needs_a_rival(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--workload", "tiny", "--contender", "sgdcore", "--fail-below", "1") == 2
    assert "--fail-below: no rival was timed beside ours" in capsys.readouterr().err


def test_a_document_is_read_as_it_was_written(document: Path) -> None:
    found = report.read(document)
    (only,) = found["cases"]
    assert Case.of(only) == case()
    assert report.results_of(only) == RESULTS
    assert (only["tensors"], only["elements"], only["bytes"]) == (1, 10, 200)
    assert only["contenders"]["torch fused"]["ratios"] == {
        "sgdcore": [3, 3, 3],
        "sgdcore.torch": [1.5, 1.5, 1.5],
    }
    assert found["build"] == sgdcore.build_info()
    assert found["versions"]["torch"] == torch.__version__
    assert "cores" in found["machine"]["type"]


def test_the_schema_is_documented(document: Path) -> None:
    text = (ROOT / "docs" / "measuring.md").read_text()
    found = report.read(document)
    (only,) = found["cases"]
    keys = [*found, *found["machine"], *only, *only["contenders"]["NumPy"]]
    assert [key for key in keys if f"`{key}`" not in text and key != "schema"] == []


def test_merge_takes_the_newest_of_a_case(document: Path) -> None:
    old = report.read(document)
    new = {**old, "date": "9999", "skipped": [{**case("mlp").as_dict(), "reason": "why"}]}
    new["cases"] = [{**old["cases"][0], "others": 0.5}]
    found = report.merge([new, old])
    assert [each["others"] for each in found["cases"]] == [0.5]
    assert found["date"] == "9999"
    assert len(found["skipped"]) == 1
    with pytest.raises(ValueError, match="different machines: a; b"):
        report.merge([{**old, "machine": {"type": t}} for t in "ab"])


def test_compare(document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faster = {**RESULTS, "sgdcore": result(0.5, 0.5, 0.5, kind="numpy")}
    after = tmp_path / "after.json"
    report.write(after, report.document([measure.Measured(case(), faster, 0.0)], [], "test"))
    assert main(["bench", "--compare", str(document), str(after)]) == 0
    output = capsys.readouterr().out
    lines = {name: line for line in output.splitlines() for name in RESULTS if f"{name} " in line}
    assert "0.500 [0.500, 0.500]" in lines["sgdcore"]
    assert lines["sgdcore"].rstrip().endswith("faster")
    assert lines["torch fused"].rstrip().endswith("no difference seen")
    assert "What did not change, 3 times of others, moved by 1.000" in output


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_drawn_and_is_the_same_each_time(
    suffix: str, document: Path, tmp_path: Path
) -> None:
    written = []
    for name in ("a", "b"):
        target = (tmp_path / name).with_suffix(suffix)
        assert main(["bench", "--from", str(document), "--plot", str(target)]) == 0
        written.append(target.read_bytes())
    assert len(written[0]) > 10_000
    assert written[0] == written[1]


def test_a_run_writes_its_table_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, picture = tmp_path / "r.json", tmp_path / "r.svg"
    options = ["--contender", "sgdcore", "--contender", "NumPy", "--workload", "tiny"]
    assert bench(*options, "--json", str(data), "--plot", str(picture)) == 0
    output = capsys.readouterr().out
    assert "tiny, nesterov, float32" in output
    assert "smallest ratio of a rival's time to ours" in output
    assert picture.exists()
    (only,) = report.read(data)["cases"]
    assert [len(r["seconds"]) for r in only["contenders"].values()] == [3, 3]


def test_contenders_without_memory_keep_their_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "fitting", lambda *_: ["sgdcore"])
    target = tmp_path / "r.json"
    names = ["sgdcore", "NumPy", "torch fused"]
    options = [word for name in names for word in ("--contender", name)]
    assert bench(*options, "--workload", "tiny", "--json", str(target)) == 0
    (only,) = report.read(target)["cases"]
    found = {name: (r["kind"], r["check"]) for name, r in only["contenders"].items()}
    assert found == {
        "sgdcore": ("numpy", "equal"),
        "NumPy": ("numpy", "unsuitable"),
        "torch fused": ("torch", "unsuitable"),
    }


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = measure.run

    def run(each: Case, *args: Any) -> Any:
        if each.workload == "mlp":
            raise KeyboardInterrupt
        return real(each, *args)

    monkeypatch.setattr(measure, "run", run)
    target = tmp_path / "r.json"
    options = ["--contender", "NumPy", "--workload", "tiny", "--workload", "mlp"]
    assert bench(*options, "--json", str(target)) == 130
    assert [each["workload"] for each in report.read(target)["cases"]] == ["tiny"]


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.Numba, "version", classmethod(lambda _: None))
    assert bench("--list", "--full") == 0
    output = capsys.readouterr().out
    assert f"torch {torch.__version__}" in output
    assert "numba not installed" in output
    assert "gpt2, nesterov, float16, 1 thread" in output
    assert bench("--list") == 0
    assert "gpt2" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contender", "sgdcor"], "--contender: expected one of sgdcore, "),
        (["--json", "nowhere/r.json"], "--json: there is no folder nowhere"),
        (["--plot", "r.gif"], "--plot: expected a name ending in .png or .svg, got 'r.gif'"),
        (["--workload", "train-mlp", "--dtype", "float64"], "the filters leave no case"),
        (["--from", "nowhere.json"], "nowhere.json"),
        (["--compare", __file__, __file__], "not JSON"),
    ],
)
def test_mistakes_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*options) == 2
    assert message in capsys.readouterr().err


def test_other_json_is_no_document(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 1"):
        report.read(path)


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_missing_packages_are_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert bench("--workload", "tiny", "--plot", "r.png") == 2
    message = capsys.readouterr().err
    assert f" needs {module} (" in message
    assert "): pip install 'sgdcore[bench]', or pip install '.[bench]' in a clone" in message


# --- The page of results ----------------------------------------------------------------------------


@pytest.fixture
def pages() -> Any:
    """benchmarks/docs.py as a module."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "benchmarks" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_result_files_give(pages: Any) -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert text == pages.page(pages.documents()), "run: python benchmarks/docs.py"
    pictures = re.findall(r"\(images/([^)]*)\)", text)
    assert pictures
    assert all((ROOT / "docs" / "images" / name).exists() for name in pictures)


def test_pictures_belong_to_the_result_files(pages: Any) -> None:
    for document in pages.documents():
        for name in pages.pictures(document):
            assert pages.fingerprint(document) in (pages.IMAGES / name).read_text(), (
                "run: python benchmarks/docs.py"
            )


def test_the_page_says_what_is_missed(pages: Any, document: Path) -> None:
    found = report.read(document)
    (only,) = found["cases"]
    slower = {**RESULTS, "torch fused": result(1.5, 1.5, 1.5)}
    text = "\n".join(pages.aims({Case.of(only): slower}))
    assert "0 of 1 comparisons<br>0.750 [0.750, 0.750]: torch fused, tiny" in text
    assert "**missed**" in text
    assert "**missed**" not in "\n".join(list(pages.aims({Case.of(only): RESULTS}))[:3])


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (1.1, 1.0, 1.2, "reached"),
        (0.9, 0.8, 1.1, "not shown: only its interval reaches that"),
        (0.8, 0.7, 0.9, "**missed**"),
    ],
)
def test_the_page_tells_what_is_reached_from_what_is_not_shown(
    pages: Any, value: float, low: float, high: float, verdict: str
) -> None:
    assert pages.aim("it", pages.Ratio(value, low, high), 1).endswith(f"| {verdict} |")


@pytest.mark.parametrize(
    ("command", "imported"),
    [("info", []), ("bench", ["sgdcore.bench"]), ("demo", ["sgdcore.demo"]), ("", [])],
)
def test_a_command_imports_its_own_modules_only(command: str, imported: list[str]) -> None:
    program = f"""
import sys
from sgdcore.__main__ import main
try:
    main({[command, "--help"] if command else ["--help"]})
except SystemExit as end:
    assert end.code == 0, end.code
print([name for name in ("sgdcore.bench", "sgdcore.demo") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(imported)
