"""Ranks that die or stop answering in the middle of a round, and what the others are left with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import distributed_victims
from distributed_victims import survive, survive_data_parallel

RANKS = 3
# Each at another moment.
KILLS = 50


@pytest.fixture(scope="module")
def spawn() -> Callable[..., list[dict[str, Any]]]:
    """Run a function in RANKS processes, of which the last is lost; returns the others' reports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([distributed_victims.__name__])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11's fork server does not take over sys.path.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(
        target: Callable[..., None], trial: str, delay: float, *options: Any
    ) -> list[dict[str, Any]]:
        pipes, processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (store.port, trial, rank, RANKS, delay, *options, theirs)
            process = context.Process(target=target, args=arguments)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        reports = []
        try:
            for pipe in pipes[:-1]:
                assert pipe.poll(60), "a survivor hangs"
                reports.append(pipe.recv())
        finally:
            for process in processes:
                process.kill()
                process.join()
        return reports

    return run


def test_killed_ranks_cost_nothing_with_transactions(
    spawn: Callable[..., list[dict[str, Any]]],
) -> None:
    """SIGKILL at any moment: parameters and momentum are back at the last round, bit for bit; the others go on."""
    rng = np.random.default_rng(0)
    for trial in range(KILLS):
        # Some in the first round, most in one of the following.
        delay = float(rng.uniform(0, 0.15))
        options = {"transactional": True}
        reports = spawn(survive, f"kill-{trial}", delay, options)
        rounds = max(report["rounds"] for report in reports)
        for report in reports:
            what = f"trial {trial}, delay {delay}: {report}"
            assert report["round"] == report["rounds"] + 1, what
            assert report["restored"], what
            assert report["parameters are back"], what
            assert report["momentum is back"], what
            # One may have completed a round that the other did not: they meet at the later one.
            assert rounds - report["rounds"] <= 1, what
            assert report["rounds after rebind"] == rounds, what
            assert report["equal after rebind"], what
            assert report.get("at a round's end", True), what
            assert report["went on"] == 2, what
            assert report["equal in the end"], what
            assert report["finite"], what


@pytest.mark.parametrize("backend", ["gloo", None])
def test_a_dead_peer_is_reported_soon_and_by_round(
    spawn: Callable[..., list[dict[str, Any]]], backend: str | None
) -> None:
    start = time.perf_counter()
    options = {"transactional": True, "timeout": 30.0, "backend": backend}
    reports = spawn(survive, f"soon-{backend}", 0.1, options)
    assert time.perf_counter() - start < 25
    for rank, report in enumerate(reports):
        expected = (
            f"round {report['round']} of Local SGD failed on rank {rank} of {RANKS}; "
            "parameters are those of the end of round"
        )
        assert report["error"].startswith(expected)


def test_a_peer_that_hangs_is_reported_within_the_timeout(
    spawn: Callable[..., list[dict[str, Any]]],
) -> None:
    start = time.perf_counter()
    options = {"transactional": True, "timeout": 5.0, "how": signal.SIGSTOP}
    reports = spawn(survive, "hang", 0.1, options)
    assert time.perf_counter() - start < 25
    for report in reports:
        assert report["parameters are back"]
        assert report["equal in the end"]


def test_without_transactions_the_error_says_what_is_lost(
    spawn: Callable[..., list[dict[str, Any]]],
) -> None:
    reports = spawn(survive, "plain", 0.1, {})
    for report in reports:
        assert not report["restored"]
        lost = "transactional=True would restore them" in report["error"]
        intact = "parameters are as this rank's last step left them" in report["error"]
        assert lost != intact
    if all("rebind" in report for report in reports):
        for report in reports:
            assert "every rank's parameters are left in the middle of a round" in report["rebind"]
    else:
        assert all(report["equal in the end"] and report["finite"] for report in reports)


def test_data_parallel_survives(spawn: Callable[..., list[dict[str, Any]]]) -> None:
    reports = spawn(survive_data_parallel, "data parallel", 0.0)
    for rank, report in enumerate(reports):
        start = (
            f"step {report['step']} failed on rank {rank} of {RANKS}; parameters are those of step"
        )
        assert report["error"].startswith(start)
        assert report["step"] in (7, 8)
        assert report["parameters are untouched"]
        assert report["equal after rebind"]
        assert report["equal in the end"]
