"""The mean over the ranks of one machine: a direct reduce-scatter, then an all-gather, pipelined over slices.

Direct: each rank owns some of the slices, about 1 / N of all bytes, and every other rank sends it their values, several
slices in a message, without a ring or a tree between. The owner adds them to its own and divides (the reduce-scatter),
then sends the mean to all, who receive it where their own values were (the all-gather). Pipelined: while the mean of
some slices is formed, others are on their way. N ranks send and receive as much as in a ring, 2 (N - 1) / N of all
bytes each; all get the same bits, whatever the engine.

Where no network is between the ranks, averaging is work for the processors, and an engine's all-reduce does more of it
than has to be done: a sum goes round in many small steps, or through memory that is allocated anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from sgdcore.distributed._flat import array_namespace, divide_into, dtype_name, empty, item_bytes
from sgdcore.distributed.groups import Message, PeerGroup

__all__ = ["MessageMean", "batches", "share"]

# In a turn every rank forms the mean of one batch of what it owns. So many bytes of these are under way at once, about.
AHEAD_BYTES = 24 << 20
# The most turns under way at once, however small their batches are.
MOST_AHEAD = 6
# The first of our own tags, apart from the small ones that others use.
FIRST_TAG = 16_384
# How many there are, after which they come again: every MPI allows tags up to 32,767.
TAGS = 8_192


def share(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the positions of the slices that each rank owns: the sums of their sizes are about equal."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = totals.index(min(totals))
        owned[least].append(number)
        totals[least] += sizes[number]
    return owned


def batches(own: Sequence[int], sizes: Sequence[int], dtypes: Sequence[str]) -> list[list[int]]:
    """Return what a rank owns in batches of one dtype, each together no larger than the largest array of all."""
    most = max(sizes, default=0)
    grouped: list[list[int]] = []
    room = 0
    for number in sorted(own, key=lambda i: dtypes[i]):
        if not grouped or sizes[number] > room or dtypes[number] != dtypes[grouped[-1][0]]:
            grouped.append([])
            room = most
        grouped[-1].append(number)
        room -= sizes[number]
    return grouped


class MessageMean:
    """Replaces arrays by their mean over all ranks.

    Args:
        arrays: flat arrays in the CPU's memory; the same sizes and dtypes on all ranks.
        rank: this one.
        ranks: how many there are.
    """

    def __init__(self, arrays: Sequence[Any], rank: int, ranks: int) -> None:
        self._arrays, self._rank, self._ranks = arrays, rank, ranks
        # Each begins with another one, so that they do not all send to one at once.
        self._others = [(rank + i) % ranks for i in range(1, ranks)]
        dtypes = [dtype_name(array.dtype) for array in arrays]
        bytes_of = [len(a) * item_bytes(name) for a, name in zip(arrays, dtypes, strict=True)]
        self._batches = [batches(own, bytes_of, dtypes) for own in share(bytes_of, ranks)]
        count = sum(map(len, self._batches))
        self._ahead = min(MOST_AHEAD, max(1, AHEAD_BYTES * count // max(1, sum(bytes_of))))
        # The others' values of an own batch, in memory that is free again so many turns later.
        mine = self._batches[rank]
        largest: dict[tuple[int, str], int] = {}
        for turn, batch in enumerate(mine):
            key = turn % self._ahead, dtypes[batch[0]]
            largest[key] = max(largest.get(key, 0), sum(len(arrays[i]) for i in batch))
        memory = {
            key: [empty(arrays[0], size, key[1]) for _ in self._others]
            for key, size in largest.items()
        }
        self._received = [
            [self._places(batch, place) for place in memory[turn % self._ahead, dtypes[batch[0]]]]
            for turn, batch in enumerate(mine)
        ]

    def _places(self, batch: Sequence[int], memory: Any) -> list[Any]:
        """Return room for arrays like those of a batch, one behind the other."""
        ends = list(accumulate(len(self._arrays[i]) for i in batch))
        return [memory[start:stop] for start, stop in pairwise([0, *ends])]

    def run(
        self, group: PeerGroup, load: Callable[[int], None], take: Callable[[int], None]
    ) -> None:
        """Average once.

        Args:
            group: the ranks.
            load: called before what array number i holds is sent or added to.
            take: called when it holds the mean.

        Raises:
            Exception: the engine's, if a rank is gone; some of the arrays are then overwritten.
        """
        messages: list[Message] = []
        group.open_messages()
        try:
            # A rank whose user has NumPy raise at an overflow would leave the others waiting, who form other means.
            with np.errstate(all="ignore"):
                self._run(group, load, take, messages)
        except BaseException:
            # Whatever it was, nothing may be written to the arrays any more.
            for message in messages:
                message.abandon()
            raise

    def _run(
        self,
        group: PeerGroup,
        load: Callable[[int], None],
        take: Callable[[int], None],
        messages: list[Message],
    ) -> None:
        def send(batch: Sequence[int], target: int, is_mean: bool) -> Message:
            own = [self._arrays[i] for i in batch]
            messages.append(group.send(own, target, _tag(batch, is_mean)))
            return messages[-1]

        def receive(
            places: Sequence[Any], batch: Sequence[int], source: int, is_mean: bool
        ) -> Message:
            messages.append(group.receive(places, source, _tag(batch, is_mean)))
            return messages[-1]

        mine = self._batches[self._rank]
        turns = max(map(len, self._batches))
        arriving: list[list[Message]] = []
        leaving: list[list[tuple[list[int], int, Message]]] = []
        means: list[tuple[list[int], Message]] = []
        sent: list[Message] = []
        for turn in range(turns + self._ahead - 1):
            # This turn: what is mine comes in, what is the others' goes out.
            if turn < len(mine):
                places = zip(self._received[turn], self._others, strict=True)
                arriving.append([receive(own, mine[turn], rank, False) for own, rank in places])
            if turn < turns:
                leaving.append([])
                for rank in self._others:
                    for batch in self._batches[rank][turn : turn + 1]:
                        for number in batch:
                            load(number)
                        leaving[turn].append((batch, rank, send(batch, rank, False)))
            # The turn that is due, an earlier one: what is mine is there by now.
            due = turn - (self._ahead - 1)
            if 0 <= due < len(mine):
                self._form_mean(due, arriving[due], load)
                sent += [send(mine[due], rank, True) for rank in self._others]
                for number in mine[due]:
                    take(number)
            if due >= 0:
                for batch, rank, message in leaving[due]:
                    message.wait()  # the mean comes to where it lay
                    own = [self._arrays[i] for i in batch]
                    means.append((batch, receive(own, batch, rank, True)))
        for batch, message in means:
            message.wait()
            for number in batch:
                take(number)
        for message in sent:
            message.wait()

    def _form_mean(self, turn: int, arriving: list[Message], load: Callable[[int], None]) -> None:
        batch = self._batches[self._rank][turn]
        means = [self._arrays[i] for i in batch]
        for number in batch:
            load(number)
        for message, places in zip(arriving, self._received[turn], strict=True):
            message.wait()
            for mean, received in zip(means, places, strict=True):
                array_namespace(mean).add(mean, received, out=mean)
        for mean in means:
            divide_into(mean, mean, self._ranks)


def _tag(batch: Sequence[int], is_mean: bool) -> int:
    """Return a message's tag. Where tags come again, messages are told apart by their order, the same on both sides."""
    return FIRST_TAG + (2 * batch[0] + is_mean) % TAGS
