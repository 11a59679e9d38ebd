"""The optimizer's bookkeeping against torch.optim: groups, state, hooks, checkpoints, copies.

What torch can do as well is a scenario that runs on both libraries, `Sgdcore` and `Torch`, and whose
record of numbers, texts and errors must be the same, in every bit. What only sgdcore can do is
compared with sgdcore.reference, or with the same training without the feature.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sgdcore
from sgdcore import _core
from sgdcore.reference import ReferenceSGD
from support import (
    BFLOAT16,
    STORAGE_TYPES,
    Array,
    assert_same_bits,
    assert_same_training,
    momentum_of,
    numbers,
    parameters_of,
    refused,
    snapshot,
)

FULL = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}
NESTEROV = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


# --- The two libraries under one set of names -----------------------------------------------------


class Sgdcore:
    """sgdcore's side of a scenario."""

    SGD = sgdcore.SGD

    @staticmethod
    def array(array: Array) -> Any:
        return array.copy()

    @staticmethod
    def parameter(array: Array) -> Any:
        return sgdcore.Parameter(array.copy())

    @staticmethod
    def numpy(value: Any) -> Array:
        return np.array(value.data if isinstance(value, sgdcore.Parameter) else value)


class Torch:
    """torch's side: the for-loop implementation, whose bits sgdcore promises."""

    @staticmethod
    def SGD(params: Any, **hyper: Any) -> torch.optim.SGD:
        return torch.optim.SGD(params, foreach=False, **hyper)

    @staticmethod
    def array(array: Array) -> Any:
        return torch.from_numpy(array.copy())

    @staticmethod
    def parameter(array: Array) -> Any:
        return torch.nn.Parameter(torch.from_numpy(array.copy()))

    @staticmethod
    def numpy(value: Any) -> Array:
        return value.detach().numpy().copy()


class Run:
    """A training on one library, and the record of what it showed."""

    shapes = ((3,), (2, 4), ())

    def __init__(self, library: Any, dtype: Any = np.float32) -> None:
        self.library = library
        self.dtype = dtype
        self.params = [
            library.parameter(numbers(i, shape, dtype)) for i, shape in enumerate(self.shapes)
        ]
        self.record: list[Any] = []
        self.optimizer: Any = None
        self._seed = 100

    def start(self, params: Any = None, **hyper: Any) -> Any:
        """Make the optimizer, over all parameters if no others are given."""
        self.optimizer = self.library.SGD(self.params if params is None else params, **hyper)
        return self.optimizer

    def new_grads(self, *skip: int) -> None:
        """Give every parameter a new gradient, except that those at `skip` get none."""
        for i, parameter in enumerate(self.params):
            self._seed += 1
            grad = numbers(self._seed, tuple(parameter.shape), self.dtype)
            parameter.grad = None if i in skip else self.library.array(grad)

    def step(self, *skip: int, count: int = 1) -> None:
        """Train `count` steps and record where they led."""
        for _ in range(count):
            self.new_grads(*skip)
            self.optimizer.step()
            self.note_values()

    def note(self, *values: Any) -> None:
        self.record.extend(values)

    def note_values(self) -> None:
        """Record all parameters and momentum buffers; False for a buffer that does not exist."""
        for parameter in self.params:
            self.note(self.library.numpy(parameter))
            state = self.optimizer.state.get(parameter, {})
            buffer = state.get("momentum_buffer")
            self.note(False if buffer is None else self.library.numpy(buffer))

    def note_grads(self) -> None:
        for parameter in self.params:
            self.note(None if parameter.grad is None else self.library.numpy(parameter.grad))

    def note_error(self, action: Callable[[], Any], message: str) -> None:
        """Record the type of the error that `action` raises, and that its message has `message`."""
        with pytest.raises(Exception) as caught:
            action()
        assert message in str(caught.value)
        self.note(caught.type.__name__)


Scenario = Callable[[Run], None]
SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    """Add to the scenarios that must go the same way in both libraries."""
    SCENARIOS.append(function)
    return function


# --- Scenarios: groups ----------------------------------------------------------------------------


@scenario
def groups_override_defaults(run: Run) -> None:
    a, b, c = run.params
    run.start(
        [{"params": [a, b], "lr": 0.5, "nesterov": True}, {"params": c}], lr=0.1, momentum=0.9
    )
    run.note([len(group["params"]) for group in run.optimizer.param_groups])
    run.note([group["lr"] for group in run.optimizer.param_groups], run.optimizer.defaults["lr"])
    run.step(count=3)


@scenario
def groups_from_generators(run: Run) -> None:
    a, b, c = run.params
    run.start(({"params": (p for p in group)} for group in ([a], [b, c])), lr=0.1)
    run.step(count=2)


@scenario
def group_keys_of_the_user_are_kept(run: Run) -> None:
    run.start([{"params": run.params, "name": "all", "layer": 3}], lr=0.1)
    run.step()
    run.note(run.optimizer.param_groups[0]["name"], run.optimizer.param_groups[0]["layer"])
    run.note(run.optimizer.state_dict()["param_groups"][0]["name"])


@scenario
def hyperparameters_changed_between_steps(run: Run) -> None:
    group = run.start(**FULL).param_groups[0]
    run.step()
    for key, value in [
        ("lr", 0.01),
        ("weight_decay", 0.5),
        ("dampening", 0),
        ("nesterov", True),
        ("maximize", True),
        ("momentum", 0.5),
        ("weight_decay", 0),
        ("nesterov", False),
        ("lr", 0),
        ("lr", 1),
    ]:
        group[key] = value
        run.step()


@scenario
def momentum_switched_on_off_and_on(run: Run) -> None:
    group = run.start(lr=0.1).param_groups[0]
    run.step()
    group["momentum"] = 0.9
    run.step(count=2)
    group["momentum"] = 0
    run.step()  # the buffers stay as they are
    group["momentum"] = 0.8
    run.step()


@scenario
def groups_have_their_own_hyperparameters_at_each_step(run: Run) -> None:
    a, b, c = run.params
    run.start([{"params": [a]}, {"params": [b]}, {"params": [c]}], **FULL)
    for step in range(4):
        for i, group in enumerate(run.optimizer.param_groups):
            group["lr"] = 0.1 / (1 + i + step)
        run.step()


@scenario
def params_list_changed_in_place(run: Run) -> None:
    a, b, c = run.params
    params = run.start([a], **FULL).param_groups[0]["params"]
    run.step()
    params.append(c)
    run.step()
    params.insert(0, b)
    run.step()
    del params[1]
    run.step()
    params[:] = [c, a, b]
    run.step()


@scenario
def params_list_replaced(run: Run) -> None:
    a, b, c = run.params
    group = run.start([a, b], **FULL).param_groups[0]
    run.step()
    group["params"] = [b, c]
    run.step()
    group["params"] = []
    run.step()
    group["params"] = [c, b, a]
    run.step()


@scenario
def groups_removed_and_swapped(run: Run) -> None:
    a, b, c = run.params
    run.start([{"params": [p], "lr": lr} for p, lr in ((a, 0.1), (b, 0.2), (c, 0.3))], momentum=0.9)
    run.step()
    groups = run.optimizer.param_groups
    removed = groups.pop(1)
    run.step()
    groups.insert(0, removed)
    run.step()
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    run.step()
    del groups[:]
    run.step()


@scenario
def group_added_between_steps(run: Run) -> None:
    a, b, c = run.params
    run.start([a], **FULL)
    run.step()
    run.optimizer.add_param_group({"params": b})
    run.optimizer.add_param_group({"params": [c], "lr": 0.5, "momentum": 0})
    run.note([group["lr"] for group in run.optimizer.param_groups])
    run.step(count=2)


@scenario
def group_without_parameters(run: Run) -> None:
    run.start([{"params": []}, {"params": run.params}], lr=0.1, momentum=0.9)
    run.step(count=2)


@scenario
def group_refused(run: Run) -> None:
    a, b, c = run.params
    run.start([a], **FULL)
    run.step()
    add = run.optimizer.add_param_group
    for group, message in [
        ([b], "param_group must be a dict, but got <class 'list'>"),
        ({"params": [b, a]}, "some parameters appear in more than one parameter group"),
        ({"params": {b, c}}, "optimizer parameters need to be organized in ordered collections"),
        ({"params": [b, "c"]}, "optimizer can only optimize"),
        ({"params": [("b", b)]}, "cannot add param group with names to the optimizer"),
        ({"params": [("b", b), c]}, "Some param names are missing"),
    ]:
        run.note_error(lambda group=group: add(group), message)
        run.note(len(run.optimizer.param_groups))
        run.step()
    add({"params": [b, c]})
    run.step()


@scenario
def nothing_to_optimize(run: Run) -> None:
    run.note_error(lambda: run.library.SGD([], lr=0.1), "optimizer got an empty parameter list")
    run.note_error(
        lambda: run.library.SGD(run.library.array(numbers(0, (2,))), lr=0.1),
        "params argument given to the optimizer should be an iterable of ",
    )


# --- Scenarios: names -----------------------------------------------------------------------------


@scenario
def named_parameters(run: Run) -> None:
    a, b, c = run.params
    run.start([("a", a), ("b", b)], **FULL)
    run.note(run.optimizer.param_groups[0]["param_names"])
    run.step()
    run.optimizer.add_param_group({"params": [("c", c)]})
    run.note([group["param_names"] for group in run.optimizer.state_dict()["param_groups"]])
    run.note([group["params"] for group in run.optimizer.state_dict()["param_groups"]])
    run.note("param_names: ['a', 'b']" in repr(run.optimizer))
    run.step()


@scenario
def named_parameters_in_groups(run: Run) -> None:
    a, b, c = run.params
    run.start([{"params": iter([("a", a)]), "lr": 0.5}, {"params": [("b", b), ("c", c)]}], lr=0.1)
    run.note([group["param_names"] for group in run.optimizer.param_groups])
    run.step()


@scenario
def names_given_to_some_parameters_only(run: Run) -> None:
    a, b, c = run.params
    sgd = run.library.SGD
    missing = "all optimizer params should be with/without names. Some param names are missing"
    run.note_error(lambda: sgd([("a", a), b], lr=0.1), missing)
    run.note_error(lambda: sgd([a, ("b", b)], lr=0.1), missing)
    mixed = "all optimizer param groups should be with/without names. cannot add param group "
    run.note_error(lambda: sgd([{"params": [("a", a)]}, {"params": [b]}]), mixed + "without names")
    run.note_error(lambda: sgd([{"params": [a]}, {"params": [("c", c)]}]), mixed + "with names")


@scenario
def loaded_names_win(run: Run) -> None:
    a, b, c = run.params
    run.start([("a", a), ("b", b), ("c", c)], lr=0.1)
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    checkpoint["param_groups"][0]["param_names"] = ["x", "y", "z"]
    run.optimizer.load_state_dict(checkpoint)
    run.note(run.optimizer.param_groups[0]["param_names"])
    del checkpoint["param_groups"][0]["param_names"]
    run.optimizer.load_state_dict(checkpoint)
    run.note(run.optimizer.param_groups[0]["param_names"])


# --- Scenarios: gradients and steps ---------------------------------------------------------------


@scenario
def parameters_without_gradient_are_skipped(run: Run) -> None:
    run.start(**FULL)
    run.step(0)
    run.step(1)
    run.step()
    run.step(0, 1, 2)
    run.step(2)


@scenario
def first_gradient_comes_late(run: Run) -> None:
    run.start(**NESTEROV)
    run.step(1, 2)
    run.step(2)
    run.step()


@scenario
def zero_grad_forgets(run: Run) -> None:
    run.start(**FULL)
    run.step()
    run.optimizer.zero_grad()
    run.note_grads()
    run.optimizer.step()  # skips all
    run.note_values()


@scenario
def zero_grad_zeroes_in_place(run: Run) -> None:
    run.start(**FULL)
    run.step(1)
    held = [parameter.grad for parameter in run.params]
    run.optimizer.zero_grad(set_to_none=False)
    run.note([parameter.grad is grad for parameter, grad in zip(run.params, held, strict=True)])
    run.note_grads()
    run.optimizer.step()  # with gradients of zero
    run.note_values()


@scenario
def gradient_changed_in_place(run: Run) -> None:
    run.start(**FULL)
    run.step()
    for parameter in run.params:
        parameter.grad += run.library.array(numbers(5, tuple(parameter.shape)))
    run.optimizer.step()
    run.note_values()


@scenario
def closure_is_called_once_and_its_loss_returned(run: Run) -> None:
    run.start(**FULL)
    calls = []

    def closure() -> str:
        calls.append(1)
        run.new_grads()
        return f"loss {len(calls)}"

    run.note(run.optimizer.step(closure), len(calls))
    run.note_values()
    run.note(run.optimizer.step(closure=closure), len(calls))
    run.note_values()
    run.note(run.optimizer.step(None))
    run.note(run.optimizer.step())
    run.note_values()


@scenario
def closure_raises(run: Run) -> None:
    run.start(**FULL)
    run.step()
    run.new_grads()
    run.note_error(lambda: run.optimizer.step(lambda: 1 / 0), "division by zero")
    run.note_values()


@scenario
def learning_rate_as_array_of_no_dimension(run: Run) -> None:
    lr = run.library.array(np.array(0.1, np.float32))
    run.start(momentum=0.9, lr=lr)
    run.step()
    lr *= 0.5
    run.step()
    lr[...] = 3
    run.step()
    run.note(run.optimizer.param_groups[0]["lr"] is lr)


@scenario
def learning_rate_as_array_of_one_element(run: Run) -> None:
    lr = run.library.array(np.array([0.1], np.float64))
    run.start(lr=lr)
    run.step()
    lr[0] = 0.7
    run.step()


# --- Scenarios: state -----------------------------------------------------------------------------


@scenario
def state_is_empty_without_momentum(run: Run) -> None:
    run.start(lr=0.1)
    run.step()
    run.note([run.optimizer.state[p].get("momentum_buffer") for p in run.params])


@scenario
def momentum_buffer_read_and_changed_in_place(run: Run) -> None:
    run.start(**FULL)
    run.step()
    buffer = run.optimizer.state[run.params[0]]["momentum_buffer"]
    buffer *= 2
    run.step()
    run.note(run.library.numpy(buffer))


@scenario
def momentum_buffer_replaced(run: Run) -> None:
    run.start(**FULL)
    replacement = run.library.array(numbers(7, Run.shapes[0], run.dtype))
    run.optimizer.state[run.params[0]]["momentum_buffer"] = replacement  # before any step
    run.step()
    replacement = run.library.array(numbers(8, Run.shapes[1], run.dtype))
    run.optimizer.state[run.params[1]] = {"momentum_buffer": replacement, "note": "mine"}
    run.step()
    run.note(run.library.numpy(replacement), run.optimizer.state[run.params[1]]["note"])


@scenario
def momentum_buffer_removed(run: Run) -> None:
    a, b, c = run.params
    run.start(**FULL)
    run.step(count=2)
    del run.optimizer.state[a]["momentum_buffer"]
    run.step()  # a first one for that parameter
    run.optimizer.state[b]["momentum_buffer"] = None
    run.step()
    del run.optimizer.state[c]
    run.note(c in run.optimizer.state)
    run.step()
    run.optimizer.state.clear()
    run.note(len(run.optimizer.state))
    run.step()
    run.note(len(run.optimizer.state))


@scenario
def keys_of_the_user_live_beside_the_momentum(run: Run) -> None:
    a, b, _ = run.params
    run.start(**FULL)
    run.step()
    run.optimizer.state[a]["steps"] = 1
    run.step()
    run.note(sorted(run.optimizer.state[a]), len(run.optimizer.state[a]), a in run.optimizer.state)
    run.note(run.optimizer.state[a].pop("steps"), run.optimizer.state[b].get("steps"))
    run.note_error(lambda: run.optimizer.state[b]["steps"], "steps")
    run.note(sorted(run.optimizer.state_dict()["state"][0]))


# --- Scenarios: checkpoints -----------------------------------------------------------------------


@scenario
def state_dict_has_torch_layout(run: Run) -> None:
    a, b, c = run.params
    run.start([{"params": [a]}, {"params": [c, b]}], **FULL)
    run.step(2)
    checkpoint = run.optimizer.state_dict()
    run.note(sorted(checkpoint), [group["params"] for group in checkpoint["param_groups"]])
    run.note([type(group).__name__ for group in checkpoint["param_groups"]])
    for position, values in checkpoint["state"].items():
        run.note(position, sorted(values), run.library.numpy(values["momentum_buffer"]))
    buffer = run.optimizer.state[a]["momentum_buffer"]
    run.note(checkpoint["state"][0]["momentum_buffer"] is buffer)


@scenario
def checkpoint_goes_on_in_another_optimizer(run: Run) -> None:
    a, b, c = run.params
    run.start([{"params": [a]}, {"params": [b, c], "lr": 0.3}], **FULL)
    run.step(2, count=2)
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    run.start([{"params": [a]}, {"params": [b, c]}], lr=9, nesterov=False)
    run.optimizer.load_state_dict(checkpoint)
    run.note([(g["lr"], g["momentum"]) for g in run.optimizer.param_groups])
    run.step(count=2)


@scenario
def loading_replaces_what_was_there(run: Run) -> None:
    run.start(**FULL)
    empty = copy.deepcopy(run.optimizer.state_dict())
    run.step()
    run.optimizer.state[run.params[0]]["mine"] = [1, 2]
    full = copy.deepcopy(run.optimizer.state_dict())
    run.step()
    run.optimizer.load_state_dict(empty)
    run.note(len(run.optimizer.state))
    run.step()
    run.optimizer.load_state_dict(full)
    run.note(run.optimizer.state[run.params[0]]["mine"])
    run.step()


@scenario
def checkpoint_refused(run: Run) -> None:
    a, b, c = run.params
    run.start([{"params": [a]}, {"params": [b, c]}], **FULL)
    run.step()
    good = copy.deepcopy(run.optimizer.state_dict())
    few = {**good, "param_groups": good["param_groups"][:1]}
    run.note_error(
        lambda: run.optimizer.load_state_dict(few),
        "loaded state dict has a different number of parameter groups",
    )
    run.step()
    moved = copy.deepcopy(good)
    moved["param_groups"][0]["params"] = [0, 1]
    moved["param_groups"][1]["params"] = [2]
    run.note_error(
        lambda: run.optimizer.load_state_dict(moved),
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    )
    run.step()


@scenario
def checkpoint_through_pickle(run: Run) -> None:
    run.start(**FULL)
    run.step()
    checkpoint = pickle.loads(pickle.dumps(run.optimizer.state_dict()))
    run.start(lr=1)
    run.optimizer.load_state_dict(checkpoint)
    run.step()


# --- Scenarios: hooks -----------------------------------------------------------------------------


@scenario
def step_hooks_are_called_in_order(run: Run) -> None:
    run.start(**FULL)
    log: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def called(optimizer: Any, args: Any, kwargs: Any) -> None:
            same = optimizer is run.optimizer
            values = float(run.library.numpy(run.params[2]))
            log.append(f"{name} {same} {len(args)} {args[0] is optimizer} {values}")

        return called

    handles = [
        run.optimizer.register_step_pre_hook(hook("pre 1")),
        run.optimizer.register_step_post_hook(hook("post 1")),
        run.optimizer.register_step_pre_hook(hook("pre 2")),
        run.optimizer.register_step_post_hook(hook("post 2")),
    ]
    run.step()
    run.optimizer.step(lambda: log.append("closure"))
    run.note_values()
    handles[0].remove()
    handles[1].remove()
    handles[1].remove()  # more than once does no harm
    run.step()
    for handle in handles[2:]:
        handle.remove()
    run.step()
    run.note(log)


@scenario
def hook_for_the_length_of_a_block(run: Run) -> None:
    run.start(**FULL)
    log: list[str] = []
    with run.optimizer.register_step_post_hook(lambda *_: log.append("within")):
        run.step()
    run.step()
    with (
        pytest.raises(ZeroDivisionError),
        run.optimizer.register_step_post_hook(lambda *_: log.append("raised")),
    ):
        raise ZeroDivisionError
    run.step()
    run.note(log)


@scenario
def step_pre_hook_changes_what_the_step_sees(run: Run) -> None:
    run.start(**FULL)

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.param_groups[0]["lr"] /= 2
        for parameter in run.params:
            parameter.grad *= 2

    run.optimizer.register_step_pre_hook(halve)
    run.step(count=2)


@scenario
def step_pre_hook_replaces_the_closure(run: Run) -> None:
    run.start(**FULL)
    run.new_grads()
    post: list[Any] = []

    def replace(optimizer: Any, args: Any, kwargs: Any) -> Any:
        return (args[0], lambda: "another"), kwargs

    run.optimizer.register_step_pre_hook(replace)
    run.optimizer.register_step_post_hook(lambda _, args, kwargs: post.append(args[1]()))
    run.note(run.optimizer.step(lambda: "the first"), run.optimizer.step(), post)
    run.note_values()


@scenario
def step_pre_hook_replaces_by_keyword(run: Run) -> None:
    run.start(**FULL)
    run.new_grads()
    run.optimizer.register_step_pre_hook(lambda _, args, kwargs: (args[:1], {"closure": lambda: 5}))
    run.note(run.optimizer.step(lambda: 4))


@scenario
def step_pre_hook_returns_nonsense(run: Run) -> None:
    run.start(**FULL)
    run.step()
    run.optimizer.register_step_pre_hook(lambda *_: "nonsense")
    run.note_error(
        run.optimizer.step,
        "must return None or a tuple of (new_args, new_kwargs), but got nonsense",
    )
    run.note_values()


@scenario
def state_dict_hooks(run: Run) -> None:
    run.start(**FULL)
    run.step()
    log: list[str] = []
    register_pre = run.optimizer.register_state_dict_pre_hook
    register_post = run.optimizer.register_state_dict_post_hook
    register_pre(lambda optimizer: log.append(f"pre 1 {optimizer is run.optimizer}"))
    register_pre(lambda _: log.append("pre 0"), prepend=True)
    # One changes the dict, one returns another.
    register_post(lambda optimizer, state_dict: log.append("post 1") or {**state_dict, "mine": 1})
    register_post(lambda _, state_dict: state_dict.setdefault("order", []).append("post 0"), True)
    last = register_post(lambda _, state_dict: state_dict.update(last=True))
    checkpoint = run.optimizer.state_dict()
    run.note(log, sorted(checkpoint), checkpoint["mine"], checkpoint["order"], checkpoint["last"])
    last.remove()
    run.note("last" in run.optimizer.state_dict())


@scenario
def load_state_dict_hooks(run: Run) -> None:
    run.start(**FULL)
    run.step()
    log: list[str] = []
    register_pre = run.optimizer.register_load_state_dict_pre_hook
    register_post = run.optimizer.register_load_state_dict_post_hook

    def cool(optimizer: Any, state_dict: Any) -> Any:
        log.append("pre 1")
        groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def change_in_place(optimizer: Any, state_dict: Any) -> None:
        log.append("pre 0")
        state_dict["state"] = dict(list(state_dict["state"].items())[:1])

    register_pre(cool)
    register_pre(change_in_place, prepend=True)
    register_post(lambda opt: log.append(f"post 1 {opt.param_groups[0]['lr']} {len(opt.state)}"))
    first = register_post(lambda _: log.append("post 0"), prepend=True)
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(checkpoint)
    run.note(log, len(checkpoint["state"]))  # hooks change a copy
    first.remove()
    run.step()
    run.optimizer.load_state_dict(checkpoint)
    run.note(log)


# --- Scenarios: copies ----------------------------------------------------------------------------


@scenario
def optimizer_copied_with_its_parameters(run: Run) -> None:
    a, b, c = run.params
    run.start([{"params": [a, b]}, {"params": [c], "lr": 0.5}], **FULL)
    run.step(2, count=2)
    run.optimizer, run.params = copy.deepcopy((run.optimizer, run.params))
    run.note([p is q for p, q in zip((a, b, c), run.params, strict=True)])
    run.step(count=2)
    run.note(*(run.library.numpy(p) for p in (a, b, c)))  # the originals stay


@scenario
def optimizer_pickled_with_its_parameters(run: Run) -> None:
    run.start(**FULL)
    run.step(2, count=2)
    run.optimizer, run.params = pickle.loads(pickle.dumps((run.optimizer, run.params)))
    run.step(count=2)
    run.optimizer.add_param_group({"params": run.library.parameter(numbers(9, (2,)))})
    run.step()


@scenario
def hooks_are_not_copied(run: Run) -> None:
    run.start(**FULL)
    log: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: log.append("step"))
    other = copy.deepcopy(run.optimizer)
    other.step()
    run.note(log)


def _compare(actual: Any, expected: Any, where: str) -> None:
    if isinstance(actual, np.ndarray) or isinstance(expected, np.ndarray):
        assert isinstance(actual, np.ndarray), where
        assert isinstance(expected, np.ndarray), where
        assert_same_bits(actual, expected, where)
    else:
        assert actual == expected, where


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("function", SCENARIOS, ids=lambda function: function.__name__)
def test_same_as_torch(function: Scenario, dtype: Any) -> None:
    ours, theirs = Run(Sgdcore, dtype), Run(Torch, dtype)
    function(ours)
    function(theirs)
    assert len(ours.record) == len(theirs.record) > 0
    for i, (actual, expected) in enumerate(zip(ours.record, theirs.record, strict=True)):
        _compare(actual, expected, f"entry {i} of the record")


def test_modules_that_are_imported_when_used_are_there() -> None:
    script = (
        "import sgdcore, sys; assert not {'torch', 'sgdcore.distributed'} & {*sys.modules}; "
        "names = {'torch', 'distributed', 'reference'}; assert names < {*dir(sgdcore)}; "
        "print(*(getattr(sgdcore, name).__name__ for name in sorted(names)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert found.split() == ["sgdcore.distributed", "sgdcore.reference", "sgdcore.torch"]


def test_the_base_class_has_no_rule() -> None:
    with pytest.raises(NotImplementedError):
        sgdcore.Optimizer([np.zeros(3)], {})


def test_repr_has_torch_shape() -> None:
    def lines(run: Run) -> list[str]:
        a, b, c = run.params
        run.start([{"params": [a, b], "lr": 0.5}, {"params": [c]}], **FULL)
        own = ("momentum_dtype", "foreach", "fused", "differentiable")
        return [
            line
            for line in repr(run.optimizer).split("\n")
            if line.split(":")[0].strip() not in own
        ]

    ours, theirs = lines(Run(Sgdcore)), lines(Run(Torch))
    assert ours == theirs
    assert ours[:2] == ["SGD (", "Parameter Group 0"]
    assert ours[-1] == ")"


def test_every_argument_of_torch_sgd_that_makes_sense_here_exists() -> None:
    def arguments(function: Any) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: (p.default, p.kind) for p in parameters if p.name != "params"}

    theirs = arguments(torch.optim.SGD)
    for key in ("foreach", "differentiable", "fused"):  # which of torch's implementations runs
        del theirs[key]
    ours = arguments(sgdcore.SGD)
    assert ours.pop("momentum_dtype")[0] is None
    assert ours.pop("options")[1] is inspect.Parameter.VAR_KEYWORD
    assert ours == theirs


# --- step(grads=...) and step(zero_grad=True) -----------------------------------------------------


def _values(dtype: Any = np.float32) -> list[Array]:
    return [numbers(i, shape, dtype) for i, shape in enumerate(Run.shapes)]


def _grads(seed: int, dtype: Any = np.float32) -> list[Array]:
    return [numbers(1000 * seed + i, shape, dtype) for i, shape in enumerate(Run.shapes)]


def _assert_as_reference(optimizer: sgdcore.SGD, reference: ReferenceSGD) -> None:
    for i, parameter in enumerate(parameters_of(optimizer)):
        assert_same_bits(parameter.data, reference.params[i], f"parameter {i}")
    for i, buffer in enumerate(momentum_of(optimizer)):
        assert_same_bits(buffer, reference.momentum_buffers[i], f"momentum of parameter {i}")


@pytest.mark.parametrize("sequence", [list, tuple, collections.deque])
def test_given_gradients_are_used(sequence: Any) -> None:
    values = _values()
    reference = ReferenceSGD(values, **FULL)
    optimizer = sgdcore.SGD(values, **FULL)
    for step in range(4):
        grads: list[Any] = _grads(step)
        if step < 3:
            grads[step] = None
        optimizer.step(grads=sequence(grads))
        reference.step(grads)
        _assert_as_reference(optimizer, reference)
    assert all(p.data is value for p, value in zip(parameters_of(optimizer), values, strict=True))


def test_given_gradients_leave_the_parameters_own_alone() -> None:
    optimizer = sgdcore.SGD([sgdcore.Parameter(value) for value in _values()], **FULL)
    reference = ReferenceSGD(_values(), **FULL)
    own = _grads(50)
    for parameter, grad in zip(parameters_of(optimizer), own, strict=True):
        parameter.grad = grad
    given: list[Any] = [*_grads(51)[:2], None]
    optimizer.step(grads=given)
    reference.step(given)
    _assert_as_reference(optimizer, reference)  # None skips, although there is one of its own
    assert all(p.grad is grad for p, grad in zip(parameters_of(optimizer), own, strict=True))
    for grad, same in zip(own, _grads(50), strict=True):
        assert_same_bits(grad, same)
    optimizer.step()
    reference.step(own)
    _assert_as_reference(optimizer, reference)


def test_given_gradients_of_other_types() -> None:
    """Whatever shares its memory is read: other dtypes, torch tensors, array.array, Parameters."""
    tensor = torch.from_numpy(numbers(2, (3,))).bfloat16()
    grads = {
        "float64": numbers(1, (3,), np.float64),
        "bfloat16": numbers(1, (3,), BFLOAT16),
        "tensor": tensor,
        "memoryview": memoryview(numbers(3, (3,))),
        "parameter": sgdcore.Parameter(numbers(4, (3,), np.float16)),
    }
    arrays = {name: np.asarray(grad) for name, grad in grads.items() if name != "tensor"}
    arrays["tensor"] = tensor.float().numpy().astype(BFLOAT16)
    for name, grad in grads.items():
        optimizer = sgdcore.SGD([numbers(0, (3,))], lr=0.1)
        optimizer.step(grads=[grad])
        reference = ReferenceSGD([numbers(0, (3,))], lr=0.1)
        reference.step([arrays[name]])
        assert_same_bits(parameters_of(optimizer)[0].data, reference.params[0], name)


@pytest.mark.parametrize("way", ["own", "given"])
def test_zero_grad_in_the_step_clears_what_was_used(way: str) -> None:
    optimizer = sgdcore.SGD([sgdcore.Parameter(value) for value in _values()], **NESTEROV)
    plain = sgdcore.SGD([sgdcore.Parameter(value) for value in _values()], **NESTEROV)
    for step in range(3):
        grads: list[Any] = _grads(step)
        if step == 1:
            grads[1] = None
        for p, q, grad in zip(parameters_of(optimizer), parameters_of(plain), grads, strict=True):
            p.grad = grad if way == "own" else None
            q.grad = None if grad is None else grad.copy()
        optimizer.step(grads=grads if way == "given" else None, zero_grad=True)
        plain.step()
        assert_same_training(optimizer, plain)
        for p, grad in zip(parameters_of(optimizer), grads, strict=True):
            assert p.grad is (grad if way == "own" else None)
            assert grad is None or not grad.any()


def test_step_with_closure_and_keywords() -> None:
    optimizer = sgdcore.SGD(_values(), lr=0.1)
    reference = ReferenceSGD(_values(), lr=0.1)
    grads = _grads(1)
    assert optimizer.step(lambda: 0.5, grads=grads, zero_grad=True) == 0.5
    reference.step(_grads(1))
    _assert_as_reference(optimizer, reference)
    assert not any(grad.any() for grad in grads)


def test_pre_hook_sees_and_replaces_keywords() -> None:
    optimizer = sgdcore.SGD(_values(), lr=0.1)
    seen: list[Any] = []

    def replace(_: Any, args: Any, kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return args, {**kwargs, "grads": grads, "zero_grad": True}

    optimizer.register_step_pre_hook(replace)
    grads, given = _grads(1), _grads(2)
    optimizer.step(grads=given)
    reference = ReferenceSGD(_values(), lr=0.1)
    reference.step(_grads(1))
    _assert_as_reference(optimizer, reference)
    assert not any(grad.any() for grad in grads)
    assert seen == [((optimizer,), {"grads": given, "zero_grad": False})]


# --- Learning rates, state and momentum types that torch does not have -----------------------------


@pytest.mark.parametrize(
    "lr",
    [
        0.125,
        1,
        True,
        np.float32(0.1),
        np.float64(0.1),
        np.int32(1),
        np.float16(0.1),
        np.array(0.1),
        np.array([0.1], np.float32),
        np.array([[2]]),
        torch.tensor(0.1),
    ],
    ids=lambda lr: f"{type(lr).__name__} {lr!r}",
)
def test_learning_rate_is_any_number(lr: Any) -> None:
    optimizer = sgdcore.SGD(_values(np.float64), lr=lr, momentum=0.5)
    reference = ReferenceSGD(_values(np.float64), lr=float(np.asarray(lr).item()), momentum=0.5)
    for step in range(2):
        optimizer.step(grads=_grads(step, np.float64))
        reference.step(_grads(step, np.float64))
    _assert_as_reference(optimizer, reference)
    assert optimizer.param_groups[0]["lr"] is lr


def test_every_hyperparameter_may_be_an_array() -> None:
    hyper = {**FULL, "nesterov": False, "maximize": True}
    optimizer = sgdcore.SGD(_values(), **{key: np.array([value]) for key, value in hyper.items()})
    reference = ReferenceSGD(_values(), **hyper)
    for step in range(2):
        optimizer.step(grads=_grads(step))
        reference.step(_grads(step))
    _assert_as_reference(optimizer, reference)


@pytest.mark.parametrize("momentum_dtype", STORAGE_TYPES)
@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_momentum_dtype(dtype: str, momentum_dtype: str) -> None:
    values = _values(STORAGE_TYPES[dtype])
    reference = ReferenceSGD(values, **FULL, momentum_dtype=STORAGE_TYPES[momentum_dtype])
    optimizer = sgdcore.SGD(values, **FULL, momentum_dtype=momentum_dtype)
    for step in range(3):
        optimizer.step(grads=_grads(step, np.float32))
        reference.step(_grads(step, np.float32))
    _assert_as_reference(optimizer, reference)


@pytest.mark.parametrize("spelled", [np.float64, "float64", np.dtype("f8"), "d"], ids=repr)
def test_momentum_dtype_is_kept_by_name(spelled: Any) -> None:
    optimizer = sgdcore.SGD(
        [{"params": _values()[:1]}, {"params": _values()[1:], "momentum_dtype": spelled}],
        momentum=0.9,
    )
    assert [group["momentum_dtype"] for group in optimizer.param_groups] == [None, "float64"]
    optimizer.step(grads=_grads(0))
    assert [str(b.dtype) for b in momentum_of(optimizer)] == ["float32", "float64", "float64"]


def test_momentum_dtype_changed_between_steps_is_for_new_buffers() -> None:
    optimizer = sgdcore.SGD(_values(), **FULL)
    optimizer.step(grads=[*_grads(0)[:2], None])
    optimizer.param_groups[0]["momentum_dtype"] = "float64"
    optimizer.step(grads=_grads(1))
    assert [str(b.dtype) for b in momentum_of(optimizer)] == ["float32", "float32", "float64"]


@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_momentum_replaced_by_another_dtype(dtype: str) -> None:
    optimizer = sgdcore.SGD(_values(), **FULL)
    reference = ReferenceSGD(_values(), **FULL)
    optimizer.step(grads=_grads(0))
    reference.step(_grads(0))
    replacement = numbers(77, Run.shapes[1], STORAGE_TYPES[dtype])
    reference.momentum_buffers[1] = replacement.copy()
    optimizer.state[parameters_of(optimizer)[1]]["momentum_buffer"] = replacement
    for step in range(1, 3):
        optimizer.step(grads=_grads(step))
        reference.step(_grads(step))
    _assert_as_reference(optimizer, reference)
    assert momentum_of(optimizer)[1] is replacement  # updated where it is


def test_failed_first_step_leaves_no_momentum() -> None:
    optimizer = sgdcore.SGD(_values(), **FULL)
    bad = [*_grads(0)[:2], parameters_of(optimizer)[2].data]
    with refused(ValueError, r"^grads\[2\]: overlaps the data of", optimizer):
        optimizer.step(grads=bad)
    assert len(optimizer.state) == 0
    assert "momentum_buffer" not in optimizer.state[parameters_of(optimizer)[0]]
    reference = ReferenceSGD(_values(), **FULL)
    optimizer.step(grads=_grads(1))
    reference.step(_grads(1))
    _assert_as_reference(optimizer, reference)


def test_state_behaves_as_a_mapping() -> None:
    optimizer = sgdcore.SGD([sgdcore.Parameter(value) for value in _values()], **FULL)
    a, b, c = parameters_of(optimizer)
    assert dict(optimizer.state) == {}
    assert repr(optimizer.state) == "{}"
    optimizer.step(grads=[_grads(0)[0], None, None])
    assert list(optimizer.state) == [a]
    assert list(optimizer.state[a]) == ["momentum_buffer"]
    assert optimizer.state[b] == {}
    assert b not in optimizer.state
    with pytest.raises(KeyError, match="momentum_buffer"):
        optimizer.state[b]["momentum_buffer"]
    with pytest.raises(KeyError, match="momentum_buffer"):
        del optimizer.state[b]["momentum_buffer"]
    with pytest.raises(KeyError):
        del optimizer.state[c]
    optimizer.state[c] = {"x": 1}
    assert [p for p, _ in optimizer.state.items()] == [a, c]
    assert repr(optimizer.state[c]) == "{'x': 1}"


# --- Adding groups --------------------------------------------------------------------------------


def test_added_group_is_not_the_dict_it_came_in() -> None:
    optimizer = sgdcore.SGD(_values()[:1], lr=0.1)
    given = {"params": iter(_values()[1:])}
    optimizer.add_param_group(given)
    assert sorted(given) == ["params"]
    assert isinstance(optimizer.param_groups[1]["params"], list)


OVERLAPPING = np.zeros(8, np.float32)
BAD_GROUPS: dict[str, tuple[Callable[[sgdcore.SGD], Any], type[Exception], str]] = {
    "no dict": (lambda _: [1], TypeError, r"^param_group must be a dict, but got <class 'list'>$"),
    "no params": (lambda _: {"lr": 1}, ValueError, r"expected a key 'params', got \['lr'\]"),
    "hyperparameter": (
        lambda _: {"params": [numbers(0, (2,))], "lr": -2.5},
        ValueError,
        r"^Invalid learning rate: -2\.5$",
    ),
    "repeated": (
        lambda opt: {"params": [numbers(0, (2,)), parameters_of(opt)[1]]},
        ValueError,
        "appear in more than one parameter group, or twice: parameter at position 1",
    ),
    "repeated by name": (
        lambda opt: {"params": [sgdcore.Parameter(numbers(0, (2,)), name="w")] * 2},
        ValueError,
        "appear in more than one parameter group, or twice: parameter 'w'",
    ),
    "overlapping the others": (
        lambda opt: {"params": [numbers(0, (2,)), parameters_of(opt)[1].data[1:]]},
        ValueError,
        "^params: the data of parameter . and the data of parameter . overlap in memory$",
    ),
    "overlapping within": (
        lambda opt: {"params": [OVERLAPPING[:5], OVERLAPPING[4:]]},
        ValueError,
        "^params: the data of parameter 3 and the data of parameter 4 overlap in memory$",
    ),
    "last array": (
        lambda _: {"params": [numbers(0, (2,)), np.zeros(2, np.int8)]},
        TypeError,
        r"^params\[1\]: expected dtype float64, .* got dtype\('int8'\)$",
    ),
    "momentum dtype": (
        lambda _: {"params": [numbers(0, (2,))], "momentum_dtype": "int8"},
        TypeError,
        "^momentum_dtype: expected one of float64, float32, float16, bfloat16, got 'int8'$",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_refused_group_changes_nothing(case: str) -> None:
    make, error, match = BAD_GROUPS[case]
    optimizer, untouched = sgdcore.SGD(_values(), **FULL), sgdcore.SGD(_values(), **FULL)
    for each in (optimizer, untouched):
        each.step(grads=_grads(0))
    group = make(optimizer)
    keys = set(group) if isinstance(group, dict) else None
    with refused(error, match, optimizer):
        optimizer.add_param_group(group)
    assert keys is None or set(group) == keys
    for each in (optimizer, untouched):
        each.step(grads=_grads(1))
    assert_same_training(optimizer, untouched)


def test_refused_group_is_let_go() -> None:
    import sys

    optimizer = sgdcore.SGD(_values(), **FULL)
    array = np.zeros(8, np.float32)
    references = sys.getrefcount(array)
    views = [array[:5], array[4:]]
    with pytest.raises(ValueError, match="overlap in memory"):
        optimizer.add_param_group({"params": views})
    del views
    assert sys.getrefcount(array) == references


# --- Checkpoints that cross between the libraries -------------------------------------------------


def _map_leaves(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map_leaves(each, leaf) for key, each in value.items()}
    if isinstance(value, list):
        return [_map_leaves(each, leaf) for each in value]
    return leaf(value)


def to_arrays(state_dict: Any) -> Any:
    return _map_leaves(state_dict, lambda x: x.numpy().copy() if isinstance(x, torch.Tensor) else x)


def to_tensors(state_dict: Any) -> Any:
    return _map_leaves(
        state_dict, lambda x: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x
    )


CROSSINGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": FULL,
    "nesterov": NESTEROV,
    "maximize": {**FULL, "maximize": True},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("hyper", CROSSINGS)
@pytest.mark.parametrize("source", [Sgdcore, Torch], ids=["from sgdcore", "from torch"])
def test_checkpoint_crosses(source: Any, hyper: str, named: bool, dtype: Any) -> None:
    target, convert = (Torch, to_tensors) if source is Sgdcore else (Sgdcore, to_arrays)

    def groups(run: Run) -> Any:
        a, b, c = [("abc"[i], p) for i, p in enumerate(run.params)] if named else run.params
        return [{"params": [a]}, {"params": [b, c]}]

    first = Run(source, dtype)
    first.start(groups(first), **CROSSINGS[hyper])
    first.optimizer.param_groups[1]["lr"] = 0.03
    first.step(2, count=3)  # the last parameter has no state yet

    second = Run(target, dtype)
    second.params = [target.parameter(source.numpy(p)) for p in first.params]
    second._seed = first._seed
    second.start(groups(second), lr=5.0)
    second.optimizer.load_state_dict(convert(first.optimizer.state_dict()))
    for run in (first, second):
        run.record.clear()
        run.step(count=2)
        run.optimizer.param_groups[0]["nesterov"] = False
        run.step()
    for i, (actual, expected) in enumerate(zip(first.record, second.record, strict=True)):
        _compare(actual, expected, f"entry {i} of the record")
    kept = set(CROSSINGS[hyper]) | {"lr", "momentum", "nesterov", "maximize"}
    kept |= {"param_names"} if named else set()
    for ours, theirs in zip(
        first.optimizer.param_groups, second.optimizer.param_groups, strict=True
    ):
        assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}


def test_checkpoint_goes_there_and_back() -> None:
    ours = Run(Sgdcore)
    ours.start(**FULL)
    ours.step()
    theirs = Run(Torch)
    theirs.start(lr=1)
    theirs.optimizer.load_state_dict(to_tensors(ours.optimizer.state_dict()))
    back = Run(Sgdcore)
    back.start(lr=2)
    back.optimizer.load_state_dict(to_arrays(theirs.optimizer.state_dict()))
    assert_same_bits(momentum_of(back.optimizer)[1], momentum_of(ours.optimizer)[1])
    group = ours.optimizer.param_groups[0]
    for key, value in group.items():
        if key != "params":
            assert back.optimizer.param_groups[0][key] == value


def test_checkpoint_through_torch_save() -> None:
    """sgdcore's checkpoint, arrays turned to tensors, is one that torch reads as weights only."""
    run = Run(Sgdcore)
    run.start(**FULL, momentum_dtype="bfloat16")
    run.step()
    as_tensors = _map_leaves(
        run.optimizer.state_dict(),
        lambda x: torch.from_dlpack(sgdcore.Parameter(x)) if isinstance(x, np.ndarray) else x,
    )
    file = io.BytesIO()
    torch.save(as_tensors, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = Run(Sgdcore)
    other.start(lr=3)
    other.optimizer.load_state_dict(loaded)
    assert other.optimizer.param_groups[0]["momentum_dtype"] == "bfloat16"
    for actual, expected in zip(
        momentum_of(other.optimizer), momentum_of(run.optimizer), strict=True
    ):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_tensors_are_loaded_directly(dtype: torch.dtype) -> None:
    tensors = [torch.from_numpy(numbers(i, shape)).to(dtype) for i, shape in enumerate(Run.shapes)]
    optimizer = sgdcore.SGD(_values(), **FULL)
    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {i: {"momentum_buffer": tensor} for i, tensor in enumerate(tensors)}
    optimizer.load_state_dict(checkpoint)
    for buffer, tensor in zip(momentum_of(optimizer), tensors, strict=True):
        assert str(buffer.dtype) == str(dtype).removeprefix("torch.")
        assert_same_bits(buffer, np.array(sgdcore.Parameter(tensor).data))
    before = [tensor.clone() for tensor in tensors]
    optimizer.step(grads=_grads(0))  # works on a copy
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_loading_copies() -> None:
    """Unlike torch's, whose tensors become the optimizer's own."""
    optimizer, twin = sgdcore.SGD(_values(), **FULL), sgdcore.SGD(_values(), **FULL)
    for each in (optimizer, twin):
        each.step(grads=_grads(0))
    lr = np.array(0.1)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0]["lr"] = lr
    checkpoint["state"][0]["mine"] = mine = [1]
    kept = copy.deepcopy(checkpoint["state"])
    optimizer.load_state_dict(checkpoint)
    optimizer.step(grads=_grads(1))
    for i, values in checkpoint["state"].items():
        assert_same_bits(values["momentum_buffer"], kept[i]["momentum_buffer"])
        values["momentum_buffer"][...] = 0
    lr[...] = 0
    mine.append(2)
    assert optimizer.state[parameters_of(optimizer)[0]]["mine"] == [1]
    optimizer.step(grads=_grads(2))
    twin.step(grads=_grads(1))
    twin.step(grads=_grads(2))
    assert_same_training(optimizer, twin)


def test_loading_its_own_checkpoint() -> None:
    """The checkpoint's arrays are the optimizer's own ones."""
    optimizer, twin = sgdcore.SGD(_values(), **FULL), sgdcore.SGD(_values(), **FULL)
    for each in (optimizer, twin):
        each.step(grads=_grads(0))
    optimizer.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin):
        each.step(grads=_grads(1))
    assert_same_training(optimizer, twin)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loaded_momentum_keeps_its_dtype(dtype: str) -> None:
    """torch casts float32 momentum to the parameter's 16 bits when loading; sgdcore does not."""
    storage = STORAGE_TYPES[dtype]
    first = sgdcore.SGD(_values(storage), **FULL, momentum_dtype="float32")
    for step in range(2):
        first.step(grads=_grads(step, storage))
    second = sgdcore.SGD([p.data.copy() for p in parameters_of(first)], lr=1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert {str(buffer.dtype) for buffer in momentum_of(second)} == {"float32"}
    for each in (first, second):
        each.step(grads=_grads(5, storage))
    assert_same_training(first, second)


def test_torch_checkpoint_with_none_as_momentum() -> None:
    """What torch.optim.SGD's versions before 2.0 wrote for parameters without momentum."""
    optimizer = sgdcore.SGD(_values(), **FULL)
    optimizer.step(grads=_grads(0))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][1]["momentum_buffer"] = None
    optimizer.load_state_dict(checkpoint)
    assert momentum_of(optimizer)[1] is None
    reference = ReferenceSGD([p.data for p in parameters_of(optimizer)], **FULL)
    reference.momentum_buffers = [b if b is None else b.copy() for b in momentum_of(optimizer)]
    optimizer.step(grads=_grads(1))
    reference.step(_grads(1))
    _assert_as_reference(optimizer, reference)


def test_hyperparameters_the_checkpoint_lacks_come_from_the_defaults() -> None:
    optimizer = sgdcore.SGD(_values(), lr=0.5, momentum=0.7)
    optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0, 1, 2], "lr": 0.1}]})
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.7, False)


def test_positions_in_a_checkpoint_may_be_any_keys() -> None:
    optimizer = sgdcore.SGD(_values(), **FULL)
    buffers = _grads(3)
    state = {key: {"momentum_buffer": b} for key, b in zip("xyz", buffers, strict=True)}
    optimizer.load_state_dict(
        {"state": state, "param_groups": [{"params": ["x", "y", "z"], **FULL}]}
    )
    for actual, expected in zip(momentum_of(optimizer), buffers, strict=True):
        assert_same_bits(actual, expected)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "number of groups": (
        lambda c: c["param_groups"].append(c["param_groups"][0]),
        ValueError,
        "^loaded state dict has a different number of parameter groups: 2, expected 1$",
    ),
    "size of a group": (
        lambda c: c["param_groups"][0].update(params=[0, 1]),
        ValueError,
        "doesn't match the size of optimizer's group: group 0 has 2 parameters, expected 3$",
    ),
    "shape of the last momentum": (
        lambda c: c["state"][2].update(momentum_buffer=np.zeros(3, np.float32)),
        ValueError,
        r"^state_dict\['state'\]\[2\]\['momentum_buffer'\]: expected shape \(\), .* got \(3,\)$",
    ),
    "dtype of the last momentum": (
        lambda c: c["state"][2].update(momentum_buffer=np.zeros((), np.int64)),
        TypeError,
        r"^state_dict\['state'\]\[2\]\['momentum_buffer'\]: expected one of .* got dtype\('int64'\)$",
    ),
    "byte order of the momentum": (
        lambda c: c["state"][0].update(momentum_buffer=np.zeros(3, ">f4")),
        TypeError,
        r"^state_dict\['state'\]\[0\]\['momentum_buffer'\]: expected one of .* got dtype\('>f4'\)$",
    ),
    "tensor of integers": (
        lambda c: c["state"][0].update(momentum_buffer=torch.zeros(3, dtype=torch.int32)),
        TypeError,
        r"^state_dict\['state'\]\[0\]\['momentum_buffer'\]: DLPack tensor: expected float64",
    ),
    "no array": (
        lambda c: c["state"][0].update(momentum_buffer="momentum"),
        TypeError,
        r"^state_dict\['state'\]\[0\]\['momentum_buffer'\]: expected one of",
    ),
    "unknown key": (
        lambda c: c["state"].update({7: {"momentum_buffer": np.zeros(3, np.float32)}}),
        ValueError,
        r"^state_dict\['state'\]: no parameter has the key 7$",
    ),
    "hyperparameter": (
        lambda c: c["param_groups"][0].update(momentum=-1),
        ValueError,
        "^Invalid momentum value: -1$",
    ),
    "no groups": (lambda c: c.pop("param_groups"), KeyError, "param_groups"),
    "no state": (lambda c: c.pop("state"), KeyError, "state"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_refused_checkpoint_changes_nothing(case: str) -> None:
    spoil, error, match = BAD_CHECKPOINTS[case]
    optimizer, untouched = sgdcore.SGD(_values(), **FULL), sgdcore.SGD(_values(), **FULL)
    for each in (optimizer, untouched):
        each.step(grads=_grads(0))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0]["lr"] = 0.7
    for values in checkpoint["state"].values():
        values["momentum_buffer"] += 1
        values["mine"] = 1
    spoil(checkpoint)
    with refused(error, match, optimizer):
        optimizer.load_state_dict(checkpoint)
    for each in (optimizer, untouched):
        each.step(grads=_grads(1))
    assert_same_training(optimizer, untouched)


# --- Copies of optimizers over a buffer -----------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda x, protocol=protocol: pickle.loads(pickle.dumps(x, protocol))
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("dtype", STORAGE_TYPES)
@pytest.mark.parametrize("way", COPIES)
def test_copied_optimizer_over_a_buffer_goes_on(way: str, dtype: str) -> None:
    buffer = sgdcore.ParameterBuffer({"a": (3,), "b": (2, 4), "c": ()}, dtype)
    buffer.data[:] = numbers(0, (12,), dtype=STORAGE_TYPES[dtype])
    optimizer = sgdcore.SGD(buffer, **FULL)
    buffer["b"].grad = None
    for step in range(2):
        buffer["a"].grad = numbers(step, (3,))
        buffer["c"].grad = numbers(step + 9, ())
        optimizer.step()

    other_buffer, other = COPIES[way]((buffer, optimizer))
    assert parameters_of(other)[0].buffer is other_buffer  # one piece, not three
    assert parameters_of(other) == other_buffer.parameters()
    assert other_buffer["b"].grad is None
    assert not np.shares_memory(other_buffer.data, buffer.data)
    for step in range(2, 5):
        for each in (buffer, other_buffer):
            for i, parameter in enumerate(each.values()):
                parameter.grad = numbers(10 * step + i, parameter.shape)
        other.step()
        before = buffer.data.copy(), [b if b is None else b.copy() for b in momentum_of(optimizer)]
        optimizer.step()
        assert_same_training(other, optimizer)
        assert not np.array_equal(before[0], buffer.data)
    momentum = momentum_of(other)
    # Those that were copied lie side by side again.
    assert momentum[0].base is momentum[2].base
    assert momentum[2].__array_interface__["data"][0] == (
        momentum[0].__array_interface__["data"][0] + momentum[0].nbytes
    )


@pytest.mark.parametrize("way", COPIES)
def test_copied_optimizer_alone_brings_its_buffer(way: str) -> None:
    buffer = sgdcore.ParameterBuffer({"a": (3,), "b": (2,)})
    optimizer = sgdcore.SGD([{"params": [buffer["b"]]}, {"params": [buffer["a"]]}], **FULL)
    buffer.grad[:] = numbers(0, (5,))
    optimizer.step()
    other = COPIES[way](optimizer)
    b, a = parameters_of(other)
    assert a.buffer is b.buffer is not buffer
    assert_same_bits(a.buffer.data, buffer.data)
    assert_same_bits(a.buffer.grad, buffer.grad)
    other.step()
    optimizer.step()
    assert_same_training(other, optimizer)


@pytest.mark.parametrize("way", COPIES)
def test_copied_optimizer_keeps_dtypes_layouts_and_user_state(way: str) -> None:
    values = [
        np.asfortranarray(numbers(0, (3, 5), np.float64)),
        numbers(1, (4, 2, 3), BFLOAT16).transpose(1, 2, 0),
    ]
    optimizer = sgdcore.SGD(values, **FULL, momentum_dtype="float32")
    grads = [numbers(2, (3, 5)), numbers(3, (2, 3, 4))]
    optimizer.step(grads=grads)
    optimizer.state[parameters_of(optimizer)[0]]["mine"] = {"x": 1}
    optimizer.param_groups[0]["name"] = "all"
    other = COPIES[way](optimizer)
    assert other.state[parameters_of(other)[0]]["mine"] == {"x": 1}
    assert other.param_groups[0]["name"] == "all"
    assert other.defaults == optimizer.defaults
    for _ in range(2):
        for each in (optimizer, other):
            each.step(grads=grads)
    assert_same_training(other, optimizer)


@pytest.mark.parametrize("way", COPIES)
def test_copied_parameter(way: str) -> None:
    parameter = sgdcore.Parameter(numbers(0, (2, 3)), name="w")
    parameter.grad = numbers(1, (2, 3), np.float16)
    other = COPIES[way](parameter)
    assert repr(other) == repr(parameter)
    assert_same_bits(other.data, parameter.data)
    assert_same_bits(other.grad, parameter.grad)
    other.data[:] = 0
    assert parameter.data.all()


def test_subclass_with_its_own_defaults_is_copied() -> None:
    other = copy.deepcopy(_Halving([numbers(0, (2,))], lr=4))
    other.step(grads=[np.ones(2, np.float32)])
    assert_same_bits(parameters_of(other)[0].data, numbers(0, (2,)) - np.float32(2))


class _Halving(sgdcore.SGD):
    """Steps half as far."""

    def step(self, closure: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] /= 2
        return super().step(closure, **kwargs)


def test_snapshot_sees_changes() -> None:
    """What the refusals rely on: a snapshot notices each kind of change."""
    optimizer = sgdcore.SGD([sgdcore.Parameter(value) for value in _values()], **FULL)
    parameter = parameters_of(optimizer)[0]
    parameter.grad = _grads(0)[0]
    optimizer.step()
    momentum = momentum_of(optimizer)[0]
    changes: dict[str, Callable[[], Any]] = {
        "data": lambda: parameter.data.__setitem__(0, 5),
        "data array": lambda: setattr(parameter, "data", parameter.data.copy()),
        "grad": lambda: parameter.grad.__setitem__(0, 5),
        "grad array": lambda: setattr(parameter, "grad", parameter.grad.copy()),
        "momentum": lambda: momentum.__setitem__(0, 5),
        "momentum array": lambda: optimizer.state[parameter].update(
            momentum_buffer=momentum.copy()
        ),
        "hyperparameter": lambda: optimizer.param_groups[0].update(lr=0.2),
        "default": lambda: optimizer.defaults.update(lr=0.2),
        "params": lambda: optimizer.param_groups[0]["params"].reverse(),
        "state": lambda: optimizer.state[parameter].update(mine=1),
    }
    for what, change in changes.items():
        before = snapshot(optimizer)
        assert snapshot(optimizer) == before
        change()
        assert snapshot(optimizer) != before, what


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_momentum_keeps_the_layout_and_is_mapped_by_itself(order: Any) -> None:
    """Right behind its parameter it may be several times slower; see optimizer.py."""
    rows = 2 * _core.huge_page // 4 // 64
    w = sgdcore.Parameter(np.ones((rows, 64), np.float32, order=order))
    w.grad = np.ones_like(w.data)
    optimizer = sgdcore.SGD([w], lr=0.5, momentum=0.5)
    optimizer.step()
    momentum = optimizer.state[w]["momentum_buffer"]
    assert momentum.strides == w.data.strides
    assert (momentum == 1).all()
    assert (w.data == 0.5).all()
    if order == "C":
        assert momentum.ctypes.data % _core.huge_page < 1 << 15


def test_many_groups_are_checked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer is made in a time that is linear in the number of its groups."""
    built = []
    build = sgdcore.SGD._build_plan

    def noting(self: sgdcore.SGD, groups: list[dict[str, Any]]) -> None:
        built.append(len(groups))
        build(self, groups)

    monkeypatch.setattr(sgdcore.SGD, "_build_plan", noting)
    arrays = [np.ones(2, np.float32) for _ in range(50)]
    groups = [{"params": [array]} for array in arrays]
    optimizer = sgdcore.SGD(groups, lr=0.5)
    assert built == [50]
    for _ in range(2):
        optimizer.add_param_group({"params": [np.ones(2, np.float32)]})
    assert built == [50]  # nor is it checked anew for each that comes later
    optimizer.step(grads=[np.ones(2, np.float32)] * 52)
    assert all(array.tolist() == [0.5, 0.5] for array in arrays)
    with pytest.raises(ValueError, match="appear in more than one parameter group, or twice"):
        sgdcore.SGD([*groups, {"params": [arrays[0]]}], lr=0.5)
    with pytest.raises(ValueError, match="overlap in memory"):
        sgdcore.SGD([*groups, {"params": [arrays[0][:1]]}], lr=0.5)
    with pytest.raises(ValueError, match="with/without names"):
        sgdcore.SGD([*groups, {"params": [("a", np.ones(2, np.float32))]}], lr=0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradients_are_compared_with_groups_that_are_added_later(
    momentum: float, zero_grad: bool
) -> None:
    grad = np.full(4, 0.5, np.float32)
    first = sgdcore.Parameter(np.ones(4, np.float32))
    first.grad = grad
    optimizer = sgdcore.SGD([first], lr=0.5, momentum=0.5)
    optimizer.step()
    optimizer.add_param_group({"params": [np.ones(3, np.float32)], "momentum": momentum})
    optimizer.step()
    optimizer.add_param_group({"params": [sgdcore.Parameter(grad)], "momentum": momentum})
    before = first.data.copy()
    for _ in range(2):
        with pytest.raises(ValueError, match="overlap in memory"):
            optimizer.step(zero_grad=zero_grad)
        assert_same_bits(first.data, before)
        assert (grad == 0.5).all()


@pytest.mark.parametrize("seed", range(40))
def test_groups_added_after_anything_are_checked_against_all_that_is_there(seed: int) -> None:
    """A group is refused where an optimizer made of the same groups is, and the optimizer steps as that one does."""
    rng = np.random.default_rng(seed)
    memory = np.ones(40, np.float64)
    optimizer = sgdcore.SGD([memory[36:38]], lr=1.0, momentum=0.5)
    refused = 0
    for _ in range(30):
        groups, kind = optimizer.param_groups, int(rng.integers(6))
        group = groups[int(rng.integers(len(groups)))]
        parameter = group["params"][0] if group["params"] else None
        if kind == 0 and len(groups) > 1:
            groups.remove(group)
        elif kind == 1:
            group["params"] = [*group["params"], sgdcore.Parameter(np.ones(2))]
        elif kind == 2 and parameter is not None:
            parameter.data = np.ones(parameter.shape)
        elif kind == 3 and parameter is not None:
            start = int(rng.integers(36))
            values = memory[start : start + parameter.size].reshape(parameter.shape)
            optimizer.state[parameter]["momentum_buffer"] = values
        elif kind == 4:
            with contextlib.suppress(ValueError):
                optimizer.step(grads=[np.ones(p.shape) for p in parameters_of(optimizer)])
        start = int(rng.integers(34))
        new = sgdcore.Parameter(memory[start : start + int(rng.integers(0, 3))])
        if rng.integers(4) == 0 and parameter is not None:
            new = sgdcore.Parameter(parameter.data)
        before = [list(group["params"]) for group in groups]
        listed = parameters_of(optimizer)
        held = [optimizer.state[p]["momentum_buffer"] for p in listed if p in optimizer.state]
        in_use = [*held, *(p.data for p in listed)]
        fits = not any(np.may_share_memory(a, b) for a, b in itertools.combinations(in_use, 2))
        fits = fits and not any(np.may_share_memory(new.data, a) or new.data is a for a in in_use)
        if fits:
            optimizer.add_param_group({"params": [new]})
            assert groups[-1]["params"] == [new]
        else:
            refused += 1
            with pytest.raises(ValueError, match=r"overlap in memory|appear in more than one"):
                optimizer.add_param_group({"params": [new]})
            assert [group["params"] for group in groups] == before
    assert 0 < refused < 30


def test_get_and_setdefault_of_the_state_know_an_empty_one() -> None:
    parameter = sgdcore.Parameter(np.ones(2))
    optimizer = sgdcore.SGD([parameter], lr=0.1, momentum=0.9)
    assert optimizer.state.get(parameter) is None
    assert optimizer.state.get(parameter, 3) == 3
    assert len(optimizer.state) == 0
    assert optimizer.state.setdefault(parameter, {"count": 1}) == {"count": 1}
    assert optimizer.state.setdefault(parameter, {"count": 2}) == {"count": 1}
    optimizer.step(grads=[np.ones(2)])
    assert optimizer.state.get(parameter) == optimizer.state[parameter]
    assert optimizer.state.get(parameter)["momentum_buffer"].tolist() == [1, 1]
