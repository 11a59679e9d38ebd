"""Which samples each worker sees: torch's DistributedSampler without torch, also from the middle of an epoch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sized
from types import FrameType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sgdcore.distributed._checks import check_count, integer
from sgdcore.distributed.groups import as_process_group


class ShardSampler:
    """The indices of this rank's samples, epoch after epoch: those of torch's DistributedSampler.

    With N ranks and n samples, rank r takes the entries r, r + N, r + 2 N, ... of an order of all samples that is
    shuffled by ``seed + epoch``. So that every rank gets as many, the order is continued from its beginning, or with
    ``drop_last`` cut. torch need not be installed for fewer than 214,748,364 samples. Where it has been imported, the
    sampler is an instance of DistributedSampler, so that Lightning and others do not divide its samples again.
    accelerate divides every loader that it prepares, and needs ``num_replicas=1, rank=0``.

    Args:
        dataset: anything with a length, or the length.
        num_replicas, rank: the number of ranks, and which of them this is. Default: those of `group`.
        shuffle: shuffle anew each epoch; without it the order is 0, 1, 2, ...
        seed: start of the random numbers; the same on every rank.
        drop_last: leave out the last ``n % num_replicas`` samples of the order, instead of repeating the first.
        group: see `as_process_group`.

    Raises:
        TypeError, ValueError: if an argument is invalid.
        RuntimeError: if no process group is initialised; from iteration, if a framework would divide the shard again.
    """

    def __init__(
        self,
        dataset: Sized | int,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        group: Any = None,
    ) -> None:
        length: Any = dataset if integer(dataset) is not None else len(dataset)  # type: ignore[arg-type]
        self.dataset, self._length = dataset, check_count("dataset", length, 0)
        if num_replicas is None or rank is None:
            ranks = as_process_group(group)
            num_replicas = ranks.size if num_replicas is None else num_replicas
            rank = ranks.rank if rank is None else rank
        self.num_replicas = check_count("num_replicas", num_replicas, 1)
        self.rank = check_count("rank", rank, 0, below=self.num_replicas)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        self.seed = check_count("seed", seed, 0, below=2**63)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Choose the epoch, and with it the order, of the next iteration.

        That leaves out the first `seen` samples of the order, which all ranks together have been given before, however
        many ranks there were, and yields this rank's part of the rest.
        """
        self.epoch = check_count("epoch", epoch, 0, below=2**63)
        self._seen = check_count("seen", seen, 0)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance goes by beside the type: a subclass of torch's sampler, too, as frameworks ask for it."""
        data, kind = sys.modules.get("torch.utils.data"), cast(Any, type(self))
        return kind if data is None else _torch_class(kind, data.DistributedSampler)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),), self.__getstate__()

    @property
    def num_samples(self) -> int:
        """Indices that each rank gets in a whole epoch."""
        return self._samples_after(0)

    @property
    def total_size(self) -> int:
        """Indices that all ranks together get in a whole epoch."""
        return self.num_samples * self.num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        return (int(batch[0]) for batch in self.batches(1))

    def batches(self, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Yield the indices in arrays of `batch_size`, the last one perhaps shorter, to index arrays with."""
        batch_size = check_count("batch_size", batch_size, 1)
        self._check_undivided()
        seen, self._seen = self._seen, 0
        turns = np.arange(self._samples_after(seen))
        shard = (seen + self.rank + self.num_replicas * turns) % max(1, self._length)
        if self.shuffle and len(turns):
            shard = _permutation(self._length, self.seed + self.epoch)[shard]
        return (shard[i : i + batch_size] for i in range(0, len(shard), batch_size))

    def _check_undivided(self) -> None:
        """Refuse to be iterated by something that gives each rank a part of what it gets."""
        frame: FrameType | None = sys._getframe() if self.num_replicas > 1 else None
        data, loaders = map(sys.modules.get, ("torch.utils.data", "accelerate.data_loader"))
        while frame is not None:
            caller, ranks = frame.f_locals.get("self"), 1
            if (
                caller is not self
                and data is not None
                and isinstance(caller, data.DistributedSampler)
            ):
                ranks = caller.num_replicas  # such as Lightning's DistributedSamplerWrapper
            elif loaders is not None and isinstance(caller, loaders.BatchSamplerShard):
                ranks = caller.num_processes
            elif loaders is not None and isinstance(caller, loaders.DataLoaderDispatcher):
                ranks = caller.state.num_processes
            if ranks > 1:
                kind = f"{type(caller).__module__}.{type(caller).__qualname__}"
                raise RuntimeError(
                    f"ShardSampler: {kind} divides a sampler's samples among the ranks, and this one has those of rank "
                    f"{self.rank} of {self.num_replicas} only. Construct the sampler with num_replicas=1, rank=0"
                )
            frame = frame.f_back

    def _samples_after(self, seen: int) -> int:
        """Indices left for each rank when the first `seen` of the order are done."""
        left = max(0, self._length - seen)
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)


@functools.cache
def _torch_class(kind: type[ShardSampler], torch_sampler: type) -> type:
    """Return a class like `kind` that is torch's, too; who calls it gets a `kind`."""
    own = {name: getattr(kind, name) for name in ("__doc__", "__module__", "__qualname__")}
    own["__new__"] = lambda _, *args, **options: kind(*args, **options)
    return type(kind.__name__, (kind, torch_sampler), own)


def _permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Return what ``torch.randperm(count, generator=torch.Generator().manual_seed(seed))`` does."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        return np.asarray(torch.randperm(count, generator=torch.Generator().manual_seed(seed)))
    # torch (utils/data/distributed.py) seeds the same Mersenne Twister as NumPy's RandomState, with the lower 32 bits,
    # and swaps place i with one of those from i on, chosen by the remainder of one 32-bit draw.
    draws = np.random.RandomState(seed % 2**32).randint(2**32, size=count - 1, dtype=np.uint32)
    others = np.arange(count - 1) + draws % np.arange(count, 1, -1)
    shuffled = list(range(count))
    for i, j in enumerate(others.tolist()):
        shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return np.array(shuffled, np.int64)
