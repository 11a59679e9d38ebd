"""What ranks have to agree on, and how they tell each other: layouts, errors, settings.

All ranks call these functions together.
"""

from __future__ import annotations

import hashlib
import pickle
import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sgdcore.distributed._flat import empty, is_torch, numbers
from sgdcore.distributed.groups import ProcessGroup, is_peer_group

if TYPE_CHECKING:
    from sgdcore.distributed._views import Views

__all__ = [
    "add_up",
    "check_failures",
    "check_fingerprints",
    "compare",
    "fingerprint",
    "machine_fingerprint",
    "share_settings",
    "take_settings",
]

# The most that each rank sends to all, wherever they are: a network does not notice it.
FEW_BYTES = 16 << 10


def compare(group: ProcessGroup, like: Any, facts: dict[str, str]) -> None:
    """Raise on all ranks if they differ in something.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        facts: what has to be equal, by name.

    Raises:
        ValueError: naming it.
    """
    hashes = []
    for text in facts.values():
        number = fingerprint(text)
        hashes += [number, -number]
    extremes = numbers(like, hashes, "int64")
    _combine(group, extremes, "max")
    highest = [int(value) for value in extremes.tolist()]
    for i, (name, text) in enumerate(facts.items()):
        if highest[2 * i] != -highest[2 * i + 1]:
            found = _first_difference(group, like, text)
            raise ValueError(f"{name}: expected the same on all ranks, got {found}")


def _first_difference(group: ProcessGroup, like: Any, text: str) -> str:
    """Return the first line in which the text of the first rank that differs from rank 0 does so, and both versions."""
    (hashes,) = add_up(group, like, sums=[], per_rank=[fingerprint(text)])[1]
    other = next(rank for rank, number in enumerate(hashes) if number != hashes[0])
    versions = [
        _broadcast_bytes(group, like, text.encode(), rank).decode().split("\n")
        for rank in (0, other)
    ]
    for first, second in zip_longest(*versions, fillvalue="nothing"):
        if first != second:
            return f"on rank 0: {first}; on rank {other}: {second}"
    raise AssertionError("the texts are equal")


def fingerprint(text: str) -> int:
    """Return a hash that is the same in all processes, and a number that float64 holds."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def add_up(
    group: ProcessGroup, like: Any, sums: Iterable[float], per_rank: Sequence[float]
) -> tuple[list[float], list[list[float]]]:
    """Tell all ranks a few numbers of each, in one operation on float64.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        sums: numbers of this rank to be added up; as many on all ranks.
        per_rank: numbers of this rank that the others are to know one by one; as many on all ranks.

    Returns:
        The sums over all ranks; and for each number of `per_rank` the values on all ranks, in their order.
    """
    own = [float(value) for value in sums]
    # A rank's number in a place of its own, among zeros, is its sum.
    one_hot = [
        float(value) if rank == group.rank else 0.0
        for value in per_rank
        for rank in range(group.size)
    ]
    header = numbers(like, own + one_hot)
    _combine(group, header)
    totals = [float(value) for value in header.tolist()]
    starts = range(len(own), len(totals), group.size)
    return totals[: len(own)], [totals[start : start + group.size] for start in starts]


def _combine(group: ProcessGroup, array: Any, op: str = "sum") -> None:
    if array.nbytes <= FEW_BYTES and is_peer_group(group) and group.can_send(array):
        group.combine(array, op)
    else:
        group.all_reduce(array, op).wait()


@cache
def machine_fingerprint() -> int:
    """Return a fingerprint that processes have in common if they are on one machine, and in one container of it."""
    names = [platform.node()]
    with suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    return fingerprint("\n".join(names))


def check_fingerprints(everyone: Sequence[float]) -> None:
    """Raise a ValueError if ranks have laid out what they are about to average in different ways."""
    if min(everyone) != max(everyone):
        raise ValueError(
            "parameters: expected the same layout in memory on all ranks, and the same ones frozen; since they were "
            "wrapped, some ranks have changed that and others have not"
        )


def check_failures(
    group: ProcessGroup, like: Any, failures: Sequence[float], own: Exception | None
) -> None:
    """Raise on all ranks what the first of those that failed has to say.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        failures: for each rank whether it failed; the same on all.
        own: what this rank failed with.

    Raises:
        RuntimeError: naming the rank, and its error's type and text.
    """
    if not any(failures):
        return
    first = [failed > 0 for failed in failures].index(True)
    text = f"{type(own).__name__}: {own}".encode(errors="replace")
    told = _broadcast_bytes(group, like, text, first).decode()
    raise RuntimeError(f"rank {first} failed with {told}") from own


def _broadcast_bytes(group: ProcessGroup, like: Any, content: bytes, source: int) -> bytes:
    """Give all ranks the bytes of one of them."""
    size = numbers(like, [len(content)], "int64")
    group.broadcast(size, source).wait()
    count = int(size.tolist()[0])
    padded = -(-count // 8) * 8
    # Only the source's content counts; another rank's may be longer.
    words = np.frombuffer(content[:padded].ljust(padded, b"\0"), np.int64)
    array = empty(like, len(words), "int64")
    array[...] = sys.modules["torch"].from_numpy(words.copy()) if is_torch(like) else words
    group.broadcast(array, source).wait()
    received = array.cpu().numpy() if is_torch(array) else array
    return bytes(received.tobytes()[:count])


def share_settings(group: ProcessGroup, optimizer: Any, views: Views, source: int) -> Any:
    """Return one rank's hyperparameters, and what its optimizer keeps beside momentum, such as Adam's moments.

    Raises:
        TypeError: on all ranks, naming what pickle does not take.
    """
    content = _pickled_settings(optimizer, views) if group.rank == source else b""
    # From a rank of this program.
    settings = pickle.loads(_broadcast_bytes(group, views.flats[0], content, source))
    if isinstance(settings, TypeError):
        raise settings
    return settings


def _pickled_settings(optimizer: Any, views: Views) -> bytes:
    """Return what `share_settings` sends: the settings, or the error that all ranks raise."""
    hyper = [
        {k: v for k, v in each.items() if k not in ("params", "param_names")}
        for each in optimizer.param_groups
    ]
    kept = [_kept_of(optimizer, p) for p in views.parameters]
    try:
        return pickle.dumps((hyper, kept))
    except Exception as error:  # noqa: BLE001 (pickle raises whatever the objects do)
        named = [(f"param_groups[{i}]", each) for i, each in enumerate(hyper)]
        named += [(f"the state of {views.labels[i]}: ", each) for i, each in enumerate(kept)]
        bad = (f"{name}[{k!r}]" for name, each in named for k, v in each.items() if not _pickles(v))
        place = next(bad, "optimizer")
        return pickle.dumps(TypeError(f"{place}: it cannot be sent to the other ranks: {error}"))


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # noqa: BLE001 (as above)
        return False
    return True


def take_settings(optimizer: Any, views: Views, settings: Any) -> None:
    """Set what another rank shared."""
    hyper, kept = settings
    for own, theirs in zip(optimizer.param_groups, hyper, strict=True):
        for key, value in theirs.items():
            if is_torch(own.get(key)):
                own[key].copy_(value)
            else:
                own[key] = value
    for parameter, values in zip(views.parameters, kept, strict=True):
        for key in _kept_of(optimizer, parameter).keys() - values.keys():
            del optimizer.state[parameter][key]
        for key, (value, beside) in values.items():
            if is_torch(value) and beside:  # the parameter's device may be another one here
                value = value.to(parameter.device)
            optimizer.state[parameter][key] = value


def _kept_of(optimizer: Any, parameter: Any) -> dict[str, tuple[Any, bool]]:
    """Return a parameter's state without momentum; for each value whether it is where the parameter is."""
    if parameter not in optimizer.state:
        return {}
    return {
        key: (
            value.detach().cpu().clone() if is_torch(value) else value,
            is_torch(value) and value.device == parameter.device,
        )
        for key, value in optimizer.state[parameter].items()
        if key != "momentum_buffer"
    }
