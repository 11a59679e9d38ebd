"""Local SGD with a rule that has several states: all are averaged, reset, brought back and saved."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import sgdcore
from sgdcore import _kept
from sgdcore._rules import Rule, State
from sgdcore.distributed import LocalSGD, RoundError
from support import assert_same_bits
from test_distributed_interrupts import ThreadGroup, on_all

KEYS = ("momentum_buffer", "second")


@pytest.fixture(autouse=True)
def two_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another state beside SGD's, which the core keeps for the user."""
    states = tuple(State(i, key, f"{key}_dtype") for i, key in enumerate(KEYS))
    monkeypatch.setattr(_kept, "rule_of", lambda _: Rule("sgd", (), (), states))


def build(group: ThreadGroup, **options: Any) -> LocalSGD:
    params = [sgdcore.Parameter(np.full(3, 1.0)), sgdcore.Parameter(np.full(2, 2.0))]
    return LocalSGD(sgdcore.SGD(params, lr=0.1, momentum=0.5), group, sync_every=2, **options)


def take(local: LocalSGD, group: ThreadGroup, second: float) -> None:
    """A step, which writes to the other state of the first parameter."""
    for p in local.param_groups[0]["params"]:
        p.grad = np.full(p.shape, group.rank + 1.0)
    first = local.param_groups[0]["params"][0]
    local.optimizer.state[first]["second"] = np.full(3, second + group.rank)
    local.step()


def states(local: LocalSGD) -> list[Any]:
    kept = [local.optimizer.state[p] for p in local.param_groups[0]["params"]]
    return [copy.deepcopy(each.get(key)) for each in kept for key in KEYS]


def test_all_are_averaged() -> None:
    def run(group: ThreadGroup) -> list[Any]:
        local = build(group, momentum_sync="average")
        for _ in range(2):
            take(local, group, 4.0)
        return states(local)

    first, second = on_all(run)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert_same_bits(a, b)
    assert first[1].tolist() == [4.5] * 3
    assert first[0].tolist() == [1.5 * 1.5] * 3
    assert first[3] is second[3] is None


def test_all_are_reset() -> None:
    def run(group: ThreadGroup) -> list[Any]:
        local = build(group, momentum_sync="reset")
        for _ in range(2):
            take(local, group, 4.0)
        return states(local)

    for each in on_all(run):
        assert not any(state.any() for state in each[:3])


@pytest.mark.parametrize("resumed", [False, True])
def test_all_are_brought_back(resumed: bool) -> None:
    """By a round that fails, also where it was begun before a checkpoint."""

    def run(group: ThreadGroup) -> tuple[list[Any], list[Any]]:
        local = build(group, transactional=True)
        for second in (4.0, 5.0):
            take(local, group, second)
        before = states(local)
        take(local, group, 6.0)
        if resumed:
            saved, local = copy.deepcopy(local.state_dict()), build(group, transactional=True)
            local.load_state_dict(saved)

        class Gone(ThreadGroup):
            def all_reduce(self, array: Any) -> Any:
                raise ConnectionError("gone")

        local.group = Gone(group.rank, group._barrier, group._arrays)
        with pytest.raises(RoundError, match="are those of the end of round 1"):
            take(local, group, 7.0)
        return before, states(local)

    for before, after in on_all(run):
        for a, b in zip(before[:3], after[:3], strict=True):
            assert_same_bits(a, b)
        assert after[3] is None
