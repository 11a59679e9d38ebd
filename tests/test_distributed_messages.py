"""The mean by messages, between threads instead of processes; messages come as early or as late as they may."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgdcore.distributed import _messages
from sgdcore.distributed._messages import MOST_AHEAD, MessageMean

SECONDS = 20.0


def numbers(array: Any) -> Any:
    """The same memory as an array of NumPy's."""
    return array.numpy() if isinstance(array, torch.Tensor) else array


class Post:
    """What carries the messages of all ranks."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: dict[tuple[int, int, int], deque[Sent]] = defaultdict(deque)
        self.fails = False
        self.abandoned = 0

    def wait_until(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.fails or condition(), SECONDS)
            if self.fails:
                raise RuntimeError("gone")


class Sent:
    """Its arrays are read when somebody needs them: at the latest when the sender waits."""

    def __init__(self, post: Post, arrays: Sequence[Any]) -> None:
        self.post, self.arrays = post, arrays
        self.contents: Any = None
        self.done = False

    def read(self) -> Any:
        with self.post.changed:
            if self.contents is None:
                self.contents = [numbers(array).copy() for array in self.arrays]
            return self.contents

    def wait(self) -> None:
        self.read()
        self.done = True

    def abandon(self) -> None:
        self.post.abandoned += 1


class Received:
    """Its arrays hold anything until the receiver has waited."""

    def __init__(self, post: Post, key: tuple[int, int, int], arrays: Sequence[Any]) -> None:
        self.post, self.key, self.arrays = post, key, arrays
        self.done = False
        for array in arrays:
            array[...] = np.nan

    def wait(self) -> None:
        queue = self.post.sent[self.key]
        self.post.wait_until(lambda: queue)
        for array, contents in zip(self.arrays, queue.popleft().read(), strict=True):
            assert len(contents) == len(array)
            numbers(array)[...] = contents
        self.done = True

    def abandon(self) -> None:
        self.post.abandoned += 1


class Rank:
    """One of several threads, as a process group sees them."""

    def __init__(self, post: Post, rank: int, size: int) -> None:
        self.post, self.rank, self.size = post, rank, size
        self.messages: list[Sent | Received] = []

    def begin(self, message: Sent | Received) -> None:
        """No memory is in two messages at once, unless both only read it."""
        for other in self.messages:
            if not (other.done or (isinstance(message, Sent) and isinstance(other, Sent))):
                for a, b in product(message.arrays, other.arrays):
                    assert not np.may_share_memory(numbers(a), numbers(b))
        self.messages.append(message)

    def open_messages(self) -> None:
        pass

    def close_messages(self) -> None:
        pass

    def combine(self, array: Any, op: str = "sum") -> None:
        raise NotImplementedError

    def break_off(self) -> None:
        pass

    def send(self, arrays: Sequence[Any], target: int, tag: int) -> Sent:
        assert 0 <= tag < 1 << 15
        message = Sent(self.post, arrays)
        self.begin(message)
        with self.post.changed:
            self.post.sent[self.rank, target, tag].append(message)
            self.post.changed.notify_all()
        return message

    def receive(self, arrays: Sequence[Any], source: int, tag: int) -> Received:
        message = Received(self.post, (source, self.rank, tag), arrays)
        self.begin(message)
        return message


def on_ranks(size: int, work: Any) -> list[BaseException | None]:
    """Call work(rank) in a thread for each; returns what they raised."""
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:  # noqa: BLE001 (for the caller to look at)
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
        assert not thread.is_alive()
    return errors


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 50), min_size=1, max_size=4),
            st.sampled_from(["float32", "float64"]),
        ),
        max_size=30,
    ),
    st.integers(2, 5),
    st.sampled_from(["numpy", "torch"]),
    st.sampled_from([100, 1000, 1 << 20]),
    st.integers(0, 9),
)
def test_the_mean(
    layout: list[tuple[list[int], str]], ranks: int, kind: str, ahead: int, seed: int
) -> None:
    """Exact sums, so that there is one right answer; twice, through the same memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_messages, "AHEAD_BYTES", ahead)
        check_mean(layout, ranks, kind, seed)


def check_mean(layout: list[tuple[list[int], str]], ranks: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [
        [[rng.integers(-99, 99, n).astype(dtype) for n in lengths] for lengths, dtype in layout]
        for _ in range(ranks)
    ]
    wrap: Any = torch.from_numpy if kind == "torch" else np.asarray
    arrays = [[[wrap(array.copy()) for array in message] for message in own] for own in values]
    post = Post()
    loaded = [[0] * len(layout) for _ in range(ranks)]
    taken = [[0] * len(layout) for _ in range(ranks)]
    means = [MessageMean(own, rank, ranks) for rank, own in enumerate(arrays)]

    def count(counts: list[int], number: int) -> None:
        counts[number] += 1

    def work(rank: int) -> None:
        group = Rank(post, rank, ranks)
        for again in range(2):
            if again:
                for array, value in zip(chain(*arrays[rank]), chain(*values[rank]), strict=True):
                    numbers(array)[...] = value
            means[rank].run(
                group,  # type: ignore[arg-type]
                lambda number: count(loaded[rank], number),
                lambda number: count(taken[rank], number),
            )
            assert all(message.done for message in group.messages)

    assert on_ranks(ranks, work) == [None] * ranks
    for own in arrays:
        for array, *each in zip(*(chain(*of_rank) for of_rank in [own, *values]), strict=True):
            mean = sum(each) / each[0].dtype.type(ranks)
            assert numbers(array).tobytes() == mean.tobytes()
    assert loaded == taken == [[2] * len(layout)] * ranks
    assert not any(post.sent.values())


@pytest.mark.parametrize("after", range(0, 24, 3))
def test_after_a_failure_nothing_is_under_way(after: int) -> None:
    """Also where it is the user who interrupts."""
    ranks, post = 3, Post()
    groups = [Rank(post, rank, ranks) for rank in range(ranks)]
    calls = 0

    def fail(number: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            with post.changed:
                post.fails = True
                post.changed.notify_all()
            raise KeyboardInterrupt

    def work(rank: int) -> None:
        messages = [[np.ones(4, np.float32)] for _ in range(4 * MOST_AHEAD)]
        mean = MessageMean(messages, rank, ranks)
        load = fail if rank == 0 else lambda number: None
        mean.run(groups[rank], load, lambda number: None)  # type: ignore[arg-type]

    errors = on_ranks(ranks, work)
    interrupted = after < 4 * MOST_AHEAD
    assert isinstance(errors[0], KeyboardInterrupt) == interrupted
    if interrupted:
        failed = [error is not None for error in errors]
        assert all(failed)
        assert post.abandoned == sum(len(group.messages) for group in groups)
