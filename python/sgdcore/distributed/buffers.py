"""A model's state beside its parameters: batch norm's running statistics, and parameters that no optimizer has."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import as_kind, as_numpy, dtype_name, is_torch
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.groups import ProcessGroup

_AVERAGED = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "complex32")


class Buffers:
    """Arrays, or a mapping of them, that are averaged with each round; integers are taken from one rank."""

    def __init__(self, buffers: Any) -> None:
        if buffers is not None and not isinstance(buffers, Iterable):
            raise TypeError(
                f"buffers: expected arrays or tensors, such as model.buffers(), got {buffers!r}"
            )
        named = buffers if isinstance(buffers, Mapping) else dict(enumerate(buffers or ()))
        labels: list[str] = []
        self.floats: list[Any] = []
        self._integers: list[Any] = []
        for name, array in named.items():
            label = f"buffers[{name!r}]"
            if not (is_torch(array) or isinstance(array, np.ndarray)):
                raise TypeError(
                    f"{label}: expected an array or a tensor, got {type(array).__name__}"
                )
            labels.append(f"{label} of shape {tuple(array.shape)}, {array.dtype}")
            if dtype_name(array.dtype) in _AVERAGED:
                self.floats.append(_flat.flat(array, label))
            else:
                self._integers.append(array)
        self.layout = "\n".join(labels)  # what has to be equal on all ranks
        self._averager: Averager | None = None
        if self.floats:
            self._averager = Averager(self.floats, _flat.runs(self.floats))

    def average(self, group: ProcessGroup, factor: float, source: int) -> None:
        """Average the values over the ranks; take integers from the rank `source`."""
        if self._averager is not None:
            self._averager.average(group, self.floats, factor)
        self._share_integers(group, source)

    def broadcast(self, group: ProcessGroup, source: int) -> None:
        """Take all values from the rank `source`."""
        if self._averager is not None:
            self._averager.broadcast(group, self.floats, source)
        self._share_integers(group, source)

    def copies(self) -> list[Any]:
        """Return copies of all arrays."""
        return [_flat.copied(array) for array in (*self.floats, *self._integers)]

    def restore(self, copies: Sequence[Any]) -> None:
        """Return to what `copies` returned; none: to nothing."""
        for array, copy in zip((*self.floats, *self._integers), copies, strict=False):
            array[...] = copy

    def _share_integers(self, group: ProcessGroup, source: int) -> None:
        if self._integers:
            words = [as_numpy(each).astype(np.int64).reshape(-1) for each in self._integers]
            sent = as_kind(self._integers[0], np.concatenate(words))
            group.broadcast(sent, source).wait()
            parts = np.split(as_numpy(sent), np.cumsum([len(each) for each in words])[:-1])
            for array, part in zip(self._integers, parts, strict=True):
                array[...] = as_kind(array, part.reshape(tuple(array.shape)))


_warned = False


def warn_of_batch_norm(parameters: Iterable[Any]) -> None:
    """Warn, once in a process, if a module with these parameters has batch norm."""
    global _warned
    batch_norm = sys.modules.get("torch.nn.modules.batchnorm")
    own = {id(parameter) for parameter in parameters}
    if _warned or batch_norm is None or not own:
        return
    objects, norm = gc.get_objects(), batch_norm._NormBase
    kinds = set(map(type, objects))
    if not any(issubclass(kind, norm) for kind in kinds):
        return
    kinds = {kind for kind in kinds if issubclass(kind, sys.modules["torch"].nn.Module)}
    modules = [each for each in objects if type(each) in kinds]
    norms = {id(m) for m in modules if isinstance(m, norm) and m.running_mean is not None}
    for module in modules if norms else ():
        inside = list(module.modules())
        if any(id(each) in norms for each in inside) and any(
            id(p) in own for each in inside for p in each._parameters.values()
        ):
            _warned = True
            warnings.warn(
                "the model has batch norm, whose running statistics stay each rank's own: pass model=model, or "
                "buffers=model.buffers(), to average them with each round",
                stacklevel=3,
            )
            return
