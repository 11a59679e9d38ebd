"""Ranks that are killed under MPI, which ends all of them: training goes on from checkpoints, and no bit is lost.

``SGDCORE_KILLS=50`` kills so often.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from test_distributed import mpiexec

RANKS = 3
KILLS = int(os.environ.get("SGDCORE_KILLS", "5"))
VICTIM = Path(__file__).with_name("mpi_victim.py")


def launch(folder: Path, victim: int = -1, milliseconds: float = 0.0) -> bool:
    """Train on; returns whether all ranks came to the end."""
    pytest.importorskip("mpi4py")
    command = [mpiexec(), "-n", str(RANKS), sys.executable, str(VICTIM)]
    done = subprocess.run(
        [*command, str(folder), str(victim), str(milliseconds)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 or "signal 9" in done.stdout + done.stderr, done.stderr[-3000:]
    return done.returncode == 0


def results(folder: Path) -> list[bytes]:
    return [(folder / f"{rank}.end").read_bytes() for rank in range(RANKS)]


def rounds(folder: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in folder.glob("0-*.state")), default=0)


def test_kills_under_mpi_cost_nothing(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert launch(whole)
    rng = np.random.default_rng(0)
    kills, in_rounds = 0, 0
    while kills < KILLS:
        broken = tmp_path / f"broken-{kills}"
        broken.mkdir()
        ended = False
        while not ended and kills < KILLS:
            before = rounds(broken)
            ended = launch(broken, int(rng.integers(RANKS)), float(rng.uniform(1, 300)))
            kills += not ended
            in_rounds += rounds(broken) > before
        if not ended:
            assert launch(broken)
        assert results(broken) == results(whole)
    assert in_rounds > 0, "no rank was killed in training"
