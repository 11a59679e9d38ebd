"""The demo on several workers and the examples, started as their users do, by torchrun and mpiexec."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
MPIEXEC = shutil.which("mpiexec", path=PATH)

needs_mpi = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: pip install mpi4py mpich")


def run(command: list[str], folder: Path, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def demo(launcher: list[str], folder: Path, *options: str) -> str:
    module = ["-m", "sgdcore", "demo", "--distributed", *options]
    command = launcher + (
        module if "torch.distributed.run" in launcher else [sys.executable, *module]
    )
    done = run(command, folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def mpiexec() -> list[str]:
    assert MPIEXEC is not None
    return [MPIEXEC, "-n", "2"]


def results(output: str) -> str:
    """What training came to, without its time."""
    (line,) = re.findall(r"^Trained .*", output, re.MULTILINE)  # from one rank only
    return re.sub(r"in [\d.]+ s", "", line)


@needs_mpi
def test_demo_on_two_ranks(tmp_path: Path) -> None:
    """Both engines train the same network, and print what the demo prints."""
    output = demo(TORCHRUN, tmp_path, "--epochs", "12", "--lr", "0.1")
    assert output.startswith("MLP 64-128-10, 9,610 float32 parameters")
    assert (
        "2 ranks, parameters averaged every 16 steps; each with 719 digits in batches of 32\n"
        in output
    )
    assert "Trained 12 of 12 epochs (276 steps)" in output
    accuracy = re.search(r"test accuracy (\d+\.\d) %", output)
    assert accuracy is not None
    assert float(accuracy[1]) > 94
    assert output.count("  sgdcore  ") == 1
    assert output.endswith("Plot: sgdcore-demo.png\n")
    assert [path.name for path in tmp_path.iterdir()] == ["sgdcore-demo.png"]

    quiet = demo(mpiexec(), tmp_path, "--epochs", "12", "--lr", "0.1", "--quiet", "--no-plot")
    # The sum of two numbers is the same in either order, so that the engines agree in every bit.
    assert results(quiet) == results(output)


@needs_mpi
def test_synchronous_demo_and_divergence(tmp_path: Path) -> None:
    output = demo(mpiexec(), tmp_path, "--epochs", "1", "--sync-every", "1", "--no-plot")
    assert "2 ranks, gradients averaged in each step; each with 719 digits" in output
    command = [
        sys.executable,
        "-m",
        "sgdcore",
        "demo",
        "--distributed",
        "--lr",
        "1000",
        "--loss",
        "mse",
    ]
    done = run([*mpiexec(), *command], tmp_path)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("sgdcore demo: error")]
    assert re.search(r"training diverged: the loss is (inf|nan) in epoch 1 ", error)


FAILING = """
import sys
from mpi4py import MPI
from sgdcore import demo
from sgdcore.__main__ import main

def fails(*_):
    raise {"RuntimeError": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt}[sys.argv[1]]("on one rank")

if MPI.COMM_WORLD.Get_rank() == 1:
    if sys.argv[1] == "ImportError":
        sys.modules["sklearn"] = None
    else:
        demo.MLP.backward = fails
sys.exit(main(["demo", "--distributed", "--no-plot"]))
"""


@needs_mpi
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("ImportError", 1, "sgdcore demo: error: the demo needs scikit-learn"),
        ("RuntimeError", 1, "RuntimeError: on one rank"),
        ("KeyboardInterrupt", 130, "sgdcore demo: interrupted"),
    ],
)
def test_a_rank_that_fails_ends_the_others(
    error: str, code: int, message: str, tmp_path: Path
) -> None:
    """MPI would let them wait for it for ever."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = run([*mpiexec(), sys.executable, str(script), error], tmp_path, seconds=60)
    assert done.returncode == code
    assert message in done.stderr


def test_demo_needs_a_launcher(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "sgdcore", "demo", "--distributed"], tmp_path)
    assert done.returncode == 2
    assert (
        "argument --distributed: needs a launcher, such as\n  torchrun --standalone" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("launcher", "script"),
    [
        pytest.param(TORCHRUN, "ddp.py", id="ddp"),
        *(
            pytest.param(TORCHRUN, f"ddp.py --compress {dtype}", id=f"ddp {dtype}")
            for dtype in ("bfloat16", "float16", "powersgd")
        ),
        pytest.param(TORCHRUN, "local_sgd.py", id="local_sgd"),
        pytest.param(None, "local_sgd_mpi.py", id="local_sgd_mpi", marks=needs_mpi),
    ],
)
def test_examples(launcher: list[str] | None, script: str, tmp_path: Path) -> None:
    start = [*mpiexec(), sys.executable, "-m", "mpi4py"] if launcher is None else launcher
    path, *options = script.split()
    done = run([*start, str(ROOT / "examples" / path), *options, "--epochs", "8"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"2 ranks, 8 epochs: test accuracy (\d+\.\d)%\n", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) > 90
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import sys
if sys.argv[1] == "gloo":
    import torch.distributed as dist
    dist.init_process_group("gloo")
else:
    import mpi4py.MPI
from sgdcore.distributed import ShardSampler, measure, plan
link = measure()
shard = list(ShardSampler(6, shuffle=False))
assert str(plan(1e6, 0.1, link)).count("float32") == 1
print(f"{link.latency!r} {link.bandwidth!r} {link.ranks} {shard}\\n", end="", flush=True)
if sys.argv[1] == "gloo":
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("engine", ["gloo", pytest.param("mpi", marks=needs_mpi)])
def test_measuring_real_ranks(engine: str, tmp_path: Path) -> None:
    """Every rank finds the same link, and both helpers the group that is initialised."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    start = TORCHRUN if engine == "gloo" else [*mpiexec(), sys.executable]
    done = run([*start, str(script), engine], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.split("\n")[:-1], key=lambda line: line[-8:])
    assert [line.partition("[")[2] for line in lines] == ["0, 2, 4]", "1, 3, 5]"]
    assert len({line.partition("[")[0] for line in lines}) == 1, lines
    latency, bandwidth, ranks = lines[0].partition("[")[0].split()
    assert 0 <= float(latency) < 1
    assert 1e5 < float(bandwidth) < 1e12
    assert ranks == "2"


def test_gloo_has_let_go_of_what_was_waited_for(tmp_path: Path) -> None:
    """Else its thread may be the last to hold a tensor, and abort the process at its end."""
    import torch
    import torch.distributed as dist

    from sgdcore.distributed import as_process_group

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = as_process_group()
        held = 0
        for _ in range(1000):
            work = group.all_reduce(torch.zeros(8))
            work.wait()
            held += work._tensor._use_count() > 1
        assert held == 0
        work.wait()
    finally:
        dist.destroy_process_group()
