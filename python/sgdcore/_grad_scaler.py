"""Who asks whether an optimizer's step undoes a GradScaler's scale: the answer is for torch's GradScaler alone.

torch asks for the attribute ``_step_supports_amp_scaling``. ``GradScaler.step`` wants to know who unscales and who
leaves a step out. Trainers (Lightning, Fabric) ask the same attribute whether they may unscale and clip the gradients
themselves, and refuse to clip if it is true, whatever the precision. They may: a step whose gradients were unscaled by
``GradScaler.unscale_`` gets no scale. So only ``GradScaler.step`` is told that the step takes the scale, and everyone
else hears what torch.optim.SGD says, which is no.
"""

from __future__ import annotations

import sys

__all__ = ["asked_by_grad_scaler"]

# Functions between the one who asks and the attribute: the attribute's own, and those of wrappers that pass it on.
_PASS_ON = frozenset({"__get__", "__getattr__", "__getattribute__", "_step_supports_amp_scaling"})


def asked_by_grad_scaler() -> bool:
    """Return whether the attribute that calls this function was asked for by torch.amp.GradScaler.step."""
    frame = sys._getframe(1)
    while frame.f_code.co_name in _PASS_ON and frame.f_back is not None:
        frame = frame.f_back
    module = frame.f_globals.get("__name__")
    return module == "torch.amp.grad_scaler" and frame.f_code.co_name == "step"
