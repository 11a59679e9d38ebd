"""Checkpoints of sgdcore.torch.SGD: torch's keys and plain values, whoever wrote them; others are refused at load."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import sgdcore
from sgdcore.torch import SGD
from torch_support import assert_same_bits, momentum_of, needs_torch_2_6, parameter

DATA = Path(__file__).parent / "data"

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
OWN_KEYS = ("momentum_dtype", "sparse_mode")


def stepped(make: Callable[..., Any], *, count: int = 2, **hyper: Any) -> Any:
    model = model_of()
    optimizer = make(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **hyper})
    for _ in range(count):
        step(model, optimizer)
    return optimizer


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


# Keys

SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"maximize": True, "foreach": False},
    {"foreach": True},
    {"fused": True},
    {"differentiable": True, "dampening": 0.5},
    {"lr": torch.tensor(0.5), "fused": False},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("named", [False, pytest.param(True, marks=needs_torch_2_6)])
def test_the_keys_are_torchs(setting: dict[str, Any], named: bool) -> None:
    """In their order, with their values."""
    seen = []
    for make in (SGD, torch.optim.SGD):
        params = [parameter([1.0]), parameter([2.0])]
        given: Any = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
        optimizer = make(given[:1], **setting)
        optimizer.add_param_group({"params": given[1:], "lr": 0.3, "of one's own": 1})
        groups = [
            [(k, v) for k, v in group.items() if k != "params"] for group in optimizer.param_groups
        ]
        saved = optimizer.state_dict()
        seen.append(
            (list(optimizer.defaults.items()), groups, saved["param_groups"], repr(optimizer))
        )
        optimizer.load_state_dict(saved)
        assert [list(group) for group in optimizer.state_dict()["param_groups"]] == [
            list(group) for group in saved["param_groups"]
        ]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("setting", "present"),
    [
        ({"momentum_dtype": torch.float32}, {"momentum_dtype": torch.float32}),
        ({"momentum_dtype": "bfloat16"}, {"momentum_dtype": torch.bfloat16}),
        ({"sparse_mode": "lazy"}, {"sparse_mode": "lazy"}),
        ({"momentum_dtype": None, "sparse_mode": "dense"}, {}),
    ],
    ids=str,
)
def test_ours_are_there_if_they_are_set(setting: dict[str, Any], present: dict[str, Any]) -> None:
    optimizer = SGD([parameter([1.0])], **setting)
    for keys in (optimizer.defaults, optimizer.param_groups[0]):
        assert {key: keys[key] for key in OWN_KEYS if key in keys} == present
    group = {"params": parameter([1.0]), **setting}
    plain = SGD([parameter([1.0])])
    plain.add_param_group(group)
    assert not set(OWN_KEYS) & {*plain.defaults, *plain.param_groups[0]}
    for key, value in present.items():
        assert plain.param_groups[1][key] == value


def test_a_group_without_the_keys_steps() -> None:
    for grad in (torch.ones(2), torch.ones(2).to_sparse()):
        p = parameter([1.0, 2.0])
        p.grad = grad
        SGD([p], lr=0.5, momentum=0.5).step()
        assert p.tolist() == [0.5, 1.5]


# Plain values


@pytest.mark.parametrize("given", [*DTYPES, *DTYPES.values()], ids=str)
def test_a_dtype_is_saved_by_its_name(given: Any) -> None:
    name = given if isinstance(given, str) else str(given).removeprefix("torch.")
    seen: list[Any] = []
    optimizer = stepped(SGD, momentum_dtype=given)
    optimizer.param_groups[0]["of one's own"] = "x"
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved["param_groups"]))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["momentum_dtype"] == name
    assert seen[0][0]["momentum_dtype"] == name
    assert json.loads(json.dumps(saved["param_groups"])) == saved["param_groups"]
    assert optimizer.param_groups[0]["momentum_dtype"] is DTYPES[name]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    for form in (name, DTYPES[name]):
        read = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        read["param_groups"][0]["momentum_dtype"] = form
        other = stepped(SGD, count=0)
        other.load_state_dict(read)
        assert other.param_groups[0]["momentum_dtype"] is DTYPES[name]
        for values, expected in zip(other.state.values(), optimizer.state.values(), strict=True):
            assert_same_bits(values["momentum_buffer"], expected["momentum_buffer"])
            assert values["momentum_buffer"].dtype is DTYPES[name]


@pytest.mark.parametrize("form", ["float64", torch.float64], ids=["name", "dtype"])
def test_a_dtype_set_between_steps_counts_and_is_saved(form: Any) -> None:
    optimizer = stepped(SGD, count=0)
    p = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["momentum_dtype"] = form
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype is torch.float64
    assert optimizer.state_dict()["param_groups"][0]["momentum_dtype"] == "float64"


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16", torch.float64], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_take_it(momentum_dtype: Any, flat: bool) -> None:
    """Written, and read by another optimizer: torch.distributed.checkpoint's functions take any."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = model_of()
    hyper: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "momentum_dtype": momentum_dtype}
    optimizer = SGD(model.parameters(), **hyper)
    step(model, optimizer)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    loaded_model = model_of()
    loaded_model.load_state_dict(model.state_dict())
    loaded = SGD(loaded_model.parameters(), **hyper)
    dcp.set_optimizer_state_dict(loaded_model, loaded, saved, options=options)
    assert loaded.param_groups[0].get("momentum_dtype") == optimizer.param_groups[0].get(
        "momentum_dtype"
    )
    for each, its in ((model, optimizer), (loaded_model, loaded)):
        step(each, its)
    for p, q in zip(model.parameters(), loaded_model.parameters(), strict=True):
        assert_same_bits(q, p)
        assert_same_bits(momentum_of(loaded, q), momentum_of(optimizer, p))


# Golden files: written by earlier versions, which had both keys in every group


@pytest.mark.parametrize("name", ["plain", "own_keys", "bfloat16"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_earlier_checkpoints_load(name: str, weights_only: bool) -> None:
    saved = torch.load(DATA / f"torch_{name}.pt", weights_only=weights_only)
    groups = saved["optimizer"]["param_groups"]
    assert all(key in group for group in groups for key in OWN_KEYS)
    params = {key: torch.nn.Parameter(value) for key, value in saved["params"].items()}
    optimizer = SGD([{"params": [p]} for p in params.values()], lr=1.0)
    optimizer.load_state_dict(saved["optimizer"])
    present = set() if name == "plain" else {"momentum_dtype"}
    if name == "own_keys":
        present.add("sparse_mode")
    for group, wrote in zip(optimizer.param_groups, groups, strict=True):
        assert set(OWN_KEYS) & set(group) == present
        assert all(group[key] == wrote[key] for key in present | {"lr", "momentum"})
    for i, p in enumerate(params.values()):
        assert_same_bits(
            momentum_of(optimizer, p), saved["optimizer"]["state"][i]["momentum_buffer"]
        )
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("name", ["plain", "own_keys", "bfloat16"])
def test_earlier_pickles_load(name: str) -> None:
    optimizer = pickle.loads((DATA / f"torch_{name}.pickle").read_bytes())
    again = pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, again):
        for group in each.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        each.step()
    for p, q in zip(*(g["params"] for g in optimizer.param_groups), strict=False):
        assert p.shape != q.shape
    for a, b in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert_same_bits(a["params"][0], b["params"][0])


@pytest.mark.parametrize("name", ["plain", "own_keys"])
def test_earlier_checkpoints_of_arrays_load(name: str) -> None:
    saved = pickle.loads((DATA / f"arrays_{name}.state.pickle").read_bytes())
    whole = pickle.loads((DATA / f"arrays_{name}.pickle").read_bytes())
    params = {key: sgdcore.Parameter(value.copy()) for key, value in saved["params"].items()}
    arrays = sgdcore.SGD([{"params": [p]} for p in params.values()], lr=1.0)
    tensors = {key: torch.nn.Parameter(torch.tensor(v)) for key, v in saved["params"].items()}
    ours = SGD([{"params": [p]} for p in tensors.values()], lr=1.0)
    arrays.load_state_dict(saved["optimizer"])
    ours.load_state_dict(saved["optimizer"])
    expected = {"momentum_dtype"} if name == "own_keys" else set()
    assert all(set(OWN_KEYS) & set(group) == expected for group in ours.param_groups)
    grads = [np.ones(p.shape, np.float32) for p in params.values()]
    for optimizer in (arrays, whole):
        optimizer.step(grads=grads)
    for p in tensors.values():
        p.grad = torch.ones_like(p)
    ours.step()
    restored = [group["params"][0] for group in whole.param_groups]
    for p, q, r in zip(params.values(), tensors.values(), restored, strict=True):
        assert p.data.tobytes() == q.detach().numpy().tobytes() == r.data.tobytes()


# What is not SGD's

OTHERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "SGD")
)


def array_optimizer() -> sgdcore.SGD:
    return sgdcore.SGD([np.ones((4, 4), np.float32)], lr=0.1, momentum=0.9)


def torch_optimizer() -> SGD:
    return SGD([torch.nn.Parameter(torch.ones(4, 4))], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("make", [array_optimizer, torch_optimizer])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("taken", [False, True], ids=["fresh", "stepped"])
def test_another_optimizers_state_is_refused(make: Any, name: str, taken: bool) -> None:
    p = torch.nn.Parameter(torch.ones(4, 4))
    other = getattr(torch.optim, name)([p], lr=0.1)
    if taken:
        p.grad = torch.ones(4, 4)
        if name == "SparseAdam":
            p.grad = p.grad.to_sparse()
        other.step(lambda: torch.zeros(()))
    assert_refused(make(), other.state_dict(), ValueError, "another optimizer|hyperparameters")


@pytest.mark.parametrize("make", [array_optimizer, torch_optimizer])
def test_another_optimizers_state_in_groups_of_sgd_is_refused(make: Any) -> None:
    optimizer = make()
    saved = {**optimizer.state_dict(), "state": {0: {"exp_avg": 1.0, "exp_avg_sq": 2.0}}}
    assert_refused(
        optimizer, saved, ValueError, r"state_dict\['state'\]\[0\]: .* exp_avg, exp_avg_sq"
    )


@pytest.mark.parametrize("make", [array_optimizer, torch_optimizer])
@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [
        (lambda: model_of().state_dict(), KeyError, "'state'.*a model's own"),
        (lambda: {"model": {}, "optimizer": torch_optimizer().state_dict()}, KeyError, r"\['optimizer'\] has it"),
        (dict, KeyError, "expected a key 'state'"),
        (lambda: {"state": {}}, KeyError, "expected a key 'param_groups'"),
        (lambda: {"state": [], "param_groups": []}, TypeError, r"\['state'\]: expected a mapping"),
        (lambda: {"state": {}, "param_groups": [3]}, TypeError, r"\['param_groups'\]\[0\]"),
        (lambda: None, TypeError, "state_dict: expected a mapping, got NoneType"),
        (lambda: model_of(), TypeError, "state_dict: expected a mapping, got Sequential"),
        (lambda: [1], TypeError, "state_dict: expected a mapping, got list"),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(
    make: Any, saved: Callable[[], Any], error: type[Exception], message: str
) -> None:
    assert_refused(make(), saved(), error, message)


def test_a_group_that_lacks_a_hyperparameter_is_refused() -> None:
    optimizer = torch_optimizer()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["momentum"], saved["param_groups"][0]["dampening"]
    assert_refused(optimizer, saved, ValueError, r"\[0\]: .* none called momentum, dampening$")


def test_keys_of_ones_own_load() -> None:
    optimizer = torch_optimizer()
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p]["count"] = 3
    optimizer.param_groups[0]["eps"] = 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.state[p]["count"], optimizer.param_groups[0]["eps"]) == (3, 0.5)


def assert_refused(optimizer: Any, saved: Any, error: type[Exception], message: str) -> None:
    """And nothing is changed."""
    before = repr(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == before


# What is no parameter


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: np.ones(3), r"got .*ndarray; arrays are for sgdcore\.SGD"),
        (lambda: [np.ones(3)], r"params\[0\]: .* ndarray|ndarray; arrays are for sgdcore\.SGD"),
        (lambda: [parameter([1.0]), np.ones(3)], r"params\[1\]: .*ndarray; arrays are for"),
        (lambda: iter([np.ones(3)]), r"params\[0\]: .*ndarray; arrays are for"),
        (lambda: [("w", np.ones(3))], r"params\[0\]: .*ndarray; arrays are for"),
        (lambda: [{"params": [np.ones(3)]}], r"params\[0\]: .*ndarray; arrays are for"),
        (lambda: [{"params": np.ones(3)}], r"got .*ndarray; arrays are for"),
        (lambda: sgdcore.Parameter(np.ones(3)), r"got .*Parameter; arrays are for sgdcore\.SGD"),
        (lambda: [sgdcore.Parameter(np.ones(3))], r"params\[0\]: .*Parameter; arrays are for"),
        (lambda: sgdcore.ParameterBuffer({"w": (3,)}), r"got .*ParameterBuffer; arrays are for"),
        (lambda: [sgdcore.ParameterBuffer({"w": (3,)})], r"\[0\]: .*ParameterBuffer; arrays are"),
        (lambda: torch.nn.Linear(2, 2), r"got .*Linear; pass its parameters, as model.parameters"),
        (lambda: model_of(), r"got .*Sequential; pass its parameters, as model.parameters"),
        (lambda: [model_of()], r"params\[0\]: .*Sequential; pass its parameters"),
        (lambda: {"params": model_of()}, "got dict; put a group in a list"),
        (lambda: [{"params": model_of()}], r"got .*Sequential; pass its parameters"),
        (lambda: model_of().state_dict(), "OrderedDict; .* list"),
    ],
)
def test_what_is_no_parameter_is_refused_with_what_to_pass(
    params: Callable[[], Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        SGD(params(), lr=0.1)


def test_refused_parameters_leave_the_optimizer_as_it_was() -> None:
    optimizer = torch_optimizer()
    for params in (np.ones(3), [np.ones(3)], model_of()):
        with pytest.raises(TypeError, match="; "):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
