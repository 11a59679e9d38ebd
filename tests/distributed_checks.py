"""What the distributed tests check, on every rank of a process group; see distributed_worker.py.

NumPy's part; it imports no torch. distributed_torch_checks.py adds torch's to the same table.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgdcore
from sgdcore.distributed import (
    DataParallel,
    LocalSGD,
    OuterSGD,
    ProcessGroup,
    Progress,
    RoundError,
    SlowMo,
    Stagewise,
    _flat,
    as_process_group,
    averager,
)

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


class Context:
    """Where a check runs."""

    def __init__(self, engine: str, ranks: int, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.group = as_process_group()
        self.rank, self.size = self.group.rank, self.group.size
        assert self.size == ranks

    def split(self, members: Sequence[int]) -> ProcessGroup | None:
        """A group of some of the ranks; None for those that are not in it. All ranks call it."""
        if self.engine == "mpi":
            from mpi4py import MPI

            color = 0 if self.rank in members else MPI.UNDEFINED
            comm = MPI.COMM_WORLD.Split(color, self.rank)
            return None if comm == MPI.COMM_NULL else as_process_group(comm)
        import torch.distributed as dist

        group = dist.new_group(list(members))
        return as_process_group(group) if self.rank in members else None


Check = Callable[[Context], None]
CHECKS: dict[str, Check] = {}
_LAUNCHES: dict[str, tuple[str, ...]] = {}

EVERYWHERE = ("gloo-2", "gloo-4", "mpi-2", "mpi-4")
GLOO, MPI = EVERYWHERE[:2], EVERYWHERE[2:]


def check(
    launches: Sequence[str] = EVERYWHERE, cases: dict[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the table, once for each of its cases.

    Args:
        launches: engine and number of ranks of the launches that run it.
        cases: keyword arguments by the case's name.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for case, arguments in (cases or {"": None}).items():
            name = function.__name__ + (f"[{case}]" if case else "")
            CHECKS[name] = function if arguments is None else partial(function, **arguments)
            _LAUNCHES[name] = tuple(launches)
        return function

    return add


def names(launch: str) -> list[str]:
    """The checks of a launch, in order."""
    return [name for name, launches in _LAUNCHES.items() if launch in launches]


# Helpers


def on_all(context: Context, value: float) -> list[float]:
    """The value of each rank."""
    everyone = np.zeros(context.size)
    everyone[context.rank] = value
    context.group.all_reduce(everyone).wait()
    return everyone.tolist()


def as_array(values: Any) -> Any:
    """The values as an array, whatever holds them."""
    if isinstance(values, sgdcore.Parameter):
        return values.data
    if hasattr(values, "detach"):
        tensor = values.detach().cpu().contiguous()
        return tensor.numpy() if str(tensor.dtype) != "torch.bfloat16" else tensor.float().numpy()
    return np.asarray(values)


def digest(arrays: Sequence[Any]) -> int:
    contents = b"".join(np.ascontiguousarray(as_array(a)).tobytes() for a in arrays)
    return int.from_bytes(hashlib.sha256(contents).digest()[:6], "big")


def assert_equal_on_all(context: Context, arrays: Sequence[Any]) -> None:
    """Compare arrays in every bit between all ranks."""
    assert len(set(on_all(context, digest(arrays)))) == 1, "ranks differ"


def same_bits(a: Any, b: Any) -> bool:
    a, b = as_array(a), as_array(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def close(actual: Any, expected: Any, rounding: float = 64) -> None:
    """Equal to a number of roundings of the largest value."""
    actual, expected = as_array(actual), as_array(expected)
    tolerance = (
        rounding * float(np.finfo(actual.dtype).eps) * max(1.0, float(np.abs(expected).max()))
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def values_of(optimizer: Any) -> list[Any]:
    return [as_array(p).copy() for p in params_of(optimizer)]


def momenta_of(optimizer: Any) -> list[Any]:
    return [
        optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
        for p in params_of(optimizer)
    ]


def addresses_of(arrays: Sequence[Any]) -> list[int]:
    return [a.data_ptr() if hasattr(a, "data_ptr") else as_array(a).ctypes.data for a in arrays]


SHAPES: list[tuple[int, ...]] = [(7, 5), (5,), (1,), (3, 4, 2), (33,)]


def numpy_params(flat: bool, dtype: str = "float32", seed: int = 0) -> Any:
    """Parameters in one buffer, or separate ones, the same on all ranks."""
    rng = np.random.default_rng(seed)
    arrays = {f"p{i}": rng.standard_normal(shape).astype(dtype) for i, shape in enumerate(SHAPES)}
    if flat:
        return sgdcore.ParameterBuffer(arrays)
    arrays["p0"] = np.asfortranarray(arrays["p0"])
    return [sgdcore.Parameter(array) for array in arrays.values()]


def torch_params(dtype: str = "float32", seed: int = 0) -> list[Any]:
    import torch

    rng = np.random.default_rng(seed)
    tensors = [
        torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype)) for shape in SHAPES
    ]
    tensors[0] = tensors[0].t().contiguous().t()
    return [torch.nn.Parameter(tensor) for tensor in tensors]


KINDS: dict[str, dict[str, Any]] = {
    "numpy flat": {"kind": "numpy flat"},
    "numpy separate": {"kind": "numpy separate"},
}


def make(kind: str, dtype: str = "float32", seed: int = 0, **hyper: Any) -> Any:
    """An optimizer of a kind, with parameters equal on all ranks."""
    hyper = hyper or HYPER
    if kind.startswith("numpy"):
        return sgdcore.SGD(numpy_params(kind == "numpy flat", dtype, seed), **hyper)
    import torch

    cls = sgdcore.torch.SGD if kind == "sgdcore.torch" else torch.optim.SGD
    return cls(torch_params(dtype, seed), **hyper)


def put_gradient(p: Any, gradient: Any) -> None:
    if isinstance(p, sgdcore.Parameter):
        p.grad = np.array(gradient, order="K")
    else:
        import torch

        p.grad = torch.empty_like(p).copy_(torch.from_numpy(gradient))


def put_gradients(optimizer: Any, rng: np.random.Generator, scale: float = 1.0) -> None:
    """A gradient that depends on the parameters, and on who computes it."""
    for p in params_of(optimizer):
        value = as_array(p)
        wanted = rng.standard_normal(value.shape)
        put_gradient(p, (scale * (0.5 * value - wanted)).astype(value.dtype))


def train(context: Context, optimizer: Any, steps: int, first: int = 0) -> None:
    """Take steps with a gradient for each of rank and step."""
    for step in range(first, first + steps):
        put_gradients(optimizer, np.random.default_rng([context.rank, step]))
        optimizer.step()


@contextmanager
def chunks_of(nbytes: int) -> Iterator[None]:
    """Cut what travels into chunks of so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GLOO_SIZES", "MPI_SIZES", "WIRE_SIZES"):
            patch.setattr(averager, name, averager.Sizes(nbytes, nbytes))
        yield


class Counting:
    """A group that counts what is averaged; what ranks tell each other is integers."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.size, self.dtypes = group.rank, group.size, group.dtypes
        self.reductions = self.elements = 0
        self.arrays: list[tuple[int, int]] = []

    def all_reduce(self, array: Any) -> Any:
        if "float" in str(array.dtype):
            self.reductions += 1
            self.elements += array.shape[0]
            self.arrays.append((addresses_of([array])[0], array.shape[0]))
        return self.group.all_reduce(array)


@contextmanager
def refused(context: Context, error: type[Exception], match: str, *arrays: Any) -> Iterator[None]:
    """Expect an error on this rank, and the arrays as they were."""
    before = [as_array(a).copy() for a in arrays]
    with pytest.raises(error, match=match):
        yield
    assert all(same_bits(a, b) for a, b in zip(arrays, before, strict=True))


@contextmanager
def told(
    context: Context, own: type[Exception], match: str, *arrays: Any, kind: str = ""
) -> Iterator[None]:
    """Expect an error on all ranks that names rank 1, the error's type and its text."""
    match = f"of step .*: rank 1 failed with {kind or own.__name__}: .*{match}[^\0]*$"
    with refused(context, RoundError, match, *arrays):
        yield


# Process groups


@check(cases={d: {"dtype": d} for d in ("float64", "float32", "int64")})
def group_operations(context: Context, dtype: str) -> None:
    group, n, rank = context.group, context.size, context.rank
    ranks = np.arange(n)
    array = np.arange(6, dtype=dtype) + rank
    address = array.ctypes.data
    group.all_reduce(array).wait()
    assert array.tolist() == [n * i + ranks.sum() for i in range(6)]
    assert array.ctypes.data == address


@check()
def group_refusals(context: Context) -> None:
    group: Any = context.group
    array, frozen = np.zeros((4, 4)), np.zeros(4)
    frozen.flags.writeable = False
    for argument, call in {
        "array: expected contiguous": lambda: group.all_reduce(array.T),
        "array: expected a NumPy array or a torch tensor, got list": lambda: group.all_reduce(
            [1.0]
        ),
        "array: expected contiguous and writable": lambda: group.all_reduce(frozen),
    }.items():
        with refused(context, (TypeError, ValueError), argument, array):
            call()


@check(MPI)
def sixteen_bits_are_refused(context: Context) -> None:
    # OpenMPI would return garbage for them.
    for dtype in (np.float16, sgdcore._arrays.storage_dtype("bfloat16")):
        array = np.ones(4, dtype)
        with refused(context, TypeError, "array: expected one of float32, .* for MPI, got", array):
            context.group.all_reduce(array)
    able = Counting(context.group)
    able.dtypes |= {"bfloat16", "float16"}
    for wire in ("bfloat16", np.float16):
        optimizer = make("numpy flat")
        match = "wire_dtype: MpiGroup.* cannot add up"
        with refused(context, ValueError, match, *values_of(optimizer)):
            LocalSGD(optimizer, wire_dtype=wire)
        # Nor is one that comes later.
        local = LocalSGD(optimizer, able, wire_dtype=wire)
        with refused(context, ValueError, match, *values_of(optimizer)):
            local.rebind(context.group)
        assert local.group is able


# Local SGD


@check(cases=KINDS)
def averaging(context: Context, kind: str) -> None:
    """After a round: the mean of the ranks' parameters, equal on all, where they were, gradient or not."""
    optimizer = make(kind)
    reference = [make(kind) for _ in range(context.size)]
    local = LocalSGD(optimizer, sync_every=3)
    params = params_of(optimizer)
    where = addresses_of(params)
    for step in range(6):
        for rank, other in enumerate([*reference, optimizer]):
            if other is optimizer:
                rank = context.rank
            put_gradients(other, np.random.default_rng([rank, step]))
            params_of(other)[1].grad = None  # on no rank
            if rank == 0:
                params_of(other)[3].grad = None  # on one
            (local if other is optimizer else other).step()
        if step == 2:  # between rounds nothing but the reference's average
            for values in zip(*(params_of(other) for other in reference), strict=True):
                total = values[0].data * 1
                for value in values[1:]:
                    total = total + value.data
                for value in values:
                    value.data[...] = total / context.size
    for values, ours in zip(zip(*map(params_of, reference), strict=True), params, strict=True):
        mean = np.mean([as_array(v).astype(np.float64) for v in values], axis=0)
        close(ours, mean.astype(np.float32), 8)
    assert_equal_on_all(context, params)
    assert addresses_of(params) == where
    assert local.round == 2


@check(cases=KINDS)
def h1_equals_synchronous(context: Context, kind: str) -> None:
    """SGD with momentum, Nesterov and weight decay is linear in p, g and b."""
    local = LocalSGD(make(kind, "float64"), sync_every=1)
    sync = DataParallel(make(kind, "float64"))
    for step in range(20):
        gradients = np.random.default_rng([context.rank, step])
        state = gradients.bit_generator.state
        for optimizer in (local, sync):
            gradients.bit_generator.state = state
            put_gradients(optimizer, gradients)
            optimizer.step()
    for ours, theirs in zip(params_of(local), params_of(sync), strict=True):
        close(ours, as_array(theirs))
    assert_equal_on_all(context, params_of(local))
    assert_equal_on_all(context, params_of(sync))
    assert_equal_on_all(context, momenta_of(sync))


@check(cases=KINDS)
def outer_step_of_one_is_averaging(context: Context, kind: str) -> None:
    plain = LocalSGD(make(kind), sync_every=4)
    outer = LocalSGD(make(kind), sync_every=4, outer=OuterSGD(lr=1.0))
    for optimizer in (plain, outer):
        train(context, optimizer, 12)
    for ours, theirs in zip(params_of(outer), params_of(plain), strict=True):
        close(ours, as_array(theirs), 16)
    assert_equal_on_all(context, params_of(outer))


def _outer_reference(
    outer: OuterSGD | SlowMo, anchor: Any, mean: Any, momentum: Any, lr: float
) -> tuple[Any, Any]:
    """The formulas, in float64."""
    g = anchor - mean
    if isinstance(outer, SlowMo):
        u = outer.momentum * momentum + g / lr
        return anchor - outer.lr * lr * u, u
    u = g if momentum is None else outer.momentum * momentum + g
    step = g + outer.momentum * u if outer.nesterov else u
    return anchor - outer.lr * step, u


OUTERS = {
    "sgd": {"outer": OuterSGD(0.5)},
    "momentum": {"outer": OuterSGD(0.5, 0.8)},
    "nesterov": {"outer": OuterSGD(0.7, 0.9, nesterov=True)},
    "slowmo": {"outer": SlowMo(0.6)},
    "slowmo, lr": {"outer": SlowMo(0.6, lr=0.7)},
}


@check(cases=OUTERS)
def outer_step(context: Context, outer: OuterSGD | SlowMo) -> None:
    """As the formulas say, also where the inner learning rate changes between rounds."""
    optimizer = make("numpy flat", "float64")
    local = LocalSGD(optimizer, sync_every=2, outer=outer, momentum_sync="reset")
    inner = make("numpy flat", "float64")  # as this rank without the averaging
    momentum: Any = 0.0 if isinstance(outer, SlowMo) else None
    buffer, other = (params_of(o)[0].buffer for o in (optimizer, inner))
    for number, lr in enumerate((0.1, 0.1, 0.05, 0.2)):
        anchor = other.data.copy()
        for group in (optimizer.param_groups[0], inner.param_groups[0]):
            group["lr"] = lr
        train(context, inner, 2, first=2 * number)
        train(context, local, 2, first=2 * number)
        mean = other.data.copy()
        context.group.all_reduce(mean).wait()
        expected, momentum = _outer_reference(outer, anchor, mean / context.size, momentum, lr)
        close(buffer.data, expected)
        other.data[:] = buffer.data
        for each in momenta_of(inner):
            each[...] = 0
    assert_equal_on_all(context, [buffer.data])


@check(cases=KINDS)
def momentum_kept_averaged_reset(context: Context, kind: str) -> None:
    for mode in ("keep", "average", "reset"):
        optimizer = make(kind)
        local = LocalSGD(optimizer, sync_every=3, momentum_sync=mode)
        train(context, local, 2)
        where = addresses_of(momenta_of(optimizer))
        put_gradients(optimizer, np.random.default_rng([context.rank, 2]))
        reference = sgdcore.SGD([p.data.copy("K") for p in params_of(optimizer)], **HYPER)
        reference.load_state_dict(optimizer.state_dict())
        reference.step(grads=[p.grad for p in params_of(optimizer)])
        local.step()
        for ours, own in zip(momenta_of(optimizer), momenta_of(reference), strict=True):
            if mode == "keep":
                assert same_bits(ours, own)
            elif mode == "reset":
                assert not ours.any()
            else:
                mean = np.ascontiguousarray(own)
                context.group.all_reduce(mean).wait()
                close(ours, mean / context.size, 4)
        assert addresses_of(momenta_of(optimizer)) == where
        if mode != "keep":
            assert_equal_on_all(context, momenta_of(optimizer))


def averages_of(optimizer: Any) -> list[Any]:
    return [as_array(optimizer.state[p]["average"]) for p in params_of(optimizer)]


@check(cases=KINDS)
def averages_of_parameters_are_averaged_with_them(context: Context, kind: str) -> None:
    """At a round's end a rank's averages become the mean of the ranks', whatever becomes of momentum."""
    ema = sgdcore.EMA(0.75)
    for mode in ("keep", "average", "reset"):
        optimizer = make(kind, **HYPER, average=ema)
        local = LocalSGD(optimizer, sync_every=3, momentum_sync=mode)
        train(context, local, 3)
        assert_equal_on_all(context, averages_of(optimizer))
        train(context, local, 2, 3)
        put_gradients(optimizer, np.random.default_rng([context.rank, 5]))
        params = [as_array(p).copy() for p in params_of(optimizer)]
        twin = sgdcore.SGD(params, **HYPER, average=ema)
        twin.load_state_dict(optimizer.state_dict())
        twin.step(grads=[as_array(p.grad).copy() for p in params_of(optimizer)])
        local.step()
        for ours, own in zip(averages_of(optimizer), averages_of(twin), strict=True):
            mean = np.ascontiguousarray(own)
            context.group.all_reduce(mean).wait()
            close(ours, mean / context.size, 4)
        assert_equal_on_all(context, averages_of(optimizer))
        before = [as_array(p).copy() for p in params_of(optimizer)]
        with local.averaged():
            for p, average in zip(params_of(optimizer), averages_of(twin), strict=True):
                assert as_array(p).shape == average.shape
            assert_equal_on_all(context, params_of(optimizer))
        for p, old in zip(params_of(optimizer), before, strict=True):
            assert same_bits(as_array(p), old)


def masters_of(optimizer: Any) -> list[Any]:
    return [as_array(optimizer.master(p)) for p in params_of(optimizer)]


@check(cases=KINDS)
def masters_are_averaged(context: Context, kind: str) -> None:
    """What a round averages of parameters in two halves is their float32 values, not what the model sees of them."""
    import ml_dtypes  # names the dtype

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    for precision in ("split", "kahan"):
        optimizer = make(kind, "bfloat16", **HYPER, precision=precision)
        local = LocalSGD(optimizer, sync_every=3)
        train(context, local, 5)
        put_gradients(optimizer, np.random.default_rng([context.rank, 5]))
        # A twin of arrays takes the step before the average.
        params = [as_array(p).astype(bfloat16) for p in params_of(optimizer)]
        twin = sgdcore.SGD(params, **HYPER, precision=precision)
        twin.load_state_dict(optimizer.state_dict())
        twin.step(grads=[as_array(p.grad).astype(bfloat16) for p in params_of(optimizer)])
        local.step()
        for ours, own in zip(masters_of(optimizer), masters_of(twin), strict=True):
            mean = np.ascontiguousarray(own)
            context.group.all_reduce(mean).wait()
            mean = mean / context.size
            # With split only the sums' roundings differ; kahan keeps 16 bits.
            bound = 2.0**-22 if precision == "split" else 2.0**-16
            assert (np.abs(ours - mean) <= bound * np.abs(mean).max()).all()
        assert_equal_on_all(context, masters_of(optimizer))
        assert_equal_on_all(context, params_of(optimizer))
        with pytest.raises(ValueError, match="transactional cannot go with precision='split'"):
            LocalSGD(make(kind, "bfloat16", precision=precision), transactional=True)


@check(cases=KINDS)
def averages_under_data_parallel_are_equal_on_all_ranks(context: Context, kind: str) -> None:
    optimizer = make(kind, **HYPER, average=sgdcore.EMA(0.75))
    data = DataParallel(optimizer)
    expected: list[Any] = [None] * len(params_of(optimizer))
    for step in range(4):
        put_gradients(optimizer, np.random.default_rng([context.rank, step]))
        data.step()
        for i, p in enumerate(params_of(optimizer)):
            expected[i] = sgdcore.reference.ema_update(expected[i], as_array(p), decay=0.75)
    for ours, average in zip(averages_of(optimizer), expected, strict=True):
        assert same_bits(ours, average)
    assert_equal_on_all(context, averages_of(optimizer))


@check(cases=KINDS)
def the_norm_is_of_the_mean_and_equal_on_all_ranks(context: Context, kind: str) -> None:
    """The norm, the factor, and the decision to leave a step out."""
    options = {"max_grad_norm": 0.5, "clip_value": 2.0, "skip_nonfinite": True}
    optimizer = make(kind, **HYPER, **options)
    data = DataParallel(optimizer)
    params = [as_array(p).copy() for p in params_of(optimizer)]
    twin = sgdcore.SGD(params, **HYPER, **options)
    for step in range(4):
        put_gradients(optimizer, np.random.default_rng([context.rank, step]))
        if step == 2 and context.rank == 1:
            as_array(params_of(optimizer)[0].grad).flat[0] = np.nan
        data.step()
        # The mean is now in the gradients' place.
        twin.step(grads=[as_array(p.grad).copy() for p in params_of(optimizer)])
        np.testing.assert_array_equal(data.grad_norm, twin.grad_norm)
        assert data.skipped_steps == twin.skipped_steps == (step >= 2)
        for p, expected in zip(params_of(optimizer), params, strict=True):
            assert same_bits(as_array(p), expected)
        norm = np.array([data.grad_norm])
        assert_equal_on_all(context, [norm])
    assert_equal_on_all(context, params_of(optimizer))


@check(cases=KINDS)
def momentum_that_some_ranks_lack(context: Context, kind: str) -> None:
    optimizer = make(kind)
    local = LocalSGD(optimizer, sync_every=2, momentum_sync="average")
    for step in range(2):
        put_gradients(optimizer, np.random.default_rng([context.rank, step]))
        for i, p in enumerate(params_of(optimizer)):
            if i == 4 or (i == 2 and context.rank > 0):
                p.grad = None
        local.step()
    present = [m is not None for m in momenta_of(optimizer)]
    assert present == [True, True, True, True, False]
    assert_equal_on_all(context, momenta_of(optimizer)[:4])
    assert_equal_on_all(context, params_of(optimizer))


@check()
def uneven_shards(context: Context) -> None:
    """Ranks with less data take part until the last one is done; none hangs."""
    for options in (
        {"sync_every": 4},
        {"sync_every": 4, "outer": OuterSGD(0.7, 0.9)},
        {"sync_every": Stagewise({0: 1, 3: 4}), "momentum_sync": "average"},
        {"sync_every": Stagewise({0: 2, 6: 5})},
        {"sync_every": 6, "levels": "pairs"},
    ):
        if options.get("levels"):
            pairs = [context.split([i, i + 1]) for i in range(0, context.size, 2)]
            mine = next(pair for pair in pairs if pair is not None)
            options = {**options, "levels": [(mine, 2)]}
        optimizer = make("numpy flat")
        with LocalSGD(optimizer, **options) as local:
            train(context, local, 9 + 7 * context.rank)
        assert_equal_on_all(context, params_of(optimizer))
        assert len(set(on_all(context, local.round))) == 1
        assert len(set(on_all(context, local._round.steps))) == 1


@check()
def equal_shards_end_without_extra_rounds(context: Context) -> None:
    optimizer = make("numpy flat")
    with LocalSGD(optimizer, sync_every=4) as local:
        train(context, local, 8)
        before = values_of(optimizer)
    assert all(same_bits(a, b) for a, b in zip(params_of(optimizer), before, strict=True))
    assert (local._round.steps, local.round) == (8, 2)


@check()
def sync_ends_a_round(context: Context) -> None:
    optimizer = make("numpy flat")
    local = LocalSGD(optimizer, sync_every=100)
    train(context, local, 3)
    local.sync()
    assert_equal_on_all(context, params_of(optimizer))
    before = values_of(optimizer)
    local.sync()
    assert all(same_bits(a, b) for a, b in zip(params_of(optimizer), before, strict=True))
    assert local.round == 1


class Recording:
    """A schedule of one method."""

    def __init__(self, first: int = 1) -> None:
        self.first, self.seen = first, list[Progress]()

    def period(self, progress: Progress) -> int:
        self.seen.append(progress)
        return self.first + progress.round


@check()
def schedules(context: Context) -> None:
    """The number of rounds, and what a schedule is told: the same on all ranks."""
    for schedule, steps, rounds in (
        (3, 12, 4),
        (Stagewise({0: 1, 2: 5}), 12, 4),
    ):
        local = LocalSGD(make("numpy flat"), sync_every=schedule)
        train(context, local, steps)
        assert local.round == rounds, schedule
    recording = Recording()
    local = LocalSGD(make("numpy flat"), sync_every=recording)
    train(context, local, 6)
    seen = [(p.step, p.round, p.period, p.lr) for p in recording.seen]
    assert seen == [(0, 0, 0, 0.1), (1, 1, 1, 0.1), (3, 2, 2, 0.1)]


@check()
def fewer_reductions(context: Context) -> None:
    counts = []
    for every in (1, 16):
        group = Counting(context.group)
        local = LocalSGD(make("numpy flat"), group, sync_every=every)
        group.reductions = group.elements = 0
        train(context, local, 32)
        counts.append((group.reductions, group.elements))
    assert counts[0] == (16 * counts[1][0], 16 * counts[1][1])


@check(["gloo-4", "mpi-4"])
def levels(context: Context) -> None:
    """Often within a pair, rarely across."""
    pairs = [context.split([0, 1]), context.split([2, 3])]
    pair = next(each for each in pairs if each is not None)
    group, inner = Counting(context.group), Counting(pair)
    optimizer = make("numpy flat")
    local = LocalSGD(optimizer, group, sync_every=6, levels=[(inner, 2)])
    group.reductions = inner.reductions = 0
    for step in range(6):
        train(context, local, 1, first=step)
        digests = on_all(context, digest(params_of(optimizer)))
        within = digests[0] == digests[1] and digests[2] == digests[3]
        assert within == (step in (1, 3, 5)), step
        assert (len(set(digests)) == 1) == (step == 5), step
    assert inner.reductions == 2 * group.reductions > 0

    # Where two levels are due, the wider one alone.
    wide = Counting(context.group)
    local = LocalSGD(make("numpy flat"), group, sync_every=100, levels=[(inner, 2), (wide, 4)])
    inner.reductions = wide.reductions = 0
    for step in range(4):
        train(context, local, 1, first=step)
        digests = on_all(context, digest(params_of(local)))
        assert (digests[0] == digests[1]) == (step in (1, 3)), step
        assert (len(set(digests)) == 1) == (step == 3), step
    assert inner.reductions == wide.reductions > 0


@check()
def different_starts_are_evened_out(context: Context) -> None:
    for cls in (LocalSGD, DataParallel):
        optimizer = make("numpy separate", seed=context.rank)
        cls(optimizer)
        first = values_of(make("numpy separate", seed=0))
        assert all(same_bits(a, b) for a, b in zip(params_of(optimizer), first, strict=True))


@check()
def ranks_that_disagree_are_refused(context: Context) -> None:
    odd = context.rank == 1
    for cls in (LocalSGD, DataParallel):
        shape = (3, 2) if odd else (2, 3)
        optimizer = sgdcore.SGD([np.full(shape, context.rank, np.float32)], lr=0.1)
        match = (
            r"parameters: expected the same on all ranks, got on rank 0: number 0, .* of shape \(2, 3\).*; "
            r"on rank 1: number 0, .* of shape \(3, 2\)"
        )
        with refused(context, ValueError, match, *params_of(optimizer)):
            cls(optimizer)
        params = [np.full(2, context.rank, np.float32) for _ in range(2)]
        groups = [{"params": [p]} for p in params] if odd else [{"params": params}]
        with refused(context, ValueError, "parameters: expected the same on all ranks", *params):
            cls(sgdcore.SGD(groups, lr=0.1))
    optimizer = make("numpy flat", seed=context.rank)
    match = "optimizer: expected the same on all ranks, got on rank 0: .*; on rank 1: "
    with refused(context, ValueError, match, *params_of(optimizer)):
        (LocalSGD if odd else DataParallel)(optimizer)
    options: dict[Any, dict[str, Any]] = {
        LocalSGD: {
            "sync_every": (4, 5),
            "momentum_sync": ("keep", "reset"),
            "outer": (None, SlowMo(0.5)),
            "levels": (None, [(context.group, 2)]),
            "wire_dtype": (None, "float32"),
            "transactional": (False, True),
        },
    }
    for cls, each in options.items():
        for name, (one, other) in each.items():
            optimizer = make("numpy flat", seed=context.rank)
            match = f"{name}: expected the same on all ranks, got on rank 0: .*; on rank "
            with refused(context, ValueError, match, *params_of(optimizer)):
                cls(optimizer, **{name: other if odd else one})


RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "outer": {"outer": OuterSGD(0.7, 0.9, nesterov=True), "momentum_sync": "average"},
    "slowmo": {"outer": SlowMo(0.5)},
    "transactional": {"transactional": True, "momentum_sync": "reset"},
    "schedule": {"sync_every": Stagewise({0: 3, 10: 4})},
    "recorded": {"sync_every": Recording(2)},
    "wire": {"wire_dtype": "bfloat16"},
}


@check(cases=KINDS)
def resuming(context: Context, kind: str) -> None:
    """From a checkpoint in the middle of a round: the same bits as without a stop."""
    for name, options in RESUMED.items():
        if "wire_dtype" in options and context.engine == "mpi":
            continue

        def build(seed: int = 0, options: dict[str, Any] = options) -> LocalSGD:
            return LocalSGD(make(kind, seed=seed), **{"sync_every": 4, **copy.deepcopy(options)})

        unbroken, first = build(), build()
        train(context, unbroken, 19)
        train(context, first, 10)
        values, state = values_of(first), copy.deepcopy(first.state_dict())
        train(context, first, 1)  # what is saved is not touched any more
        second, third = build(seed=5), build(seed=6)
        for resumed in (second, third):
            for p, value in zip(params_of(resumed), values, strict=True):
                _assign(p, value)
            resumed.load_state_dict(state)
        train(context, second, 9, first=10)
        for ours, theirs in zip(params_of(second), params_of(unbroken), strict=True):
            assert same_bits(ours, theirs), name
        for ours, theirs in zip(momenta_of(second), momenta_of(unbroken), strict=True):
            assert same_bits(ours, theirs), name
        assert vars(second._round) == vars(unbroken._round)
        if name == "recorded":
            seen = second._options.sync_every.seen
            assert seen
            assert seen == unbroken._options.sync_every.seen[-len(seen) :]
        third.sync()  # ends the round that was begun
        assert_equal_on_all(context, params_of(third))
        if name == "recorded":  # and at the start of one, when the schedule is asked
            fourth = build()
            fourth.load_state_dict(third.state_dict())
            for resumed in (third, fourth):
                train(context, resumed, 1)
            assert fourth._options.sync_every.seen == third._options.sync_every.seen[-1:]


def _assign(p: Any, value: Any) -> None:
    if isinstance(p, sgdcore.Parameter):
        p.data[...] = value
    else:
        import torch

        p.data.copy_(torch.from_numpy(value))


@check()
def checkpoints_that_do_not_fit(context: Context) -> None:
    plain, outer = LocalSGD(make("numpy flat")), LocalSGD(make("numpy flat"), outer=SlowMo(0.5))
    train(context, plain, 3)
    with refused(context, ValueError, "saved with other options and lacks", *params_of(outer)):
        outer.load_state_dict(plain.state_dict())
    train(context, outer, 3)
    state = outer.state_dict()
    state["state"][1]["local_sgd.anchor"] = np.zeros(3, np.float32)
    match = r"state_dict\['state'\]\[1\]\['local_sgd.anchor'\]: expected shape \(5,\)"
    with refused(context, ValueError, match, *params_of(outer)):
        outer.load_state_dict(state)
    # A plain optimizer's begins a new round.
    outer.load_state_dict(make("numpy flat").state_dict())
    assert (outer.step_in_round, outer._anchor.valid) == (0, False)


# Data parallel


@check(cases=KINDS)
def data_parallel_mean(context: Context, kind: str) -> None:
    """One step equals a step with the mean; weights count examples; where there is no gradient, there is zero."""
    for weighted in (False, True):
        optimizer, reference = make(kind), make(kind)
        data = DataParallel(optimizer)
        weights = [1.0 + r if weighted else 1.0 for r in range(context.size)]
        data.weight = weights[context.rank]
        for step in range(4):
            means: list[Any] = []
            for rank in range(context.size):
                put_gradients(reference, np.random.default_rng([rank, step]))
                for i, p in enumerate(params_of(reference)):
                    share = as_array(p.grad).astype(np.float64) * weights[rank] / sum(weights)
                    if i == 3 and rank == 0:
                        share *= 0
                    if rank == 0:
                        means.append(share)
                    else:
                        means[i] += share
            put_gradients(optimizer, np.random.default_rng([context.rank, step]))
            params = params_of(optimizer)
            params[1].grad = params_of(reference)[1].grad = None
            if context.rank == 0:
                params[3].grad = None
            data.step()
            assert params[1].grad is None
            for i, p in enumerate(params_of(reference)):
                if i != 1:
                    put_gradient(p, means[i].astype(np.float32))
                    close(params[i].grad, as_array(p.grad), 8)
            reference.step()
        for ours, theirs in zip(params, params_of(reference), strict=True):
            close(ours, as_array(theirs), 64)
        assert momenta_of(optimizer)[1] is None
        assert_equal_on_all(context, params)


@check()
def data_parallel_grads_argument(context: Context) -> None:
    arrays = [np.zeros((3, 2), np.float32), np.zeros(4, np.float32)]
    data = DataParallel(sgdcore.SGD(arrays, lr=1.0))
    frozen = np.full((3, 2), float(context.rank), np.float32)
    frozen.flags.writeable = False
    own = np.full(4, 2.0 * context.rank, np.float32) if context.rank else None
    data.step(grads=[frozen, own])
    mean = (context.size - 1) / 2
    assert np.all(arrays[0] == -mean)
    assert np.all(arrays[1] == -2 * mean)
    with refused(
        context, RoundError, "grads: expected 2 gradients, one for each parameter, got 1", *arrays
    ):
        data.step(grads=[own])


@check(cases=KINDS)
def data_parallel_weight_of_zero(context: Context, kind: str) -> None:
    """Counts for nothing, even where gradients are NaN, and is not the end of a rank; but not on all ranks."""
    optimizer, single = make(kind), make(kind)
    data = DataParallel(optimizer)
    last = context.size - 1
    if context.rank != 0:
        data.finish()
    else:
        for weight, value in ((2.0, 1.0), (5.0, 3.0)):
            data.weight = weight
            for p in params_of(optimizer):
                put_gradient(p, np.full(p.shape, value, np.float32))
            data.step()
        data.finish()
    for value in (1.0, 3.0):
        for p in params_of(single):
            put_gradient(p, np.full(p.shape, value, np.float32))
        single.step()
    for step, value in enumerate((np.nan, 2.0)):
        data.weight = float(context.rank == last) if step == 0 else 1.0
        for p in params_of(optimizer):
            put_gradient(p, np.full(p.shape, value if context.rank != last else 2.0, np.float32))
        data.step()
        for p in params_of(single):
            put_gradient(p, np.full(p.shape, 2.0, np.float32))
        single.step()
    for a, b in zip(params_of(optimizer), params_of(single), strict=True):
        close(a, b)
    data.weight = 0
    with refused(
        context,
        RoundError,
        "weight: expected more than 0 on some rank",
        *params_of(optimizer),
    ):
        data.step()


@check()
def data_parallel_a_rank_of_weight_zero_goes_on(context: Context) -> None:
    """It is not done: the others' `finish` neither ends nor divides by its weight, and waits for its next step."""
    optimizer = make("numpy flat")
    data = DataParallel(optimizer)
    train(context, data, 1)
    if context.rank == 0:
        data.weight = 0
        with refused(
            context, RoundError, "weight: expected more than 0 on some rank", *params_of(optimizer)
        ):
            train(context, data, 1, first=1)
        data.weight = 1
        train(context, data, 2, first=1)
    else:
        with refused(
            context, RoundError, "weight: expected more than 0 on some rank", *params_of(optimizer)
        ):
            data.finish()
    data.finish()
    assert on_all(context, data._steps) == [3] * context.size
    assert_equal_on_all(context, params_of(optimizer))


@check()
def data_parallel_uneven_shards(context: Context) -> None:
    optimizer = make("numpy flat")
    with DataParallel(optimizer) as data:
        for step in range(5 + 3 * context.rank):
            optimizer.param_groups[0]["lr"] = 0.1 / (
                step + 1
            )  # as a scheduler, which stops with the data
            train(context, data, 1, first=step)
    assert_equal_on_all(context, params_of(optimizer))
    assert_equal_on_all(context, momenta_of(optimizer))
    assert on_all(context, data._steps) == [float(5 + 3 * (context.size - 1))] * context.size


@check()
def data_parallel_average_before_the_step(context: Context) -> None:
    """The step does not do it again, unless other ranks are there by then."""
    optimizer = make("numpy flat")
    group = Counting(context.group)
    data = DataParallel(optimizer, group)
    for rebound in (False, True):
        put_gradients(optimizer, np.random.default_rng(context.rank))
        data.average_gradients()
        gradients = [p.grad for p in params_of(optimizer)]
        assert_equal_on_all(context, gradients)
        before = [g.copy() for g in gradients]
        data.average_gradients()  # of means, which they stay
        group.reductions = 0
        if rebound:
            data.rebind(group)
            put_gradients(optimizer, np.random.default_rng(context.rank))
        data.step()
        assert (group.reductions > 0) == rebound
        assert rebound or all(same_bits(a, b) for a, b in zip(gradients, before, strict=True))
        put_gradients(optimizer, np.random.default_rng(context.rank))
        data.step()  # averages again
        assert_equal_on_all(context, params_of(optimizer))


@check()
def data_parallel_skipped_steps(context: Context) -> None:
    """The means of a step that was skipped do not stand for the gradients that follow."""
    for cleared in (False, True):
        optimizer = make("numpy flat")
        data = DataParallel(optimizer)
        for _ in range(2):
            if cleared:
                data.zero_grad()
            put_gradients(optimizer, np.random.default_rng(context.rank))
            data.average_gradients()
        assert_equal_on_all(context, [p.grad for p in params_of(optimizer)])
        data.zero_grad()
        put_gradients(optimizer, np.random.default_rng(context.rank))
        data.step()
        assert_equal_on_all(context, params_of(optimizer))


@check()
def data_parallel_starts_from_one_state(context: Context) -> None:
    """Where an optimizer has state already, that of the first rank; else ranks would differ after a step."""
    for first in (True, False):
        optimizer = make("numpy separate")
        optimizer.param_groups[0]["lr"] = 0.1 + context.rank
        if first or context.rank > 0:
            train(context, optimizer, 2)
        data = DataParallel(optimizer)
        assert data.param_groups[0]["lr"] == 0.1
        train(context, data, 2)
        assert_equal_on_all(context, params_of(optimizer))
        assert_equal_on_all(context, momenta_of(optimizer))


@check()
def data_parallel_refuses_gradients_of_another_shape(context: Context) -> None:
    arrays = [np.zeros((3, 2), np.float32)]
    data = DataParallel(sgdcore.SGD(arrays, lr=1.0))
    match = r"the gradient of .*\[0\]: expected shape \(3, 2\), got \(2, 3\)"
    with refused(context, RoundError, match, *arrays):
        data.step(grads=[np.ones((2, 3), np.float32)])


@check()
def bad_gradients_of_one_rank_are_told_to_all(context: Context) -> None:
    """In the same step, which none takes; then all go on."""
    arrays = [np.zeros((3, 2)), np.zeros(4)]
    data = DataParallel(sgdcore.SGD(arrays, lr=1.0))
    bad: dict[str, Any] = {
        r"grads: expected 2 gradients, one for each parameter, got 1": lambda good: good[:1],
        r"\['params'\]\[1\]: expected shape \(4,\), got \(2, 2\)": lambda good: [
            good[0],
            good[1].reshape(2, 2),
        ],
    }
    for step, (match, spoil) in enumerate(bad.items()):
        good = [np.full(array.shape, 1.0 + context.rank) for array in arrays]
        with told(context, ValueError, match, *arrays):
            data.step(grads=spoil(good) if context.rank == 1 else good)
        data.step(grads=[np.full(array.shape, 1.0 + context.rank) for array in arrays])
        for array in arrays:
            assert np.all(array == -(step + 1) * (context.size + 1) / 2)
    # A rank that has ended hears of it, too, and may stay.
    good = [np.ones(array.shape) for array in arrays]
    with told(context, ValueError, "grads: expected 2 gradients", *arrays):
        data.finish() if context.rank == 0 else data.step(grads=good[context.rank == 1 :])
    if context.rank > 0:
        data.step(grads=good)
    data.finish()
    assert data._steps == 3
    assert_equal_on_all(context, arrays)


@check()
def settings_that_cannot_be_sent_are_refused(context: Context) -> None:
    """On all ranks, by name, before a parameter is sent."""
    for place in ("group", "state"):
        optimizer = make("numpy separate", seed=context.rank)
        if context.rank == 0:
            parameter = params_of(optimizer)[2]
            where = optimizer.param_groups[0] if place == "group" else optimizer.state[parameter]
            where["hook"] = lambda: None
        match = "rank 0 failed with .*lambda"
        with refused(context, RuntimeError, match, *params_of(optimizer)):
            DataParallel(optimizer)


@check()
def buffers_travel_without_copies(context: Context) -> None:
    """A flat buffer goes over the wire where it is, in even slices; so do its gradients and its momentum."""
    buffer = sgdcore.ParameterBuffer({f"p{i}": (700_000,) for i in range(4)})
    group = Counting(context.group)
    local = LocalSGD(
        sgdcore.SGD(buffer, lr=0.1, momentum=0.9), group, sync_every=1, momentum_sync="average"
    )
    group.arrays.clear()
    buffer.grad[:] = context.rank
    local.step()
    large = [(a, n) for a, n in group.arrays if n > 100]
    momentum = momenta_of(local)[0]
    starts = buffer.data.ctypes.data, momentum.ctypes.data
    assert sum(n for _, n in large) == 2 * buffer.size
    assert [a for a, _ in large] == [s for s in starts for _ in (0,)]
    data = DataParallel(sgdcore.SGD(buffer, lr=0.1), group)
    group.arrays.clear()
    buffer.grad[:], data.weight = context.rank, context.rank + 1
    with chunks_of(4 << 20):
        data.step()
    large = [(a, n) for a, n in group.arrays if n > 100]
    assert [n for _, n in large] == [933334, 933334, 933332]
    assert large[0][0] == buffer.grad.ctypes.data
    weights = np.arange(context.size) + 1
    assert (buffer.grad == np.float32(((weights - 1) * weights).sum() / weights.sum())).all()


@check()
def nothing_is_left_unreduced(context: Context) -> None:
    """Whatever the sizes, in whatever slices."""
    rng = np.random.default_rng(3)
    sizes = [1, 2, 3, 1000, 0, 7, 4096, 5, 4097, 1, 12345]
    for chunk_bytes in (8, 64, 16384, 1 << 24):
        arrays = [rng.standard_normal(n).astype(np.float32) for n in sizes]
        if chunk_bytes <= 64:
            arrays = [array[:9].copy() for array in arrays]
        data = DataParallel(sgdcore.SGD(arrays, lr=1.0))
        params = params_of(data)
        before = values_of(data)
        with chunks_of(chunk_bytes):
            data.step(grads=[np.full(p.shape, context.rank + 1.0, np.float32) for p in params])
        for p, value in zip(params, before, strict=True):
            assert same_bits(p, value - np.float32((context.size + 1) / 2))


@check()
def sixteen_bit_parameters(context: Context) -> None:
    """Averaged in float32, and rounded once."""
    for dtype in ("float16", "bfloat16"):
        dtype = sgdcore._arrays.storage_dtype(dtype)
        start = np.random.default_rng(0).standard_normal(50).astype(dtype)
        array = start.copy()
        local = LocalSGD(sgdcore.SGD([array], lr=1.0), sync_every=1)
        gradients = np.random.default_rng(1).standard_normal((context.size, 50)).astype(dtype)
        local.step(grads=[gradients[context.rank]])
        locals_ = (start.astype(np.float32) - gradients.astype(np.float32)).astype(dtype)
        total = locals_.astype(np.float64).sum(0)
        assert same_bits(array, (total / context.size).astype(np.float32).astype(dtype))


@check()
def results_to_compare(context: Context) -> None:
    """Saved, for the test that compares the engines."""
    results = {}
    for name, options in {"plain": {}, "outer": {"outer": OuterSGD(0.7, 0.9)}}.items():
        optimizer = make("numpy flat")
        train(context, LocalSGD(optimizer, sync_every=4, **options), 20)
        results[name] = params_of(optimizer)[0].buffer.data
    optimizer = make("numpy flat")
    train(context, DataParallel(optimizer), 20)
    results["data parallel"] = params_of(optimizer)[0].buffer.data
    if context.rank == 0:
        np.savez(context.folder / f"{context.engine}-{context.size}.npz", **results)


INTERRUPTS: dict[str, dict[str, Any]] = {
    "a round": {"wrap": partial(LocalSGD, sync_every=1), "where": (_flat, "count_change")},
    "a step": {"wrap": DataParallel, "where": (_flat, "count_change")},
}


@check(GLOO, cases=INTERRUPTS)
def nobody_waits_for_a_rank_that_was_interrupted(
    context: Context, wrap: Any, where: tuple[Any, str]
) -> None:
    """Nor goes on with other parameters than it has: all ranks get an error, in this round or in the next."""
    import torch.distributed as dist

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    optimizer = wrap(make("numpy flat"), as_process_group(dist.new_group()))
    start = time.perf_counter()
    if context.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(context, optimizer, 1)
    with pytest.raises(RuntimeError):
        train(context, optimizer, 2)
    on_all(context, 0)
    assert time.perf_counter() - start < 20


@check()
def a_failure_is_forgotten_with_its_error(context: Context) -> None:
    """No cycle of references keeps what was under way until a garbage collection."""
    optimizer = DataParallel(make("numpy separate"))
    grads = [np.zeros(as_array(p).shape, np.float32) for p in params_of(optimizer)]
    if context.rank == 1:
        grads[0] = np.zeros(3, np.float32)
    gc.disable()
    try:
        with pytest.raises(RoundError) as caught:
            optimizer.step(grads=grads)
        if context.rank != 1:
            error = weakref.ref(caught.value)
            del caught
            assert error() is None
    finally:
        gc.enable()


@check()
def going_on_with_other_ranks(context: Context) -> None:
    """Some leave, the rest goes on; they come back as new ranks and get what the others have."""
    stay = list(range(1, context.size))
    for options in (
        {},
        {"transactional": True},
        {"outer": SlowMo(0.5), "momentum_sync": "average"},
    ):
        optimizer = make("numpy flat")
        local = LocalSGD(optimizer, sync_every=4, **options)
        train(context, local, 10)
        local.sync()
        smaller = context.split(stay)
        if smaller is None:
            optimizer = make("numpy flat", seed=77)  # a new process
            local = LocalSGD(optimizer, sync_every=4, **options)
        else:
            local.rebind(smaller)
            train(context, local, 6, first=10)
            assert local.round == 4
            local.rebind(context.group)
        assert_equal_on_all(context, params_of(optimizer))
        # With `transactional` back at the end of the round.
        assert set(on_all(context, local._round.steps)) == {
            14.0 if options.get("transactional") else 16.0
        }
        train(context, local, 4, first=20)
        assert_equal_on_all(context, params_of(optimizer))
    data = DataParallel(make("numpy flat"))
    train(context, data, 3)
    smaller = context.split(stay)
    if smaller is None:
        data = DataParallel(make("numpy flat", seed=77))
    else:
        data.rebind(smaller)
        train(context, data, 3, first=3)
        data.rebind(context.group)
    train(context, data, 2, first=6)
    assert data._steps == 8
    assert_equal_on_all(context, params_of(data))
    assert_equal_on_all(context, momenta_of(data))


@check(
    cases={
        "plain": {},
        "transactional": {"transactional": True},
        "wire_dtype": {"wire_dtype": "float32"},
    }
)
def ranks_that_trained_apart(context: Context, **options: Any) -> None:
    """After as many rounds, but each by itself: equal once they are together, and from then on as any others."""
    alone = [context.split([rank]) for rank in range(context.size)][context.rank]
    optimizer, plain = make("numpy flat", "float64"), make("numpy flat", "float64")
    local = LocalSGD(optimizer, alone, sync_every=2, **options)
    train(context, local, 2)
    assert len(set(on_all(context, digest(params_of(optimizer))))) == context.size
    local.rebind(context.group)
    assert_equal_on_all(context, params_of(optimizer))
    reference = LocalSGD(plain, context.group, sync_every=2)
    for ours, theirs in zip(params_of(optimizer), params_of(plain), strict=True):
        theirs.data[...] = ours.data
    plain.load_state_dict(optimizer.state_dict())
    for each in (local, reference):
        train(context, each, 2)
    assert_equal_on_all(context, params_of(optimizer))
    for ours, theirs in zip(params_of(optimizer), params_of(plain), strict=True):
        np.testing.assert_allclose(ours.data, theirs.data, atol=1e-6)


@check()
def rebinding_averages_the_steps_since(context: Context) -> None:
    rebound, synced = (LocalSGD(make("numpy flat"), sync_every=4) for _ in range(2))
    for local in (rebound, synced):
        train(context, local, 5)
    rebound.rebind(context.group)
    synced.sync()
    for a, b in zip(params_of(rebound), params_of(synced), strict=True):
        assert same_bits(a, b)


@check()
def momentum_that_was_loaded_is_averaged(context: Context) -> None:
    """In its new memory."""
    optimizer = make("numpy flat")
    local = LocalSGD(optimizer, sync_every=2, momentum_sync="average")
    train(context, local, 3)
    local.load_state_dict(copy.deepcopy(local.state_dict()))
    train(context, local, 1, first=3)
    assert_equal_on_all(context, momenta_of(optimizer))


@check()
def momentum_of_several_dtypes(context: Context) -> None:
    """Parameters side by side in memory, in groups whose momentum is not; each is averaged in its own dtype."""
    buffer = sgdcore.ParameterBuffer({"a": (3,), "b": (4,)})
    groups = [
        {"params": [buffer["a"]], "momentum_dtype": "float32"},
        {"params": [buffer["b"]], "momentum_dtype": "float64"},
    ]
    local = LocalSGD(sgdcore.SGD(groups, lr=0.1, momentum=0.9), momentum_sync="average")
    buffer.grad[:] = np.float32(0.1) * (context.rank + 1)
    train(context, local, 3)
    mean = momenta_of(local)[1].copy()
    assert mean.dtype == np.float64
    context.group.all_reduce(mean).wait()
    local.sync()
    close(momenta_of(local)[1], mean / context.size, 4)


@check()
def momentum_loaded_in_another_dtype(context: Context) -> None:
    """On one rank alone, which copies what the others send from where it is; all choose the same way, and mean."""
    value = 1.0 + context.rank
    expected = np.float32((context.size + 1) / 2)
    parameter = sgdcore.Parameter(np.ones(1000, np.float32))
    optimizer = sgdcore.SGD([parameter], lr=0.0, momentum=0.9)
    optimizer.step(grads=[np.full(1000, value, np.float32)])
    if context.rank == 1:
        state = optimizer.state_dict()
        momentum = state["state"][0]["momentum_buffer"].astype(np.float64)
        state["state"][0]["momentum_buffer"] = momentum
        optimizer.load_state_dict(state)
    local = LocalSGD(optimizer, sync_every=1, momentum_sync="average")
    local.step(grads=[np.full(1000, 0.1 * value, np.float32)])  # b = 0.9 b + g
    [mean] = momenta_of(local)
    assert mean.dtype == (np.float64 if context.rank == 1 else np.float32)
    close(mean, np.full(1000, expected), 4)


class Failing(Counting):
    """A group whose rank 1 hears of a failure at the end of its last operation, as a dying peer may leave it."""

    armed = False
    error: BaseException = ConnectionError("the peer is gone")

    def all_reduce(self, array: Any) -> Any:
        work = super().all_reduce(array)
        if not (self.armed and self.rank == 1 and "float" in str(array.dtype)):
            return work

        error = self.error

        class Broken:
            def wait(self) -> None:
                work.wait()
                raise error

        return Broken()


@check()
def an_interrupt_within_a_round(context: Context) -> None:
    """Ctrl-C goes through, and the parameters count as lost: what is under way still writes to them."""
    group = Failing(context.group)
    group.error = KeyboardInterrupt()
    local = LocalSGD(make("numpy flat"), group, sync_every=2)
    train(context, local, 1)
    group.armed = True
    if context.rank == 1:
        with pytest.raises(KeyboardInterrupt):
            train(context, local, 1)
        with pytest.raises(RuntimeError, match="a round failed, or was interrupted, and left"):
            local.step()
    else:
        train(context, local, 1)


@check()
def ranks_that_completed_a_round_lead(context: Context) -> None:
    """One rank failed in a round that the others completed: after rebind it is where they are."""
    for options in (
        {"transactional": True},
        {"transactional": True, "outer": SlowMo(0.5), "momentum_sync": "average"},
        {"transactional": False},
    ):
        group = Failing(context.group)
        optimizer = make("numpy flat")
        local = LocalSGD(optimizer, group, sync_every=2, **options)
        train(context, local, 2)
        end = values_of(optimizer)
        group.armed = True
        if context.rank == 1:
            outcome = (
                "are those of the end of round 1"
                if options["transactional"]
                else "are left in the middle"
            )
            with pytest.raises(RoundError, match=f"round 2 .* rank 1 .* parameters .*{outcome}"):
                train(context, local, 2, first=2)
            if options["transactional"]:
                assert all(same_bits(a, b) for a, b in zip(params_of(optimizer), end, strict=True))
            else:
                for call in (local.step, local.sync, local.finish):
                    with pytest.raises(
                        RuntimeError, match="a round failed, or was interrupted, and left"
                    ):
                        call()
        else:
            with pytest.MonkeyPatch.context() as patch:
                # Rank 1 does not get to the momentum.
                patch.setattr(local._parameters, "average_state", lambda *_: None)
                train(context, local, 2, first=2)
            assert local.round == 2
        group.armed = False
        local.rebind(group)
        assert local.round == 2
        assert local.step_in_round == 0
        assert_equal_on_all(context, params_of(optimizer))
        if options.get("momentum_sync") == "average":
            assert_equal_on_all(context, momenta_of(optimizer))
        train(context, local, 2, first=4)
        assert_equal_on_all(context, params_of(optimizer))


@check()
def long_rounds_end_at_once(context: Context) -> None:
    optimizer = make("numpy flat")
    with LocalSGD(optimizer, sync_every=10**12, transactional=True) as local:
        train(context, local, 3 + context.rank)
    assert_equal_on_all(context, params_of(optimizer))
    assert local.round == 1


@check()
def a_failure_before_the_first_step_changes_nothing(context: Context) -> None:
    class Gone(Counting):
        def all_reduce(self, array: Any) -> Any:
            raise ConnectionError("all are gone")

    optimizer = make("numpy flat")
    local = LocalSGD(optimizer, transactional=True)
    local.group = Gone(context.group)
    with refused(context, RoundError, "round 1 .* all are gone", *params_of(optimizer)):
        local.sync()


@check()
def groups_without_parameters(context: Context) -> None:
    """The first one may have none yet."""
    for outer in (None, OuterSGD(0.7, 0.9), SlowMo(0.5)):
        params = params_of(make("numpy separate"))
        optimizer = sgdcore.SGD([{"params": []}, {"params": params}], **HYPER)
        other = make("numpy separate")
        train(context, LocalSGD(optimizer, sync_every=2, outer=outer), 4)
        train(context, LocalSGD(other, sync_every=2, outer=outer), 4)
        for a, b in zip(params, params_of(other), strict=True):
            assert same_bits(a, b)


@check()
def steps_are_counted_alike(context: Context) -> None:
    """After a round that some ranks ended early, schedules choose the same period on all ranks."""
    local = LocalSGD(make("numpy flat"), sync_every=Stagewise({0: 1, 1: 100}))
    train(context, local, 1)
    train(context, local, 4 * context.rank)
    local.sync()
    assert on_all(context, local._round.steps) == [4 * context.size - 3] * context.size
    assert on_all(context, local._round.last_period) == [4 * (context.size - 1)] * context.size


@check(
    GLOO,
    cases={
        "outer": {"options": {"outer": OuterSGD(1.0, 0.5)}},
        "wire_dtype": {"options": {"wire_dtype": "bfloat16"}},
        "transactional": {"options": {"transactional": True}},
    },
)
def a_round_without_a_step_here(context: Context, options: dict[str, Any]) -> None:
    """A rank that has not stepped since all were equal averages from there, too."""
    optimizer, plain = make("numpy flat"), make("numpy flat")
    local = LocalSGD(optimizer, sync_every=100, **options)
    for anchor in local._anchor.values:  # memory's contents before it is used
        anchor[...] = np.nan
    reference = LocalSGD(plain, sync_every=100)
    if context.rank == 0:
        for each in (local, reference):
            train(context, each, 1)
    local.sync()
    reference.sync()
    for a, b in zip(params_of(optimizer), params_of(plain), strict=True):
        close(a, b, 64 if "wire_dtype" not in options else 1 << 16)
    assert_equal_on_all(context, params_of(optimizer))


@check(cases={"no step here": {"steps": 0}, "first round": {"steps": 1}})
def a_failed_first_round(context: Context, steps: int) -> None:
    """With `transactional` a rank that was written to is back where it began, also if it has not stepped."""
    group = Failing(context.group)
    optimizer = make("numpy flat")
    start = values_of(optimizer)
    local = LocalSGD(optimizer, group, sync_every=100, transactional=True)
    if context.rank == 0 or steps:
        train(context, local, 1)
    group.armed = True
    if context.rank == 1:
        with pytest.raises(RoundError, match="are those of the end of round 0"):
            local.sync()
        assert all(same_bits(a, b) for a, b in zip(params_of(optimizer), start, strict=True))
        assert all(momentum is None for momentum in momenta_of(optimizer))
        assert (local._round.steps, local.step_in_round) == (0, 0)
    else:
        local.sync()


# What ranks tell each other before they average


@check()
def wrappers_called_in_another_order(context: Context) -> None:
    """All ranks hear which wrapper each calls, whatever the sizes and the timing; then all go on."""
    local = partial(LocalSGD, sync_every=1)
    for wrap in (DataParallel, local, partial(local, wire_dtype="float32")):
        first: Any = wrap(sgdcore.SGD([np.zeros(3)], lr=1.0))
        second: Any = wrap(sgdcore.SGD([np.zeros(5), np.zeros(2)], lr=1.0))
        pair = [first, second] if context.rank == 0 else [second, first]
        name = type(first).__name__
        match = f"on rank 0: .*{name} number .*; on rank 1: .*{name} number "
        for optimizer in pair:
            for p in params_of(optimizer):
                p.grad = np.ones(p.shape)
            with pytest.raises(RoundError, match=match):
                optimizer.step()
        for optimizer in (first, second):
            optimizer.zero_grad()
            optimizer.rebind(context.group)
            train(context, optimizer, 1)
            assert_equal_on_all(context, params_of(optimizer))
        # Another kind of call.
        call = first.finish
        if context.rank == 0:
            call = partial(first.rebind, context.group)
        with pytest.raises(RoundError, match=r"ranks call different things: .* on rank 0: "):
            call()


@check()
def names_of_parameters_are_compared(context: Context) -> None:
    """Parameters of one shape in another order would be averaged with each other."""
    order = ["query", "key"] if context.rank == 0 else ["key", "query"]
    for cls in (LocalSGD, DataParallel):
        params = [sgdcore.Parameter(np.full(2, float(context.rank)), name=n) for n in order]
        match = "on rank 0: number 0, parameter 'query', .*; on rank 1: number 0, parameter 'key', "
        with refused(context, ValueError, match, *params):
            cls(sgdcore.SGD(params, lr=0.1))


@check()
def learning_rates_of_an_outer_step_are_compared(context: Context) -> None:
    """A scheduler stepped by each rank's own metrics: the outer step would leave ranks different."""
    optimizer = make("numpy flat")
    local = LocalSGD(optimizer, sync_every=2, outer=SlowMo(0.5), transactional=True)
    train(context, local, 4)
    before = values_of(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1 / (1 + context.rank)
    match = r"learning rates .* on rank 0: \[0.1\]; on rank 1: \[0.05\]"
    with pytest.raises(RoundError, match=match):
        train(context, local, 2, first=4)
    assert all(same_bits(a, b) for a, b in zip(params_of(optimizer), before, strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    with local:
        train(context, local, 3 + context.rank, first=6)
    assert_equal_on_all(context, params_of(optimizer))
    data = DataParallel(make("numpy flat"))
    data.param_groups[0]["lr"] = 0.1 / (1 + context.rank)
    train(context, data, 1)
    data.finish()
    assert_equal_on_all(context, params_of(data))


LOADED: dict[str, dict[str, Any]] = {
    "outer": {"options": {"outer": OuterSGD(0.7, 0.9)}},
    "slowmo": {"options": {"outer": SlowMo(0.5)}},
    "wire": {"options": {"wire_dtype": "float32"}},
    "data parallel": {"options": None},
}


@check(cases=LOADED)
def weights_loaded_on_one_rank_are_noticed(
    context: Context, options: dict[str, Any] | None
) -> None:
    """After wrapping; on all ranks they are welcome."""
    for ranks in ([1], range(context.size)):
        optimizer = make("numpy flat", "float64")
        wrapper: Any = DataParallel(optimizer)
        if options is not None:
            wrapper = LocalSGD(optimizer, sync_every=2, **options)
        if context.rank in ranks:
            params_of(optimizer)[1].data[...] = 100.0
        if len(ranks) == 1:
            with pytest.raises(RoundError, match=r"on some ranks only: .* parameter 'p1': .*; on "):
                train(context, wrapper, 2)
        else:
            with wrapper:
                train(context, wrapper, 3)
            assert_equal_on_all(context, params_of(optimizer))
            assert params_of(optimizer)[1].data.mean() > 20


@check(cases={name: each for name, each in LOADED.items() if each["options"]})
def a_state_loaded_on_one_rank_is_noticed(context: Context, options: dict[str, Any]) -> None:
    """With another anchor, or none, or another outer momentum."""
    for spoil in ("plain", "anchor", "outer_momentum"):
        if spoil == "outer_momentum" and "outer" not in options:
            continue
        optimizer = make("numpy flat", "float64")
        local = LocalSGD(optimizer, sync_every=4, **options)
        train(context, local, 6)
        state = copy.deepcopy(local.state_dict())
        if spoil == "plain":
            state = optimizer.state_dict()
        else:
            state["state"][1][f"local_sgd.{spoil}"][...] += 1
        if context.rank == 1:
            local.load_state_dict(state)
        with pytest.raises(RoundError, match="which was loaded on some ranks only"):
            local.sync()


@check()
def data_parallel_ends_with_equal_parameters(context: Context) -> None:
    """Also where one rank's were changed by hand between two steps."""
    data = DataParallel(make("numpy flat"))
    train(context, data, 2)
    if context.rank == 1:
        params_of(data)[0].data[...] = 5.0
    train(context, data, 1)
    data.finish()
    assert_equal_on_all(context, params_of(data))


class OwnPeriod:
    """A schedule that answers differently on each rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def period(self, progress: Progress) -> int:
        return 2 if progress.round < 1 else 2 + self.rank


@check()
def periods_that_differ_are_refused(context: Context) -> None:
    for levels in (None, [(context.group, 3)]):
        local = LocalSGD(
            make("numpy flat"),
            sync_every=OwnPeriod(context.rank),
            levels=levels,
            transactional=True,
        )
        train(context, local, 2)
        match = "period: expected the same on all ranks, got on rank 0: 2 steps; on rank 1: 3 steps"
        with pytest.raises(RoundError, match=match):
            train(context, local, 5, first=2)


@check(cases={name: {"options": each["options"] or {}} for name, each in LOADED.items()})
def values_that_are_not_finite(context: Context, options: dict[str, Any]) -> None:
    """An error that names the rank; or that rank is left out, and goes on with the others' mean."""
    for bad in (np.nan, np.inf):
        optimizer = make("numpy flat", "float64")
        local = LocalSGD(optimizer, sync_every=2, transactional=True, **options)
        train(context, local, 2)
        before = values_of(optimizer)
        train(context, local, 1, first=2)
        if context.rank == 1:
            params_of(optimizer)[2].data[...] = bad
        with pytest.raises(RoundError, match="rank 1 has parameters that are not finite"):
            train(context, local, 1, first=3)
        assert all(same_bits(a, b) for a, b in zip(params_of(optimizer), before, strict=True))

        optimizer = make("numpy flat", "float64")
        local = LocalSGD(optimizer, sync_every=2, exclude_nonfinite=True, **options)
        train(context, local, 3)
        if context.rank == 1:
            params_of(optimizer)[2].data[...] = bad
            momenta_of(optimizer)[0][...] = bad
        local.sync()
        assert_equal_on_all(context, params_of(optimizer))
        train(context, local, 4, first=4)
        assert_equal_on_all(context, params_of(optimizer))
        assert all(np.isfinite(as_array(p)).all() for p in params_of(optimizer))
    params_of(optimizer)[0].data[...] = np.nan
    with pytest.raises(RoundError, match="no rank has parameters that are all finite"):
        train(context, local, 2)


@check()
def more_parameters_than_a_header_holds(context: Context) -> None:
    """Which of them have gradients, or momentum, travels in an operation of its own."""
    for wrap in (DataParallel, partial(LocalSGD, sync_every=1, momentum_sync="average")):
        params = [sgdcore.Parameter(np.zeros(2)) for _ in range(3000)]
        optimizer = wrap(sgdcore.SGD(params, lr=1.0, momentum=0.5))
        params[2999].grad = np.ones(2) if context.rank == 1 else None
        params[5].grad = np.ones(2)
        optimizer.step()
        assert_equal_on_all(context, [params[5], params[2999]])
        assert params[2999].data[0] == -1 / context.size
        momenta = momenta_of(optimizer)
        assert_equal_on_all(context, [momenta[5], momenta[2999]])
        assert [i for i, each in enumerate(momenta) if each is not None] == [5, 2999]


@check()
def the_mean_leaves_out_what_is_not_finite(context: Context) -> None:
    array = np.full(3, float(context.rank))
    local = LocalSGD(
        sgdcore.SGD([array], lr=1.0), sync_every=1, exclude_nonfinite=True
    )  # all begin with 0
    local.step(grads=[np.full(3, np.nan if context.rank == 0 else float(context.rank))])
    others = range(1, context.size)
    assert np.allclose(array, -sum(others) / len(others))


@check(["gloo-4", "mpi-4"], cases={"one": {"every": [2]}, "two": {"every": [2, 4]}})
def sync_takes_part_in_levels(context: Context, every: list[int]) -> None:
    """Ranks that call it early average with those that step on, as `finish` does."""
    pairs = [context.split([0, 1]), context.split([2, 3])]
    pair = next(each for each in pairs if each is not None)
    levels = list(zip([pair, context.group], every, strict=False))
    for end in ("sync", "finish"):
        for steps in ([1, 6, 3, 9], [0, 5, 5, 0], [20, 0, 1, 2], [3, 3, 3, 3]):
            optimizer = make("numpy flat")
            local = LocalSGD(optimizer, sync_every=8, levels=levels)
            train(context, local, steps[context.rank])
            getattr(local, end)()
            assert_equal_on_all(context, params_of(optimizer))
            assert len(set(on_all(context, local.round))) == 1
            assert len(set(on_all(context, local._round.steps + local._round.active))) == 1
            train(context, local, 8)
            assert_equal_on_all(context, params_of(optimizer))


@check(cases={"keep": {"mode": "keep"}, "average": {"mode": "average"}})
def a_late_joiner_gets_momentum_and_learning_rates(context: Context, mode: str) -> None:
    """Of a rank that has them; the others keep their own."""
    stay = list(range(1, context.size))
    optimizer = make("numpy flat")
    local = LocalSGD(optimizer, sync_every=2, momentum_sync=mode)
    train(context, local, 2)
    smaller = context.split(stay)
    if smaller is None:
        optimizer = make("numpy flat", seed=77)  # a new process
        local = LocalSGD(optimizer, sync_every=2, momentum_sync=mode)
    else:
        local.rebind(smaller)
        optimizer.param_groups[0]["lr"] = 0.025  # as a scheduler
        train(context, local, 2, first=2)
        own = [each.copy() for each in momenta_of(optimizer)]
        local.rebind(context.group)
        if mode == "keep":
            assert all(same_bits(a, b) for a, b in zip(momenta_of(optimizer), own, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.025
    digests = on_all(context, digest(momenta_of(optimizer)))
    assert digests[0] == digests[1]
    assert_equal_on_all(context, params_of(optimizer))


@check(
    cases={
        "LocalSGD": {"wrap": partial(LocalSGD, sync_every=2)},
        "DataParallel": {"wrap": DataParallel},
    }
)
def buffers_are_averaged(context: Context, wrap: Any) -> None:
    """Arrays beside parameters: rank 0's at first, then the mean; integers are those of rank 0."""
    mean = np.full(3, float(context.rank), np.float32)
    count = np.array(10 + context.rank)
    optimizer = wrap(make("numpy flat"), buffers={"mean": mean, "count": count})
    assert mean.tolist() == [0.0] * 3
    assert count == 10
    for _ in range(2):
        mean += context.rank
        count += 1 + context.rank
        train(context, optimizer, 1)
    assert_equal_on_all(context, [mean, count])
    assert np.allclose(mean, context.size - 1)
    assert count in (11, 12)
    other = {"mean": mean} if context.rank else {"mean": mean, "count": count}
    with refused(context, ValueError, r"buffers: .* on rank 0: .*; on rank 1: ", mean, count):
        wrap(make("numpy flat"), buffers=other)


@check(MPI)
def no_torch_was_needed(context: Context) -> None:
    assert "torch" not in sys.modules
