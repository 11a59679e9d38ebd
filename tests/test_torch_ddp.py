"""sgdcore.torch.SGD in DistributedDataParallel: the bits of torch.optim.SGD, whatever DDP does with the gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_worker import CASES, HOOKS, SETUPS

WORKER = Path(__file__).with_name("ddp_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

Results = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Each rank's results, of one launch."""
    folder = tmp_path_factory.mktemp("ddp")
    launcher = subprocess.Popen(
        [*TORCHRUN, str(WORKER), str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        _, errors = launcher.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # so that it ends the ranks, too
        _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_torch(name: str, results: list[Results]) -> None:
    for result in results:
        assert not result[name]["error"]
    assert results[0][name]["parameters"] == results[1][name]["parameters"], "ranks differ"


@pytest.mark.parametrize("setup", SETUPS)
def test_hooks_change_the_gradients(setup: str, results: list[Results]) -> None:
    """Else the cases would compare less than they say."""
    names = [setup, *(name for hook in HOOKS if (name := f"{setup}, {hook}") in CASES)]
    assert len(names) >= len(HOOKS)
    assert len({results[0][name]["parameters"] for name in names}) == len(names)
