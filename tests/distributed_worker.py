"""One rank of the distributed tests: python distributed_worker.py ENGINE RANK RANKS FOLDER.

Runs the checks of distributed_checks.py in turn and writes what became of them to FOLDER/ENGINE-RANKS-RANK.json. It
stops at the first that fails, since the other ranks are then waiting somewhere.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import distributed_checks as checks

warnings.simplefilter("error")


def start(engine: str, rank: int, ranks: int, folder: Path) -> int:
    """Start the engine as its user would; returns the rank."""
    if engine == "mpi":
        from mpi4py import MPI

        return int(MPI.COMM_WORLD.Get_rank())
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'store-{ranks}'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    return rank


def main(engine: str, rank: int, ranks: int, folder: Path) -> None:
    rank = start(engine, rank, ranks, folder)
    context = checks.Context(engine, ranks, folder)
    results: dict[str, str] = {}
    path = folder / f"{engine}-{ranks}-{rank}.json"
    for module in ("distributed_checks", "distributed_torch_checks"):
        if "torch" in module and f"{engine}-{ranks}" == "mpi-4":
            continue
        importlib.import_module(module)
        for name in checks.names(f"{engine}-{ranks}"):
            if name in results:
                continue
            try:
                checks.CHECKS[name](context)
                checks.on_all(context, 0)
                results[name] = ""
            except BaseException:  # noqa: BLE001 (pytest's outcomes are no Exceptions)
                results[name] = traceback.format_exc()
            # At once: where one rank ends, a launcher may end the others in the middle of this.
            path.with_suffix(".new").write_text(json.dumps(results))
            path.with_suffix(".new").replace(path)
            if results[name]:
                os._exit(1)
    checks.on_all(context, 0)
    # Not by sys.exit: now and then gloo aborts a process that is on its way out, and MPI waits for all ranks.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
