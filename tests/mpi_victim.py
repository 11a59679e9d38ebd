"""One rank of test_distributed_mpi_kills.py: python mpi_victim.py FOLDER VICTIM MILLISECONDS.

Trains from the checkpoints in FOLDER, writes one at the end of each round, and what came of it all to FOLDER/RANK.end.
The rank VICTIM is killed so long after the first step of this launch; -1 for none.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import sgdcore
from sgdcore.distributed import LocalSGD, SlowMo

STEPS, PERIOD = 100, 4
ELEMENTS = 300_000  # a millisecond for an average


def write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


def kill_later(milliseconds: float) -> None:
    """From another process, wherever this one is just then."""
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(milliseconds / 1e3)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)


def main(folder: Path, victim: int, milliseconds: float) -> None:
    rank = MPI.COMM_WORLD.Get_rank()
    sgdcore.set_num_threads(1)
    rng = np.random.default_rng(0)
    values = rng.standard_normal(ELEMENTS).astype(np.float32)
    buffer = sgdcore.ParameterBuffer({"w": values, "b": (3,)})
    inner = sgdcore.SGD(buffer, lr=0.1, momentum=0.9)
    local = LocalSGD(inner, MPI.COMM_WORLD, PERIOD, outer=SlowMo(0.5), transactional=True)
    # A round may be over on one rank and not on another when one is killed: all go on from the last one that all have.
    own = max((int(path.stem.split("-")[1]) for path in folder.glob(f"{rank}-*.state")), default=0)
    begin = MPI.COMM_WORLD.allreduce(own, MPI.MIN)
    if begin:
        saved = pickle.loads((folder / f"{rank}-{begin}.state").read_bytes())
        buffer.data[:] = saved["parameters"]
        local.load_state_dict(saved["optimizer"])
    if rank == victim:
        kill_later(milliseconds)
    for step in range(begin * PERIOD, STEPS):
        buffer.grad[:] = 0.1 * buffer.data + np.float32(rank + 1) / (step + 1)
        local.step()
        if local.step_in_round == 0:
            state = {"parameters": buffer.data.copy(), "optimizer": local.state_dict()}
            write(folder / f"{rank}-{local.round}.state", pickle.dumps(state))
            (folder / f"{rank}-{local.round - 2}.state").unlink(missing_ok=True)
    momentum = inner.state[buffer["w"]]["momentum_buffer"]
    write(folder / f"{rank}.end", buffer.data.tobytes() + momentum.tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
