"""Who takes part: one class for each way to take an optimizer step.

To add one: derive from `Contender`, decorate it with `@contender(name, kind, needs)`, copy the starting values in
`__init__`, set `self.step`, and return the parameters from `result`. What it computes is compared with the oracle
before it is timed, so a mistake shows up as "wrong", not as a time. Libraries are imported inside the classes: only
those that are installed take part. docs/measuring.md shows an example.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import numpy as np

import sgdcore
from sgdcore import _core
from sgdcore._arrays import Array, as_tensor, storage_dtype
from sgdcore.bench.cases import HYPERS, SGD, Case, states_in

__all__ = ["CONTENDERS", "RIVAL_OF", "Contender", "Problem", "Unsuitable", "contender"]

# Which of ours each kind of contender is compared with.
RIVAL_OF = {"numpy": "sgdcore", "jax": "sgdcore", "torch": "sgdcore.torch"}

_LARGE = 1 << 25  # elements for which 16-bit arithmetic in NumPy takes seconds


class Unsuitable(Exception):
    """Raised by a contender that cannot take part in a case; the text says why."""


class Problem:
    """What all contenders of a case start from: parameters and gradients, drawn from a normal distribution.

    Attributes:
        case: the case.
        hyper: the keyword arguments of the rule's optimizer.
        params: starting values; to be copied.
        gradients: one list of arrays, or two for cold gradients. Not to be written to.
        patient: whether a contender takes part that needs long to start; else it raises Unsuitable.
    """

    patient = True

    def __init__(self, case: Case) -> None:
        self.case = case
        self.hyper = HYPERS[case.hyper]
        self.params = _normal(case, 0)
        self.gradients = [_normal(case, 1 + i) for i in range(2 if case.grads == "cold" else 1)]

    @cached_property
    def torch_gradients(self) -> list[list[Array]]:
        """The gradients, in memory of torch's."""
        return [[_in_torch_memory(g) for g in each] for each in self.gradients]


def _normal(case: Case, seed: int) -> list[Array]:
    """Return arrays of the case's shapes, filled with normally distributed numbers, some million different ones."""
    rng = np.random.default_rng(seed)
    dtype = storage_dtype(case.dtype)
    draw = np.float64 if dtype == np.float64 else np.float32
    # Long arrays repeat a prime number of values: drawing all of them takes longer than the steps.
    drawn = rng.standard_normal(min(case.elements, 1_000_003), draw).astype(dtype, copy=False)
    arrays, start = [], 0
    for shape in case.shapes:
        size = math.prod(shape)
        arrays.append(np.resize(np.roll(drawn, -start), size).reshape(shape))
        start = (start + size) % len(drawn)
    return arrays


class Contender(ABC):
    """One way to take a step.

    Attributes:
        step: what is timed: one whole step, clearing the gradients too if the case says so.
        rule: the only rule that it computes; None if it computes every rule.
        name, kind, needs: set by `contender`. `kind` is what it works on: "numpy", "torch", "jax" or "ceiling".
    """

    rule: str | None = SGD

    name: str
    kind: str
    needs: str
    step: Callable[[], Any]

    @abstractmethod
    def __init__(self, problem: Problem) -> None: ...

    @abstractmethod
    def load(self, index: int) -> None:
        """Make the problem's gradients of that index the next step's; not timed."""

    @abstractmethod
    def result(self) -> Iterable[Array]:
        """Return the parameters."""

    @classmethod
    def version(cls) -> str | None:
        """Return the version of the library it needs; None if that is not installed."""
        if importlib.util.find_spec(cls.needs) is None:
            return None
        return importlib.metadata.version(cls.needs)


CONTENDERS: dict[str, type[Contender]] = {}


def contender(name: str, kind: str, needs: str) -> Callable[[type[Contender]], type[Contender]]:
    """Register a class under the name shown; `needs` is the module that it imports."""

    def register(cls: type[Contender]) -> type[Contender]:
        cls.name, cls.kind, cls.needs = name, kind, needs
        CONTENDERS[name] = cls
        return cls

    return register


# --- sgdcore ----------------------------------------------------------------------------------------


def optimizer_of(module: Any, rule: str) -> Any:
    """Return the class of a module, sgdcore or sgdcore.torch, that has the rule."""
    return next(each for each in vars(module).values() if getattr(each, "rule", None) == rule)


@contender("sgdcore", "numpy", "sgdcore")
class Separate(Contender):
    """Separate arrays, as users of NumPy mostly have them."""

    rule = None

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.params = [sgdcore.Parameter(values.copy()) for values in problem.params]
        make = optimizer_of(sgdcore, problem.case.rule)
        self.optimizer = make(self.params, **problem.hyper)
        clear = problem.case.clear
        self.step = partial(self.optimizer.step, zero_grad=True) if clear else self.optimizer.step
        self.own = [[g.copy() if clear else g for g in each] for each in problem.gradients]

    def load(self, index: int) -> None:
        for param, own, values in zip(
            self.params, self.own[index], self.problem.gradients[index], strict=True
        ):
            if own is not values:
                own[...] = values
            param.grad = own

    def result(self) -> Iterable[Array]:
        return [param.data for param in self.params]


@contender("sgdcore flat", "numpy", "sgdcore")
class Flat(Contender):
    """A ParameterBuffer."""

    rule = None

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        arrays = {str(i): values for i, values in enumerate(problem.params)}
        self.buffer = sgdcore.ParameterBuffer(arrays)
        make = optimizer_of(sgdcore, problem.case.rule)
        self.optimizer = make(self.buffer, **problem.hyper)
        clear = problem.case.clear
        self.step = partial(self.optimizer.step, zero_grad=True) if clear else self.optimizer.step

    def load(self, index: int) -> None:
        for param, values in zip(self.buffer.values(), self.problem.gradients[index], strict=True):
            param.grad = values  # copied

    def result(self) -> Iterable[Array]:
        return [param.data for param in self.buffer.values()]


# --- torch ------------------------------------------------------------------------------------------


def _in_torch_memory(values: Array) -> Array:
    """Return a copy where torch's users have their tensors: aligned to 64 bytes and, if large, on ordinary pages.

    NumPy's arrays are aligned to 16, which costs torch's kernels time, and on huge pages, which saves all of them some.
    """
    import torch

    memory = torch.empty(values.nbytes, dtype=torch.uint8)
    array: Array = memory.numpy().view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


class Torch(Contender):
    """Parameters of torch, with the optimizer that a subclass makes."""

    def __init__(self, problem: Problem) -> None:
        import torch

        self.check(problem)
        self.problem = problem
        self.values = [_in_torch_memory(values) for values in problem.params]
        self.params = [torch.nn.Parameter(as_tensor(values)) for values in self.values]
        clear = problem.case.clear
        self.own = [
            [_in_torch_memory(g) if clear else g for g in each] for each in problem.torch_gradients
        ]
        self.tensors = [[as_tensor(g) for g in each] for each in self.own]
        self.step = self.make_step(problem.hyper, clear)

    def check(self, problem: Problem) -> None:
        """Raise Unsuitable where this one does not take part."""

    @abstractmethod
    def make_step(self, hyper: dict[str, Any], clear: bool) -> Callable[[], Any]:
        """Return what is timed."""

    def load(self, index: int) -> None:
        if self.problem.case.clear:
            for own, values in zip(self.own[index], self.problem.gradients[index], strict=True):
                own[...] = values
        for param, grad in zip(self.params, self.tensors[index], strict=True):
            param.grad = grad

    def result(self) -> Iterable[Array]:
        return self.values


@contender("sgdcore.torch", "torch", "torch")
class OursInTorch(Torch):
    """The optimizer of sgdcore.torch."""

    rule = None

    def make_step(self, hyper: dict[str, Any], clear: bool) -> Callable[[], Any]:
        import sgdcore.torch

        optimizer = optimizer_of(sgdcore.torch, self.problem.case.rule)(self.params, **hyper)
        return partial(optimizer.step, zero_grad=True) if clear else optimizer.step


class TorchSGD(Torch):
    """torch.optim.SGD with the arguments of a subclass."""

    path: dict[str, bool]

    def compile(self, step: Callable[[], Any]) -> Callable[[], Any]:
        return step

    def make_step(self, hyper: dict[str, Any], clear: bool) -> Callable[[], Any]:
        import torch

        optimizer = torch.optim.SGD(self.params, **hyper, **self.path)
        step = self.compile(optimizer.step)

        def step_and_clear() -> None:
            step()
            optimizer.zero_grad(set_to_none=False)

        return step_and_clear if clear else step


@contender("torch loop", "torch", "torch")
class TorchLoop(TorchSGD):
    """torch.optim.SGD(foreach=False): what users get by default on the CPU."""

    path = {"foreach": False}  # noqa: RUF012


@contender("torch foreach", "torch", "torch")
class TorchForeach(TorchSGD):
    """torch.optim.SGD(foreach=True)."""

    path = {"foreach": True}  # noqa: RUF012


@contender("torch fused", "torch", "torch")
class TorchFused(TorchSGD):
    """torch.optim.SGD(fused=True)."""

    path = {"fused": True}  # noqa: RUF012


@contender("torch compiled", "torch", "torch")
class TorchCompiled(TorchSGD):
    """torch.compile around the step of torch.optim.SGD(foreach=True), as torch's documentation does it."""

    path = {"foreach": True}  # noqa: RUF012

    def check(self, problem: Problem) -> None:
        case = problem.case
        usual = (case.hyper, case.dtype, case.grads, case.clear) == (
            "nesterov",
            "float32",
            "warm",
            False,
        )
        # The whole step becomes one function.
        if not problem.patient and len(case.shapes) > 200:
            raise Unsuitable("compiling would take minutes")
        if not problem.patient and not (usual and case.threads == len(os.sched_getaffinity(0))):
            raise Unsuitable("compiling takes up to a minute; --contender measures it all the same")

    def compile(self, step: Callable[[], Any]) -> Callable[[], Any]:
        import torch

        torch._dynamo.reset()
        compiled: Callable[[], Any] = torch.compile(step)
        return compiled


# --- NumPy ------------------------------------------------------------------------------------------


class NumPy(Contender):
    """Arrays updated by `update`, one after the other, on one thread."""

    def __init__(self, problem: Problem) -> None:
        if (
            not problem.patient
            and problem.case.elements > _LARGE
            and problem.params[0].itemsize == 2
        ):
            raise Unsuitable("a step takes seconds; --contender measures it all the same")
        self.problem = problem
        hyper = problem.hyper
        self.lr, self.momentum = hyper["lr"], hyper.get("momentum", 0.0)
        self.weight_decay, self.nesterov = (
            hyper.get("weight_decay", 0.0),
            hyper.get("nesterov", False),
        )
        self.params = [values.copy() for values in problem.params]
        self.buffers: list[Array | None] = [None] * len(self.params)
        clear = problem.case.clear
        self.own = [[g.copy() if clear else g for g in each] for each in problem.gradients]
        self.grads = self.own[0]
        self.prepare()

        def step() -> None:
            for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
                self.update(i, param, grad)
                if clear:
                    grad.fill(0)

        self.step = step

    def prepare(self) -> None:
        """Allocate what the steps need."""

    @abstractmethod
    def update(self, i: int, param: Array, grad: Array) -> None:
        """Update the i-th parameter."""

    def load(self, index: int) -> None:
        self.grads = self.own[index]
        for own, values in zip(self.grads, self.problem.gradients[index], strict=True):
            if own is not values:
                own[...] = values

    def result(self) -> Iterable[Array]:
        return self.params


@contender("NumPy", "numpy", "numpy")
class NumPyNaive(NumPy):
    """The formulas as one writes them first."""

    def update(self, i: int, param: Array, grad: Array) -> None:
        scalar = param.dtype.type
        if self.weight_decay:
            grad = grad + scalar(self.weight_decay) * param
        if self.momentum:
            old = self.buffers[i]
            buffer = grad.copy() if old is None else scalar(self.momentum) * old + grad
            self.buffers[i] = buffer
            grad = grad + scalar(self.momentum) * buffer if self.nesterov else buffer
        param -= scalar(self.lr) * grad


@contender("NumPy out=", "numpy", "numpy")
class NumPyInPlace(NumPy):
    """Every operation writes to memory that is there already."""

    def prepare(self) -> None:
        size = max(param.size for param in self.params)
        scratch = np.empty((2, size), self.params[0].dtype)
        self.scratch = [
            (scratch[0, : p.size].reshape(p.shape), scratch[1, : p.size].reshape(p.shape))
            for p in self.params
        ]

    def update(self, i: int, param: Array, grad: Array) -> None:
        scalar = param.dtype.type
        a, b = self.scratch[i]
        if self.weight_decay:
            np.multiply(param, scalar(self.weight_decay), out=a)
            np.add(a, grad, out=a)
            grad = a
        if self.momentum:
            buffer = self.buffers[i]
            if buffer is None:
                buffer = self.buffers[i] = grad.copy()
            else:
                np.multiply(buffer, scalar(self.momentum), out=buffer)
                np.add(buffer, grad, out=buffer)
            if self.nesterov:
                np.multiply(buffer, scalar(self.momentum), out=b)
                np.add(b, grad, out=b)
                grad = b
            else:
                grad = buffer
        np.multiply(grad, scalar(self.lr), out=b)
        np.subtract(param, b, out=param)


@contender("numba", "numpy", "numba")
class Numba(Contender):
    """One compiled loop per array, in parallel where the array is large."""

    def __init__(self, problem: Problem) -> None:
        import numba

        if problem.case.dtype not in ("float32", "float64"):
            raise Unsuitable(f"numba has no {problem.case.dtype}")
        numba.set_num_threads(min(problem.case.threads, numba.config.NUMBA_NUM_THREADS))
        self.problem = problem
        self.params = [values.ravel().copy() for values in problem.params]
        self.momenta = [np.zeros_like(p) for p in self.params]
        clear = problem.case.clear
        self.own = [
            [g.ravel().copy() if clear else g.ravel() for g in each] for each in problem.gradients
        ]
        self.grads = self.own[0]
        hyper = problem.hyper
        scalar = self.params[0].dtype.type
        lr, mu = scalar(hyper["lr"]), scalar(hyper.get("momentum", 0))
        wd, nesterov = scalar(hyper.get("weight_decay", 0)), bool(hyper.get("nesterov"))
        kernels = _numba_kernels()

        def step() -> None:
            # A buffer of zeros makes the first step right, since dampening is zero.
            for p, g, m in zip(self.params, self.grads, self.momenta, strict=True):
                kernels[p.size > 1 << 16](p, g, m, lr, mu, wd, nesterov, clear)

        self.step = step

    def load(self, index: int) -> None:
        self.grads = self.own[index]
        if self.problem.case.clear:
            for own, values in zip(self.grads, self.problem.gradients[index], strict=True):
                own[...] = values.ravel()

    def result(self) -> Iterable[Array]:
        return [p.reshape(v.shape) for p, v in zip(self.params, self.problem.params, strict=True)]


_numba_compiled: list[Any] = []


def _numba_kernels() -> list[Any]:
    """Return the loop, serial and parallel."""
    if not _numba_compiled:
        import numba

        def update(p, g, m, lr, mu, wd, nesterov, clear):  # type: ignore[no-untyped-def]
            for i in numba.prange(p.size):
                d = g[i] + wd * p[i]
                if mu != 0:
                    m[i] = mu * m[i] + d
                    d = d + mu * m[i] if nesterov else m[i]
                p[i] -= lr * d
                if clear:
                    g[i] = 0

        _numba_compiled[:] = [numba.njit(update), numba.njit(update, parallel=True)]
    return _numba_compiled


# --- jax --------------------------------------------------------------------------------------------


@contender("optax", "jax", "optax")
class Optax(Contender):
    """optax.sgd under jax.jit, parameters and state donated."""

    def __init__(self, problem: Problem) -> None:
        import jax
        import optax

        case = problem.case
        if case.threads < len(os.sched_getaffinity(0)):
            raise Unsuitable("XLA's threads cannot be limited after it has started")
        jax.config.update("jax_enable_x64", True)
        hyper = problem.hyper
        transforms = [optax.sgd(hyper["lr"], hyper.get("momentum"), hyper.get("nesterov", False))]
        if "weight_decay" in hyper:
            transforms.insert(0, optax.add_decayed_weights(hyper["weight_decay"]))
        optimizer = optax.chain(*transforms)
        # Copies: asarray would share the memory, which donated buffers are written to.
        self.params = [jax.numpy.array(p, copy=True) for p in problem.params]
        self.state = optimizer.init(self.params)
        self.sets = [[jax.numpy.array(g, copy=True) for g in each] for each in problem.gradients]
        self.grads = self.sets[0]

        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(update, donate_argnums=(0, 1))
        # Gradients in jax are not cleared but dropped: there is nothing to do for `clear`.

        def step() -> None:
            self.params, self.state = compiled(self.params, self.state, self.grads)
            jax.block_until_ready(self.params)

        self.step = step

    def load(self, index: int) -> None:
        self.grads = self.sets[index]

    def result(self) -> Iterable[Array]:
        return [np.asarray(p) for p in self.params]


# --- Ceilings ---------------------------------------------------------------------------------------


@contender("memory streams", "ceiling", "sgdcore")
class Streams(Contender):
    """The same memory read and written without arithmetic, in one flat piece."""

    rule = None

    def __init__(self, problem: Problem) -> None:
        case = problem.case
        size = case.elements
        if case.bytes < 1 << 20:
            raise Unsuitable("the arrays fit into the cache")
        states = states_in(case.hyper)
        if states > 1:
            raise Unsuitable(f"it reads and writes one state at most, the rule has {states}")
        names = ["param", "grad"] + ["state"] * states
        arrays = {name: sgdcore.ParameterBuffer({name: (size,)}, case.dtype).data for name in names}
        for array in arrays.values():
            array[:] = 1
        self.step = partial(_core.memory_pass, **arrays, clear=case.clear)

    def load(self, index: int) -> None:
        pass

    def result(self) -> Iterable[Array]:
        return []


@contender("empty call", "ceiling", "sgdcore")
class EmptyCall(Contender):
    """A Python function without a body."""

    rule = None

    def __init__(self, problem: Problem) -> None:  # noqa: ARG002
        def step() -> None:
            pass

        self.step = step

    def load(self, index: int) -> None:
        pass

    def result(self) -> Iterable[Array]:
        return []
