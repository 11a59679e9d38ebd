"""ShardSampler: the indices of torch's DistributedSampler, without torch, and from the middle of an epoch."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sgdcore.distributed.sampler import ShardSampler

sizes = st.integers(0, 60)
ranks = st.integers(1, 9)
seeds = st.one_of(st.integers(0, 5), st.integers(0, 2**63 - 1))
flags = st.booleans()


def shards(sampler: ShardSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")


@given(n=sizes, replicas=ranks, seed=seeds, epoch=st.integers(0, 9), shuffle=flags, drop_last=flags)
def test_equals_distributed_sampler(
    n: int, replicas: int, seed: int, epoch: int, shuffle: bool, drop_last: bool
) -> None:
    for rank in range(replicas):
        theirs: Any = DistributedSampler(
            range(n), replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        theirs.set_epoch(epoch)
        expected = list(theirs)
        for torch_loaded in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not torch_loaded:
                    patch.delitem(sys.modules, "torch")
                ours = ShardSampler(range(n), replicas, rank, shuffle, seed, drop_last)
                assert shards(ours, epoch) == expected
        assert len(ours) == ours.num_samples == len(theirs)
        assert ours.total_size == theirs.total_size


@given(n=sizes, replicas=ranks, seed=seeds, drop_last=flags)
def test_ranks_share_every_sample(n: int, replicas: int, seed: int, drop_last: bool) -> None:
    each = [
        list(ShardSampler(n, replicas, r, seed=seed, drop_last=drop_last)) for r in range(replicas)
    ]
    assert len({len(shard) for shard in each}) == 1
    seen = np.bincount([index for shard in each for index in shard], minlength=n)
    if drop_last:
        assert seen.max(initial=0) <= 1
        assert (seen == 0).sum() == n % replicas
    elif n >= replicas:
        assert set(seen) <= {1, 2}
        assert (seen == 2).sum() == -n % replicas


@pytest.mark.parametrize("n", [2, 12_345])
def test_permutation_without_torch(n: int, no_torch: None) -> None:
    seed = 2**32 + 2**31 + 3  # the generator takes the lower 32 bits
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    assert list(ShardSampler(n, 1, 0, seed=seed)) == expected


def test_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from sgdcore.distributed import ShardSampler\n"
        "print(list(ShardSampler(10, 2, 1, seed=3)))\n"
        "assert 'torch' not in sys.modules and 'mpi4py' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{list(DistributedSampler(range(10), 2, 1, seed=3))}\n"


def test_in_a_data_loader() -> None:
    data = TensorDataset(torch.arange(103))
    for workers in (0, 2):
        batches = [
            [
                batch.tolist()
                for (batch,) in DataLoader(data, batch_size=8, sampler=sampler, num_workers=workers)
            ]
            for sampler in (ShardSampler(data, 4, 1), DistributedSampler(data, 4, 1))
        ]
        assert batches[0] == batches[1]
        assert len(batches[0]) == 4


def test_batches_are_arrays_to_index_with() -> None:
    sampler = ShardSampler(10, 2, 0, seed=1)
    images = np.arange(10.0)
    batches = list(sampler.batches(3))
    assert [len(batch) for batch in batches] == [3, 2]
    assert sampler.state_dict() == sampler.state_dict(position=5)
    assert np.concatenate(batches).tolist() == list(sampler)
    assert images[batches[0]].tolist() == batches[0].tolist()


# Frameworks that divide the data by themselves


class Weighed(ShardSampler):
    """As users derive their own."""

    def __init__(self, dataset: Any, weight: float, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.weight = weight


@pytest.fixture
def before_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardSampler]:
    """A sampler from before torch was imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch.utils.data")
        return ShardSampler(20, 2, 1, seed=3)


def test_is_one_of_torchs_samplers(before_torch: ShardSampler) -> None:
    for sampler in (ShardSampler(20, 2, 1), Weighed(20, 0.5, num_replicas=2, rank=1)):
        assert isinstance(sampler, DistributedSampler)
        assert isinstance(sampler, torch.utils.data.Sampler)
        assert isinstance(sampler, ShardSampler)
        assert (sampler.num_samples, sampler.total_size) == (10, 20)
    assert type(ShardSampler(20, 2, 1)) is type(ShardSampler(30, 3, 1))
    assert type(sampler).__qualname__ == sampler.__class__.__qualname__ == "Weighed"
    assert type(sampler.__class__(20, 0.5, num_replicas=2, rank=1)) is Weighed
    assert isinstance(before_torch, DistributedSampler), "also one from before torch was imported"
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch.utils.data")
        assert not isinstance(before_torch, DistributedSampler)


def copied(sampler: ShardSampler) -> list[ShardSampler]:
    pickled = [
        pickle.loads(pickle.dumps(sampler, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    return [copy.copy(sampler), copy.deepcopy(sampler), *pickled]


def test_copies_are_as_far_and_of_the_same_class() -> None:
    sampler = Weighed(20, 0.5, num_replicas=2, rank=1, seed=3)
    sampler.set_epoch(4)
    sampler.load_state_dict(sampler.state_dict(position=3))
    rest = list(copy.copy(sampler))
    assert len(rest) == 7
    for other in copied(sampler):
        assert type(other) is type(sampler)
        assert vars(other) == vars(sampler)
        assert list(other) == rest
    assert vars(sampler)["_start"] == 6, "a copy's epoch is its own"


def test_copies_need_no_torch_and_are_torchs_samplers_where_it_is(
    before_torch: ShardSampler,
) -> None:
    expected = list(DistributedSampler(range(20), 2, 1, seed=3))
    for other in copied(before_torch):
        assert isinstance(other, DistributedSampler)
        assert list(other) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch.utils.data")
        for other in copied(ShardSampler(20, 2, 1, seed=3)):
            assert type(other) is ShardSampler
            assert list(other) == expected


def test_pickles_need_no_torch() -> None:
    pickled = pickle.dumps(ShardSampler(10, 2, 1, seed=3))
    program = (
        "import pickle, sys\n"
        f"sampler = pickle.loads({pickled!r})\n"
        "assert 'torch' not in sys.modules\n"
        "before = list(sampler)\n"
        "import torch.utils.data as data\n"
        "assert isinstance(pickle.loads(pickle.dumps(sampler)), data.DistributedSampler)\n"
        "print(before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{list(DistributedSampler(range(10), 2, 1, seed=3))}\n"


class Dividing(DistributedSampler):
    """As frameworks wrap a sampler that they do not know, such as Lightning's DistributedSamplerWrapper."""

    def __init__(self, sampler: Any, ranks: int) -> None:
        super().__init__(range(len(sampler)), ranks, 0, shuffle=False)
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        indices = list(self.sampler)
        return iter([indices[i] for i in super().__iter__()])


def test_a_sampler_refuses_to_be_divided_by_what_does_not_recognise_it(
    before_torch: ShardSampler,
) -> None:
    message = (
        r"^ShardSampler: test_shard_sampler.Dividing divides the samples of a sampler among the ranks, "
        r"and this one has those of rank 1 of 2 only"
    )
    with pytest.raises(RuntimeError, match=message):
        list(Dividing(before_torch, 2))
    assert len(list(Dividing(before_torch, 1))) == 10
    assert len(list(Dividing(ShardSampler(20, 1, 0), 2))) == 10, "all samples, among two ranks"


def accelerate(monkeypatch: pytest.MonkeyPatch, ranks: int) -> Any:
    """What there is of accelerate in a batch sampler; tests/clients has the real one."""

    class BatchSamplerShard:
        def __init__(self, batches: Any) -> None:
            self.batch_sampler, self.num_processes = batches, ranks

        def __iter__(self) -> Iterator[Any]:
            yield from list(self.batch_sampler)[:: self.num_processes]

    class DataLoaderDispatcher(BatchSamplerShard):
        state = SimpleNamespace(num_processes=ranks)

    module = ModuleType("accelerate.data_loader")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(
        BatchSamplerShard=BatchSamplerShard, DataLoaderDispatcher=DataLoaderDispatcher
    )
    return module


@pytest.mark.parametrize("kind", ["BatchSamplerShard", "DataLoaderDispatcher"])
@pytest.mark.parametrize("workers", [0, 1])
def test_refuses_to_be_divided_by_accelerate(
    kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TensorDataset(torch.arange(20))

    def loader(ranks: int, *arguments: int) -> DataLoader[Any]:
        batches = torch.utils.data.BatchSampler(ShardSampler(data, *arguments), 5, drop_last=False)
        shard = getattr(accelerate(monkeypatch, ranks), kind)(batches)
        return DataLoader(data, batch_sampler=shard, num_workers=workers)

    with pytest.raises(RuntimeError, match=rf"{kind} divides .* with num_replicas=1, rank=0$"):
        list(loader(2, 2, 1))
    assert [len(batch) for (batch,) in loader(1, 2, 1)] == [5, 5]
    assert [len(batch) for (batch,) in loader(2, 1, 0)] == [5, 5]


# Going on in the middle of an epoch


@given(n=sizes, replicas=ranks, seed=seeds, drop_last=flags, data=st.data())
def test_resumes_within_an_epoch(
    n: int, replicas: int, seed: int, drop_last: bool, data: st.DataObject
) -> None:
    sampler = ShardSampler(n, replicas, 0, seed=seed, drop_last=drop_last)
    whole = shards(sampler, 4)
    done = data.draw(st.integers(0, len(whole)), "position")
    iterator = iter(sampler)
    assert [next(iterator) for _ in range(done)] == whole[:done]
    state = sampler.state_dict()
    assert state == sampler.state_dict(position=done)
    list(iterator)  # the state is a copy

    again = ShardSampler(n, replicas, 0, seed=seed, drop_last=drop_last)
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.set_epoch(4)  # as the loop over epochs does
    assert list(again) == whole[done:]
    assert list(again) == whole, "only the epoch that was loaded is shortened"


def test_another_epoch_starts_from_its_beginning() -> None:
    sampler = ShardSampler(20, 2, 0)
    sampler.load_state_dict(ShardSampler(20, 2, 1).state_dict(position=7))
    assert shards(sampler, 1) == list(DistributedSampler(range(20), 2, 0, seed=1))


def test_an_abandoned_iteration_is_not_resumed() -> None:
    sampler = ShardSampler(20, 2, 0)
    next(iter(sampler))
    assert len(list(sampler)) == 10


@given(n=sizes, before=ranks, after=ranks, seed=seeds)
def test_goes_on_with_another_number_of_ranks(n: int, before: int, after: int, seed: int) -> None:
    first = [ShardSampler(n, before, rank, seed=seed) for rank in range(before)]
    position = len(first[0]) // 2
    seen = [index for sampler in first for index in list(sampler)[:position]]
    (state,) = {tuple(sampler.state_dict(position).items()) for sampler in first}
    rest = [ShardSampler(n, after, rank, seed=seed) for rank in range(after)]
    for sampler in rest:
        sampler.load_state_dict(dict(state))
        seen += sampler
    counts = np.bincount(seen, minlength=n)
    assert (counts >= 1).all(), "every sample is seen"
    assert len(seen) - n < after, "and no more repeated than the last ranks need"


def test_state_counts_what_a_loader_asked_for() -> None:
    data = TensorDataset(torch.arange(64))
    sampler = ShardSampler(data, 2, 0)
    loader = iter(DataLoader(data, batch_size=4, sampler=sampler, num_workers=1))
    batch = next(loader)[0]
    assert sampler.state_dict()["seen"] > 2 * 4, "the worker has asked ahead"
    state = sampler.state_dict(position=4)
    sampler.load_state_dict(state)
    assert [*batch.tolist(), *sampler] == list(DistributedSampler(data, 2, 0))


def test_without_an_engine_the_number_of_ranks_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each process would take all samples."""
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    for options in ({}, {"rank": 0}, {"num_replicas": 1}):
        with pytest.raises(RuntimeError, match="no process group is initialised"):
            ShardSampler(10, **options)
    assert len(ShardSampler(10, num_replicas=1, rank=0)) == 10


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dataset": iter([])},
            TypeError,
            "dataset: expected something with a length, or an integer",
        ),
        ({"dataset": -1}, ValueError, "dataset: expected at least 0, got -1"),
        ({"dataset": True}, TypeError, "dataset: expected something with a length"),
        ({"num_replicas": 0}, ValueError, "num_replicas: expected at least 1, got 0"),
        ({"num_replicas": 2.0}, TypeError, "num_replicas: expected an integer, got 2.0"),
        ({"rank": 4}, ValueError, "rank: expected less than 4, got 4"),
        ({"rank": -1}, ValueError, "rank: expected at least 0, got -1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": 2**63}, ValueError, f"seed: expected less than {2**63}, got {2**63}"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer, got 0.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ShardSampler(**{"dataset": 10, "num_replicas": 4, "rank": 0, **arguments})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"length": 11},
            ValueError,
            r"state_dict\['length'\]: the state is of a sampler with 11, this",
        ),
        ({"seed": 1}, ValueError, r"state_dict\['seed'\]: the state is of a sampler with 1, this"),
        (
            {"shuffle": False},
            ValueError,
            r"state_dict\['shuffle'\]: the state is of a sampler with Fa",
        ),
        ({"epoch": -1}, ValueError, r"state_dict\['epoch'\]: expected at least 0, got -1"),
        ({"seen": "x"}, TypeError, r"state_dict\['seen'\]: expected an integer, got 'x'"),
    ],
    ids=str,
)
def test_bad_states(change: dict[str, Any], error: type[Exception], message: str) -> None:
    sampler = ShardSampler(10, 2, 0)
    sampler.set_epoch(3)
    before = sampler.state_dict()
    with pytest.raises(error, match=f"^{message}"):
        sampler.load_state_dict({**before, **change})
    with pytest.raises(ValueError, match="lacks \\['epoch', 'seen'\\]"):
        sampler.load_state_dict({k: v for k, v in before.items() if k not in ("epoch", "seen")})
    with pytest.raises(TypeError, match="state_dict: expected a dict, got list"):
        sampler.load_state_dict([])  # type: ignore[arg-type]
    assert sampler.state_dict() == before


@pytest.mark.parametrize("position", [-1, 6, 0.5])
def test_bad_positions(position: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^position: "):
        ShardSampler(10, 2, 0).state_dict(position=position)


def test_bad_batch_size_and_epoch() -> None:
    sampler = ShardSampler(10, 2, 0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        sampler.batches(0)
    with pytest.raises(TypeError, match="epoch: expected an integer, got None"):
        sampler.set_epoch(None)  # type: ignore[arg-type]


def test_huge_shuffle_needs_torch(no_torch: None) -> None:
    sampler = ShardSampler(2**32, 2**20, 0)
    with pytest.raises(ValueError, match="dataset: 4294967296 samples are shuffled by torch only"):
        iter(sampler)


def test_positions_count_from_the_state_that_was_loaded() -> None:
    """On another number of ranks a shard begins there; its indices are not those since the epoch began."""
    four = ShardSampler(100, 4, 0, seed=1)
    two = ShardSampler(100, 2, 0, seed=1)
    two.load_state_dict(four.state_dict(position=10))
    assert two.state_dict(position=0)["seen"] == 40
    shard = two.batches(5)
    next(shard)
    assert two.state_dict(position=0)["seen"] == 40
    assert two.state_dict(position=5) == two.state_dict()
    with pytest.raises(ValueError, match="position: expected less than 31, got 31"):
        two.state_dict(position=31)
    two.set_epoch(1)
    assert two.state_dict(position=5)["seen"] == 10
