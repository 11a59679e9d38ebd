"""What a user lets go between two steps is freed at once, and tensors may be swapped: a step keeps no references.

Everything is done to our optimizer and to torch's own. What is freed is asked of the storages, with the garbage
collector switched off.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sgdcore.torch import SGD
from sgdcore.torch import optimizer as optimizer_module
from torch_support import access_without_cpp_functions, assert_same_bits, assert_same_training

COUNT = 4


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["access", "C functions only", "DLPack only", "attributes"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How tensors are read."""
    if request.param == "attributes":
        monkeypatch.setattr(optimizer_module, "exchange_api", lambda: None)
    elif request.param == "DLPack only":
        monkeypatch.setattr("sgdcore.torch._interface._tensor_access", None)
    elif request.param == "C functions only":
        monkeypatch.setattr(
            "sgdcore.torch._interface._tensor_access", access_without_cpp_functions()
        )
    return str(request.param)


class Training:
    """Some steps of an optimizer, which has the only references to its parameters."""

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], momentum: float, *, early: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, 7, generator=generator)) for _ in range(COUNT)]
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.03}]
        self.optimizer = make(groups, lr=0.1, momentum=momentum, foreach=False)
        self.early_state = self.optimizer.state if early else None
        self.generator = generator
        self.step(3)
        self.storages: dict[str, Any] = {}
        for i, p in enumerate(params):
            assert p.grad is not None
            buffer = self.optimizer.state.get(p, {}).get("momentum_buffer") if early else None
            for what, tensor in (("param", p), ("grad", p.grad), ("momentum", buffer)):
                if tensor is not None:
                    self.storages[f"{what} {i}"] = StorageWeakRef(tensor.untyped_storage())

    def step(self, count: int) -> None:
        for _ in range(count):
            for p in self.params():
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=self.generator)
            self.optimizer.step()

    def params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def first(self) -> torch.Tensor:
        first: torch.Tensor = self.optimizer.param_groups[0]["params"][0]
        return first

    def freed(self) -> list[str]:
        return [what for what, storage in self.storages.items() if storage.expired()]


RELEASES: dict[str, Callable[[Training], object]] = {}


def release(function: Callable[[Training], object]) -> Callable[[Training], object]:
    RELEASES[function.__name__] = function
    return function


@release
def state_cleared(t: Training) -> None:
    t.optimizer.state.clear()


@release
def state_of_one_popped(t: Training) -> None:
    t.optimizer.state.pop(t.first())


@release
def state_of_one_deleted(t: Training) -> None:
    del t.optimizer.state[t.first()]


@release
def state_of_one_emptied(t: Training) -> None:
    t.optimizer.state[t.first()].clear()


@release
def state_of_one_replaced(t: Training) -> None:
    t.optimizer.state[t.first()] = {}


@release
def state_replaced(t: Training) -> None:
    t.early_state = None
    t.optimizer.state = defaultdict(dict)


@release
def buffer_deleted(t: Training) -> None:
    del t.optimizer.state[t.first()]["momentum_buffer"]


@release
def buffer_none(t: Training) -> None:
    t.optimizer.state[t.first()]["momentum_buffer"] = None


@release
def buffer_replaced(t: Training) -> None:
    values = t.optimizer.state[t.first()]
    values["momentum_buffer"] = values["momentum_buffer"].clone()


@release
def buffer_offloaded(t: Training) -> None:
    buffer = t.optimizer.state[t.first()]["momentum_buffer"]
    buffer.data = torch.empty(0)


@release
def state_held_from_the_start(t: Training) -> None:
    assert t.early_state is not None
    t.early_state.clear()


@release
def groups_cleared(t: Training) -> None:
    t.optimizer.param_groups.clear()


@release
def groups_replaced(t: Training) -> None:
    t.optimizer.param_groups = []


@release
def groups_and_state_cleared(t: Training) -> None:
    t.optimizer.param_groups.clear()
    t.optimizer.state.clear()


@release
def one_group_deleted(t: Training) -> None:
    del t.optimizer.param_groups[1]


@release
def params_emptied(t: Training) -> None:
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
    params[1] = torch.nn.Parameter(torch.ones(5, 7))


@release
def one_offloaded(t: Training) -> None:
    t.first().data = torch.empty(0)


@release
def gradients_set_to_none(t: Training) -> None:
    t.optimizer.zero_grad()


@release
def checkpoint_loaded(t: Training) -> None:
    t.early_state = None
    # Momentum as tensors of no optimizer's.
    saved = t.optimizer.state_dict()
    saved["state"] = {
        i: {k: v.clone() for k, v in values.items()} for i, values in saved["state"].items()
    }
    t.optimizer.load_state_dict(saved)


@release
def optimizer_deleted(t: Training) -> None:
    del t.optimizer, t.early_state


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", RELEASES)
def test_what_is_let_go_is_freed_at_once(name: str, momentum: float, reading: str) -> None:
    freed = []
    for make in (SGD, torch.optim.SGD):
        training = Training(make, momentum, early=True)
        try:
            RELEASES[name](training)
        except KeyError:
            assert momentum == 0
        freed.append(training.freed())
    assert freed[0] == freed[1]
    assert freed[1] or momentum == 0 or name.startswith(("groups", "one_g", "one_r", "params"))


@pytest.mark.parametrize("name", ["groups_cleared", "one_removed", "one_pruned", "state_cleared"])
def test_so_it_is_where_nobody_had_looked_at_the_state(name: str, reading: str) -> None:
    freed = []
    for make in (SGD, torch.optim.SGD):
        training = Training(make, 0.9, early=False)
        values = iter(training.optimizer.__dict__.get("_state", training.optimizer.state).values())
        for i, value in enumerate(values):
            storage = value["momentum_buffer"].untyped_storage()
            training.storages[f"momentum {i}"] = StorageWeakRef(storage)
        del value, storage, values
        RELEASES[name](training)
        freed.append(training.freed())
    assert freed[0] == freed[1]


@pytest.mark.parametrize("how", ["plain", "zero_grad", "hooks", "closure", "refused"])
def test_however_it_stepped(how: str, reading: str) -> None:
    training = Training(SGD, 0.9, early=True)
    optimizer = training.optimizer
    if how == "hooks":
        optimizer.register_step_post_hook(lambda *_: None)
    if how == "refused":
        optimizer.param_groups[1]["lr"] = "much"
        with pytest.raises(TypeError, match="lr"):
            optimizer.step()
    elif how == "closure":
        optimizer.step(lambda: 1.0)
    else:
        optimizer.step(**({"zero_grad": True} if how == "zero_grad" else {}))
    optimizer.param_groups.clear()
    optimizer.state.clear()
    assert training.freed() == list(training.storages)


def test_a_large_step_lets_go_too() -> None:
    """It holds its tensors while other threads run."""
    p = torch.nn.Parameter(torch.ones(100_000))
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.ones(100_000)
        optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    refs = [StorageWeakRef(t.untyped_storage()) for t in (p, p.grad, buffer)]
    optimizer.step()
    optimizer.state.clear()
    optimizer.param_groups.clear()
    del p, buffer
    assert all(ref.expired() for ref in refs)


def test_nothing_is_referred_to_between_steps(reading: str) -> None:
    """As torch.utils.swap_tensors and whoever counts references sees it."""
    counts = []
    for make in (SGD, torch.optim.SGD):
        training = Training(make, 0.9, early=True)
        tensors = [*training.params(), *(p.grad for p in training.params())]
        tensors += [values["momentum_buffer"] for values in training.optimizer.state.values()]
        assert not any(weakref.getweakrefs(tensor) for tensor in tensors)
        counts.append([tensor._use_count() for tensor in tensors])
    assert counts[0] == counts[1]


def test_a_buffer_in_the_place_of_a_freed_one_is_read_anew(reading: str) -> None:
    """Python often gives the new one the address of the old one."""
    results = []
    for make in (SGD, torch.optim.SGD):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p], lr=0.5, momentum=0.5, foreach=False)
        for step in range(8):
            p.grad = torch.full((3,), 1.0 + step)
            optimizer.step()
            del optimizer.state[p]["momentum_buffer"]
            values = torch.full((3,), -2.0 - step)
            new = (
                torch._neg_view(values),
                values,
                values.double().float(),
                torch.stack([values, values], 1)[:, 0],
            )[step % 4]
            optimizer.state[p]["momentum_buffer"] = new
            del values, new
        results.append(p)
    assert_same_bits(results[0], results[1])


# Swapping


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh()
        )
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


@pytest.fixture
def swapping(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Switches conversions to swapping, as users do after they took some steps."""
    yield lambda: torch.__future__.set_swap_module_params_on_conversion(True)
    torch.__future__.set_swap_module_params_on_conversion(False)


CONVERSIONS: dict[str, Callable[[torch.nn.Module], object]] = {
    "double": lambda model: model.to(torch.float64),
    "there and back": lambda model: model.to(torch.float64).to(torch.float32),
    "cpu": lambda model: model.to("cpu"),
    "loaded": lambda model: model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=False
    ),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("looked", [False, True], ids=["state unseen", "state seen"])
def test_a_module_is_converted_by_swapping(
    name: str, momentum: float, looked: bool, swapping: Callable[[], None], reading: str
) -> None:
    trained = []
    for make in (SGD, torch.optim.SGD):
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.manual_seed(0)
        model = Net()
        optimizer = make(model.parameters(), lr=0.1, momentum=momentum, foreach=False)
        data = torch.randn(40, 4, 3)
        for step in range(8):
            if step == 4:
                swapping()
                CONVERSIONS[name](model)
                if looked or name == "double":
                    # Of the parameters' dtype: we round mixed ones once, torch more often.
                    for p in model.parameters():
                        buffer = optimizer.state[p].get("momentum_buffer")
                        if buffer is not None:
                            optimizer.state[p]["momentum_buffer"] = buffer.to(p.dtype)
            optimizer.zero_grad()
            model(data[step].to(model.head.weight.dtype)).square().sum().backward()
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(trained[0], trained[1])


def test_tensors_are_swapped_one_by_one(reading: str) -> None:
    """Parameters, and momentum buffers."""
    results = []
    for make in (SGD, torch.optim.SGD):
        training = Training(make, 0.9, early=True)
        for p in training.params():
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach() * 2))
            buffer = training.optimizer.state[p]["momentum_buffer"]
            torch.utils.swap_tensors(buffer, buffer * 3)
        training.step(3)
        results.append(training.optimizer)
    assert_same_training(results[0], results[1])


def test_a_swap_to_another_kind_of_tensor_is_noticed() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = SGD([p], lr=0.5)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(torch.ones(3, 2).to_sparse()))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match="expected a dense tensor"):
        optimizer.step()
