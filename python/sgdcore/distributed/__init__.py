"""Training with several workers: synchronous and Local SGD over torch.distributed and MPI.

Each worker runs on its shard of the data; gradients or parameters are averaged by all-reduce. The engine is the one that is
running already: ``torchrun`` and ``torch.distributed.init_process_group``, or ``mpiexec`` and mpi4py.
"""

from __future__ import annotations

from sgdcore.distributed.groups import MpiGroup, ProcessGroup, TorchGroup, Work, as_process_group

__all__ = ["MpiGroup", "ProcessGroup", "TorchGroup", "Work", "as_process_group"]
