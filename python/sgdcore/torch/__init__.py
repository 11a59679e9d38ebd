"""sgdcore for PyTorch: a drop-in for torch.optim.SGD, with the same bits from one fused pass, and its kin.

>>> import torch, sgdcore
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = sgdcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> model(torch.ones(3, 4)).sum().backward()
>>> optimizer.step()
"""

from __future__ import annotations

from sgdcore._hints import needs as _needs

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        _needs("sgdcore.torch", "torch", "torch", error)
        + "; sgdcore.SGD works on NumPy arrays without it"
    ) from error

from sgdcore.torch.backward import StepInBackward, step_in_backward
from sgdcore.torch.lion import Lion
from sgdcore.torch.schedule_free_sgd import ScheduleFreeSGD
from sgdcore.torch.sgd import SGD
from sgdcore.torch.sgdw import SGDW
from sgdcore.torch.signum import Signum
from sgdcore.torch.verification import Verification, verify

__all__ = [
    "SGD",
    "SGDW",
    "Lion",
    "ScheduleFreeSGD",
    "Signum",
    "StepInBackward",
    "Verification",
    "step_in_backward",
    "verify",
]
