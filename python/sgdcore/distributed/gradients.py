"""The gradients that are averaged: of which parameters, in which memory, in which chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgdcore.distributed._flat import (
    dtype_name,
    element_strides,
    flat,
    is_torch,
    wire_name,
    zeros_like,
)
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.header import fingerprint
from sgdcore.distributed.parameters import Parameters


class Gradients:
    """The gradients of an optimizer's parameters.

    Args:
        parameters: the parameters.
        feedback: what rounds gradients to the wire's dtype.
        wire: that dtype, or None.
        chunk_bytes: the most bytes that travel in one operation; None for what suits the engine.

    Attributes:
        parameters: the parameters.
        options: the wire's dtype and `chunk_bytes`.
        trained: for each parameter whether it is not frozen.
        layout: what has to be equal on all ranks, as text.
        fingerprint: of the layout.
    """

    def __init__(
        self,
        parameters: Parameters,
        feedback: ErrorFeedback,
        wire: str | None,
        chunk_bytes: int | None,
    ) -> None:
        self.parameters, self.options = parameters, (wire, chunk_bytes)
        self.trained = self._requires_grad()
        self.layout = f"{parameters.layout}\nnot frozen {self.trained}"
        self.fingerprint = fingerprint(self.layout)
        views = parameters.flats
        wires = [wire_name(dtype_name(view.dtype), wire) for view in views]
        sizes, rounding = [len(view) for view in views], None if wire is None else feedback
        self._averager = Averager(parameters.runs, sizes, wires, views[0], rounding, chunk_bytes)

    def _requires_grad(self) -> list[bool]:
        return [getattr(parameter, "requires_grad", True) for parameter in self.parameters.all]

    def changed(self) -> bool:
        """Return whether parameters were frozen or unfrozen, or were given other memory."""
        return self.parameters.moved() or self.trained != self._requires_grad()

    def label(self, i: int) -> str:
        """Return what errors call a gradient."""
        return f"the gradient of {self.parameters.labels[i]}"

    def own(self) -> list[Any]:
        """Return the parameters' gradients, or None, laid out as the parameters are.

        Raises:
            TypeError, ValueError: if one does not fit its parameter.
        """
        gradients = []
        for i, parameter in enumerate(self.parameters.all):
            gradient = self._laid_out(i, parameter.grad)
            if gradient is not parameter.grad:
                parameter.grad = gradient
            gradients.append(gradient)
        return gradients

    def given(self, grads: Sequence[Any]) -> list[Any]:
        """Return gradients that were passed to the step, laid out as the parameters are.

        Raises:
            TypeError, ValueError: if there are too many or too few, or one does not fit its parameter.
        """
        expected = len(self.parameters.all)
        if len(grads) != expected:
            raise ValueError(
                f"grads: expected {expected} gradients, one for each parameter, got {len(grads)}"
            )
        return [self._laid_out(i, gradient) for i, gradient in enumerate(grads)]

    def _laid_out(self, i: int, gradient: Any) -> Any:
        """Return the gradient, or a copy that has the parameter's order in memory and can be written to."""
        data = self.parameters.data[i]
        if gradient is None:
            return None
        if tuple(gradient.shape) != tuple(data.shape):
            raise ValueError(
                f"{self.label(i)}: expected shape {tuple(data.shape)}, the parameter's, got {tuple(gradient.shape)}"
            )
        if is_torch(gradient) and gradient.is_sparse:
            raise TypeError(f"{self.label(i)}: expected a dense tensor, got a sparse one")
        writable = is_torch(gradient) or gradient.flags.writeable
        if writable and element_strides(gradient) == element_strides(data):
            return gradient
        copy = zeros_like(data, gradient.dtype)
        copy[...] = gradient
        return copy

    def average(
        self,
        group: ProcessGroup,
        gradients: list[Any],
        factor: float,
        wanted: Sequence[bool],
        given: bool,
    ) -> None:
        """Replace gradients by the sum over the ranks of each one's times its factor.

        Args:
            group: the ranks.
            gradients: this rank's, changed in place: zeros take the place of None; none on an idle rank.
            factor: this rank's weight.
            wanted: for each parameter whether some rank has a gradient.
            given: they are not the parameters' own.

        Raises:
            ValueError: if some rank has a gradient of a parameter that is frozen.
        """
        for i in (i for i, there in enumerate(wanted) if there and not self.trained[i]):
            raise ValueError(
                f"{self.label(i)}: expected None where requires_grad is False, got one on some rank; it is not averaged"
            )
        for i, gradient in enumerate(gradients):
            if gradient is None and wanted[i]:
                gradients[i] = zeros_like(self.parameters.data[i])
                if not given:
                    self.parameters.all[i].grad = gradients[i]
                    gradients[i] = self.parameters.all[i].grad  # a buffer's own memory
        labelled = ((each, self.label(i)) for i, each in enumerate(gradients))
        views = [None if each is None else flat(each, label) for each, label in labelled]
        try:
            self._averager.average(group, views, factor, wanted=wanted)
        finally:
            self._averager.release()
