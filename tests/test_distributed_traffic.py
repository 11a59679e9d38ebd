"""Averaging's traffic without other processes: what travels, in which memory, and what it does to the arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sgdcore.distributed import averager as averaging
from sgdcore.distributed._flat import BLOCK, empty, runs, scale
from sgdcore.distributed.averager import Averager, Cargo, Chunk, ErrorFeedback, Sizes, exchange


class Late:
    """A sum that is there when it is waited for, and not before."""

    def __init__(self, group: Same, array: Any) -> None:
        self.group, self.array = group, array

    def wait(self) -> None:
        self.group.under_way -= 1
        self.array *= self.group.size


class Same:
    """Ranks that all hold the same."""

    rank = 0
    dtypes = frozenset({"float64", "float32"})

    def __init__(self, size: int) -> None:
        self.size = size
        self.under_way = self.most = self.count = 0

    def all_reduce(self, array: Any) -> Late:
        self.count += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return Late(self, array)


def like(kind: str, array: Any) -> Any:
    return array.copy() if kind == "numpy" else torch.tensor(array)


KINDS = pytest.mark.parametrize("kind", ["numpy", "torch"])


@KINDS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("look", [False, True])
def test_scaling(kind: str, dtype: str, look: bool) -> None:
    """Across several blocks; what is not finite is seen wherever it is, and large sums are no alarm."""
    values = np.random.default_rng(0).standard_normal(3 * BLOCK + 5).astype(dtype)
    array = like(kind, values)
    assert scale(array, 1 / 3, look)
    assert np.asarray(array).tobytes() == (values * np.dtype(dtype).type(1 / 3)).tobytes()
    assert scale(like(kind, np.full(9, np.finfo(dtype).max / 2, dtype)), 1.0, look)
    for place in (0, BLOCK, len(values) - 1):
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = values.copy()
            spoilt[place] = bad
            assert scale(like(kind, spoilt), 0.5, look) == (not look)


@KINDS
@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_copies_do_not_overwrite_each_other(
    kind: str, in_flight: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many chunks through few places, each of whose sums comes at the last moment."""
    monkeypatch.setattr(averaging, "GLOO_SIZES", Sizes(1 << 12, 1 << 10, in_flight))
    rng = np.random.default_rng(0)
    sizes = [100, 200, 50, 3000, 256, 256, 1, 999, 120, 130, 140]
    values = [rng.standard_normal(size).astype(dtype) for size in sizes]
    arrays = [like(kind, each) for each in values]
    group = Same(2)
    averager = Averager(arrays, runs(arrays), ["float32"] * len(arrays))
    for _ in range(2):
        averager.average(group, arrays, 0.5)
        for array, each in zip(arrays, values, strict=True):
            assert np.asarray(array).tobytes() == each.tobytes()
    assert group.count > 2 * in_flight
    assert group.most == in_flight
    assert group.under_way == 0


@KINDS
def test_differences(kind: str) -> None:
    """Parameter, anchor and what rounding left over, across several blocks."""
    rng = np.random.default_rng(1)
    size = 2 * BLOCK + 77
    start = rng.standard_normal(size, np.float32)
    moved = start + rng.standard_normal(size, np.float32) / 100
    left = rng.standard_normal(size, np.float32) / 1e4
    (view, anchor, error) = (like(kind, each) for each in (moved, start, left))
    feedback = ErrorFeedback()
    feedback.follow([view], [view], [anchor])
    feedback.load([error])
    Averager([view], [[0]], ["bfloat16"]).average(Same(2), [view], 0.5, feedback=feedback)
    share = (moved - start) / np.float32(2) + left
    sent = torch.tensor(share).bfloat16()
    mean = start + (2 * sent.float()).numpy()
    assert np.asarray(view).tobytes() == mean.tobytes()
    left = share - sent.float().numpy()
    assert np.asarray(feedback.residuals[0]).tobytes() == left.tobytes()
    assert np.asarray(anchor).tobytes() == start.tobytes()


class Failing:
    def __init__(self, log: list[str], number: int, fails: bool) -> None:
        self.log, self.number, self.fails = log, number, fails

    def wait(self) -> None:
        self.log.append(f"wait {self.number}")
        if self.fails:
            raise RuntimeError("gone")


def cargos(count: int) -> list[Cargo]:
    """Numbers in place of arrays."""
    return [Cargo(Chunk([0], 1, "float32"), number) for number in range(count)]


def test_the_next_is_sent_before_the_last_is_unloaded() -> None:
    log: list[str] = []

    def send(cargo: Cargo) -> Failing:
        log.append(f"send {cargo.array}")
        return Failing(log, cargo.array, fails=False)

    exchange(cargos(3), send, lambda cargo: log.append(f"unload {cargo.array}"), 1)
    assert " ".join(log) == "send 0 wait 0 send 1 unload 0 wait 1 send 2 unload 1 wait 2 unload 2"


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_failure_waits_for_all_others(bad: int) -> None:
    log: list[str] = []
    sent: list[int] = []

    def send(cargo: Cargo) -> Failing:
        sent.append(cargo.array)
        return Failing(log, cargo.array, cargo.array == bad)

    with pytest.raises(RuntimeError, match="gone"):
        exchange(cargos(6), send, lambda cargo: None, 3)
    assert {f"wait {number}" for number in sent} == set(log)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64"])
@pytest.mark.parametrize("size", [0, 3, (4 << 20) + 3])
def test_new_memory(dtype: str, size: int) -> None:
    tensor = empty(torch.zeros(1), size, dtype)
    assert (tensor.dtype, len(tensor)) == (getattr(torch, dtype), size)
    array = empty(np.zeros(1), size, dtype)
    assert (array.dtype.name, len(array)) == (dtype, size)
    assert array.flags.writeable
