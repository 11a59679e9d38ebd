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
    sampler.set_epoch(4, seen=6)
    rest = list(copy.copy(sampler))
    assert len(rest) == 7
    for other in copied(sampler):
        assert type(other) is type(sampler)
        assert vars(other) == vars(sampler)
        assert list(other) == rest
    assert vars(sampler)["_seen"] == 6, "a copy's epoch is its own"


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
        r"^ShardSampler: test_shard_sampler.Dividing divides a sampler's samples among the ranks, "
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
def test_goes_on_within_an_epoch(
    n: int, replicas: int, seed: int, drop_last: bool, data: st.DataObject
) -> None:
    sampler = ShardSampler(n, replicas, 0, seed=seed, drop_last=drop_last)
    whole = shards(sampler, 4)
    done = data.draw(st.integers(0, len(whole)), "steps")
    sampler.set_epoch(4, seen=done * replicas)
    assert list(sampler) == whole[done:]
    assert list(sampler) == whole, "only the next iteration is shortened"
    sampler.set_epoch(4, seen=done * replicas)
    assert shards(sampler, 5) == shards(ShardSampler(n, replicas, 0, True, seed, drop_last), 5)


@given(n=sizes, before=ranks, after=ranks, seed=seeds)
def test_goes_on_with_another_number_of_ranks(n: int, before: int, after: int, seed: int) -> None:
    first = [ShardSampler(n, before, rank, seed=seed) for rank in range(before)]
    steps = len(first[0]) // 2
    seen = [index for sampler in first for index in list(sampler)[:steps]]
    for rank in range(after):
        sampler = ShardSampler(n, after, rank, seed=seed)
        sampler.set_epoch(0, seen=steps * before)
        seen += sampler
    counts = np.bincount(seen, minlength=n)
    assert (counts >= 1).all(), "every sample is seen"
    assert len(seen) - n < after, "and no more repeated than the last ranks need"


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
            "object of type 'list_iterator' has no len",
        ),
        ({"dataset": -1}, ValueError, "dataset: expected at least 0, got -1"),
        ({"dataset": True}, TypeError, "object of type 'bool' has no len"),
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


def test_bad_batch_size_and_epoch() -> None:
    sampler = ShardSampler(10, 2, 0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        sampler.batches(0)
    with pytest.raises(TypeError, match="epoch: expected an integer, got None"):
        sampler.set_epoch(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seen: expected at least 0, got -1"):
        sampler.set_epoch(0, seen=-1)
