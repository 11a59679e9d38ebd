"""Which samples each worker sees: torch's DistributedSampler without torch, resumable within an epoch.

The order of an epoch depends on (number of samples, seed, epoch) alone and is the same on every rank; the ranks take
turns in it. What has been seen is therefore the beginning of that order, whatever the number of ranks, and one number
says how far an epoch has come.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sized
from types import FrameType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sgdcore.distributed._checks import check_count, integer
from sgdcore.distributed.groups import as_process_group

# Up to here torch draws 32 bits for each index, as `_permutation` does; above, 64.
_MAX_WITHOUT_TORCH = (2**32 - 1) // 20


class ShardSampler:
    """The indices of this rank's samples, epoch after epoch: those of torch's DistributedSampler.

    With N ranks and n samples, rank r takes the entries r, r + N, r + 2 N, ... of an order of all samples that is
    shuffled by ``seed + epoch``. So that every rank gets as many, the order is continued from its beginning, or with
    ``drop_last`` cut. Same arguments, same indices as torch.utils.data.DistributedSampler, also where torch is not
    installed (for fewer than 214,748,364 samples).

    A torch DataLoader takes it as ``sampler=``. Without torch, iterate over it, or over `batches`. Where torch has been
    imported, the sampler is an instance of DistributedSampler, so that Lightning and others do not divide its samples
    again. accelerate divides every loader that it prepares, and needs ``num_replicas=1, rank=0``.

    Args:
        dataset: anything with a length, or the length.
        num_replicas: number of ranks. Default: that of `group`.
        rank: which of them this is, from 0. Default: that in `group`.
        shuffle: shuffle anew each epoch; without it the order is 0, 1, 2, ...
        seed: start of the random numbers; the same on every rank.
        drop_last: leave out the last ``n % num_replicas`` samples of the order, instead of repeating the first.
        group: what `as_process_group` takes, asked only if `num_replicas` or `rank` is not given.

    Raises:
        TypeError, ValueError: if an argument is invalid.
        RuntimeError: if no process group is initialised; from iteration, if a framework would divide the shard among
            the ranks once more.

    Example:
        >>> sampler = ShardSampler(10, num_replicas=4, rank=1, shuffle=False)
        >>> list(sampler)
        [1, 5, 9]
        >>> [batch.tolist() for batch in sampler.batches(2)]
        [[1, 5], [9]]
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
        self.dataset, self._length = dataset, _length(dataset)
        if num_replicas is None or rank is None:
            ranks = as_process_group(group)
            num_replicas = ranks.size if num_replicas is None else num_replicas
            rank = ranks.rank if rank is None else rank
        self.num_replicas = check_count("num_replicas", num_replicas, 1)
        self.rank = check_count("rank", rank, 0, below=self.num_replicas)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        self.seed, self.epoch = check_count("seed", seed, 0, below=2**63), 0
        self._rewind(0)

    def _rewind(self, seen: int) -> None:
        """Let the next iteration begin after the first `seen` of the epoch's order."""
        self._start = seen  # of the next iteration
        self._base = seen  # where this rank's shard begins in the order
        self._seen = seen  # what all ranks together have been given

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance goes by beside the type: a subclass of torch's sampler, too, as frameworks ask for it."""
        data, kind = sys.modules.get("torch.utils.data"), cast(Any, type(self))
        return kind if data is None else _torch_class(kind, data.DistributedSampler)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (type(self),), self.__getstate__()

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
        start = self._start
        shard = self._shard(start)
        self._seen, self._base, self._start = start, start, 0

        def generate() -> Iterator[NDArray[np.int64]]:
            for first in range(0, len(shard), batch_size):
                batch = shard[first : first + batch_size]
                self._seen = start + (first + len(batch)) * self.num_replicas
                yield batch

        return generate()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order, of the next iteration.

        After `load_state_dict` the epoch that was loaded goes on where it was; another one starts from its beginning.
        """
        epoch = check_count("epoch", epoch, 0, below=2**63)
        if epoch != self.epoch:
            self._rewind(0)
        self.epoch = epoch

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Return where the epoch stands: the same on every rank that is as far.

        Args:
            position: indices of this rank's shard that have been trained on since the epoch began, or since the state
                that was loaded within it. Default: those handed out. A DataLoader asks for batches ahead of their use,
                so count for it.
        """
        seen = self._seen
        if position is not None:
            position = check_count("position", position, 0, self._samples_after(self._base) + 1)
            seen = self._base + position * self.num_replicas
        own = {"length": self._length, "seed": self.seed, "shuffle": self.shuffle}
        return {**own, "epoch": self.epoch, "seen": seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was taken; the next iteration yields the rest of that epoch.

        The number of ranks may have changed since: what is left of the order is shared among those there are.

        Raises:
            TypeError, ValueError: if it is no state of a sampler with this length, seed and shuffle.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        mine = self.state_dict()
        if missing := mine.keys() - state_dict.keys():
            raise ValueError(f"state_dict: lacks {sorted(missing)}")
        for key in ("length", "seed", "shuffle"):
            if state_dict[key] != mine[key]:
                theirs, own = state_dict[key], mine[key]
                raise ValueError(
                    f"state_dict[{key!r}]: the state is of a sampler with {theirs!r}, this one has {own!r}"
                )
        epoch = check_count("state_dict['epoch']", state_dict["epoch"], 0, below=2**63)
        self._rewind(check_count("state_dict['seen']", state_dict["seen"], 0))
        self.epoch = epoch

    def _check_undivided(self) -> None:
        """Refuse to be iterated by something that gives each rank a part of what it gets."""
        frame: FrameType | None = sys._getframe() if self.num_replicas > 1 else None
        while frame is not None:
            caller = frame.f_locals.get("self")
            if caller is not self and _divides(caller):
                kind = f"{type(caller).__module__}.{type(caller).__qualname__}"
                raise RuntimeError(
                    f"ShardSampler: {kind} divides the samples of a sampler among the ranks, and this one has those of "
                    f"rank {self.rank} of {self.num_replicas} only, so that some would never be seen. Construct the "
                    "sampler with num_replicas=1, rank=0"
                )
            frame = frame.f_back

    def _samples_after(self, seen: int) -> int:
        """Indices left for each rank when the first `seen` of the order are done."""
        left = max(0, self._length - seen)
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def _shard(self, seen: int) -> NDArray[np.int64]:
        """Return what this rank still has to do when the first `seen` of the order are done."""
        turns = np.arange(self._samples_after(seen))
        places = (seen + self.rank + self.num_replicas * turns) % max(1, self._length)
        if not (self.shuffle and len(turns)):
            return places
        return _permutation(self._length, self.seed + self.epoch)[places]


@functools.cache
def _torch_class(kind: type[ShardSampler], torch_sampler: type) -> type:
    """Return a class like `kind` that is torch's, too; who calls it gets a `kind`."""
    own = {name: getattr(kind, name) for name in ("__doc__", "__module__", "__qualname__")}
    own["__new__"] = lambda _, *args, **options: kind(*args, **options)
    return type(kind.__name__, (kind, torch_sampler), own)


def _new(kind: type[ShardSampler]) -> ShardSampler:
    """Make what a copied or unpickled sampler's state is put into."""
    return kind.__new__(kind)


def _divides(caller: Any) -> bool:
    """Return whether an object gives each rank a part of what it takes from a sampler."""
    data, loaders = map(sys.modules.get, ("torch.utils.data", "accelerate.data_loader"))
    if data is not None and isinstance(caller, data.DistributedSampler):
        return bool(caller.num_replicas > 1)  # such as Lightning's DistributedSamplerWrapper
    if loaders is not None and isinstance(caller, loaders.BatchSamplerShard):
        return bool(caller.num_processes > 1)
    if loaders is not None and isinstance(caller, loaders.DataLoaderDispatcher):
        return bool(caller.state.num_processes > 1)
    return False


def _permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Return what ``torch.randperm(count, generator=torch.Generator().manual_seed(seed))`` does."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        return np.asarray(torch.randperm(count, generator=torch.Generator().manual_seed(seed)))
    if count >= _MAX_WITHOUT_TORCH:
        advice = "import torch, or pass shuffle=False"
        raise ValueError(f"dataset: {count} samples are shuffled by torch only; {advice}")
    # torch (utils/data/distributed.py) seeds the same Mersenne Twister as NumPy's RandomState, with the lower 32 bits,
    # and swaps place i with one of those from i on, chosen by the remainder of one 32-bit draw.
    draws = np.random.RandomState(seed % 2**32).randint(2**32, size=count - 1, dtype=np.uint32)
    others = np.arange(count - 1) + draws % np.arange(count, 1, -1)
    shuffled = list(range(count))
    for i, j in enumerate(others.tolist()):
        shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return np.array(shuffled, np.int64)


def _length(dataset: Any) -> int:
    """Return a data set's length, or the integer that stands for one."""
    if integer(dataset) is not None:
        return check_count("dataset", dataset, 0)
    try:
        return len(dataset)
    except TypeError:
        kind = type(dataset).__name__
        raise TypeError(
            f"dataset: expected something with a length, or an integer, got {kind}"
        ) from None
