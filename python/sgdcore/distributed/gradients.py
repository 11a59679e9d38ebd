"""The gradients that are averaged: of which parameters, in which memory, in which chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgdcore.distributed import _flat
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.header import fingerprint
from sgdcore.distributed.parameters import Parameters


class Gradients:
    """The gradients of an optimizer's parameters, and whether each of those is trained, which is not frozen.

    The layout, and its fingerprint, is what has to be equal on all ranks; the options are the wire's dtype and
    `chunk_bytes`.
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
        rounding = None if wire is None else feedback
        self._averager = Averager(
            parameters.flats, parameters.runs, None, wire, rounding, chunk_bytes
        )

    def _requires_grad(self) -> list[bool]:
        return [getattr(parameter, "requires_grad", True) for parameter in self.parameters.all]

    def changed(self) -> bool:
        """Return whether parameters were frozen or unfrozen, or were given other memory."""
        return self.parameters.moved() or self.trained != self._requires_grad()

    def label(self, i: int) -> str:
        """Return what errors call a gradient."""
        return f"the gradient of {self.parameters.labels[i]}"

    def own(self) -> list[Any]:
        """Return the parameters' gradients, or None, laid out as the parameters are; raise where one does not fit."""
        gradients = []
        for i, parameter in enumerate(self.parameters.all):
            gradient = self._laid_out(i, parameter.grad)
            if gradient is not parameter.grad:
                parameter.grad = gradient
            gradients.append(gradient)
        return gradients

    def given(self, grads: Sequence[Any]) -> list[Any]:
        """Return gradients passed to the step, laid out as the parameters are; raise where they do not fit."""
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
        if _flat.is_torch(gradient) and gradient.is_sparse:
            raise TypeError(f"{self.label(i)}: expected a dense tensor, got a sparse one")
        writable = _flat.is_torch(gradient) or gradient.flags.writeable
        if writable and _flat.element_strides(gradient) == _flat.element_strides(data):
            return gradient
        copy = _flat.zeros_like(data, gradient.dtype)
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
                gradients[i] = _flat.zeros_like(self.parameters.data[i])
                if not given:
                    self.parameters.all[i].grad = gradients[i]
                    gradients[i] = self.parameters.all[i].grad  # a buffer's own memory
        labelled = ((each, self.label(i)) for i, each in enumerate(gradients))
        views = [None if each is None else _flat.flat(each, label) for each, label in labelled]
        try:
            self._averager.average(group, views, factor, wanted=wanted)
        finally:
            self._averager.release()
