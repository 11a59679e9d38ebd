"""Is `plan` right? Steps of Local SGD over a throttled link, beside what the alpha-beta model says. Linux, as root.

    python benchmarks/throttled_link.py [--ranks N] [--rate 1gbit] [--json FILE]

Each rank gets a network namespace and a host name of its own, like a machine, joined by a bridge; its link is throttled
in both directions by tc's token bucket. Within, `measure` fits latency and bandwidth, and then steps are timed for
several periods H and wire dtypes. The computation of gradients is a pause, so that the ranks do not compete for cores
as machines would not; update and averaging are real. Prints measured and predicted seconds: from what was measured, and
from the nominal rate alone, as one plans for machines that are not here. Needs torch, ip and tc (Debian's iproute2).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARAMETERS = 25_000_000
PAUSE = 0.03  # seconds, in place of forward and backward
PERIODS = (1, 8, 32)
ROUNDS = 3
WIRES = (None, "bfloat16")
CHILD, SETUP = "--child", "--inside"


def child(rank: int, ranks: int, bandwidth: float, output: str) -> None:
    """Measure, as one of the ranks."""
    socket.sethostname(f"rank{rank}")
    import numpy as np
    import torch
    import torch.distributed as dist

    import sgdcore
    from sgdcore.distributed import Link, LocalSGD, as_process_group, measure, plan

    sgdcore.set_num_threads(1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address(0)}:29500", rank=rank, world_size=ranks
    )
    group = as_process_group(None)
    link = measure(group)

    buffer = sgdcore.ParameterBuffer({"w": (PARAMETERS,)})
    buffer.grad[:] = np.random.default_rng(rank).standard_normal(PARAMETERS, np.float32)

    def optimizer() -> sgdcore.SGD:
        return sgdcore.SGD(buffer, lr=1e-6, momentum=0.9)

    def seconds_a_step(step: Any, steps: int) -> float:
        group.all_reduce(np.zeros(1)).wait()
        began = time.perf_counter()
        for _ in range(steps):
            time.sleep(PAUSE)
            step()
        return (time.perf_counter() - began) / steps

    alone = optimizer()
    alone.step()
    everyone = np.zeros(group.size)
    everyone[group.rank] = statistics.median(seconds_a_step(alone.step, 5) for _ in range(5))
    group.all_reduce(everyone).wait()
    own = float(everyone.max())  # a round ends when the slowest rank's steps do
    plans = {
        "measured": plan(PARAMETERS, own, link, sync_every=PERIODS),
        "nominal": plan(PARAMETERS, own, Link(0.0, bandwidth), ranks=ranks, sync_every=PERIODS),
    }
    rows = []
    for wire in WIRES:
        for period in PERIODS:
            workers = LocalSGD(optimizer(), group, sync_every=period, wire_dtype=wire)
            for _ in range(period):
                workers.step()  # a first round, which makes what is kept
            # The median over rounds, each with the steps that lead to it.
            taken = statistics.median(seconds_a_step(workers.step, period) for _ in range(ROUNDS))
            dtype = wire or "float32"
            predicted = {name: table.seconds(ranks, period, dtype) for name, table in plans.items()}
            rows.append(
                {
                    "wire_dtype": dtype,
                    "sync_every": period,
                    "seconds": taken,
                    "predicted": predicted,
                }
            )
    if rank == 0:
        print(plans["measured"])
        document = {
            "ranks": ranks,
            "parameters": PARAMETERS,
            "step_seconds": own,
            "latency": link.latency,
            "bandwidth": link.bandwidth,
            "nominal_bandwidth": bandwidth,
            "rows": rows,
        }
        Path(output).write_text(json.dumps(document))
    dist.destroy_process_group()


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def inside(ranks: int, rate: str, bandwidth: float, output: str) -> None:
    """Lay the network out, in namespaces of its own that end with this process, and start the ranks."""
    run("mount -t tmpfs none /run")  # where ip keeps the names of namespaces
    run("ip link add bridge0 type bridge")
    run("ip link set bridge0 up")
    bucket = f"root tbf rate {rate} burst 256kb latency 50ms"
    for rank in range(ranks):
        namespace, outer = f"rank{rank}", f"outer{rank}"
        run(f"ip netns add {namespace}")
        run(f"ip link add {outer} type veth peer name eth0 netns {namespace}")
        run(f"ip link set {outer} master bridge0 up")
        run(f"ip -n {namespace} link set lo up")
        run(f"ip -n {namespace} link set eth0 up")
        run(f"ip -n {namespace} addr add {address(rank)}/24 dev eth0")
        run(f"tc -n {namespace} qdisc add dev eth0 {bucket}")  # what the rank sends
        run(f"tc qdisc add dev {outer} {bucket}")  # what it receives
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", f"rank{rank}", "unshare", "--uts"),
                *(sys.executable, __file__, CHILD),
                *map(str, (rank, ranks, bandwidth, output)),
            ],
            env=environment,
        )
        for rank in range(ranks)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


def bytes_a_second(rate: str) -> float:
    """Return what tc's "1gbit" or "500mbit" carries."""
    units = {"gbit": 1e9, "mbit": 1e6, "kbit": 1e3}
    for unit, scale in units.items():
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * scale / 8
    raise SystemExit(f"--rate: expected a number and one of {', '.join(units)}, got {rate!r}")


def table(document: dict[str, Any]) -> str:
    """Return the table of the guide, in Markdown."""
    lines = [
        "| ranks | wire | H | seconds a step | of the plan, link measured | of the plan, nominal rate |",
        "|---|---|---|---|---|---|",
    ]
    for result in document["results"]:
        for row in result["rows"]:
            of = {name: row["seconds"] / value for name, value in row["predicted"].items()}
            lines.append(
                f"| {result['ranks']} | {row['wire_dtype']} | {row['sync_every']} | {row['seconds']:.3f} "
                f"| {of['measured']:.2f} | {of['nominal']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument(
        "--rate", default="1gbit", help="of each link, as tc takes it (default: 1gbit)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise SystemExit(f"needs root, and these tools: ip, tc, unshare (missing: {missing})")
    documents = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder, "result.json"))
            arguments = map(str, (ranks, args.rate, bytes_a_second(args.rate), output))
            command = ["unshare", "--net", "--mount", sys.executable, __file__, SETUP, *arguments]
            subprocess.run(command, check=True)
            document = json.loads(Path(output).read_text())
        documents.append(document)
    result = {
        "rate": args.rate,
        "kernel": platform.release().partition("-")[0],
        "results": documents,
    }
    print(table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
    elif sys.argv[1:2] == [SETUP]:
        inside(int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5])
    else:
        main()
