"""Tells torch's GradScaler from others that read an optimizer's attribute ``_step_supports_amp_scaling``.

``GradScaler.step`` reads the attribute to know whether the optimizer's step undoes the scale and skips overflows.
Trainers (Lightning, Fabric) read it to know whether they may unscale and clip the gradients themselves. They refuse to
clip if it is true, for any precision. With sgdcore they may clip: a step gets no scale after ``GradScaler.unscale_``.
So the attribute is true for ``GradScaler.step`` only, and false, as torch.optim.SGD's, for all others.
"""

from __future__ import annotations

import sys

__all__ = ["asked_by_grad_scaler"]

# Functions between the reader and this one: the attribute's own, and those of wrappers that pass the attribute on.
_PASS_ON = frozenset({"__get__", "__getattr__", "__getattribute__", "_step_supports_amp_scaling"})


def asked_by_grad_scaler() -> bool:
    """Return whether torch.amp.GradScaler.step reads the attribute that calls this function."""
    frame = sys._getframe(1)
    while frame.f_code.co_name in _PASS_ON and frame.f_back is not None:
        frame = frame.f_back
    module = frame.f_globals.get("__name__")
    return module == "torch.amp.grad_scaler" and frame.f_code.co_name == "step"
