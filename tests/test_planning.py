"""The model of distributed training's speed: its numbers by hand, and its parameters from a clock of known speed."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgdcore.distributed import Link, Plan, ProcessGroup, measure, plan, planning

GIGABIT = Link(latency=50e-6, bandwidth=1e9 / 8)


def test_docstrings() -> None:
    result = doctest.testmod(planning)
    assert result.attempted >= 2
    assert result.failed == 0


# The model, by hand


def test_all_reduce_by_hand() -> None:
    # Four ranks: six messages one after the other, each a quarter of 4 MB at 1 MB/s, and 0.5 s of latency.
    assert Link(0.5, 1e6).all_reduce(4e6, ranks=4) == pytest.approx(6 * (0.5 + 1))
    assert Link(0.5, 1e6).all_reduce(4e6, ranks=1) == 0


@pytest.mark.parametrize(
    ("wire_dtype", "momentum_sync", "nbytes"),
    [
        ("float64", "keep", 8e6),
        ("float32", "keep", 4e6),
        ("float32", "reset", 4e6),
        ("float32", "average", 8e6),
        ("bfloat16", "average", 4e6),
        ("float16", "keep", 2e6),
    ],
)
@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlapped"])
@pytest.mark.parametrize("period", [1, 2, 64])
def test_predictions(
    wire_dtype: str, momentum_sync: str, nbytes: float, overlap: bool, period: int
) -> None:
    table = plan(
        1e6,
        0.02,
        GIGABIT,
        ranks=[3],
        sync_every=[period],
        wire_dtypes=[wire_dtype],
        momentum_sync=momentum_sync,
        overlap=overlap,
    )
    assert table.round_seconds(3, wire_dtype) == pytest.approx(4 * 50e-6 + 4 / 3 * nbytes / 125e6)
    spread = table.round_seconds(3, wire_dtype) / period
    expected = max(0.02, spread) if overlap else 0.02 + spread
    assert table.seconds(3, period, wire_dtype) == pytest.approx(expected)


@given(
    efficiency=st.floats(0.01, 0.99),
    ranks=st.integers(1, 99),
    overlap=st.booleans(),
    t_c=st.floats(1e-3, 1),
)
def test_smallest_period_for_an_efficiency(
    efficiency: float, ranks: int, overlap: bool, t_c: float
) -> None:
    table = plan(1e7, t_c, GIGABIT, ranks=ranks, overlap=overlap)
    period = table.sync_every(efficiency, ranks)
    assert t_c / table.seconds(ranks, period) >= efficiency * (1 - 1e-9)
    if period > 1:
        assert t_c / table.seconds(ranks, period - 1) < efficiency


def test_figures_of_the_field() -> None:
    """ResNet-50 on 8 machines of 0.1 s a step wants a period of some 300, 30 and 3 at 1, 10 and 100 Gbit/s."""
    periods = [
        plan(25.6e6, 0.1, Link(20e-6, gigabits * 1e9 / 8), ranks=8).sync_every(0.95, 8)
        for gigabits in (1, 10, 100)
    ]
    assert periods == [273, 28, 3]


# What is shown


def test_prints_each_combination() -> None:
    table = plan(25.6e6, 0.1, GIGABIT, ranks=(2, 8), sync_every=(1, 64), overlap=True)
    text = str(table)
    head, note, columns, *rows = text.splitlines()
    assert head == "25.6 M parameters, 100 ms a step without traffic; 50 us a message, 125 MB/s"
    assert "overlapped" in note
    assert columns.split() == ["N", "wire", "H=1", "H=64"]
    assert [row.split()[:2] for row in rows] == [
        [ranks, wire] for ranks in "28" for wire in ("float32", "bfloat16")
    ]
    assert rows[0].split()[2:] == ["819", "ms", "12%", "100", "ms", "100%"]
    assert max(map(len, text.splitlines()[2:])) < 100


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(2.0, "2 s"), (0.9999, "1 s"), (0.05, "50 ms"), (0.00099951, "1 ms"), (25e-6, "25 us")],
)
def test_units(seconds: float, shown: str) -> None:
    assert f", {shown} a step" in str(plan(1, seconds, GIGABIT, ranks=2))


# Measuring


class Done:
    def wait(self) -> None:
        pass


class ClockedGroup:
    """Ranks that hold the same numbers, and whose all-reduces take the time of a model on a clock of their own."""

    rank = 0
    dtypes = frozenset({"float32"})

    def __init__(self, size: int, link: Link, disturbed: dict[int, float]) -> None:
        self.size, self.link, self.disturbed = size, link, disturbed
        self.now = 0.0
        self.hiccups: tuple[int, ...] = ()  # which all-reduces take a second longer
        self.calls: list[int] = []

    def all_reduce(self, array: Any) -> Done:
        array *= self.size
        self.now += self.link.all_reduce(array.nbytes, self.size) * self.disturbed.get(
            array.nbytes, 1
        )
        if array.nbytes > 4:  # a single number lets all begin together
            self.calls.append(array.nbytes)
            self.now += len(self.calls) in self.hiccups
        return Done()


def clocked(
    monkeypatch: pytest.MonkeyPatch,
    link: Link,
    size: int = 2,
    disturbed: dict[int, float] | None = None,
) -> ClockedGroup:
    group = ClockedGroup(size, link, disturbed or {})
    assert isinstance(group, ProcessGroup)
    monkeypatch.setattr(planning, "perf_counter", lambda: group.now)
    return group


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("link", [GIGABIT, Link(0.0, 5e9), Link(2e-3, 12.5e9)], ids=str)
def test_measures_what_the_clock_says(
    link: Link, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure(clocked(monkeypatch, link, size))
    assert measured.latency == pytest.approx(link.latency, rel=1e-3, abs=1e-9)
    assert measured.bandwidth == pytest.approx(link.bandwidth, rel=1e-3)
    assert measured.ranks == size
    assert plan(1e6, 0.02, measured).ranks == (size,)


def test_hiccups_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    group = clocked(monkeypatch, GIGABIT)
    # Of nine sizes in turn: the first time, and once in each size.
    monkeypatch.setattr(planning, "_TRAIN_CALLS", 1)
    group.hiccups = (*range(1, 10), *range(10, 51, 10), 17, 27)
    measured = measure(group)
    assert measured.latency == pytest.approx(GIGABIT.latency, rel=1e-3)
    assert measured.bandwidth == pytest.approx(GIGABIT.bandwidth, rel=1e-3)


def test_sizes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    group = clocked(monkeypatch, GIGABIT)
    for name, value in {"_TRAIN_BYTES": 1600, "_SIZES": (400, 1200), "_ROUNDS": 2}.items():
        monkeypatch.setattr(planning, name, value)
    measure(group, buffer=np.full(300, np.nan, np.float32))
    # A first time that does not count, two that do, and the averaging of the two medians.
    assert group.calls == [400, 400, 400, 400, 1200] * 3 + [8]


def test_lines_that_cannot_be() -> None:
    x = np.array([1.0, 2.0])
    assert planning._fit_line(x, np.array([3.0, 5.0])) == pytest.approx((1.0, 2.0))
    # A message does not take less for being longer, nor less than nothing for being short.
    assert planning._fit_line(x, np.array([3.0, 2.0])) == (0, 1)
    assert planning._fit_line(x, np.array([0.5, 2.5])) == (0, 1.25)


# Refusals


@pytest.mark.parametrize(
    ("latency", "bandwidth", "message"),
    [
        (-1e-6, 1e9, "latency: expected a finite number of at least 0, got -1e-06"),
        (float("nan"), 1e9, "latency: expected a finite number of at least 0, got nan"),
        (0, 0, "bandwidth: expected a finite number above 0, got 0"),
        (0, float("inf"), "bandwidth: expected a finite number above 0, got inf"),
    ],
)
def test_bad_links(latency: float, bandwidth: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Link(latency, bandwidth)


def test_a_latency_that_is_no_number() -> None:
    with pytest.raises(TypeError, match=r"^latency: expected a number, got '1 ms'$"):
        Link("1 ms", 1e9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parameters": 0}, ValueError, "parameters: expected a finite number above 0, got 0"),
        (
            {"step_seconds": -1},
            ValueError,
            "step_seconds: expected a finite number above 0, got -1",
        ),
        ({"link": 1e9}, TypeError, "link: expected a Link, got 1000000000.0"),
        ({"ranks": None}, ValueError, "ranks: needed, because the link was not measured"),
        ({"step_seconds": None}, TypeError, "step_seconds: expected a number, got None"),
        ({"ranks": (2, 0)}, ValueError, "ranks: expected at least 1, got 0"),
        ({"ranks": 1.5}, TypeError, "ranks: expected an integer, got 1.5"),
        ({"sync_every": "16"}, TypeError, "sync_every: expected an integer, got '16'"),
        ({"sync_every": (0,)}, ValueError, "sync_every: expected at least 1, got 0"),
        ({"wire_dtypes": ("int8",)}, ValueError, "wire_dtype: expected one of .*, got 'int8'"),
        ({"wire_dtypes": ("int64",)}, ValueError, "wire_dtype: expected one of .*, got 'int64'"),
        ({"momentum_sync": "sum"}, ValueError, "momentum_sync: expected one of .*, got 'sum'"),
    ],
    ids=str,
)
def test_bad_plans(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        plan(**{"parameters": 1e6, "step_seconds": 0.1, "link": GIGABIT, "ranks": 2, **arguments})


def test_one_number_is_a_table_too() -> None:
    table = plan(1e6, 0.1, GIGABIT, ranks=np.int64(2), sync_every=16)
    assert (table.ranks, table.periods) == ((2,), (16,))


@pytest.mark.parametrize("ranks", [0, -1])
def test_bad_ranks_of_a_period(ranks: int) -> None:
    table = plan(1e6, 0.1, GIGABIT, ranks=2)
    with pytest.raises(ValueError, match=f"^ranks: expected at least 1, got {ranks}$"):
        table.sync_every(0.9, ranks)


@pytest.mark.parametrize("efficiency", [0, 1, float("nan")])
def test_bad_efficiencies(efficiency: float) -> None:
    table: Plan = plan(1e6, 0.1, GIGABIT, ranks=2)
    with pytest.raises(ValueError, match=r"^efficiency: expected above 0 and below 1, got "):
        table.sync_every(efficiency, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"buffer": np.zeros(1000, np.float32)}, ValueError, "buffer: expected float32 of length"),
        ({"buffer": np.zeros(1 << 22)}, ValueError, "buffer: expected float32 of length"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_measurements(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        measure(clocked(monkeypatch, GIGABIT), **arguments)


def test_one_rank_has_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^group: has one rank"):
        measure(clocked(monkeypatch, GIGABIT, size=1))
