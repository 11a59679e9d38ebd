"""A model's state beside its parameters: batch norm's running statistics, and parameters that no optimizer has."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import dtype_name, is_torch
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.groups import ProcessGroup

_warned = False


class Buffers:
    """Arrays, or a mapping of them, that are averaged with each round; integers are taken from one rank.

    Attributes:
        layout: what has to be equal on all ranks, as text.
        floats: flat views of those that are averaged.
    """

    def __init__(self, buffers: Any) -> None:
        if buffers is not None and not isinstance(buffers, Iterable):
            raise TypeError(
                f"buffers: expected arrays or tensors, such as model.buffers(), got {buffers!r}"
            )
        named = buffers if isinstance(buffers, Mapping) else dict(enumerate(buffers or ()))
        lines = []
        self.floats: list[Any] = []
        self._integers: list[Any] = []
        for name, array in named.items():
            label = f"buffers[{name!r}]"
            if not (is_torch(array) or isinstance(array, np.ndarray)):
                kind = type(array).__name__
                raise TypeError(f"{label}: expected an array or a tensor, got {kind}")
            lines.append(f"{label} of shape {tuple(array.shape)}, {array.dtype}")
            averaged = dtype_name(array.dtype).startswith(("float", "bfloat", "complex"))
            (self.floats if averaged else self._integers).append(_flat.flat(array, label))
        self.layout = "\n".join(lines)
        wires = [_flat.wire_name(dtype_name(each.dtype)) for each in self.floats]
        self._of_floats = Averager(self.floats, _flat.runs(self.floats), wires)
        apart = [[i] for i in range(len(self._integers))]
        self._of_integers = Averager(self._integers, apart, ["int64"] * len(apart))

    def average(self, group: ProcessGroup, factor: float, source: int) -> None:
        """Average the values over the ranks; take integers from the rank `source`."""
        self._of_floats.average(group, self.floats, factor)
        self._of_integers.broadcast(group, self._integers, source)

    def broadcast(self, group: ProcessGroup, source: int) -> None:
        """Take all values from the rank `source`."""
        self._of_floats.broadcast(group, self.floats, source)
        self._of_integers.broadcast(group, self._integers, source)

    def copies(self) -> list[Any]:
        """Return copies of all values."""
        return [_flat.copied(each) for each in (*self.floats, *self._integers)]

    def restore(self, copies: Sequence[Any]) -> None:
        """Return to what `copies` returned; none: to nothing."""
        for values, copy in zip((*self.floats, *self._integers), copies, strict=False):
            values[...] = copy


def warn_of_batch_norm(parameters: Iterable[Any]) -> None:
    """Warn, once in a process, if a module with these parameters has batch norm."""
    global _warned
    batch_norm = sys.modules.get("torch.nn.modules.batchnorm")
    own = {id(parameter) for parameter in parameters if is_torch(parameter)}
    if _warned or batch_norm is None or not own:
        return
    objects, norm = gc.get_objects(), batch_norm._NormBase
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, batch_norm.Module)}
    for module in (each for each in objects if type(each) in kinds):
        inside = list(module.modules())
        norms = (m for m in inside if isinstance(m, norm) and m.running_mean is not None)
        trained = (id(p) in own for each in inside for p in each._parameters.values())
        if any(norms) and any(trained):
            _warned = True
            warnings.warn(
                "the model has batch norm, whose running statistics stay each rank's own: pass model=model, or "
                "buffers=model.buffers(), to average them with each round",
                stacklevel=3,
            )
            return
