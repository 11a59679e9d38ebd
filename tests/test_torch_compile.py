"""torch.compile around a step: one break of the graph, no warning, the same bits, and no frame of sgdcore compiled."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import convert_frame
from torch._dynamo.utils import counters

import sgdcore
from sgdcore.torch import SGD, step_in_backward
from torch_support import assert_same_bits

Step = Callable[[Tensor], Any]


class Model:
    """A small model with its optimizer, and the ways to take a training step."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = SGD) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )
        self.optimizer = make(self.module.parameters(), lr=0.1, momentum=0.9)

    def loss(self, x: Tensor) -> Tensor:
        return self.module(x).square().sum()

    def plain(self) -> Step:
        def train(x: Tensor) -> Tensor:
            loss = self.loss(x)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss

        return train

    def scheduler(self) -> Step:
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)

        def train(x: Tensor) -> Tensor:
            loss = self.loss(x)
            loss.backward()
            self.optimizer.step()
            scheduler.step()
            self.optimizer.zero_grad()
            return loss

        return train

    def scaler(self) -> Step:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def train(x: Tensor) -> Tensor:
            loss = self.loss(x)
            scaler.scale(loss).backward()
            scaler.step(self.optimizer)
            scaler.update()
            self.optimizer.zero_grad()
            return loss

        return train

    def closure(self) -> Step:
        def train(x: Tensor) -> Any:
            def closure() -> float:
                self.optimizer.zero_grad()
                loss = self.loss(x)
                loss.backward()
                return loss  # type: ignore[return-value]

            return self.optimizer.step(closure)

        return train

    def hooks(self) -> Step:
        self.optimizer.register_step_pre_hook(lambda *_: None)
        self.optimizer.register_step_post_hook(lambda *_: None)
        return self.plain()

    def clears(self) -> Step:
        def train(x: Tensor) -> Tensor:
            loss = self.loss(x)
            loss.backward()
            self.optimizer.step(zero_grad=True)  # type: ignore[call-arg]
            return loss

        return train

    def state(self) -> Step:
        train = self.plain()
        train(torch.ones(2, 4))

        def look(x: Tensor) -> Tensor:
            for p in self.module.parameters():
                self.optimizer.state[p]["momentum_buffer"].mul_(0.5)
            return train(x)

        return look

    def load(self) -> Step:
        train = self.plain()

        def reload(x: Tensor) -> Tensor:
            self.optimizer.load_state_dict(self.optimizer.state_dict())
            return train(x)

        return reload

    def in_backward(self) -> Step:
        step_in_backward(self.optimizer)  # type: ignore[arg-type]
        return self.plain()


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the compiler warns of and logs; emptied of what it says of any optimizer, torch's too."""
    torch._dynamo.reset()
    counters.clear()
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._logging")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
        told += [
            str(w.message)
            for w in caught
            if "not a leaf Tensor" not in str(w.message) and w.category is not DeprecationWarning
        ]
    for logger in loggers:
        logger.removeHandler(handler)
    torch._dynamo.reset()
    assert told == []


def breaks_in(what: str) -> list[str]:
    return [text for text in counters["graph_break"] if what in text]


def frames_of_sgdcore() -> list[str]:
    """The functions of sgdcore that the compiler was given."""
    seen = [code() for code in convert_frame.input_codes.seen]
    return [c.co_name for c in seen if c is not None and "sgdcore/torch" in c.co_filename]


WAYS = [name for name in vars(Model) if name not in ("loss",) and not name.startswith("__")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("messages")
def test_train_step_with_the_step_inside(way: str) -> None:
    compiled, eager = Model(), Model()
    step, eager_step = getattr(compiled, way)(), getattr(eager, way)()
    counters.clear()
    step = torch.compile(step, backend="eager")
    for i in range(6):
        x = torch.full((2, 4), 0.1 * i)
        assert_same_bits(torch.as_tensor(step(x)), torch.as_tensor(eager_step(x)))
    for p, q in zip(compiled.module.parameters(), eager.module.parameters(), strict=True):
        assert_same_bits(p, q)
    assert sum(counters["graph_break"][each] for each in breaks_in("SGD.step ")) <= 1
    assert breaks_in("sgdcore") == breaks_in("torch.compiler.disable()`d")
    assert frames_of_sgdcore() == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.usefixtures("messages")
def test_compiled_step(backend: str) -> None:
    """Nothing is compiled at all: it is the step itself that is called."""
    ours, theirs = Model(), Model(torch.optim.SGD)
    step = torch.compile(ours.optimizer.step, backend=backend)
    for i in range(4):
        for model in (ours, theirs):
            model.optimizer.zero_grad()
            model.loss(torch.full((2, 4), 0.1 * i)).backward()
        step()
        theirs.optimizer.step()
    for p, q in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        assert_same_bits(p, q)
    assert not counters["frames"]
    assert not counters["graph_break"]


@pytest.mark.usefixtures("messages")
def test_many_compiled_steps_reach_no_limit() -> None:
    for _ in range(12):  # the compiler's limit is 8
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        torch.compile(SGD([p], lr=1).step, backend="eager")()
        assert p[0] == 0


@pytest.mark.usefixtures("messages")
def test_optimizers_made_in_a_compiled_function() -> None:
    def train(p: Tensor) -> Tensor:
        optimizer = SGD([p], lr=1)
        handle = step_in_backward(optimizer)
        p.square().sum().backward()
        optimizer.step()
        handle.remove()
        optimizer.add_param_group({"params": [q]})
        return p

    q = torch.nn.Parameter(torch.ones(2))
    result = torch.compile(train, backend="eager")(torch.nn.Parameter(torch.ones(3)))
    assert result.tolist() == [-1, -1, -1]
    assert frames_of_sgdcore() == []


@pytest.mark.usefixtures("messages")
def test_compiled_autograd_with_step_in_backward() -> None:
    compiled, eager = Model(), Model()
    step, eager_step = compiled.in_backward(), eager.in_backward()
    with torch._dynamo.config.patch(compiled_autograd=True):
        step = torch.compile(step, backend="eager")
        for _ in range(3):
            step(torch.ones(2, 4))
            eager_step(torch.ones(2, 4))
    for p, q in zip(compiled.module.parameters(), eager.module.parameters(), strict=True):
        assert_same_bits(p, q)
    assert frames_of_sgdcore() == []


@pytest.mark.usefixtures("messages")
def test_fullgraph_says_what_to_do() -> None:
    model = Model()
    model.loss(torch.ones(2, 4)).backward()
    before = [p.detach().clone() for p in model.module.parameters()]
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"call step\(\) outside of the compiled"
    ):
        torch.compile(lambda: model.optimizer.step(), backend="eager", fullgraph=True)()
    for p, q in zip(model.module.parameters(), before, strict=True):
        assert_same_bits(p, q)


@pytest.mark.usefixtures("messages")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("closure", [None, lambda: torch.tensor(1.0)])
@pytest.mark.parametrize("hooked", [False, True])
def test_fullgraph_of_the_step_itself_is_refused_before_it(
    first: bool, closure: Callable[[], Tensor] | None, hooked: bool
) -> None:
    model = Model()
    if hooked:
        model.optimizer.register_step_pre_hook(lambda *_: None)
    model.loss(torch.ones(2, 4)).backward()
    if not first:
        model.optimizer.step()
    before = [p.detach().clone() for p in model.module.parameters()]
    compiled = torch.compile(model.optimizer.step, backend="eager", fullgraph=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"call step\(\) outside of the compiled function"):
            compiled(closure)
    for p, q in zip(model.module.parameters(), before, strict=True):
        assert_same_bits(p, q)
    torch.compile(model.optimizer.step, backend="eager")(closure)
    for p, q in zip(model.module.parameters(), before, strict=True):
        assert not torch.equal(p, q)


def test_import_leaves_the_compiler_out() -> None:
    code = f"import sys, {sgdcore.__name__}.torch; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
