"""Training with several workers: synchronous and Local SGD over torch.distributed or MPI, whichever is running."""

from __future__ import annotations

from sgdcore.distributed.data_parallel import DataParallel
from sgdcore.distributed.groups import ProcessGroup, Work, as_process_group
from sgdcore.distributed.header import RoundError
from sgdcore.distributed.local_sgd import LocalSGD
from sgdcore.distributed.outer import OuterSGD, SlowMo
from sgdcore.distributed.planning import Link, Plan, measure, plan
from sgdcore.distributed.sampler import ShardSampler
from sgdcore.distributed.schedules import Progress, Schedule, Stagewise

__all__ = [
    "DataParallel",
    "Link",
    "LocalSGD",
    "OuterSGD",
    "Plan",
    "ProcessGroup",
    "Progress",
    "RoundError",
    "Schedule",
    "ShardSampler",
    "SlowMo",
    "Stagewise",
    "Work",
    "as_process_group",
    "measure",
    "plan",
]
