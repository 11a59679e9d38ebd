"""Averaging's traffic without other processes: what travels, in which memory, and what it does to the arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sgdcore.distributed import averager as averaging
from sgdcore.distributed._flat import BLOCK, empty, runs, scale
from sgdcore.distributed.averager import Averager, ErrorFeedback, Sizes


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
def test_scaling(kind: str, dtype: str) -> None:
    """Across several blocks; what is not finite is seen wherever it is, and large sums are no alarm."""
    values = np.random.default_rng(0).standard_normal(3 * BLOCK + 5).astype(dtype)
    array = like(kind, values)
    assert scale(array, 1 / 3)
    assert np.asarray(array).tobytes() == (values * np.dtype(dtype).type(1 / 3)).tobytes()
    assert scale(like(kind, np.full(9, np.finfo(dtype).max / 2, dtype)), 1.0)
    for place in (0, BLOCK, len(values) - 1):
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = values.copy()
            spoilt[place] = bad
            assert not scale(like(kind, spoilt), 0.5)


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
    feedback = ErrorFeedback([view], [anchor])
    feedback.load([error])
    Averager([view], [[0]], ["bfloat16"]).average(Same(2), [view], 0.5, feedback=feedback)
    share = (moved - start) / np.float32(2) + left
    sent = torch.tensor(share).bfloat16()
    mean = start + (2 * sent.float()).numpy()
    assert np.asarray(view).tobytes() == mean.tobytes()
    left = share - sent.float().numpy()
    assert np.asarray(feedback.residuals[0]).tobytes() == left.tobytes()
    assert np.asarray(anchor).tobytes() == start.tobytes()


class Logging(Same):
    """Ranks whose all-reduces are logged; one of them fails."""

    def __init__(self, bad: int | None) -> None:
        super().__init__(2)
        self.log: list[str] = []
        self.bad = bad

    def all_reduce(self, array: Any) -> Any:
        number, group = self.count, self
        self.count += 1
        self.log.append(f"send {number}")

        class Work:
            def wait(self) -> None:
                group.log.append(f"wait {number}")
                if number == group.bad:
                    raise RuntimeError("gone")

        return Work()


def logged(bad: int | None, in_flight: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(averaging, "GLOO_SIZES", Sizes(8, 8, in_flight))
    arrays = [np.ones(1) for _ in range(6)]
    group = Logging(bad)
    averager = Averager(arrays, runs(arrays), ["float64"] * 6)
    if bad is None:
        averager.average(group, arrays, 0.5)
    else:
        with pytest.raises(RuntimeError, match="gone"):
            averager.average(group, arrays, 0.5)
    return group.log


def test_as_many_are_under_way_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    log = " ".join(logged(None, 5, monkeypatch))
    first = "send 0 send 1 send 2 send 3 send 4 wait 0 send 5 wait 1"
    assert log == f"{first} wait 2 wait 3 wait 4 wait 5"


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_failure_waits_for_all_others(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(bad, 3, monkeypatch)
    sent = {each.removeprefix("send ") for each in log if each.startswith("send")}
    assert {each.removeprefix("wait ") for each in log if each.startswith("wait")} == sent
    assert len(sent) == 3 + bad


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64"])
@pytest.mark.parametrize("size", [0, 3, (4 << 20) + 3])
def test_new_memory(dtype: str, size: int) -> None:
    tensor = empty(torch.zeros(1), size, dtype)
    assert (tensor.dtype, len(tensor)) == (getattr(torch, dtype), size)
    array = empty(np.zeros(1), size, dtype)
    assert (array.dtype.name, len(array)) == (dtype, size)
    assert array.flags.writeable
