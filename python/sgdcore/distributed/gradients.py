"""The gradients that are averaged: of which parameters, in which memory, in which chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgdcore.distributed._flat import dtype_name, element_strides, flat, is_torch, zeros_like
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.header import fingerprint
from sgdcore.distributed.parameters import Parameters, wire_name

__all__ = ["Gradients"]


class Gradients:
    """The gradients of an optimizer's parameters.

    Args:
        parameters: the parameters.
        feedback: what rounds gradients to the wire's dtype.
        wire: that dtype, or None.
        chunk_bytes: the most bytes that travel in one operation; None for what suits the engine.

    Attributes:
        parameters: the parameters.
        trained: for each parameter whether it is not frozen.
        fingerprint: of what has to be equal on all ranks.
    """

    def __init__(
        self,
        parameters: Parameters,
        feedback: ErrorFeedback,
        wire: str | None,
        chunk_bytes: int | None,
    ) -> None:
        self.parameters = parameters
        self.trained = self._requires_grad()
        self.fingerprint = fingerprint(self.layout())
        views = parameters.flats
        # Frozen parameters get no gradients, and are left out.
        sizes = [len(view) if there else 0 for view, there in zip(views, self.trained, strict=True)]
        wires = [wire_name(dtype_name(view.dtype), wire) for view in views]
        self._averager = Averager(
            parameters.runs,
            sizes,
            wires,
            views[0],
            None if wire is None else feedback,
            chunk_bytes,
        )

    def layout(self) -> str:
        """Return what has to be equal on all ranks, as text."""
        return f"{self.parameters.layout()}\nnot frozen {self.trained}"

    def _requires_grad(self) -> list[bool]:
        parameters = self.parameters.all
        if not is_torch(self.parameters.flats[0]):
            return [True] * len(parameters)
        return [parameter.requires_grad for parameter in parameters]

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
        if len(grads) != len(self.parameters.all):
            raise ValueError(
                f"grads: expected {len(self.parameters.all)} gradients, one for each parameter, got {len(grads)}"
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

    def add_missing(self, gradients: list[Any], present: Sequence[bool], given: bool) -> None:
        """Put zeros where this rank has no gradient and another one has.

        Args:
            gradients: this rank's; changed in place.
            present: for each parameter whether some rank has a gradient.
            given: they are not the parameters' own.
        """
        for i, gradient in enumerate(gradients):
            if gradient is None and present[i]:
                gradients[i] = zeros_like(self.parameters.data[i])
                if not given:
                    self.parameters.all[i].grad = gradients[i]
                    gradients[i] = self.parameters.all[i].grad  # a buffer's own memory

    def average(self, group: ProcessGroup, gradients: Sequence[Any], factor: float) -> None:
        """Replace gradients by the sum over the ranks of each one's times its factor.

        Args:
            group: the ranks.
            gradients: this rank's; None for a parameter of which no rank has one, and for all on an idle rank.
            factor: this rank's weight.
        """
        views = [
            None if gradient is None else flat(gradient, self.label(i))
            for i, gradient in enumerate(gradients)
        ]
        try:
            self._averager.average(group, views, factor)
        finally:
            self._averager.release()
