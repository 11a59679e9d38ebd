"""Time a round of Local SGD beside other ways to average the same parameters: interleaved, medians, ratios.

    python benchmarks/distributed.py [--ranks 2 4] [--engines gloo mpi] [--rounds N] [--only NAME ...] [--json FILE]

ResNet-50's 161 parameters (25.6 million elements, float32), on ranks of this machine, started anew for each engine and
number of ranks. Every contender averages once first, and the results are compared; then all take turns, in an order
drawn anew for each round, each begun together by a barrier, timed by the slowest rank. Before that, each writes to all
of its parameters once, as a step does. "flat" contenders have their parameters in one allocation, as a ParameterBuffer;
for torch, torch.nn.utils.vector_to_parameters makes one. The base is one all-reduce of a flat array and a pass that
divides it: a ParameterBuffer's, which lies on huge pages, and for comparison a tensor's, which does not. Needs torch;
for MPI, mpi4py and mpiexec. "A round's operations, bare" is what the engine itself takes for a round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sgdcore
from sgdcore._arrays import Array
from sgdcore.bench.cases import WORKLOADS
from sgdcore.bench.report import machine
from sgdcore.distributed import LocalSGD, ProcessGroup, as_process_group

SHAPES = WORKLOADS["resnet50"]
BASE = "one flat all-reduce, divided"
FLOOR, FLOOR_161 = "a round's operations, bare, flat", "a round's operations, bare, 161 arrays"
HEADER_BYTES = 1024  # that a rank tells the others before a round
DIRECT_BYTES = 3 << 20  # the least that is reduced where it is
BLOCK = 1 << 16  # elements


class Contender:
    """A way to average: `average` is what is timed, `prepare` is not; `read` finds the parameters."""

    def __init__(
        self,
        read: Callable[[], list[Array]],
        average: Callable[[], object],
        count_step: Callable[[], object] = lambda: None,
        divides: bool = True,
    ) -> None:
        self.read, self.average, self.divides = read, average, divides
        self._count_step = count_step
        self.seconds: list[float] = []
        self.faults: list[int] = []  # pages that the first rank touched for the first time

    def prepare(self) -> None:
        self._count_step()
        for array in self.read():
            array += 0


def values(rank: int) -> list[Array]:
    rng = np.random.default_rng(rank)
    return [rng.standard_normal(shape, np.float32) for shape in SHAPES]


def buffer_of(rank: int) -> sgdcore.ParameterBuffer:
    return sgdcore.ParameterBuffer({str(i): array for i, array in enumerate(values(rank))})


def one_flat(group: ProcessGroup) -> Contender:
    buffer = buffer_of(group.rank)

    def average() -> None:
        group.all_reduce(buffer.data).wait()
        buffer.data[:] /= group.size

    return Contender(lambda: [p.data for p in buffer.values()], average)


def one_tensor(group: ProcessGroup) -> Contender:
    tensor = torch.cat([torch.from_numpy(array).flatten() for array in values(group.rank)])

    def average() -> None:
        group.all_reduce(tensor).wait()
        tensor.div_(group.size)

    ends = np.cumsum([np.prod(shape) for shape in SHAPES])
    parts = np.split(tensor.numpy(), ends[:-1])
    views = [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]
    return Contender(lambda: views, average)


def one_flat_alone(group: ProcessGroup) -> Contender:
    flat = buffer_of(group.rank).data * 0
    return Contender(lambda: [flat], lambda: group.all_reduce(flat).wait(), divides=False)


def bare_round(group: ProcessGroup, flat: bool) -> Contender:
    """Return what a round cannot do without, and nothing else.

    All ranks have told each other where they are. Every value has been looked at before it is sent, since a NaN would
    reach all ranks. What was found is told, too. Small arrays travel together.
    """
    buffer = buffer_of(group.rank) if flat else None
    arrays = values(group.rank) if buffer is None else [p.data for p in buffer.values()]
    whole = [buffer.data] if buffer is not None else [a for a in arrays if a.nbytes >= DIRECT_BYTES]
    small = [] if flat else [a.reshape(-1) for a in arrays if a.nbytes < DIRECT_BYTES]
    staging = np.empty(sum(map(len, small)), np.float32)
    header = np.zeros(group.size * HEADER_BYTES // 8, np.int64)
    found = np.zeros(group.size, np.int64)

    def send(array: Array) -> Any:
        flat = array.reshape(-1)
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            block *= 1 / group.size
            found[group.rank] |= not np.isfinite(np.dot(block, block))
        return group.all_reduce(flat)

    def average() -> None:
        group.all_reduce(header).wait()
        works = [send(array) for array in whole]
        if small:
            np.concatenate(small, out=staging)
            works.append(send(staging))
        works.append(group.all_reduce(found))
        for work in works:
            work.wait()
        start = 0
        for array in small:
            array[:] = staging[start : start + len(array)]
            start += len(array)

    return Contender(lambda: arrays, average)


def per_tensor(group: ProcessGroup) -> Contender:
    arrays = values(group.rank)

    def average() -> None:
        for array in arrays:
            group.all_reduce(array).wait()
            array /= group.size

    return Contender(lambda: arrays, average)


def torch_averager(group: ProcessGroup) -> Contender:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in values(group.rank)]
    zero = torch.zeros(1)
    for p in params:  # it leaves out those without a gradient
        p.grad = zero.expand(p.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that gradients might be averaged instead
        averager = PeriodicModelAverager(period=1)
    return Contender(
        lambda: [p.detach().numpy() for p in params],
        lambda: averager.average_parameters(iter(params)),
    )


def local_sgd(group: ProcessGroup, optimizer: Any, params: list[Array]) -> Contender:
    # LocalSGD gives all ranks the parameters of rank 0.
    own = [array.copy() for array in params]
    local = LocalSGD(optimizer, group, sync_every=1 << 40)
    for array, value in zip(params, own, strict=True):
        array[...] = value
    # Without gradients a step is counted, and touches nothing.
    return Contender(lambda: params, local.sync, local.step)


def ours_flat(group: ProcessGroup) -> Contender:
    params = list(buffer_of(group.rank).values())
    for p in params:
        p.grad = None
    return local_sgd(group, sgdcore.SGD(params, lr=0.0), [p.data for p in params])


def ours_torch(group: ProcessGroup, flat: bool) -> Contender:
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in values(group.rank)]
    if flat:
        torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(params), params)
    optimizer = sgdcore.torch.SGD(params, lr=0.0)
    return local_sgd(group, optimizer, [p.detach().numpy() for p in params])


def contenders_of(group: ProcessGroup, engine: str) -> dict[str, Callable[[], Contender]]:
    contenders = {
        BASE: lambda: one_flat(group),
        "one all-reduce of a tensor, divided": lambda: one_tensor(group),
        "one flat all-reduce": lambda: one_flat_alone(group),
        FLOOR: lambda: bare_round(group, flat=True),
        FLOOR_161: lambda: bare_round(group, flat=False),
        "tensor after tensor": lambda: per_tensor(group),
        "sgdcore flat": lambda: ours_flat(group),
        "sgdcore.torch flat": lambda: ours_torch(group, flat=True),
        "sgdcore.torch 161 tensors": lambda: ours_torch(group, flat=False),
    }
    if engine == "gloo":
        contenders["torch PeriodicModelAverager"] = lambda: torch_averager(group)
    return contenders


def check(contenders: dict[str, Contender], size: int) -> None:
    """Average once with each, and compare with the mean."""
    expected = [sum(each) / size for each in zip(*map(values, range(size)), strict=True)]
    for name, contender in contenders.items():
        contender.prepare()
        contender.average()
        if contender.divides:
            for array, mean in zip(contender.read(), expected, strict=True):
                np.testing.assert_allclose(array, mean, rtol=0, atol=1e-6, err_msg=name)


def run(engine: str, rounds: int, only: list[str], path: Path) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    sgdcore.set_num_threads(1)
    if engine == "gloo":
        torch.distributed.init_process_group("gloo")
    else:
        import mpi4py.MPI  # noqa: F401
    group = as_process_group()
    contenders = {
        name: make()
        for name, make in contenders_of(group, engine).items()
        if name == BASE or any(part in name for part in only)
    }
    check(contenders, group.size)
    for number in range(rounds):
        # In another order each round, the same on all ranks: what runs before leaves its traces.
        for i in np.random.default_rng(number).permutation(len(contenders)):
            contender = list(contenders.values())[i]
            contender.prepare()
            group.all_reduce(np.zeros(1)).wait()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            contender.average()
            contender.seconds.append(time.perf_counter() - start)
            contender.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    slowest = {}
    for name, contender in contenders.items():
        everyone = np.zeros((group.size, rounds))
        everyone[group.rank] = contender.seconds
        group.all_reduce(everyone).wait()
        slowest[name] = {"seconds": everyone.max(0).tolist(), "faults": contender.faults}
    if group.rank == 0:
        path.write_text(json.dumps(slowest))
    group.all_reduce(np.zeros(1)).wait()
    if engine == "gloo":
        os._exit(0)


def launch(engine: str, ranks: int, rounds: int, only: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seconds.json"
        own = [__file__, "--as-rank-of", engine, "--rounds", str(rounds), "--json", str(path)]
        own += ["--only", *only]
        if engine == "gloo":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks), *own]
        else:
            command = ["mpiexec", "-n", str(ranks), sys.executable, *own]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result: dict[str, Any] = json.loads(path.read_text())
        return result


def report(title: str, measured: dict[str, Any]) -> dict[str, Any]:
    print(f"\n{title}")
    results = {}
    seconds = {name: each["seconds"] for name, each in measured.items()}
    base, theirs = seconds[BASE], seconds.get("torch PeriodicModelAverager")
    for name, own in seconds.items():
        low, median, high = statistics.quantiles(own, n=4)
        result = {
            "median_ms": median * 1e3,
            "iqr": (high - low) / median,
            "ratio": median / statistics.median(base),
            "ratio_by_rounds": statistics.median(a / b for a, b in zip(own, base, strict=True)),
            "page_faults": statistics.median(measured[name]["faults"]),
        }
        text = f"  {name:<36} {median * 1e3:8.1f} ms   IQR {result['iqr']:4.0%}   {result['ratio']:5.2f} x base"
        text += f" (by rounds {result['ratio_by_rounds']:.2f})"
        if theirs is not None:
            result["ratio_to_averager"] = median / statistics.median(theirs)
            text += f"   {result['ratio_to_averager']:5.2f} x torch's averager"
        print(text, flush=True)
        results[name] = result
    return results


ROWS = {
    FLOOR: "a round's operations, bare, flat",
    FLOOR_161: "a round's operations, bare, 161 arrays",
    "one flat all-reduce": "one flat all-reduce, not divided",
    "one all-reduce of a tensor, divided": "one all-reduce of a tensor, divided",
    "sgdcore flat": "`LocalSGD`, a `ParameterBuffer`",
    "sgdcore.torch flat": "`LocalSGD`, torch parameters in one storage",
    "sgdcore.torch 161 tensors": "`LocalSGD`, 161 torch parameters",
    "torch PeriodicModelAverager": "torch's PeriodicModelAverager",
    "tensor after tensor": "tensor after tensor",
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the ratios to the base in Markdown, a column for each engine and number of ranks."""
    lines = [
        "| | " + " | ".join(title.replace("mpi", "MPI") for title in results) + " |",
        "|---" * (1 + len(results)) + "|",
    ]
    for name, label in ROWS.items():
        cells = [f"{own[name]['ratio']:.2f}" if name in own else "" for own in results.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", default=["gloo", "mpi"], choices=["gloo", "mpi"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of names; the base takes part always"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--as-rank-of", help=argparse.SUPPRESS)  # as one rank
    args = parser.parse_args()
    if args.as_rank_of:
        run(args.as_rank_of, args.rounds, args.only, args.json)
        return 0
    results = {}
    for engine in args.engines:
        for ranks in args.ranks:
            title = f"{engine}, {ranks} ranks"
            results[title] = report(title, launch(engine, ranks, args.rounds, args.only))
    if args.json:
        document = {
            "machine": machine()["type"],
            "sgdcore": sgdcore.__version__,
            "torch": torch.__version__,
            "results": results,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
