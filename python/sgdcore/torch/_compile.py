"""Functions that torch.compile must not compile.

The update is one call into the core, which cannot be part of a graph of torch's operations. A function that is not
compiled breaks the graph around it once. The function, and all that it calls, runs as without torch.compile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch

__all__ = ["not_compiled", "refuse_fullgraph"]

_REASON = (
    "the update runs in sgdcore's core, which cannot be part of a graph: compile forward and backward pass with "
    "fullgraph=True, and call step() outside of the compiled function, or leave fullgraph=True out"
)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def not_compiled(function: _Function) -> _Function:
    """Return the function, marked as torch.compiler.disable marks what it returns.

    torch.compiler.disable itself would import the compiler, and its wrapper takes longer than a small step.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    _skip_frames(function.__code__)
    return function


def _skip_frames(code: CodeType) -> None:
    """Make the compiler leave these frames, and all frames below them, uncompiled."""
    eval_frame = torch._C._dynamo.eval_frame
    if hasattr(eval_frame, "set_code_exec_strategy"):  # torch >= 2.8
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))
    else:
        eval_frame.skip_code(code)  # type: ignore[attr-defined]


def refuse_fullgraph() -> None:
    """Raise a RuntimeError if the step itself was given to torch.compile with ``fullgraph=True``.

    torch would find only after the step that there is nothing to compile, and would not say what to do instead.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("sgdcore."):
        frame = frame.f_back
    # The function that torch.compile returns is a closure over its options.
    if frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
        options = frame.f_locals.get("self")
        if getattr(options, "fullgraph", False):
            raise RuntimeError(_REASON)
