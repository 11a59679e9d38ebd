"""Distributed training with real processes: 2 and 4 ranks, gloo and MPI. One launch for each runs all checks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import distributed_torch_checks  # noqa: F401 (adds to the table)
from distributed_checks import EVERYWHERE, names

HERE = Path(__file__).parent
CASES = [(launch, name) for launch in EVERYWHERE for name in names(launch)]
SECONDS = 300  # for one launch; a healthy one takes a minute where nothing else runs


def mpiexec() -> str:
    """The launcher that belongs to the MPI that mpi4py loads: of this environment first."""
    found = shutil.which("mpiexec", path=sysconfig.get_path("scripts")) or shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec here")
    return found


def launch(engine: str, ranks: int, folder: Path) -> str:
    """Run all checks; returns what the ranks printed."""
    worker = [sys.executable, "-W", "error", str(HERE / "distributed_worker.py"), engine]
    if engine == "mpi":
        pytest.importorskip("mpi4py")
        command = [mpiexec(), "-n", str(ranks), *worker, "0", str(ranks), str(folder)]
        commands = [command]
    else:
        commands = [[*worker, str(rank), str(ranks), str(folder)] for rank in range(ranks)]
    output = [folder / f"output-{engine}-{ranks}-{i}" for i in range(len(commands))]
    processes = []
    for command, path in zip(commands, output, strict=True):
        with path.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return "\n".join(path.read_text() for path in output)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


Results = tuple[list[dict[str, str]], str]


@pytest.fixture(scope="session")
def results_of(folder: Path) -> Callable[[str], Results]:
    """Every rank's result of every check of a launch, and what was printed; launched when first asked for."""

    @cache
    def results(name: str) -> Results:
        engine, _, ranks = name.partition("-")
        output = launch(engine, int(ranks), folder)
        paths = [folder / f"{name}-{rank}.json" for rank in range(int(ranks))]
        return [json.loads(path.read_text()) if path.exists() else {} for path in paths], output

    return results


@pytest.mark.parametrize(("launched", "name"), CASES)
def test_check(results_of: Callable[[str], Results], launched: str, name: str) -> None:
    of_ranks, output = results_of(launched)
    failures = [
        f"rank {i}: {result[name]}" for i, result in enumerate(of_ranks) if result.get(name)
    ]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    missing = [i for i, result in enumerate(of_ranks) if name not in result]
    if missing:
        pytest.fail(f"ranks {missing} did not get there\n{output[-3000:]}", pytrace=False)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gloo_equals_mpi(results_of: Callable[[str], Results], folder: Path, ranks: int) -> None:
    """Two numbers have one sum; of four, engines add up in different orders."""
    for engine in ("gloo", "mpi"):
        results_of(f"{engine}-{ranks}")
    files = [folder / f"{engine}-{ranks}.npz" for engine in ("gloo", "mpi")]
    if not all(path.exists() for path in files):
        pytest.skip("needs the results of both engines")
    gloo, mpi = (np.load(path) for path in files)
    assert set(gloo) == set(mpi)
    assert len(gloo) == 3
    for name in gloo:
        if ranks == 2:
            assert gloo[name].tobytes() == mpi[name].tobytes(), name
        else:
            ulps = np.abs(gloo[name] - mpi[name]) / np.spacing(np.abs(mpi[name]).max())
            assert ulps.max() <= 16, name
