"""Random schedules end without a hang and with equal parameters: uneven steps, levels, failures, late joiners.

``SGDCORE_SCHEDULES=2000`` runs so many; ``SGDCORE_FIRST_SCHEDULE=1234`` begins with that seed, to repeat one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import schedules
from schedules import schedule_of

FIRST = int(os.environ.get("SGDCORE_FIRST_SCHEDULE", "0"))
SCHEDULES = int(os.environ.get("SGDCORE_SCHEDULES", "50"))
SECONDS = float(
    os.environ.get("SGDCORE_SCHEDULE_SECONDS", "120")
)  # of wall-clock time for one schedule, which takes well under one
RANKS = 4
BATCH = 50  # schedules that one set of processes runs


class Ranks:
    """Processes that run schedules."""

    def __init__(self, context: Any, port: int) -> None:
        self._pipes, self._processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=schedules.work, args=(port, rank, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, seed: int) -> list[str]:
        """Return what the ranks of a schedule came to."""
        pipes = self._pipes[: schedule_of(seed).ranks]
        for pipe in pipes:
            pipe.send(seed)
        end = time.monotonic() + SECONDS
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                self._show_where()
                pytest.fail(
                    f"seed {seed}: rank {rank} hangs; {schedule_of(seed)}; others: {results}"
                )
            try:
                results.append(pipe.recv())
            except EOFError:
                pytest.fail(f"seed {seed}: rank {rank} died; {schedule_of(seed)}")
        return results

    def _show_where(self) -> None:
        for process in self._processes:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([schedules.__name__])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11's fork server does not take over sys.path.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("first", range(FIRST, FIRST + SCHEDULES, BATCH))
def test_random_schedules(first: int, context: Any, store: Any) -> None:
    ranks = Ranks(context, store.port)
    faults = []
    try:
        for seed in range(first, min(first + BATCH, FIRST + SCHEDULES)):
            results = ranks.run(seed)
            if len(set(results)) > 1 or ("after round" not in results[0] and results[0] != "lost"):
                texts = "\n".join(f"rank {i}: {result}" for i, result in enumerate(results))
                faults.append(f"seed {seed}: {schedule_of(seed)}\n{texts}")
                # A failure may leave torch's count of the groups different from rank to rank.
                ranks.end()
                ranks = Ranks(context, store.port)
    finally:
        ranks.end()
    assert not faults, "\n".join(faults[:3])


def test_schedules_cover_what_they_are_for() -> None:
    drawn = [schedule_of(seed) for seed in range(50)]
    assert {s.ranks for s in drawn} == {2, 3, 4}
    assert any(s.joins for s in drawn)
    assert any(s.level_every for s in drawn)
    kinds = {failure.kind for s in drawn for failure in s.failures}
    assert kinds == {"between", "in the step", "not a number", "passed over"}
