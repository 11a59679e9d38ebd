"""sgdcore.torch.SGD and huge pages: what lies on them, without a change of values or addresses."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from sgdcore import _core
from sgdcore.torch import SGD

MADV_COLLAPSE = 25  # which Python's mmap does not name


def mapping_around(address: int) -> dict[str, list[str]]:
    """Return what the system says of the mapping that an address is in."""
    for entry in re.split(
        r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE
    )[1:]:
        head, *lines = entry.splitlines()
        begin, end = (int(bound, 16) for bound in head.split()[0].split("-"))
        if begin <= address < end:
            return {name: values.split() for name, values in (line.split(":", 1) for line in lines)}
    raise AssertionError(hex(address))


def on_ordinary_pages(size: int) -> torch.Tensor:
    """Return 0, 1, 2 ... in memory of its own, which nothing has put on huge pages yet; size in bytes."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.float32)
    torch.arange(flat.numel(), out=flat)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return flat


def huge_bytes(flat: torch.Tensor) -> int:
    """Return how much of the mapping around the tensor, which may be larger, lies on huge pages."""
    number, unit = mapping_around(flat.data_ptr() + flat.nbytes // 2)["AnonHugePages"]
    assert unit == "kB"
    return int(number) * 1024


@pytest.fixture(scope="module")
def huge_pages() -> None:
    """Skip where the system has none."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the system has no transparent huge pages")


@pytest.fixture(scope="module")
def collapses(huge_pages: None) -> None:
    """Skip where the system does not do on request what the optimizer asks of it."""
    memory = mmap.mmap(-1, 4 * _core.huge_page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(len(memory)))
    try:
        memory.madvise(MADV_COLLAPSE)
    except OSError as error:
        pytest.skip(f"the system cannot put memory in use on huge pages: {error}")


@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
@pytest.mark.usefixtures("huge_pages")
def test_large_momentum_is_advised_to_lie_on_huge_pages(loaded: bool) -> None:
    p = torch.nn.Parameter(torch.zeros(4, _core.huge_page))
    p.grad = torch.ones_like(p)
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    optimizer.step()
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    middle = optimizer.state[p]["momentum_buffer"].data_ptr() + 2 * _core.huge_page
    assert "hg" in mapping_around(middle)["VmFlags"]


@pytest.mark.parametrize("kind", ["one", "many", "channels_last", "added"])
@pytest.mark.usefixtures("collapses")
def test_parameters_are_put_on_huge_pages_where_they_are(kind: str) -> None:
    flat = on_ordinary_pages(16 * _core.huge_page)
    before = huge_bytes(flat)
    views = {
        "one": lambda: [flat],
        "added": lambda: [flat],
        "many": lambda: list(flat.split(100_003)),
        "channels_last": lambda: [flat.view(2, 4, 4, -1).permute(0, 3, 1, 2)],
    }[kind]()
    params = [torch.nn.Parameter(view) for view in views]
    addresses = [p.data_ptr() for p in params]
    if kind == "added":
        optimizer = SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
        optimizer.add_param_group({"params": params})
    else:
        optimizer = SGD(params, lr=0.1)
    assert huge_bytes(flat) >= before + 15 * _core.huge_page
    assert [p.data_ptr() for p in params] == addresses
    assert torch.equal(flat, torch.arange(flat.numel(), dtype=torch.float32))


@pytest.mark.parametrize("kind", ["shared", "gaps"])
def test_parameters_that_are_not_memory_of_their_own_are_left_on_their_pages(kind: str) -> None:
    p = torch.ones(8, _core.huge_page // 4)
    if kind == "shared":
        p.share_memory_()
    else:
        p = p[:, ::2]
    with mock.patch.object(_core, "collapse_huge_pages") as collapse:
        SGD([torch.nn.Parameter(p)], lr=0.1)
    collapse.assert_called_once_with([])
