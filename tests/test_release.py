"""What a user lets go between two steps is freed at once: an optimizer keeps alive what it lists and nothing else.

Everything is done to our optimizer and to torch's own, with the garbage collector switched off.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import sgdcore
from sgdcore._states import OptimizerState

torch = pytest.importorskip("torch")

COUNT = 4
SHAPE = (5, 7)


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Training:
    """Some steps of an optimizer, which has the only references to its parameters."""

    def __init__(
        self, momentum: float, *, grads: bool = False, size: tuple[int, ...] = SHAPE
    ) -> None:
        self.rng = np.random.default_rng(0)
        self.grads = grads
        self.kept: Any = None
        params = [self.make(self.rng.standard_normal(size)) for _ in range(COUNT)]
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.03}]
        self.optimizer = self.optimizer_of(groups, lr=0.1, momentum=momentum)
        self.references: dict[str, Any] = {}
        self.step(3)
        for i, p in enumerate(params):
            buffer = self.optimizer.state.get(p, {}).get("momentum_buffer")
            parts = {"object": p, **self.parts(p), "momentum": buffer}
            for what, part in parts.items():
                if part is not None:
                    self.references[f"{what} {i}"] = weakref.ref(part)

    def make(self, values: Any) -> Any:
        return sgdcore.Parameter(values)

    def optimizer_of(self, groups: Any, **hypers: Any) -> Any:
        return sgdcore.SGD(groups, **hypers)

    def array(self, values: Any) -> Any:
        return values

    def parts(self, p: Any) -> dict[str, Any]:
        return {"data": p.data}

    def empty_state(self) -> Any:
        return OptimizerState("sgd")

    def step(self, count: int) -> None:
        for _ in range(count):
            for p in self.params():
                p.grad = self.array(self.rng.standard_normal(tuple(p.shape)))
            self.optimizer.step()

    def params(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def first(self) -> Any:
        return self.optimizer.param_groups[0]["params"][0]

    def freed(self) -> list[str]:
        return [
            what for what, ref in self.references.items() if "data" not in what and ref() is None
        ]

    def values(self) -> list[Any]:
        return [np.asarray(p.data) for p in self.params()]


class TorchTraining(Training):
    def make(self, values: Any) -> Any:
        return torch.nn.Parameter(torch.tensor(values))

    def optimizer_of(self, groups: Any, **hypers: Any) -> Any:
        return torch.optim.SGD(groups, **hypers, foreach=False)

    def array(self, values: Any) -> Any:
        return torch.tensor(values)

    def parts(self, p: Any) -> dict[str, Any]:
        return {}

    def empty_state(self) -> Any:
        return defaultdict(dict)


RELEASES: dict[str, Callable[[Training], object]] = {}


def release(function: Callable[[Training], object]) -> Callable[[Training], object]:
    RELEASES[function.__name__] = function
    return function


@release
def nothing(t: Training) -> None:
    pass


@release
def groups_cleared(t: Training) -> None:
    t.optimizer.param_groups.clear()


@release
def groups_replaced(t: Training) -> None:
    t.optimizer.param_groups = []


@release
def group_deleted(t: Training) -> None:
    del t.optimizer.param_groups[1]


@release
def group_emptied(t: Training) -> None:
    t.optimizer.param_groups[0]["params"].clear()


@release
def params_replaced(t: Training) -> None:
    t.optimizer.param_groups[0]["params"] = t.optimizer.param_groups[0]["params"][1:]


@release
def one_removed(t: Training) -> None:
    t.optimizer.param_groups[0]["params"].pop(1)


@release
def one_pruned(t: Training) -> None:
    t.optimizer.state.pop(t.optimizer.param_groups[0]["params"].pop(1), None)


@release
def one_in_anothers_place(t: Training) -> None:
    params = t.optimizer.param_groups[0]["params"]
    t.optimizer.state.pop(params[1], None)
    params[1] = None
    params[1] = t.make(np.ones(SHAPE))


@release
def state_of_one_popped(t: Training) -> None:
    t.optimizer.state.pop(t.first(), None)


@release
def state_of_one_popped_and_kept(t: Training) -> None:
    t.kept = t.optimizer.state.pop(t.first(), None)
    t.optimizer.param_groups[0]["params"].pop(0)


@release
def state_of_one_kept(t: Training) -> None:
    t.kept = t.optimizer.state.get(t.first())
    t.optimizer.param_groups[0]["params"].pop(0)


@release
def state_of_one_with_values_of_the_users(t: Training) -> None:
    t.optimizer.state[t.first()]["mine"] = 3
    t.optimizer.param_groups.clear()


@release
def values_of_the_users_removed(t: Training) -> None:
    t.optimizer.state[t.first()]["mine"] = 3
    t.optimizer.param_groups.clear()
    for state in list(t.optimizer.state.values()):
        state.clear()
        t.kept = state
    t.optimizer.state.clear()


@release
def optimizer_deleted_state_of_one_kept(t: Training) -> None:
    t.kept = t.optimizer.state.get(t.first())
    del t.optimizer


@release
def state_cleared(t: Training) -> None:
    t.optimizer.state.clear()


@release
def state_cleared_state_of_one_kept(t: Training) -> None:
    t.kept = t.optimizer.state.get(t.first())
    t.optimizer.param_groups.clear()
    t.optimizer.state.clear()


@release
def state_replaced(t: Training) -> None:
    t.optimizer.state = t.empty_state()


@release
def state_replaced_by_a_dict(t: Training) -> None:
    t.optimizer.state = defaultdict(dict)


@release
def groups_cleared_state_replaced(t: Training) -> None:
    t.optimizer.param_groups.clear()
    t.optimizer.state = t.empty_state()


@release
def state_of_one_emptied(t: Training) -> None:
    t.optimizer.state[t.first()].clear()


@release
def state_of_one_set_to_nothing(t: Training) -> None:
    t.optimizer.state[t.first()] = {}


@release
def buffer_deleted(t: Training) -> None:
    t.optimizer.state[t.first()].pop("momentum_buffer", None)


@release
def groups_and_state_cleared(t: Training) -> None:
    t.optimizer.param_groups.clear()
    t.optimizer.state.clear()


@release
def checkpoint_loaded(t: Training) -> None:
    saved = t.optimizer.state_dict()
    saved["state"] = {
        i: {k: copy.deepcopy(v) for k, v in values.items()} for i, values in saved["state"].items()
    }
    t.optimizer.load_state_dict(saved)
    del saved
    gc.collect()  # torch's loading leaves cycles of its own


@release
def optimizer_deleted(t: Training) -> None:
    del t.optimizer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", RELEASES)
def test_what_is_let_go_is_freed_at_once(name: str, momentum: float) -> None:
    trainings = [make(momentum) for make in (Training, TorchTraining)]
    for t in trainings:
        RELEASES[name](t)
    ours, other = trainings
    assert ours.freed() == other.freed()
    for i in range(COUNT):  # an array goes with its parameter
        assert (ours.references[f"data {i}"]() is None) == (
            ours.references[f"object {i}"]() is None
        )
    if not hasattr(ours, "optimizer"):
        return
    for t in trainings:
        t.step(3)
    assert len(ours.params()) == len(other.params())
    for a, b in zip(ours.values(), other.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    for t in trainings:
        t.optimizer.param_groups.clear()
        t.optimizer.state.clear()
        t.kept = None
    assert ours.freed() == list(filter(lambda what: "data" not in what, ours.references))


class Convertible:
    """Runs code when a step reads it."""

    def __init__(self, value: float, run: Callable[[], object]) -> None:
        self.value, self.run = value, run

    def __float__(self) -> float:
        self.run()
        return self.value


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("again", [False, True], ids=["once", "each time"])
@pytest.mark.parametrize("change", ["clear", "pop", "replace", "groups"])
@pytest.mark.parametrize("where", ["lr", "dampening", "nesterov", "grads"])
def test_code_in_the_middle_of_a_step_removes_parameters(
    where: str, change: str, again: bool, momentum: float
) -> None:
    t = Training(momentum)
    group = t.optimizer.param_groups[0]
    done: list[Any] = []

    def run() -> None:
        if done and not again:
            return
        done.append(None)
        if change == "clear":
            t.optimizer.param_groups[0]["params"].clear()
            t.optimizer.state.clear()
        elif change == "pop" and group["params"]:
            t.optimizer.state.pop(group["params"].pop(0), None)
        elif change == "replace":
            t.optimizer.state.pop(group["params"][1], None)
            group["params"][1] = None
            group["params"][1] = sgdcore.Parameter(np.zeros(SHAPE))
        elif change == "groups" and len(t.optimizer.param_groups) > 1:
            del t.optimizer.param_groups[1]
        # Takes the place of what was freed.
        done.append([sgdcore.Parameter(np.full(SHAPE, np.nan)) for _ in range(8)])

    class Truth:
        def __bool__(self) -> bool:
            run()
            return False

    grads = None
    if where == "grads":

        class Exporter:
            def __init__(self, array: Any) -> None:
                self.array = array

            def __dlpack_device__(self) -> tuple[int, int]:
                return self.array.__dlpack_device__()

            def __dlpack__(self, **kwargs: Any) -> Any:
                run()
                return self.array.__dlpack__(**kwargs)

        grads = [Exporter(np.ones(SHAPE)) for _ in range(COUNT)]
    elif where == "nesterov":
        group[where] = Truth()
    else:
        group[where] = Convertible(float(group[where]), run)
    t.optimizer.step(**({} if grads is None else {"grads": grads}))
    for parameter in done[1::2]:
        assert all(np.isnan(p.data).all() for p in parameter)
    done.clear()
    gc.collect()
    group["params"].clear()
    t.optimizer.param_groups.clear()
    t.optimizer.state.clear()
    t.optimizer.step()
    gc.collect()
    assert t.freed() == [what for what in t.references if "data" not in what]


@pytest.mark.parametrize("take", ["pop", "popitem"])
def test_a_state_that_is_taken_out_keeps_its_values(take: str) -> None:
    trainings = [Training(0.9), TorchTraining(0.9)]
    taken = []
    for t in trainings:
        t.optimizer.param_groups[0]["params"][1:] = []
        del t.optimizer.param_groups[1]
        states = t.optimizer.state
        for p in [p for p in states if p is not t.first()]:
            del states[p]
        states[t.first()]["mine"] = "value"
        state = states.pop(t.first()) if take == "pop" else states.popitem()[1]
        assert len(states) == 0
        t.step(1)  # starts the momentum anew, in a buffer of its own
        taken.append(dict(state))
    ours, other = taken
    assert ours.pop("mine") == other.pop("mine") == "value"
    assert list(ours) == list(other) == ["momentum_buffer"]
    np.testing.assert_array_equal(ours["momentum_buffer"], other["momentum_buffer"].numpy())
    for a, b in zip(trainings[0].values(), trainings[1].values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_popping_no_state_is_an_error_unless_there_is_a_default() -> None:
    w = sgdcore.Parameter(np.zeros(3))
    state = sgdcore.SGD([w], lr=1).state
    assert state.pop(w, None) is None
    with pytest.raises(KeyError):
        state.pop(w)
    with pytest.raises(KeyError):
        del state[w]


def test_a_state_that_was_taken_out_takes_no_buffer_of_a_parameter_that_is_gone() -> None:
    t = Training(0.9)
    state = t.optimizer.state.pop(t.first())
    state["momentum_buffer"] = np.ones(SHAPE)
    del t.optimizer.param_groups[0]["params"][0]
    with pytest.raises(ReferenceError, match="momentum_buffer"):
        state["momentum_buffer"] = np.zeros(SHAPE)
    np.testing.assert_array_equal(state["momentum_buffer"], np.ones(SHAPE))


def test_a_parameters_own_attributes_remove_it_in_the_middle_of_a_step() -> None:
    """The optimizer asks its parameters whether they were made of arrays when no one has a gradient."""

    class Curious(sgdcore.Parameter):
        def __getattribute__(self, name: str) -> Any:
            if name == "_made_of_array":
                params.clear()
                junk.extend(sgdcore.Parameter(np.zeros(SHAPE)) for _ in range(8))
                return True
            return super().__getattribute__(name)

    junk: list[Any] = []
    optimizer = sgdcore.SGD([Curious(np.ones(SHAPE)) for _ in range(3)], lr=1)
    params = optimizer.param_groups[0]["params"]
    with pytest.raises(TypeError, match="grads"):
        optimizer.step()
    optimizer.step()  # with no parameters left
