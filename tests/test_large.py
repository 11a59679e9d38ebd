"""More elements than 32 bits can count: one float16 parameter of 2**31 + 64 elements, really updated.

Takes 13 GB for parameter, gradient and momentum, and is skipped only where there is less.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sgdcore
from sgdcore.reference import ReferenceSGD
from support import Array, assert_same_bits, momentum_of, numbers

SIZE = 2**31 + 64
NEEDED = 3 * 2 * SIZE + 2 * 10**9
HYPER = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}

# Where an index that wraps around, or an element left out, would show.
WINDOWS = {
    "head": slice(0, 1000),
    "2**29": slice(2**29 - 500, 2**29 + 500),
    "2**30": slice(2**30 - 500, 2**30 + 500),  # the middle: where two threads part
    "2**31": slice(2**31 - 1000, 2**31),
    "tail": slice(2**31, SIZE),
}


def available_memory() -> int:
    """Bytes that can be allocated without swapping, as the kernel estimates them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


@pytest.fixture
def memory() -> Iterator[None]:
    """Skip the test where memory is short, and see to it that all is free again afterwards."""
    gc.collect()
    before = available_memory()
    if before < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of memory, {before / 1e9:.1f} GB are available")
    yield
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    assert resident < 4 * SIZE  # less than the smallest two of the three arrays


def set_windows(array: Array, seed: int) -> None:
    for i, window in enumerate(WINDOWS.values()):
        part = array[window]
        part[:] = numbers(seed + i, part.shape, np.float16)


@pytest.mark.usefixtures("memory")
def test_more_than_two_to_the_31_elements() -> None:
    buffer = sgdcore.ParameterBuffer({"w": (SIZE,)}, "float16")
    parameter = buffer["w"]
    assert parameter.size == buffer.data.size == SIZE
    optimizer = sgdcore.SGD(buffer, **HYPER)
    set_windows(parameter.data, 0)
    set_windows(parameter.grad, 10)
    references = {
        name: ReferenceSGD([parameter.data[window]], **HYPER) for name, window in WINDOWS.items()
    }

    def step(grad: Array, **arguments: object) -> None:
        for name, window in WINDOWS.items():
            references[name].step([grad[window].copy()])
        optimizer.step(**arguments)  # type: ignore[call-overload]
        momentum = momentum_of(optimizer)[0]
        assert momentum.size == SIZE
        for name, window in WINDOWS.items():
            assert_same_bits(parameter.data[window], references[name].params[0], name)
            assert_same_bits(momentum[window], references[name].momentum_buffers[0], name)

    step(parameter.grad)
    step(parameter.grad)
    assert not parameter.data[2000:3000].any()  # zero, as its gradient was

    # A gradient that is read with strides: the same element over and over.
    constant = np.broadcast_to(np.float16(0.75), (SIZE,))
    step(constant, grads=[constant])
    assert np.unique(parameter.data[2000:3000]).size == 1
    assert parameter.data[2000] == parameter.data[2**31 - 2000] != 0
