"""The floating-point mode: importing sgdcore leaves it alone, and every thread of a step computes in the caller's.

Also the threads' stacks, which may be small. All in processes of their own, which begin with a fresh pool of threads.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

import sgdcore

x86 = pytest.mark.skipif(
    platform.machine() not in {"x86_64", "AMD64"}, reason="reads an x86 register"
)


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


# --- Importing ------------------------------------------------------------------------------------

IMPORTING = """
import ctypes, ctypes.util
import numpy as np
libm = ctypes.CDLL(ctypes.util.find_library("m"))
def mxcsr():
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    return environment[7] & ~0x3f
before = mxcsr()
import sgdcore
print(hex(before), hex(mxcsr()), (np.full(9, 1e-41, np.float32) * np.float32(1)).all())
"""


@x86
def test_importing_leaves_the_floating_point_mode_alone() -> None:
    assert run(IMPORTING).split() == ["0x1f80", "0x1f80", "True"]


# --- The caller's mode ----------------------------------------------------------------------------

FLUSHING = """
import numpy as np
import torch
import sgdcore, sgdcore.torch

SIZE, COUNT = 1_000, 100


def non_zeros(make, threads):
    sgdcore.set_num_threads(threads)
    torch.set_num_threads(threads)
    parameters = [torch.zeros(SIZE, requires_grad=True) for _ in range(COUNT)]
    for parameter in parameters:
        parameter.grad = torch.full((SIZE,), 1e-41)
    make(parameters).step()
    # Counted as integers, which no mode changes.
    return sum(int((p.detach().view(torch.int32) & 0x7FFFFFFF != 0).sum()) for p in parameters)


def torchs(parameters):
    return torch.optim.SGD(parameters, lr=1, foreach=False)


def ours(parameters):
    return sgdcore.torch.SGD(parameters, lr=1)


def ours_on_arrays(parameters):
    arrays = [sgdcore.Parameter(p.detach().numpy()) for p in parameters]
    for array, parameter in zip(arrays, parameters):
        array.grad = parameter.grad.numpy()
    return sgdcore.SGD(arrays, lr=1)


def show():
    counts = [non_zeros(make, n) for n in (1, 2, 3) for make in (torchs, ours, ours_on_arrays)]
    print(*counts)


if {made_flushing}:
    torch.set_flush_denormal(True)
show()
torch.set_flush_denormal(not {made_flushing})
show()
torch.set_flush_denormal({made_flushing})
show()
"""


@pytest.mark.parametrize("made_flushing", [False, True], ids=["pool made keeping", "flushing"])
def test_subnormal_numbers_are_flushed_on_all_threads_or_on_none(made_flushing: bool) -> None:
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(False):
        pytest.skip("torch cannot flush subnormal numbers on this processor")
    lines = run(FLUSHING.replace("{made_flushing}", str(made_flushing))).splitlines()
    flushed, kept = " ".join(["0"] * 9), " ".join(["100000"] * 9)
    assert lines == ([flushed, kept, flushed] if made_flushing else [kept, flushed, kept])


ROUNDING = """
import ctypes, ctypes.util, zlib
import numpy as np
import sgdcore
import ml_dtypes

libm = ctypes.CDLL(ctypes.util.find_library("m"))
dtypes = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def checksum(threads, mode, momentum, clear):
    sgdcore.set_num_threads(threads)
    rng = np.random.default_rng(0)
    parameters = []
    for dtype in dtypes:
        # The float16 ones are subnormal, where a conversion rounds as arithmetic does.
        scale = 1e-5 if dtype is np.float16 else 1
        data, grad = (rng.standard_normal((2, 200_003)) * scale).astype(dtype)
        parameter = sgdcore.Parameter(data[1:].copy())
        parameter.grad = grad[1:]
        parameters.append(parameter)
    optimizer = sgdcore.SGD(parameters, lr=0.3, momentum=momentum, weight_decay=0.01 if momentum else 0)
    libm.fesetround(mode)
    try:
        optimizer.step(zero_grad=clear)
        optimizer.step()
    finally:
        libm.fesetround(0)
    return [zlib.crc32(p.data.view(np.uint8)) for p in parameters]


for mode in {modes}:
    for momentum, clear in ((0, False), (0.9, True)):
        expected = checksum(1, mode, momentum, clear)
        for threads in (2, 3, 5):
            assert checksum(threads, mode, momentum, clear) == expected, (mode, momentum, threads)
    print(*expected)
"""


@x86
def test_bits_do_not_depend_on_threads_in_any_rounding_mode() -> None:
    to_nearest, down, up, to_zero = 0, 0x400, 0x800, 0xC00
    lines = run(ROUNDING.replace("{modes}", str([to_nearest, down, up, to_zero]))).splitlines()
    assert len({line.split()[0] for line in lines}) == 4, "the mode made no difference"


# --- Small stacks ---------------------------------------------------------------------------------

STACKS = """
import zlib
import numpy as np
import torch
import sgdcore, sgdcore.torch

sgdcore.set_num_threads(4)
torch.set_num_threads(4)
rng = np.random.default_rng(0)
results = []


def keep(array):
    results.append(zlib.crc32(np.ascontiguousarray(array).view(np.uint8)))


layouts = {
    "contiguous": lambda g: g,
    "transposed": lambda g: g.T,
    "reversed": lambda g: g[::-1, ::-1],
    "spread": lambda g: np.repeat(g, 2, axis=1)[:, ::2],
}
for layout in layouts.values():
    for dtype in (np.float32, np.float64, np.float16):
        for clear in (False, True):
            p = sgdcore.Parameter(rng.standard_normal((640, 640)).astype(np.float32))
            p.grad = layout(rng.standard_normal((640, 640)).astype(dtype))
            sgdcore.SGD([p], lr=0.1, momentum=0.9).step(zero_grad=clear)
            keep(p.data)
            keep(p.grad)

for transposed in (False, True):
    p = torch.from_numpy(rng.standard_normal((640, 640)).astype(np.float32)).requires_grad_()
    g = torch.from_numpy(rng.standard_normal((640, 640)).astype(np.float32))
    optimizer = sgdcore.torch.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = g.t() if transposed else g.clone()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
    keep(p.detach().numpy())
print(*results)
"""


def test_threads_may_have_small_stacks() -> None:
    pytest.importorskip("torch")
    assert run(STACKS, OMP_STACKSIZE="16K") == run(STACKS)


def test_scratch_memory_is_per_thread_that_steps() -> None:
    """Two Python threads step at once with gradients that go through scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    def train(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        parameter = sgdcore.Parameter(rng.standard_normal((500, 500)).astype(np.float32))
        parameter.grad = rng.standard_normal((500, 500)).T
        optimizer = sgdcore.SGD([parameter], lr=0.1)
        for _ in range(20):
            optimizer.step()
        return parameter.data

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(8)))
    for seed, result in enumerate(together):
        assert (result == train(seed)).all()
