"""What sgdcore.distributed does on one process: chunks, schedules, refusals, and a group of one."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sgdcore
from sgdcore.distributed import (
    DataParallel,
    LocalSGD,
    OuterSGD,
    Progress,
    ShardSampler,
    SlowMo,
    Stagewise,
    as_process_group,
    groups,
)
from sgdcore.distributed._flat import ITEM_BYTES, extents, flat, join, laid_out, overlap, runs
from sgdcore.distributed.averager import Chunk, Sizes, plan_chunks
from sgdcore.distributed.parameters import Parameters
from support import assert_same_bits


class Done:
    def wait(self) -> None: ...


class Alone:
    """A process group of one, which is all that the protocol asks for."""

    rank, size = 0, 1
    dtypes = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32"})

    def all_reduce(self, array: Any) -> Done:
        return Done()


# Chunks

SIZES = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[str]]:
    """Arrays' positions, those together that lie side by side, their sizes and dtypes."""
    sizes = draw(SIZES)
    dtypes = [draw(st.sampled_from(["float32", "float64"])) for _ in sizes]
    runs: list[list[int]] = []
    for i in range(len(sizes)):
        if runs and dtypes[runs[-1][-1]] == dtypes[i] and draw(st.booleans()):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs, sizes, dtypes


def assert_covered(chunks: Iterable[Chunk], sizes: list[int], dtypes: list[str]) -> None:
    """No element is left out, none is sent twice."""
    covered = [np.zeros(size, int) for size in sizes]
    for chunk in chunks:
        pieces = chunk.pieces(covered)
        assert chunk.size == sum(map(len, pieces)) > 0
        assert all(dtypes[i] == chunk.dtype for i in chunk.arrays)
        for piece in pieces:
            piece += 1
    assert all((each == 1).all() for each in covered)


@settings(max_examples=200, deadline=None)
@given(layouts(), st.sampled_from([8, 64, 1000, 4096, 1 << 20]))
def test_chunks_hold_each_element_once(
    layout: tuple[list[list[int]], list[int], list[str]], limit: int
) -> None:
    chunks = plan_chunks(*layout, Sizes(limit, limit))
    assert all(piece.size * ITEM_BYTES[piece.dtype] <= limit for piece in chunks)
    assert_covered(chunks, *layout[1:])


def test_large_arrays_are_cut_evenly_and_small_ones_gathered() -> None:
    sizes = [10_000_000, 1000, 2000, 1_000_000, 3000]
    chunks = plan_chunks(
        [[0], [1], [2], [3], [4]], sizes, ["float32"] * 5, Sizes(16 << 20, 16 << 20)
    )
    assert [list(piece.arrays) for piece in chunks] == [
        [0],
        [0],
        [0],
        [3],
        [1, 2, 4],
    ]
    assert [piece.size for piece in chunks] == [3333334, 3333334, 3333332, 1_000_000, 6000]


def test_parameters_are_called_by_their_names_where_they_have_some() -> None:
    buffer = sgdcore.ParameterBuffer({"w": (2,)})
    array = np.zeros(3)
    assert Parameters(sgdcore.SGD([*buffer.values(), array], lr=0.1)).labels == [
        "parameter 'w'",
        "param_groups[0]['params'][1]",
    ]
    module = torch.nn.Linear(2, 1, bias=False)
    named = Parameters(sgdcore.torch.SGD(module.named_parameters(), lr=0.1))
    assert named.labels == ["parameter 'weight'"]


def test_chunks_are_cut_anew_where_parameters_were_moved() -> None:
    """As on a rank that joins, which has no plan of before."""
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    views = Parameters(sgdcore.torch.SGD(parameters, lr=0.1, momentum=0.9))
    apart = views.averager()
    assert views.averager() is apart
    storage = torch.zeros(6)
    for i, parameter in enumerate(parameters):
        parameter.data = storage[3 * i : 3 * i + 3]
    assert views.moved()
    views.follow()
    assert views.runs == [[0, 1]]
    assert views.averager() is not apart


ARRAYS: dict[str, Any] = {
    "C order": np.zeros((3, 4)),
    "Fortran order": np.zeros((3, 4), order="F"),
    "transposed": np.zeros((2, 3, 4)).transpose(1, 2, 0),
    "axis of one": np.zeros((3, 1, 4))[:, ::-1],
    "scalar": np.array(1.0),
    "empty": np.zeros((0, 3)),
    "tensor": torch.zeros(3, 4),
    "channels_last": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "tensor of no axes": torch.tensor(1.0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_flat_views_share_memory(name: str) -> None:
    array = ARRAYS[name]
    view = flat(array, "x")
    size = (
        array.size
        if isinstance(array, np.ndarray)
        else torch.view_as_real(array).numel()
        if array.is_complex()
        else array.numel()
    )
    assert view.shape == (size,)
    if size:
        view[0] = 7
        assert (np.asarray(array) == 7).any()
        view[0] = 0


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4))[:, :2], np.zeros(6)[::2], torch.zeros(4, 4)[:, :2], torch.zeros(1).expand(3)],
    ids=["columns", "every second", "columns of a tensor", "expanded"],
)
def test_gaps_are_refused(array: Any) -> None:
    with pytest.raises(ValueError, match=r"x: expected memory without gaps, got .* as strides"):
        flat(array, "x")


@pytest.mark.parametrize("factor", [1.0, 1 + 2j], ids=["real", "complex"])
def test_values_follow_an_array_into_another_order(factor: complex) -> None:
    before = factor * torch.arange(120.0).reshape(2, 3, 4, 5)
    after = before.contiguous(memory_format=torch.channels_last)
    assert laid_out(before, before) is before
    moved = laid_out(before, after)
    assert torch.equal(flat(moved, "x"), flat(after, "x"))
    assert torch.equal(flat(laid_out(moved, before), "x"), flat(before, "x"))


def test_neighbours_are_joined() -> None:
    buffer = sgdcore.ParameterBuffer({"a": (3,), "b": (4, 2), "c": (1,)})
    views = [flat(p.data, p.name) for p in buffer.values()]
    assert runs(views) == [[0, 1, 2]]
    whole = join(views[1:])
    whole[...] = 5
    assert buffer.data.tolist() == [0] * 3 + [5] * 9
    assert runs([views[1], views[0], views[2]]) == [[0], [1], [2]]
    assert runs([np.zeros(3), np.zeros(3)]) == [[0], [1]]
    base = torch.zeros(10)
    parts = [base[:4], base[4:9], base[9:]]
    assert runs(parts) == [[0, 1, 2]]
    join(parts[:2])[...] = 1
    assert base.tolist() == [1] * 9 + [0]
    assert join([base[:4], base[5:]]) is None


def test_views_with_memory_in_common_are_found() -> None:
    for base in (np.zeros(10), torch.zeros(10)):
        apart = [base[4:9], base[:4], base[9:], base[5:5]]
        assert overlap(*extents(apart)) == []
        assert overlap(*extents([*apart, base[8:9]])) == [0, 4]
        assert overlap(*extents([base[:1], base[3:5], base])) == [0, 2]


# One rank

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stages": {"sync_every": Stagewise({0: 1, 3: 2})},
    "average": {"momentum_sync": "average"},
    "reset": {"momentum_sync": "reset"},
    "outer": {"outer": OuterSGD(0.7, 0.9, nesterov=True)},
    "slowmo": {"outer": SlowMo(0.5)},
    "wire": {"wire_dtype": "bfloat16"},
    "transactional": {"transactional": True},
    "levels": {"levels": [(Alone(), 1)]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_one_rank_changes_nothing(kind: str, options: dict[str, Any]) -> None:
    """Bit for bit, and nothing moves."""
    rng = np.random.default_rng(0)
    starts = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (5,))]
    gradients = [
        [rng.standard_normal(a.shape).astype(np.float32) for a in starts] for _ in range(7)
    ]
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

    def build() -> Any:
        if kind == "numpy":
            return sgdcore.SGD([sgdcore.Parameter(a.copy()) for a in starts], **hyper)
        return sgdcore.torch.SGD([torch.nn.Parameter(torch.tensor(a)) for a in starts], **hyper)

    trained = []
    for wrap in (
        lambda o: o,
        lambda o: LocalSGD(o, Alone(), **{"sync_every": 2, **options}),
        lambda o: DataParallel(o, Alone()),
    ):
        optimizer = wrap(build())
        params = optimizer.param_groups[0]["params"]
        where = [np.asarray(p.data).ctypes.data for p in params]
        for each in gradients:
            for p, g in zip(params, each, strict=True):
                p.grad = g.copy() if kind == "numpy" else torch.tensor(g)
            optimizer.step()
        if hasattr(optimizer, "finish"):
            optimizer.finish()
        assert [np.asarray(p.data).ctypes.data for p in params] == where
        trained.append([np.asarray(p.data).copy() for p in params])
    for other in trained[1:]:
        for a, b in zip(other, trained[0], strict=True):
            assert_same_bits(a, b)


# Schedules


def test_stagewise() -> None:
    def at(step: int) -> Progress:
        return Progress(step, 0, 1, 0.1)

    stages = Stagewise({10: 4, 20: 16})
    assert [stages.period(at(step)) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 4, 4, 16, 16]


# Refusals


def sgd() -> sgdcore.SGD:
    return sgdcore.SGD([np.zeros(3, np.float32)], lr=0.1)


def overlapping() -> torch.optim.SGD:
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    q.data = p.data
    return torch.optim.SGD([p, q], lr=0.1)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no optimizer": (
        lambda: LocalSGD([]),
        TypeError,
        "optimizer: expected one of sgdcore or torch.optim, got list",
    ),
    "twice": (
        lambda: DataParallel(LocalSGD(sgd(), Alone()), Alone()),
        TypeError,
        "optimizer: it is distributed already",
    ),
    "no parameters": (
        lambda: DataParallel(sgdcore.SGD([{"params": []}], lr=0.1), Alone()),
        ValueError,
        "optimizer: expected at least one parameter, got none",
    ),
    "overlap": (
        lambda: LocalSGD(overlapping(), Alone()),
        ValueError,
        r"params: param_groups\[0\]\['params'\]\[0\] and .*\[1\] overlap in memory",
    ),
    "overlap, data parallel": (
        lambda: DataParallel(overlapping(), Alone()),
        ValueError,
        "params: .* overlap in memory",
    ),
    "group": (
        lambda: LocalSGD(sgd(), "gloo"),
        TypeError,
        "group: expected a process group .* got 'gloo'",
    ),
    "sync_every=0": (
        lambda: LocalSGD(sgd(), Alone(), sync_every=0),
        ValueError,
        "sync_every: expected at least 1, got 0",
    ),
    "sync_every=1.5": (
        lambda: LocalSGD(sgd(), Alone(), sync_every=1.5),  # type: ignore[arg-type]
        TypeError,
        r"sync_every: expected an integer, got 1.5",
    ),
    "momentum_sync": (
        lambda: LocalSGD(sgd(), Alone(), momentum_sync="sum"),
        ValueError,
        "momentum_sync: expected one of 'keep', 'average', 'reset', got 'sum'",
    ),
    "outer": (
        lambda: LocalSGD(sgd(), Alone(), outer=0.7),
        TypeError,
        "outer: expected an OuterSGD, a SlowMo or None, got 0.7",
    ),  # type: ignore[arg-type]
    "outer lr": (
        lambda: LocalSGD(sgd(), Alone(), outer=OuterSGD(-1.0)),
        ValueError,
        "Invalid learning rate: -1.0",
    ),
    "outer nesterov": (
        lambda: LocalSGD(sgd(), Alone(), outer=OuterSGD(1.0, nesterov=True)),
        ValueError,
        "Nesterov momentum requires a momentum",
    ),
    "slowmo": (
        lambda: LocalSGD(sgd(), Alone(), outer=SlowMo("0.5")),  # type: ignore[arg-type]
        TypeError,
        "momentum: expected a number, got '0.5'",
    ),
    "wire_dtype": (
        lambda: LocalSGD(sgd(), Alone(), wire_dtype="int8"),
        ValueError,
        "wire_dtype: expected one of .* got 'int8'",
    ),
    "sync_every=True": (
        lambda: LocalSGD(sgd(), Alone(), sync_every=True),
        TypeError,
        "sync_every: expected an integer, got True",
    ),
    "levels": (
        lambda: LocalSGD(sgd(), Alone(), levels=[Alone()]),
        TypeError,
        r"levels: expected pairs \(group, every\)",
    ),  # type: ignore[list-item]
    "levels, every": (
        lambda: LocalSGD(sgd(), Alone(), levels=[(Alone(), 0)]),
        ValueError,
        r"levels: expected at least 1, got 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refusals(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("dtype", "wide"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_residuals_begin_as_zeros_of_the_compute_dtype(dtype: str, wide: str) -> None:
    inner = sgdcore.SGD([np.zeros(3, dtype)], lr=0.1)
    [residual] = LocalSGD(inner, Alone(), wire_dtype="float16")._feedback.residuals
    assert (residual.dtype.name, residual.tolist()) == (wide, [0, 0, 0])


@pytest.mark.parametrize("change", ["order", "group"])
def test_parameters_that_changed_are_refused(change: str) -> None:
    """What is kept beside them is in their order in memory, and has no place for others."""
    parameter = torch.nn.Parameter(torch.ones(2, 3, 4, 5))
    inner = torch.optim.SGD([parameter], lr=0.1)
    local = LocalSGD(inner, Alone(), sync_every=1, transactional=True)
    if change == "order":
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    else:
        inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(
        ValueError, match="changed since they were wrapped; wrap the optimizer anew"
    ):
        local.step()
    LocalSGD(inner, Alone(), sync_every=1, transactional=True).step()


def test_outer_momentum_has_the_widest_dtype_of_its_group() -> None:
    groups = [{"params": [np.zeros(2, d) for d in each]} for each in (["f4", "f8"], ["f2", "f4"])]
    local = LocalSGD(sgdcore.SGD(groups, lr=0.1), Alone(), outer=SlowMo(0.5))
    assert local._outer is not None
    momenta = [local._outer._anchors.state("momentum_buffer", i) for i in range(4)]
    assert [m.dtype.name for m in momenta] == ["float64"] * 2 + ["float32"] * 2


def test_integers_of_numpy_and_torch_are_integers() -> None:
    assert LocalSGD(sgd(), Alone(), sync_every=np.int64(4))._options.sync_every == Stagewise({0: 4})  # type: ignore[arg-type]
    sampler = ShardSampler(
        np.int64(10), num_replicas=np.int32(2), rank=torch.tensor(1), seed=np.uint8(3)
    )  # type: ignore[arg-type]
    same = ShardSampler(10, num_replicas=2, rank=1, seed=3)
    assert [b.tolist() for b in sampler.batches(np.int64(2))] == [
        b.tolist() for b in same.batches(2)
    ]
    for value in (np.bool_(True), 2.0, np.float64(2), "2", None):
        with pytest.raises(TypeError, match="batch_size: expected an integer, got"):
            same.batches(value)  # type: ignore[arg-type]


ANCHORED: dict[str, dict[str, Any]] = {
    "outer": {"outer": OuterSGD(1.0)},
    "wire_dtype": {"wire_dtype": "bfloat16"},
    "transactional": {"transactional": True},
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "afterwards"])
@pytest.mark.parametrize("options", [None, *ANCHORED.values()], ids=["DataParallel", *ANCHORED])
def test_step_in_backward_is_refused(options: dict[str, Any] | None, before: bool) -> None:
    """Both when it is asked for before wrapping and afterwards; the ranks would differ otherwise."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = sgdcore.torch.SGD([parameter], lr=0.1)

    def wrap() -> Any:
        if options is None:
            return DataParallel(optimizer, Alone())
        return LocalSGD(optimizer, Alone(), **options)

    if before:
        with (
            sgdcore.torch.step_in_backward(optimizer),
            pytest.raises(ValueError, match=r"optimizer: .* cannot go with step_in_backward"),
        ):
            wrap()
        return
    wrapped = wrap()
    with pytest.raises(ValueError, match=r"optimizer: .* cannot go with step_in_backward"):
        sgdcore.torch.step_in_backward(optimizer)
    del wrapped
    sgdcore.torch.step_in_backward(optimizer).remove()


class Failing(Alone):
    size = 2

    def all_reduce(self, array: Any) -> Done:
        raise ConnectionError("gone")


def outer_local(**options: Any) -> LocalSGD:
    inner = sgdcore.SGD([np.zeros(3, np.float32)], lr=0.1, momentum=0.9)
    return LocalSGD(inner, Alone(), sync_every=2, outer=OuterSGD(1.0), **options)


def take(local: LocalSGD, steps: int) -> None:
    for _ in range(steps):
        local.step(grads=[np.ones(3, np.float32)])


def momentum(local: LocalSGD) -> Any:
    return local.state[local.param_groups[0]["params"][0]]["momentum_buffer"]


@pytest.mark.parametrize("steps", [2, 3], ids=["between rounds", "within a round"])
def test_resuming_with_transactional_a_state_saved_without(steps: int) -> None:
    """Within a round the momentum to return to is unknown; between rounds it is that of the state."""
    before, local = outer_local(), outer_local(transactional=True)
    take(before, steps)
    state = before.state_dict()
    if steps == 3:
        with pytest.raises(ValueError, match="it was saved with other options"):
            local.load_state_dict(state)
        return
    local.load_state_dict(state)
    take(local, 1)
    local.group = Failing()
    with pytest.raises(sgdcore.distributed.RoundError) as caught:
        take(local, 1)
    assert caught.value.restored
    np.testing.assert_array_equal(local.param_groups[0]["params"][0].data, 0)


def test_resuming_with_transactional_within_a_round() -> None:
    """A failure returns to the momentum of the round's start, which the state has."""
    before, local = outer_local(transactional=True), outer_local(transactional=True)
    take(before, 2)
    start = momentum(before).copy()
    take(before, 1)
    local.load_state_dict(before.state_dict())
    assert not np.array_equal(momentum(local), start)
    local.group = Failing()
    with pytest.raises(sgdcore.distributed.RoundError):
        take(local, 1)
    assert_same_bits(momentum(local), start)


def test_an_exception_in_a_with_block_goes_through_at_once() -> None:
    """The others may be elsewhere, so that `finish` would wait for them."""
    local = outer_local()

    def train() -> None:
        with local:
            take(local, 1)
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert (local.round, local.step_in_round) == (0, 1)


def test_a_checkpoint_mends_what_a_failed_round_left() -> None:
    local = outer_local()
    state = local.state_dict()
    local._round.broken = True
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        take(local, 1)
    local.load_state_dict(state)
    take(local, 1)
    assert local.step_in_round == 1


@pytest.mark.parametrize("make", [torch.optim.SGD, sgdcore.torch.SGD])
@pytest.mark.parametrize("cls", [LocalSGD, DataParallel])
def test_a_grad_scaler_unscales_and_leaves_steps_out(cls: Any, make: Any) -> None:
    """Trainers clip gradients only if the attribute is false."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = cls(make([parameter], lr=0.5), Alone())
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is False
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, np.inf):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        assert parameter.tolist() == [0.5, 0.5, 0.5]
        scaler.update()
    assert scaler.get_scale() == 4.0


def test_a_schedule_that_answers_nonsense() -> None:
    class Nonsense:
        def period(self, progress: Progress) -> Any:
            return 2.5

    local = LocalSGD(sgd(), Alone(), sync_every=Nonsense())
    with pytest.raises(TypeError, match=r"the schedule's period: expected an integer, got 2\.5"):
        local.step(grads=[np.ones(3, np.float32)])


NONE = "no process group is initialised. With torch, start with torchrun .*; with MPI, start with mpiexec"
BOTH = "both torch.distributed and MPI are initialised; pass torch.distributed.group.WORLD or MPI"


@pytest.mark.parametrize(
    ("torch_ranks", "mpi_ranks", "chosen"),
    [
        (None, None, NONE),
        (2, None, "torch"),
        (None, 2, "mpi"),
        (2, 2, BOTH),
        (1, 1, BOTH),
        # As where Lightning has imported mpi4py in a script of torchrun's.
        (2, 1, "torch"),
        (1, 2, "mpi"),
    ],
)
def test_the_engine_that_is_meant(
    torch_ranks: int | None, mpi_ranks: int | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, ranks in (
        ("torch.distributed", "torch", torch_ranks),
        ("mpi4py.MPI", "mpi", mpi_ranks),
    ):
        fake = types.SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda ranks=ranks: ranks is not None,
            Is_initialized=lambda ranks=ranks: ranks is not None,
            Is_finalized=lambda: False,
            COMM_WORLD=None,
            group=types.SimpleNamespace(WORLD=None),
        )
        monkeypatch.setitem(sys.modules, module, fake)
        group = types.SimpleNamespace(size=ranks, name=name)
        kind = "TorchGroup" if name == "torch" else "MpiGroup"
        monkeypatch.setattr(groups, kind, lambda _, group=group: group)
    if chosen in ("torch", "mpi"):
        assert as_process_group().name == chosen  # type: ignore[attr-defined]
    else:
        with pytest.raises(RuntimeError, match=chosen):
            as_process_group()
