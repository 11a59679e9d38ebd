"""Training with several workers: synchronous and Local SGD over torch.distributed and MPI.

Each worker runs on its shard of the data; gradients or parameters are averaged by all-reduce. The engine is the one
that is running already: ``torchrun`` and ``torch.distributed.init_process_group``, or ``mpiexec`` and mpi4py.
"""

from __future__ import annotations

from sgdcore.distributed.data_parallel import DataParallel
from sgdcore.distributed.groups import MpiGroup, ProcessGroup, TorchGroup, Work, as_process_group
from sgdcore.distributed.header import RoundError
from sgdcore.distributed.local_sgd import LocalSGD
from sgdcore.distributed.outer import OuterSGD, SlowMo
from sgdcore.distributed.planning import Link, Plan, measure, plan
from sgdcore.distributed.sampler import ShardSampler
from sgdcore.distributed.schedules import AdaComm, PostLocal, Progress, Schedule, Stagewise

__all__ = [
    "AdaComm",
    "DataParallel",
    "Link",
    "LocalSGD",
    "MpiGroup",
    "OuterSGD",
    "Plan",
    "PostLocal",
    "ProcessGroup",
    "Progress",
    "RoundError",
    "Schedule",
    "ShardSampler",
    "SlowMo",
    "Stagewise",
    "TorchGroup",
    "Work",
    "as_process_group",
    "measure",
    "plan",
]
