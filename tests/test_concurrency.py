"""Threads, forks, signals and memory: what must hold while, after and between steps.

Steps from several threads, arrays rebound under a running step, training on in a forked child, Ctrl-C,
and that a step allocates nothing once the first one has made the momentum.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgdcore
from processes import TIMEOUT, allow_fork, assert_daemons_let_python_end, in_fork, stepping
from sgdcore.reference import ReferenceSGD
from support import Array, assert_same_bits, momentum_of, numbers, parameters_of

FULL = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}
# Large enough that a step releases the GIL and, on two cores or more, runs in parallel.
LARGE = 150_000


def in_threads(*functions: Callable[[], Any]) -> None:
    """Run the functions at the same time, each in a thread, and raise what they raise."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(functions))

    def guarded(function: Callable[[], Any]) -> None:
        try:
            barrier.wait(TIMEOUT)
            function()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


@contextmanager
def switching_often() -> Iterator[None]:
    """Let Python change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@functools.cache
def after_eight_steps(size: int, seed: int) -> Array:
    reference = ReferenceSGD([numbers(seed, (size,))], **FULL)
    for _ in range(8):
        reference.step([numbers(seed + 1, (size,))])
    return reference.params[0]


def training(size: int, seed: int) -> tuple[sgdcore.SGD, Array]:
    """An optimizer over one parameter with a gradient, and what the parameter will be in 8 steps."""
    parameter = sgdcore.Parameter(numbers(seed, (size,)))
    parameter.grad = numbers(seed + 1, (size,))
    return sgdcore.SGD([parameter], **FULL), after_eight_steps(size, seed)


# --- Threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.usefixtures("threads")
def test_different_optimizers_in_different_threads(count: int) -> None:
    sgdcore.set_num_threads(count)
    trainings = [training(size, 10 * i) for i, size in enumerate((10, LARGE, 70_001, 3 * LARGE))]

    def train(optimizer: sgdcore.SGD) -> Callable[[], None]:
        return lambda: [optimizer.step() for _ in range(8)] and None

    with switching_often():
        in_threads(*(train(optimizer) for optimizer, _ in trainings))
    for optimizer, expected in trainings:
        assert_same_bits(parameters_of(optimizer)[0].data, expected)


@pytest.mark.parametrize("size", [10, LARGE])
def test_one_optimizer_in_several_threads(size: int) -> None:
    """Steps take turns, or say that another one is running: none is lost or half done."""
    optimizer, expected = training(size, 0)
    done: list[None] = []  # appending is atomic
    refusals: set[str] = set()
    steps = iter(range(8))

    def train() -> None:
        for _ in steps:  # next() is atomic: together the threads take 8
            while True:
                try:
                    optimizer.step()
                except RuntimeError as error:
                    refusals.add(str(error))
                    time.sleep(0)
                else:
                    done.append(None)
                    break

    with switching_often():
        in_threads(train, train, train)
    assert len(done) == 8
    assert refusals <= {
        "step() is already running on this optimizer in another thread",
        "the optimizer's parameters cannot change while it is stepping",
    }
    assert_same_bits(parameters_of(optimizer)[0].data, expected)


def test_first_step_overtaken_by_another_threads_step() -> None:
    """Both find the momentum missing; the one that comes late must not replace the other's."""
    optimizer, expected = training(10, 0)
    slots = optimizer.state[parameters_of(optimizer)[0]].slots
    late = np.full(10, np.nan, np.float32)  # made before, given after the first step
    for i in range(8):
        optimizer.step()
        if i == 0:
            slots.reserve(0, late)
    assert_same_bits(parameters_of(optimizer)[0].data, expected)


def rebinding(optimizer: sgdcore.SGD, change: Callable[[int], None], enough: int) -> int:
    """Step while another thread calls `change(0)`, `change(1)`, ..., at least `enough` of both.

    Returns the number of steps.
    """
    stop = threading.Event()
    changes = steps = 0

    def rebind() -> None:
        nonlocal changes
        while not stop.is_set():
            change(changes)
            changes += 1

    def train() -> None:
        nonlocal steps
        deadline = time.monotonic() + TIMEOUT / 2
        try:
            while min(steps, changes) < enough:
                assert time.monotonic() < deadline
                optimizer.step()
                steps += 1
        finally:
            stop.set()

    with switching_often():
        in_threads(train, rebind)
    return steps


def _ones(kind: int) -> Array | None:
    """A fresh gradient of ones, of changing type and layout; sometimes there is none."""
    new = (
        lambda: None,
        lambda: np.ones(LARGE, np.float32),
        lambda: np.ones((LARGE, 2), np.float32)[:, 1],
        lambda: np.ones(LARGE, np.float64)[::-1],
        lambda: np.broadcast_to(np.float16(1), (LARGE,)),
    )
    return new[kind % len(new)]()


def test_gradients_rebound_during_steps() -> None:
    """Each step uses, for each parameter, one gradient as a whole, which lives until the step ends."""
    parameters = [sgdcore.Parameter(np.zeros(LARGE, np.float32)) for _ in range(3)]
    optimizer = sgdcore.SGD(parameters, lr=1)

    def change(i: int) -> None:
        parameters[i % 3].grad = _ones(i // 3)

    steps = rebinding(optimizer, change, 60)
    for parameter in parameters:
        assert -steps <= parameter.data[0] <= 0
        assert (parameter.data == parameter.data[0]).all()


def test_gradients_rebound_while_checked_for_overlap() -> None:
    """Where NumPy has to tell gradients apart, other threads may take over meanwhile."""
    size = 500  # too few elements for the step itself to let others run
    parameters = [sgdcore.Parameter(np.zeros((size, 2), np.float32)) for _ in range(4)]
    optimizer = sgdcore.SGD(parameters, lr=0.1)
    stop = threading.Event()

    def columns() -> Array:
        # Memory of its own, given back to the system at once when it is let go.
        return np.full((size, 40), 1, np.float64)

    def assign(matrix: Array) -> None:
        for i, parameter in enumerate(parameters):
            parameter.grad = matrix[:, 4 * i : 4 * i + 3 : 2]

    def rebind() -> None:
        while not stop.is_set():
            assign(columns())

    def train() -> None:
        try:
            for _ in range(300):
                assign(columns())
                optimizer.step(zero_grad=True)
        finally:
            stop.set()

    with switching_often():
        in_threads(train, rebind)
    for parameter in parameters:
        assert np.isfinite(parameter.data).all()


def test_data_and_momentum_rebound_during_steps() -> None:
    parameter = sgdcore.Parameter(np.zeros(LARGE, np.float32))
    parameter.grad = np.zeros(LARGE, np.float32)
    optimizer = sgdcore.SGD([parameter], lr=1, momentum=0.5)

    def change(i: int) -> None:
        state = optimizer.state[parameter]
        if i % 4 == 0:
            parameter.data = np.zeros(LARGE, np.float32)
        elif i % 4 == 1:
            state["momentum_buffer"] = np.zeros(LARGE, np.float16 if i % 8 == 1 else np.float32)
        elif i % 4 == 2:
            state.pop("momentum_buffer", None)
        else:
            optimizer.zero_grad(set_to_none=False)

    rebinding(optimizer, change, 60)
    # Nothing but zeros was ever given; a buffer read before it was filled would have left its traces.
    optimizer.step()
    assert not parameter.data.any()
    assert not momentum_of(optimizer)[0].any()


def test_groups_changed_during_steps() -> None:
    """Another thread may change hyperparameters and groups; a step takes them in before it starts."""
    parameters = [sgdcore.Parameter(np.zeros(LARGE, np.float32)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = np.ones(LARGE, np.float32)
    optimizer = sgdcore.SGD(parameters[:1], lr=1)

    def change(i: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] = float(i % 3)
        # Rebuilding the plan is the one thing that cannot happen during a step.
        with contextlib.suppress(RuntimeError):
            if i % 5 == 0:
                group["params"] = parameters[: 1 + i // 5 % 2]
            if i % 20 == 10:
                optimizer.load_state_dict(optimizer.state_dict())

    rebinding(optimizer, change, 60)
    for parameter in parameters:
        assert (parameter.data == parameter.data[0]).all()


@pytest.mark.parametrize(
    "function",
    ["optimizer.OptimizerState.__getitem__", "optimizer.dtype_of", "optimizer.new_storage"],
)
def test_groups_changed_while_a_step_is_prepared(
    monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Another thread may change the groups between any two lines of the step's Python code."""
    values = [numbers(i, (4,)) for i in range(3)]
    parameters = [sgdcore.Parameter(value.copy()) for value in values]
    for parameter in parameters:
        parameter.grad = np.ones(4, np.float32)
    optimizer = sgdcore.SGD(
        [{"params": parameters[:1]}, {"params": parameters[1:2], "momentum": 0.5}], lr=1
    )
    first, second = optimizer.param_groups
    # What the other thread leaves, the last of them for good: more parameters, fewer, and those of the other group.
    changes = iter([(parameters[:2], []), ([], parameters[2:]), (parameters[2:], parameters[:2])])
    interrupted = []
    path = f"sgdcore.{function}"
    original = pkgutil.resolve_name(path)

    def interrupt(*args: Any) -> Any:
        result = original(*args)
        interrupted.append(function)
        first["params"], second["params"] = next(changes, (first["params"], second["params"]))
        return result

    optimizer.param_groups[0]["params"] = [parameters[2]]  # the plan does not match
    monkeypatch.setattr(path, interrupt)
    optimizer.step()
    monkeypatch.undo()
    assert interrupted
    stepped = {id(parameter) for parameter in first["params"] + second["params"]}
    for parameter, value in zip(parameters, values, strict=True):
        assert_same_bits(parameter.data, value - 1 if id(parameter) in stepped else value)
    in_second = {id(parameter) for parameter in second["params"]}
    assert {id(parameter) for parameter in optimizer.state} == in_second


def test_arrays_are_read_before_a_gradient_can_change_the_list() -> None:
    """Reading a given gradient may run its owner's Python code, which may do anything."""
    values = [numbers(i, (4,)) for i in range(3)]
    optimizer = sgdcore.SGD(values, lr=1)

    class Shrinking:
        def __dlpack_device__(self) -> tuple[int, int]:
            del grads[1:]
            return 1, 0

        def __dlpack__(self, **kwargs: Any) -> object:
            return np.ones(4, np.float32).__dlpack__(**kwargs)

    grads: list[Any] = [Shrinking(), values[0].copy(), values[0].copy()]
    with pytest.raises(IndexError, match="list index out of range"):
        optimizer.step(grads=grads)
    for i, parameter in enumerate(parameters_of(optimizer)):
        assert_same_bits(parameter.data, numbers(i, (4,)))


def test_step_inside_a_step_is_refused() -> None:
    optimizer = sgdcore.SGD([sgdcore.Parameter(numbers(0, (4,)))], lr=1)

    class Stepping:
        def __float__(self) -> float:
            optimizer.param_groups[0]["lr"] = 1.0
            optimizer.step()
            return 1.0

    optimizer.param_groups[0]["lr"] = Stepping()
    with pytest.raises(TypeError, match=r"^param_groups\[0\]\['lr'\]: expected a number, got <"):
        optimizer.step()
    optimizer.step()  # goes on with what the interrupted one left


# --- Forks ----------------------------------------------------------------------------------------


def checksum(array: Array) -> list[int]:
    """Enough of an array's bits to be sure of all."""
    words = array.view(np.uint32).astype(np.uint64)
    weights = np.arange(1, words.size + 1, dtype=np.uint64)
    return [int(words.sum()), int((words * weights).sum() % 2**61)]


@allow_fork
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("warm", [True, False], ids=["after a parallel step", "before any"])
def test_forked_child_trains_on(warm: bool) -> None:
    sgdcore.set_num_threads(3)
    optimizer, expected = training(LARGE, 0)
    other, other_expected = training(2 * LARGE, 5)
    steps = 8
    if warm:
        for _ in range(3):
            optimizer.step()
        steps = 5

    def child() -> Any:
        for _ in range(steps):
            optimizer.step()
        for _ in range(8):
            other.step()
        arrays = [parameters_of(each)[0].data for each in (optimizer, other)]
        threads = [sgdcore.get_num_threads()]
        sgdcore.set_num_threads(4)
        threads.append(sgdcore.get_num_threads())
        other.step()
        return [*map(checksum, arrays[:1]), threads]

    first, threads = in_fork(child)
    assert first == checksum(expected)
    assert threads == [1, 1]
    assert sgdcore.get_num_threads() == 3
    for _ in range(steps):  # the parent goes on where it was
        optimizer.step()
    assert_same_bits(parameters_of(optimizer)[0].data, expected)
    for _ in range(8):
        other.step()
    assert_same_bits(parameters_of(other)[0].data, other_expected)


@allow_fork
@pytest.mark.usefixtures("threads")
def test_forked_while_another_thread_steps() -> None:
    sgdcore.set_num_threads(2)
    busy = sgdcore.SGD([np.zeros(20 * LARGE, np.float32)], lr=1)
    grads = [np.zeros(20 * LARGE, np.float32)]
    optimizer, expected = training(LARGE, 3)
    stop = threading.Event()

    def step_until_stopped() -> None:
        while not stop.is_set():
            busy.step(grads=grads)

    thread = threading.Thread(target=step_until_stopped, daemon=True)
    thread.start()
    try:
        for _ in range(3):
            result = in_fork(
                lambda: [
                    [optimizer.step() for _ in range(8)],
                    checksum(parameters_of(optimizer)[0].data),
                ]
            )
            assert result[1] == checksum(expected)
    finally:
        stop.set()
        thread.join(TIMEOUT)


@allow_fork
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("given", [False, True], ids=["grad", "grads="])
@pytest.mark.parametrize("count", [1, 2])
def test_child_steps_the_optimizer_that_another_thread_was_stepping(
    count: int, given: bool
) -> None:
    """The thread does not exist in the child, and neither does its step."""
    sgdcore.set_num_threads(count)
    parameter = sgdcore.Parameter(np.zeros(20 * LARGE, np.float32))
    grad = np.zeros_like(parameter.data)
    grads = [grad, None] if given else None
    if not given:
        parameter.grad = grad
    other = sgdcore.Parameter(np.zeros(4, np.float32))
    optimizer = sgdcore.SGD([parameter, other], lr=1, momentum=0.5)

    def child() -> list[float]:
        optimizer.step(
            grads=[None, np.ones(4, np.float32)]
        )  # not with what the lost step was given
        optimizer.add_param_group({"params": [np.zeros(3, np.float32)], "momentum": 0})
        grad.fill(1)
        optimizer.step(grads=[grad, None, np.ones(3, np.float32)])
        datas = [p.data for p in parameters_of(optimizer)]
        assert all((data == data[0]).all() for data in datas)
        return [float(data[0]) for data in datas]

    with stepping(lambda: optimizer.step(grads=grads)):
        for _ in range(5):
            assert in_fork(child) == [-1, -1, -1]


@allow_fork
def test_a_step_goes_on_where_its_own_thread_forks() -> None:
    """Reading a hyperparameter may run any code; no other step can begin meanwhile, in the child neither."""
    optimizer, expected = training(10, 0)
    for _ in range(7):
        optimizer.step()
    results = []

    class Forking:
        """A learning rate that forks when it is read."""

        def __float__(self) -> float:
            if not results:
                results.append(None)
                results[0] = os.fork()
                if results[0] == 0:
                    with pytest.raises(RuntimeError, match="already running"):
                        optimizer.step()
            return 0.1

    optimizer.param_groups[0]["lr"] = Forking()
    code = 1
    try:
        optimizer.step()
        assert_same_bits(parameters_of(optimizer)[0].data, expected)
        code = 0
    finally:
        if results[0] == 0:
            os._exit(code)
    assert os.waitpid(results[0], 0)[1] == 0


@allow_fork
def test_grandchild_trains() -> None:
    optimizer, expected = training(LARGE, 0)
    optimizer.step()

    def child() -> Any:
        optimizer.step()
        return in_fork(
            lambda: [
                [optimizer.step() for _ in range(6)],
                checksum(parameters_of(optimizer)[0].data),
            ]
        )

    assert in_fork(child)[1] == checksum(expected)


def _train_in_worker(seed: int) -> list[int]:
    optimizer, _ = training(LARGE, seed)
    for _ in range(8):
        optimizer.step()
    return checksum(parameters_of(optimizer)[0].data)


@allow_fork
def test_multiprocessing_fork() -> None:
    optimizer, expected = training(LARGE, 0)
    for _ in range(8):
        optimizer.step()
    assert_same_bits(parameters_of(optimizer)[0].data, expected)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map_async(_train_in_worker, [0, 1, 2]).get(TIMEOUT)
    assert results == [checksum(training(LARGE, seed)[1]) for seed in (0, 1, 2)]


# --- The end of Python ----------------------------------------------------------------------------

STEPPING = """
import numpy as np
import sgdcore
from sgdcore import _core

def optimizer():
    return sgdcore.SGD([np.zeros(4_000_000, np.float32)], lr=0.1, momentum=0.9)

def step(optimizer):
    grads = [np.ones(4_000_000, np.float32)]
    return lambda: optimizer.step(grads=grads)
"""

ON_DEVICES = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from simulated import Simulated
Simulated(1)
"""

AT_EXIT_KINDS = {
    "step": "make = lambda: step(optimizer())",
    "strided": """
def make():
    made = optimizer()
    grads = [np.ones((4_000_000, 2), np.float32)[:, 0]]
    return lambda: made.step(grads=grads, zero_grad=True)
""",
    "memory pass": """
def make():
    a, b = np.zeros(4_000_000, np.float32), np.zeros(4_000_000, np.float32)
    return lambda: _core.memory_pass(a, b)
""",
    "huge pages": """
def make():
    a = np.zeros(16_000_000, np.float32)
    return lambda: _core.collapse_huge_pages([(a.ctypes.data, a.nbytes)])
""",
    "overlap": """
def make():
    matrix = np.ones((3_000, 500), np.float32)
    params = [np.zeros((1_000, 500), np.float32) for _ in range(2)]
    made = sgdcore.SGD(params, lr=0.1)
    grads = [matrix[::3], matrix[1::3]]
    return lambda: made.step(grads=grads, zero_grad=True)
""",
    "gradients copied into a buffer": """
def make():
    buffer = sgdcore.ParameterBuffer({"a": 4_000_000})
    grad = np.ones(4_000_000, np.float64)
    return lambda: setattr(buffer["a"], "grad", grad)
""",
    "gradients that share themselves": """
class Shared:
    def __init__(self):
        self.array = np.ones(10)

    def __dlpack_device__(self):
        time.sleep(0.001)
        return self.array.__dlpack_device__()

    def __dlpack__(self, **keywords):
        time.sleep(0.001)
        return self.array.__dlpack__(**keywords)

def make():
    made = sgdcore.SGD([np.zeros(10)], lr=0.1)
    return lambda: made.step(grads=[Shared()])
""",
    "gradients that are asked for their unit": """
import array

class Quantity(array.array):
    @property
    def unit(self):
        time.sleep(0.001)

def make():
    made = sgdcore.SGD([np.zeros(10)], lr=0.1)
    return lambda: made.step(grads=[Quantity("d", [1.0] * 10)])
""",
    "devices": ON_DEVICES
    + """
def make():
    buffer = sgdcore.ParameterBuffer({"a": 200_000}, device="cuda")
    made = sgdcore.SGD(buffer, lr=0.1, momentum=0.9)
    return made.step
""",
    "copies from a device": ON_DEVICES
    + """
def make():
    buffer = sgdcore.ParameterBuffer({"a": 4_000_000}, device="cuda")
    return lambda: np.asarray(buffer["a"].data.numpy())
""",
}


@pytest.mark.parametrize("kind", AT_EXIT_KINDS)
def test_daemon_threads_do_not_abort_the_end(kind: str) -> None:
    """Threads that want the GIL back from a step while Python ends stop, whatever they were doing."""
    assert_daemons_let_python_end(STEPPING + AT_EXIT_KINDS[kind])


# --- Ctrl-C ---------------------------------------------------------------------------------------

INTERRUPTED = """
import signal
import numpy as np, sgdcore
signal.signal(signal.SIGINT, signal.default_int_handler)  # inherited as ignored from a job in the background
w = sgdcore.Parameter(np.zeros({size}, np.float32))
w.grad = np.ones({size}, np.float32)
optimizer = sgdcore.SGD([w], lr=1)
optimizer.step()
print("ready", flush=True)
try:
    while True:
        optimizer.step({arguments})
except KeyboardInterrupt:
    print("interrupted", bool((w.data == w.data[0]).all()), flush=True)
    w.grad[:] = 0
    optimizer.step()
    print("stepped", flush=True)
"""


@pytest.mark.parametrize(
    ("size", "arguments"),
    [(10, ""), (20_000_000, ""), (10, "lambda: None"), (10, "grads=[w.grad]")],
    ids=["tiny", "large", "closure", "grads"],
)
def test_ctrl_c_between_steps(size: int, arguments: str) -> None:
    script = INTERRUPTED.format(size=size, arguments=arguments)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            output, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert errors == ""
    assert output == "interrupted True\nstepped\n"
    assert process.returncode == 0
    assert time.monotonic() - started < 10


# --- Allocations ----------------------------------------------------------------------------------

LAYERS = ((3,), (100, 5), (60_000,))


def _columns() -> list[Array]:
    return [np.ones((*shape, 2), np.float32)[..., 0] for shape in LAYERS]


def _grads() -> list[Array]:
    return [np.ones(shape, np.float32) for shape in LAYERS]


def _separate(grads: list[Array] | None = None) -> list[sgdcore.Parameter]:
    parameters = [sgdcore.Parameter(np.ones(shape, np.float32)) for shape in LAYERS]
    for parameter, grad in zip(parameters, grads or _grads(), strict=True):
        parameter.grad = grad
    return parameters


def _buffer() -> sgdcore.ParameterBuffer:
    return sgdcore.ParameterBuffer({str(i): np.ones(s, np.float32) for i, s in enumerate(LAYERS)})


def _step(
    params: Any, zero_grad: bool = False, grads: Any = None, **hyper: Any
) -> Callable[[], None]:
    optimizer = sgdcore.SGD(params, **{**FULL, **hyper})
    if grads is not None:
        return lambda: optimizer.step(grads=grads, zero_grad=zero_grad)
    return (lambda: optimizer.step(zero_grad=True)) if zero_grad else optimizer.step


# Each makes a step that is to allocate nothing.
STEPS: dict[str, Callable[[], Callable[[], None]]] = {
    "separate": lambda: _step(_separate()),
    "many": lambda: _step([p for _ in range(100) for p in _separate()[:2]]),
    "groups": lambda: _step([{"params": [parameter]} for parameter in _separate()]),
    "learning rate as array": lambda: _step(_separate(), lr=np.float32(0.1)),
    "buffer": lambda: _step(_buffer()),
    "without momentum": lambda: _step(_separate(), momentum=0),
    "zero_grad": lambda: _step(_separate(), zero_grad=True),
    "zero_grad in a buffer": lambda: _step(_buffer(), zero_grad=True),
    "grads": lambda: _step(_separate(), grads=_grads()),
    "grads of a buffer": lambda: _step(_buffer(), grads=_grads()),
    "grads with zero_grad": lambda: _step(_separate(), grads=_grads(), zero_grad=True),
    "some grads": lambda: _step(_separate(), grads=[None, _grads()[1], None]),
    "strided": lambda: _step(_separate(_columns())),
    "strided with zero_grad": lambda: _step(_separate(_columns()), zero_grad=True),
    "strided grads": lambda: _step(_separate(), grads=_columns()),
    "strided grads with zero_grad": lambda: _step(_separate(), grads=_columns(), zero_grad=True),
    "mixed types": lambda: _step(_separate(), momentum_dtype="float16"),
}

# Interposed before libc's own functions, which it calls by their other names.
COUNTER = """
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
atomic_long allocations;
void *malloc(size_t n) { ++allocations; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { ++allocations; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { ++allocations; return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { ++allocations; return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { ++allocations; return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    ++allocations;
    *p = __libc_memalign(a, n);
    return *p == NULL ? ENOMEM : 0;
}
"""


def count_allocations() -> None:
    """Print how often malloc is called in 100 steps of each kind, and when an array is made."""
    counter = ctypes.c_long.in_dll(ctypes.CDLL(None), "allocations")
    counts = {}
    for kind, make in STEPS.items():
        step = make()
        for _ in range(3):
            step()
        gc.collect()
        before = counter.value
        for _ in range(100):
            step()
        after = counter.value
        np.ones(1 << 16)
        counts[kind] = after - before, counter.value - after
    print(json.dumps(counts))


@pytest.fixture(scope="module")
def allocations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """What `count_allocations` prints in a process whose malloc counts."""
    compiler = shutil.which("cc")
    if compiler is None or not hasattr(ctypes.CDLL(None), "__libc_malloc"):
        pytest.skip("needs a C compiler and glibc to count calls of malloc")
    source = tmp_path_factory.mktemp("counter") / "counter.c"
    source.write_text(COUNTER)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONMALLOC": "malloc",  # so that Python's own objects count as well
        "LD_PRELOAD": str(library),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import {__name__}; {__name__}.count_allocations()"],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=TIMEOUT,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", STEPS)
def test_step_calls_no_malloc(kind: str, allocations: dict[str, tuple[int, int]]) -> None:
    in_steps, in_an_array = allocations[kind]
    assert in_an_array > 0  # the counter counts
    assert in_steps < 10  # what the loop over 100 steps needs


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def heap_in_use() -> int:
    """Bytes that malloc has given out, mapped blocks included."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("needs glibc's mallinfo2")
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.mark.parametrize("kind", STEPS)
def test_steps_leave_nothing_behind(kind: str) -> None:
    step = STEPS[kind]()
    for _ in range(20):
        step()
    gc.collect()
    gc.disable()
    try:
        heap = heap_in_use()
        tracemalloc.start()
        for _ in range(20):
            step()
        python, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(1000):
            step()
        python_after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        grown = heap_in_use() - heap
    finally:
        gc.enable()
    assert peak - python < 2048  # the objects of one call at most
    assert python_after - python < 512
    assert grown < 64 * 1024  # for 1000 steps: what tracing and other libraries' threads need


def test_momentum_is_the_only_state_of_separate_parameters() -> None:
    """NumPy tells tracemalloc about every array: the first step makes the momentum and no other."""
    parameters = [sgdcore.Parameter(np.ones(shape, np.float32)) for shape in ((1000,), (300, 70))]
    for parameter in parameters:
        parameter.grad = np.ones(parameter.shape, np.float32)
    for momentum, expected in ((0, 0), (0.9, 4 * 22_000)):
        optimizer = sgdcore.SGD(parameters, lr=0.1, momentum=momentum)
        arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
        tracemalloc.start()
        optimizer.step()
        snapshot = tracemalloc.take_snapshot().filter_traces([arrays])
        tracemalloc.stop()
        assert sum(trace.size for trace in snapshot.traces) == expected
        held = [each for each in momentum_of(optimizer) if each is not None]
        assert sum(each.nbytes for each in held) == expected


@pytest.mark.parametrize("elements", [20_000, 500_000])
def test_momentum_is_the_only_state_of_a_buffer(elements: int) -> None:
    """Its memory does not come from NumPy, so malloc is asked: below 4 MiB the bytes come from there."""
    names = [f"p{i}" for i in range(10)]
    for momentum, dtype, expected in (
        (0, None, 0),
        (0.9, None, 4 * elements),
        (0.9, "float16", 2 * elements),
    ):
        buffer = sgdcore.ParameterBuffer(dict.fromkeys(names, elements // 10))
        optimizer = sgdcore.SGD(buffer, lr=0.1, momentum=momentum, momentum_dtype=dtype)
        gc.collect()
        before = heap_in_use()
        optimizer.step()
        grown = heap_in_use() - before
        # Beside the momentum: views and lists for ten parameters, and malloc's own rounding to pages.
        assert expected <= grown < expected + 24 * 1024
        if momentum:
            assert momentum_of(optimizer)[0].base.nbytes == expected


def test_nothing_is_kept_alive_after_the_optimizer() -> None:
    class Tracked(np.ndarray):
        """An array whose end can be seen."""

    def tracked(seed: int) -> Array:
        return numbers(seed, (LARGE,)).view(Tracked)

    data, grad = tracked(0), tracked(1)
    references = sys.getrefcount(data), sys.getrefcount(grad)
    parameter = sgdcore.Parameter(data)
    parameter.grad = grad
    optimizer = sgdcore.SGD([parameter], **FULL)
    optimizer.step()
    given = tracked(2)
    optimizer.step(grads=[given])
    momentum = tracked(3)
    optimizer.state[parameter]["momentum_buffer"] = momentum
    optimizer.step(zero_grad=True)
    dead = [weakref.ref(each) for each in (given, momentum, optimizer, parameter)]
    del given, momentum, optimizer, parameter
    gc.collect()
    assert [each() for each in dead] == [None] * 4
    assert (sys.getrefcount(data), sys.getrefcount(grad)) == references


def test_optimizers_come_and_go_without_growth() -> None:
    def life() -> None:
        buffer = sgdcore.ParameterBuffer({"a": (200, 200), "b": (50,)})
        optimizer = sgdcore.SGD([{"params": buffer}, {"params": [numbers(0, (1000,))]}], **FULL)
        optimizer.step(grads=[buffer["a"].grad, None, numbers(1, (1000,))])
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError, match="expected shape"):
            optimizer.step(grads=[None, None, numbers(1, (999,))])

    for _ in range(10):
        life()
    gc.collect()
    before = heap_in_use()
    for _ in range(50):
        life()
    gc.collect()
    assert heap_in_use() - before < 160_000  # less than one of the fifty momentum buffers
