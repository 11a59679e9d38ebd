"""Usual mistakes, and what their messages say: what was probably meant, what is missing, what was to be allocated."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import SGDClassifier

import sgdcore
from sgdcore import SGD, Parameter, ParameterBuffer
from sgdcore._hints import needs
from support import STORAGE_TYPES, assert_same_bits, numbers, parameters_of, refused

FULL = {"lr": 0.1, "momentum": 0.9}


# --- A step without gradients ---------------------------------------------------------------------------

UNREACHABLE = r"^grads: no parameter has a gradient, .*; pass step\(grads=\[\.\.\.\]\), or "


@pytest.mark.parametrize("call", ["plain", "closure", "hook", "clearing"])
def test_step_over_arrays_without_gradients_is_refused(call: str) -> None:
    optimizer = SGD([{"params": [numbers(0, (3,))]}, {"params": numbers(1, (2,))}], **FULL)
    if call == "hook":
        optimizer.register_step_pre_hook(lambda *_: None)
    with refused(TypeError, UNREACHABLE, optimizer):
        if call == "closure":
            optimizer.step(lambda: 1.0)
        else:
            optimizer.step(zero_grad=call == "clearing")
    with refused(TypeError, UNREACHABLE, optimizer):
        optimizer.step(grads=None)
    optimizer.step(grads=[numbers(2, (3,)), None])
    with refused(TypeError, UNREACHABLE, optimizer):
        optimizer.step()
    optimizer.step(grads=[None, None])


def test_step_without_gradients_where_one_could_be_assigned_does_nothing() -> None:
    """As with torch."""
    values = numbers(0, (3,))
    mixed = SGD([values.copy(), Parameter(values.copy())], **FULL)
    buffer = ParameterBuffer({"w": values})
    buffer["w"].grad = None
    reached = SGD([values.copy()], **FULL)
    parameters_of(reached)[0].grad = numbers(1, (3,))
    reached.zero_grad()
    for optimizer in (mixed, reached, SGD(buffer, **FULL), SGD([{"params": []}], **FULL)):
        optimizer.step()
        optimizer.step(zero_grad=True)
        for parameter in parameters_of(optimizer):
            assert_same_bits(parameter.data, values)


def test_hook_may_bring_the_gradients() -> None:
    optimizer = SGD([np.ones(2)], lr=1)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"grads": [np.ones(2)]}))
    optimizer.step()
    assert not parameters_of(optimizer)[0].data.any()


# --- What is given in the place of parameters ---------------------------------------------------------


class Table:
    """Stands for a pandas DataFrame or Series: iterates over names, knows how to become an array."""

    def __iter__(self) -> Any:
        return iter("ab")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return np.ones((2, 2))


class Net(torch.nn.Module):
    """A module of one's own, whose class is not from torch."""


def _frame() -> Any:
    return pytest.importorskip("pandas").DataFrame({"a": [1.0]})


def _series() -> Any:
    return pytest.importorskip("pandas").Series([1.0])


def _data_array() -> Any:
    return pytest.importorskip("xarray").DataArray([1.0])


OWN_COPY = r"; an optimizer updates arrays in place: pass \[numpy\.array\(value\)\]"
MODULE = r"; for torch's modules there is sgdcore\.torch\.SGD\(module\.parameters\(\)\)$"
ARRAYS = r"; pass the estimator's arrays, such as \[model\.coef_, model\.intercept_\]$"
PARAMS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "table": (Table, "Table", OWN_COPY),
    "DataFrame": (_frame, "DataFrame", OWN_COPY),
    "Series": (_series, "Series", OWN_COPY),
    "DataArray": (_data_array, "DataArray", OWN_COPY),
    "module": (lambda: torch.nn.Linear(1, 1), r"(torch\.)?Linear", MODULE),
    "module of one's own": (Net, "Net", MODULE),
    "module that can be iterated": (
        lambda: torch.nn.Sequential(torch.nn.Linear(1, 1)),
        r"(torch\.)?Sequential",
        MODULE,
    ),
    "list of modules": (torch.nn.ModuleList, r"(torch\.)?ModuleList", MODULE),
    "estimator": (SGDClassifier, "SGDClassifier", ARRAYS),
    "estimator with a length": (RandomForestClassifier, "RandomForestClassifier", ARRAYS),
}


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("place", ["params", "item", "group"])
def test_objects_of_other_libraries_are_explained(place: str, kind: str) -> None:
    make, name, hint = PARAMS[kind]
    value = make()
    if place == "params":
        match = f"^params argument given to the optimizer .* but got {name}{hint}"
    else:
        match = rf"^params\[1\]: optimizer can only optimize .* but got {name}{hint}"
    items = [numbers(0, (2,)), value]
    params = {"params": value, "item": items, "group": [{"params": items}]}[place]
    with pytest.raises(TypeError, match=match):
        SGD(params)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (np.array(1.0), TypeError, "but got ndarray; put it in a list$"),
        ({"w": np.ones(2)}, TypeError, r"but got dict; put a group in a list, or pass names with "),
        ("weights", TypeError, "but got str$"),
        ((p for p in ()), ValueError, "empty parameter list; an iterator gives what it has only "),
        ([], ValueError, "^optimizer got an empty parameter list$"),
        (np.float64(1), TypeError, f"but got float64{OWN_COPY}"),
    ],
    ids=["0-d array", "dict", "string", "generator", "empty", "scalar"],
)
def test_params_argument_is_explained(value: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SGD(value)


# --- Keys of groups -----------------------------------------------------------------------------------

NEAR = {
    "learning_rate": "lr",
    "Learning-Rate": "lr",
    "LR": "lr",
    "lrate": "lr",
    "wd": "weight_decay",
    "weight_decy": "weight_decay",
    "weightdecay": "weight_decay",
    "WEIGHT_DECAY": "weight_decay",
    "momentun": "momentum",
    "damping": "dampening",
    "nesterof": "nesterov",
    "maximise": "maximize",
}
FREE = (
    "name",
    "initial_lr",
    "max_lr",
    "lr_scale",
    "max_momentum",
    "base_momentum",
    "rate",
    "decay",
)
TORCHS = ("foreach", "fused", "differentiable", "capturable")


@pytest.mark.parametrize("place", ["constructor", "add_param_group", "load"])
@pytest.mark.parametrize("key", NEAR)
def test_key_that_is_nearly_a_hyperparameter_is_warned_of(key: str, place: str) -> None:
    optimizer = SGD([numbers(0, (2,))], **FULL)
    group = {"params": [numbers(1, (2,))], key: 0.5}
    match = f"^param_groups: nothing reads the key {key!r}; did you mean {NEAR[key]!r}\\?$"
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0][key] = 0.5
    give: dict[str, Callable[[], Any]] = {
        "constructor": lambda: SGD([group], **FULL),
        "add_param_group": lambda: optimizer.add_param_group(group),
        "load": lambda: optimizer.load_state_dict(checkpoint),
    }
    with pytest.warns(UserWarning, match=match) as caught:
        optimizer = give[place]() or optimizer
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert optimizer.param_groups[-1][key] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # no news


@pytest.mark.parametrize("key", [*FREE, *TORCHS, 3])
def test_other_keys_are_free(key: Any) -> None:
    optimizer = SGD([{"params": [numbers(0, (2,))], key: 0.5}], **FULL)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0][key] == 0.5


def test_warning_that_is_an_error_changes_nothing() -> None:
    optimizer = SGD([numbers(0, (2,))], **FULL)
    with refused(UserWarning, "did you mean 'lr'", optimizer):
        optimizer.add_param_group({"params": [numbers(1, (2,))], "learning_rate": 1})
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0] = {"params": [0], "wd": 1}
    with refused(UserWarning, "did you mean 'weight_decay'", optimizer):
        optimizer.load_state_dict(checkpoint)


# --- Numbers, names and texts ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize(
    "value", [10**400, 10**5000, Decimal("1e400")], ids=["400", "5000", "Decimal"]
)
def test_number_that_a_float_cannot_hold_is_refused_by_the_torch_front_end(
    key: str, value: Any
) -> None:
    match = f"{key}'?\\]?: expected a number that a float can hold, got "
    tensor = torch.ones(2)
    with pytest.raises(ValueError, match="^" + match):
        sgdcore.torch.SGD([tensor], **{"lr": 0.1, key: value})
    optimizer = sgdcore.torch.SGD([tensor], lr=0.1)
    optimizer.param_groups[0][key] = value
    tensor.grad = torch.ones(2)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert torch.equal(tensor, torch.ones(2))


@pytest.mark.parametrize("name", [3, None, b"w", ["w"]], ids=str)
def test_name_that_is_no_string_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match=r"^name: expected a string, got ") as caught:
        Parameter(np.ones(2), name=name)
    assert str(caught.value).endswith(repr(name))


def test_name_that_is_no_text_is_refused() -> None:
    match = r"^{}: expected text that UTF-8 can encode, got '\\udc80'$"
    with pytest.raises(ValueError, match=match.format("name")):
        Parameter(np.ones(2), name="\udc80")
    with pytest.raises(ValueError, match=match.format("parameters")):
        ParameterBuffer({"\udc80": 3})


class Unprintable:
    """A value whose repr raises, or returns what UTF-8 lacks."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def __repr__(self) -> str:
        if not self.text:
            raise RuntimeError("no repr")
        return self.text


TEXTS: dict[str, tuple[Any, str]] = {
    "two bytes a character": ("я" * 60, "'" + "я" * 60 + "'"),
    "cut between characters": ("я" * 100, "'" + "я" * 79),
    "cut at each offset": ("a" + "я" * 100, "'a" + "я" * 78),
    "four bytes a character": ("😀" * 100, "'" + "😀" * 79),
    "raises": (Unprintable(), "<Unprintable object>"),
    "lone surrogate": (Unprintable("a\udc80b"), "a\\udc80b"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_value_of_any_text_is_shown(case: str) -> None:
    value, text = TEXTS[case]
    parameter = Parameter(numbers(0, (2,)))
    optimizer = SGD([parameter], **FULL)
    kind = type(value).__name__
    array = f"expected a NumPy array, got {kind} {text}"
    messages: dict[str, Callable[[], Any]] = {
        f"data: {array}": lambda: Parameter(value),
        f"grad: {array}": lambda: setattr(parameter, "grad", value),
        f"grads[0]: {array}": lambda: optimizer.step(grads=[value]),
        f"momentum_buffer: {array}": lambda: optimizer.state[parameter].update(
            momentum_buffer=value
        ),
        f"lr: expected a number, got {text}": lambda: SGD([parameter], lr=value),
        f"parameters['w']: expected a shape or an array, got {text}": lambda: ParameterBuffer(
            {"w": value}
        ),
        f"state: expected a Parameter as key, got {text}": lambda: optimizer.state[value],
        f"state_dict['state'][0]: expected a mapping, got {text}": lambda: (
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: value}})
        ),
        f"momentum_dtype: expected one of float64, float32, float16, bfloat16, got {text}": (
            lambda: SGD([parameter], momentum_dtype=value)
        ),
        f"device: expected 'cpu', 'cuda', 'cuda:<number>', a number from 0 on or -1 for the CPU, got {text}": (
            lambda: ParameterBuffer({"w": 2}, device=value)
        ),
        f"isa: expected a string or None, got {text}": lambda: sgdcore.set_isa(
            [value] if isinstance(value, str) else value
        ),
    }
    for message, give in messages.items():
        if message.startswith("isa") and isinstance(value, str):
            continue  # which names an instruction set
        with pytest.raises((TypeError, ValueError)) as caught:
            give()
        assert str(caught.value) == message
    optimizer.param_groups[0]["lr"] = value
    parameter.grad = numbers(1, (2,))
    with pytest.raises(TypeError) as caught:
        optimizer.step()
    full = repr(value) if isinstance(value, str) else text
    assert str(caught.value) == f"param_groups[0]['lr']: expected a number, got {full}"


# --- Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", [None, "float64"])
@pytest.mark.parametrize("dtype", STORAGE_TYPES)
def test_momentum_given_as_a_list_gets_the_dtype_of_the_momentum(
    dtype: str, momentum_dtype: str | None
) -> None:
    """As a checkpoint that went through JSON has it."""
    parameter = Parameter(numbers(0, (2, 3), STORAGE_TYPES[dtype]))
    parameter.grad = numbers(1, (2, 3), STORAGE_TYPES[dtype])
    optimizer = SGD([parameter], **FULL, momentum_dtype=momentum_dtype)
    optimizer.step()
    momentum = optimizer.state[parameter]["momentum_buffer"].copy()
    assert momentum.dtype == STORAGE_TYPES[momentum_dtype or dtype]
    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {0: {"momentum_buffer": momentum.tolist()}}
    optimizer.load_state_dict(checkpoint)
    assert_same_bits(optimizer.state[parameter]["momentum_buffer"], momentum)
    checkpoint["state"] = {0: {"momentum_buffer": ((1, 2, 3), (4, 5, 6))}}
    optimizer.load_state_dict(checkpoint)
    assert optimizer.state[parameter]["momentum_buffer"].dtype == momentum.dtype
    for bad in ([["1", "2", "3"]] * 2, [[1, 2], [3]], [[True] * 3] * 2, [[1j] * 3] * 2):
        checkpoint["state"] = {0: {"momentum_buffer": bad}}
        with refused(TypeError, r"^state_dict\['state'\]\[0\]\['momentum_buffer'\]: ", optimizer):
            optimizer.load_state_dict(checkpoint)


# --- Memory and packages that are missing ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            "sgdcore.Parameter(np.ones((2, n), 'f4'), name='w')",
            "the momentum_buffer of parameter 'w'",
        ),
        ("np.ones((2, n), 'f4')", "momentum_buffer"),
        ("np.ones((n, 2), 'f4').T", "momentum_buffer"),
    ],
    ids=["named", "array", "axes reversed"],
)
def test_momentum_that_cannot_be_allocated_is_named(make: str, text: str) -> None:
    script = f"""
import resource
import numpy as np, sgdcore
n = 2**25
optimizer = sgdcore.SGD([{make}], lr=0.1, momentum=0.9)
grads = [np.broadcast_to(np.float32(1), (2, n))]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
try:
    optimizer.step(grads=grads)
except MemoryError as error:
    print(error)
print(len(optimizer.state), optimizer.param_groups[0]["params"][0].data.max())
"""
    message = f"{text}: cannot allocate {2**28} bytes, for shape (2, {2**25}) and dtype float32"
    assert _output(script).splitlines() == [message, "0 1.0"]


def test_momentum_of_a_buffer_that_cannot_be_allocated_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = ParameterBuffer({"w": 3, "b": 2}, "float64")
    buffer.grad[:] = 1
    optimizer = SGD(buffer, **FULL)

    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(sgdcore._core, "allocate", fail)
    match = r"^the momentum_buffer of a ParameterBuffer: cannot allocate 40 bytes, for shape \(5,\) and dtype float64$"
    with refused(MemoryError, match, optimizer):
        optimizer.step()
    with pytest.raises(
        MemoryError, match=r"^data: cannot allocate 12 bytes, for shape \(3,\) and "
    ):
        ParameterBuffer({"w": 3})
    monkeypatch.undo()
    optimizer.step()


def test_hint_works_for_the_installed_package_and_in_a_clone() -> None:
    text = needs("this", "that", "demo", ImportError("no that"))
    assert text == (
        "this needs that (no that): pip install 'sgdcore[demo]', "
        "or pip install '.[demo]' in a clone of the repository"
    )


@pytest.mark.parametrize(
    ("package", "statement", "what", "extra"),
    [
        (
            "ml_dtypes",
            "sgdcore.ParameterBuffer({'w': 3}, 'bfloat16')",
            "an array of bfloat16",
            "bfloat16",
        ),
        ("torch", "sgdcore.torch", "sgdcore.torch", "torch"),
    ],
    ids=["bfloat16", "torch"],
)
def test_missing_package_is_named(package: str, statement: str, what: str, extra: str) -> None:
    script = f"""
import sys
sys.modules[{package!r}] = None
import sgdcore
try:
    {statement}
except ImportError as error:
    print(error)
"""
    lines = _output(script)
    assert lines.startswith(f"{what} needs {package} (import of {package} halted; ")
    assert f"): pip install 'sgdcore[{extra}]', or pip install '.[{extra}]' in a clone" in lines


def test_dlpack_of_bfloat16_without_ml_dtypes_names_it() -> None:
    script = """
import sys
sys.modules["ml_dtypes"] = None
import sgdcore, torch
try:
    sgdcore.Parameter(torch.zeros(3, dtype=torch.bfloat16))
except ImportError as error:
    print(error)
"""
    assert _output(script).startswith("an array of bfloat16 needs ml_dtypes (")


def _output(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout
