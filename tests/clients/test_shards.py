"""`ShardSampler` in libraries that divide data among ranks by themselves: every sample is seen, or they are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DistributedSampler

RANKS = 2
WORKER = Path(__file__).with_name("shards_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run(client: str, library: str, folder: Path) -> list[Any]:
    """Return what each rank was given."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install '.[clients]'")
    command = [*TORCHRUN, "--nproc-per-node", str(RANKS), str(WORKER), client, str(folder)]
    launcher = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        _, errors = launcher.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # so that it ends the ranks, too
        _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("client", ["fabric", "trainer"])
def test_lightning_leaves_the_shards_alone(client: str, tmp_path: Path) -> None:
    for rank, epochs in enumerate(run(client, "lightning", tmp_path)):
        sampler: Any = DistributedSampler(range(100), RANKS, rank, seed=3)
        for epoch, seen in enumerate(epochs):
            sampler.set_epoch(epoch)
            assert seen == list(sampler)


def test_accelerate_is_refused(tmp_path: Path) -> None:
    for rank, result in enumerate(run("accelerate", "accelerate", tmp_path)):
        assert result.startswith(
            "ShardSampler: accelerate.data_loader.BatchSamplerShard divides a sampler's samples among the ranks, "
            f"and this one has those of rank {rank} of 2 only"
        )


def test_accelerate_divides_the_samples_of_one_rank(tmp_path: Path) -> None:
    ranks = run("accelerate, one rank", "accelerate", tmp_path)
    orders = []
    for epochs in zip(*ranks, strict=True):
        assert sorted(chain(*epochs)) == list(range(100))
        orders.append(epochs)
    assert orders[0] != orders[1], "each epoch is shuffled anew"
