"""The mean over the ranks of one machine: a direct reduce-scatter, then an all-gather, pipelined over messages.

Direct: each rank owns every N-th message, about 1 / N of all bytes, and every other rank sends it its values, without a
ring or a tree between. The owner adds them to its own and divides (the reduce-scatter), then sends the mean to all, who
receive it where their own values were (the all-gather). Pipelined: while one mean is formed, other messages are on
their way. N ranks send and receive as much as in a ring, 2 (N - 1) / N of all bytes each; all get the same bits,
whatever the engine.

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

__all__ = ["MessageMean"]

# In a turn every rank forms the mean of one message that it owns. So many bytes of these are under way at once, about.
AHEAD_BYTES = 24 << 20
# The most turns under way at once, however small the messages are.
MOST_AHEAD = 6
# The first of our own tags, apart from the small ones that others use.
FIRST_TAG = 16_384
# How many there are, after which they come again: every MPI allows tags up to 32,767.
TAGS = 8_192


class MessageMean:
    """Replaces arrays by their mean over all ranks.

    Args:
        messages: the arrays, flat and in the CPU's memory, grouped as they travel together, those of a group of one
            dtype; the same sizes and dtypes on all ranks.
        rank: this one.
        ranks: how many there are.
    """

    def __init__(self, messages: Sequence[Sequence[Any]], rank: int, ranks: int) -> None:
        self._messages, self._rank, self._ranks = messages, rank, ranks
        # Each begins with another one, so that they do not all send to one at once.
        self._others = [(rank + i) % ranks for i in range(1, ranks)]
        sizes = [sum(map(len, arrays)) for arrays in messages]
        dtypes = [dtype_name(arrays[0].dtype) for arrays in messages]
        total = sum(n * item_bytes(name) for n, name in zip(sizes, dtypes, strict=True))
        self._ahead = min(MOST_AHEAD, max(1, AHEAD_BYTES * len(messages) // max(1, total)))
        # The others' values of an own message, in memory that is free again so many turns later.
        largest: dict[tuple[int, str], int] = {}
        for turn, number in enumerate(self._owned(rank)):
            key = turn % self._ahead, dtypes[number]
            largest[key] = max(largest.get(key, 0), sizes[number])
        memory = {
            key: [empty(messages[0][0], size, key[1]) for _ in self._others]
            for key, size in largest.items()
        }
        self._received = [
            [_places(messages[i], place) for place in memory[turn % self._ahead, dtypes[i]]]
            for turn, i in enumerate(self._owned(rank))
        ]

    def _owned(self, rank: int) -> range:
        """Return the numbers of the messages whose mean a rank forms, in order of its turns."""
        return range(rank, len(self._messages), self._ranks)

    def run(
        self, group: PeerGroup, load: Callable[[int], None], take: Callable[[int], None]
    ) -> None:
        """Average once.

        Args:
            group: the ranks.
            load: called before what message number i holds is sent or added to.
            take: called when it holds the mean.

        Raises:
            Exception: the engine's, if a rank is gone; some of the arrays are then overwritten.
        """
        under_way: list[Message] = []
        group.open_messages()
        try:
            # A rank whose user has NumPy raise at an overflow would leave the others waiting, who form other means.
            with np.errstate(all="ignore"):
                self._run(group, load, take, under_way)
                group.close_messages()
        except BaseException:
            group.break_off()
            # Whatever it was, nothing may be written to the arrays any more.
            for message in under_way:
                message.abandon()
            raise

    def _run(
        self,
        group: PeerGroup,
        load: Callable[[int], None],
        take: Callable[[int], None],
        under_way: list[Message],
    ) -> None:
        def send(number: int, target: int, is_mean: bool) -> Message:
            under_way.append(group.send(self._messages[number], target, _tag(number, is_mean)))
            return under_way[-1]

        def receive(arrays: Sequence[Any], number: int, source: int, is_mean: bool) -> Message:
            under_way.append(group.receive(arrays, source, _tag(number, is_mean)))
            return under_way[-1]

        mine = self._owned(self._rank)
        turns = len(self._owned(0))
        arriving: list[list[Message]] = []
        leaving: list[list[tuple[int, int, Message]]] = []
        means: list[tuple[int, Message]] = []
        sent: list[Message] = []
        for turn in range(turns + self._ahead - 1):
            # This turn: what is mine comes in, what is the others' goes out.
            if turn < len(mine):
                places = zip(self._received[turn], self._others, strict=True)
                arriving.append([receive(a, mine[turn], rank, False) for a, rank in places])
            if turn < turns:
                leaving.append([])
                for rank in self._others:
                    for number in self._owned(rank)[turn : turn + 1]:
                        load(number)
                        leaving[turn].append((number, rank, send(number, rank, False)))
            # The turn that is due, an earlier one: what is mine is there by now.
            due = turn - (self._ahead - 1)
            if 0 <= due < len(mine):
                load(mine[due])
                self._form_mean(due, arriving[due])
                sent += [send(mine[due], rank, True) for rank in self._others]
                take(mine[due])
            if due >= 0:
                for number, rank, message in leaving[due]:
                    message.wait()  # the mean comes to where it lay
                    means.append((number, receive(self._messages[number], number, rank, True)))
        for number, message in means:
            message.wait()
            take(number)
        for message in sent:
            message.wait()

    def _form_mean(self, turn: int, arriving: list[Message]) -> None:
        means = self._messages[self._owned(self._rank)[turn]]
        for message, received in zip(arriving, self._received[turn], strict=True):
            message.wait()
            for mean, values in zip(means, received, strict=True):
                array_namespace(mean).add(mean, values, out=mean)
        for mean in means:
            divide_into(mean, mean, self._ranks)


def _places(arrays: Sequence[Any], memory: Any) -> list[Any]:
    """Return room for others of these sizes, one behind the other."""
    ends = list(accumulate(map(len, arrays)))
    return [memory[start:stop] for start, stop in pairwise([0, *ends])]


def _tag(number: int, is_mean: bool) -> int:
    """Return a message's tag. Where tags come again, messages are told apart by their order, the same on both sides."""
    return FIRST_TAG + (2 * number + is_mean) % TAGS
