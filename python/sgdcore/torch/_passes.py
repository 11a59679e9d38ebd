"""Finds out, in a parameter's hook, whether more backward passes over the same parameters are to come.

A parameter's hook runs when the backward pass has computed its gradient. The gradient is then complete, unless another
pass adds to it: a second pass over the same graph, or a pass that a node of the graph runs, as reentrant checkpointing
does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch.autograd import function, graph

__all__ = ["current_pass", "keeps_graph", "nested_pass"]

current_pass = torch._C._current_graph_task_id  # a number, -1 outside of all passes
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# The code of the Python functions that run a backward pass, and a node that is written in Python.
_RUN_PASS: CodeType = graph._engine_run_backward.__code__
_RUN_NODE: CodeType = function.BackwardCFunction.apply.__code__


def nested_pass() -> str | None:
    """Return the name of a node that runs a backward pass, in this pass or around it; None if there is none.

    A node written in Python counts if its ``backward`` calls something called ``backward``. A pass that is nested in
    another pass for any other reason is found when this function is called inside of the nested one.
    """
    passes = list(_passes_above(sys._getframe(1)))
    if not passes:
        # A device's thread works for a pass that another thread waits for.
        for frame in list(sys._current_frames().values()):
            passes += _passes_above(frame)
    for frame, nested in passes:
        name = _nested_pass_below(frame.f_locals.get("t_outputs", ()))
        if name is not None:
            return name
        if nested:
            return "a node of the graph"
    return None


def _passes_above(frame: FrameType | None) -> Iterator[tuple[FrameType, bool]]:
    """Yield the frame of each pass that a frame runs in, innermost first, and whether another pass is around it."""
    current = None
    while frame is not None:
        if frame.f_code is _RUN_PASS:
            if current is not None:
                yield current, True
            current = frame
        elif frame.f_code is _RUN_NODE and current is not None:
            yield current, True
            current = None
        frame = frame.f_back
    if current is not None:
        yield current, False


def _nested_pass_below(roots: Iterable[Any]) -> str | None:
    nodes = [root.node if isinstance(root, graph.GradientEdge) else root.grad_fn for root in roots]
    nodes = [node for node in nodes if node is not None]
    seen, kinds = set(nodes), set()
    while nodes:
        node = nodes.pop()
        kind = type(node)
        if kind not in kinds:
            kinds.add(kind)
            if issubclass(kind, function.BackwardCFunction) and _runs_a_pass(kind):
                return kind.__name__
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)
    return None


def _runs_a_pass(kind: Any) -> bool:
    """Tell whether the node's code calls something called ``backward``: torch.autograd's, or a tensor's."""
    code = getattr(inspect.unwrap(kind._forward_cls.backward), "__code__", None)
    return code is not None and "backward" in code.co_names
