"""A model's state beside its parameters: batch norm's running statistics, and parameters that no optimizer has."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sgdcore._arrays import Array
from sgdcore.distributed._flat import copied, dtype_name, flat, is_torch, runs
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.parameters import wire_name

__all__ = ["Buffers", "warn_of_batch_norm"]

_AVERAGED = ("float64", "float32", "float16", "bfloat16")


class Buffers:
    """Arrays that are averaged with each round; integers are taken from one rank.

    Args:
        buffers: tensors or arrays, such as ``model.buffers()``, or a mapping of them.

    Raises:
        TypeError: if one is neither an array nor a tensor.
        ValueError: if there are gaps between its elements.
    """

    def __init__(self, buffers: Any) -> None:
        if buffers is not None and not isinstance(buffers, Iterable):
            raise TypeError(
                f"buffers: expected arrays or tensors, such as model.buffers(), got {buffers!r}"
            )
        named = buffers if isinstance(buffers, Mapping) else enumerate(buffers or ())
        self._labels: list[str] = []
        self.floats: list[Any] = []
        self._integers: list[Any] = []
        for name, array in named.items() if isinstance(named, Mapping) else named:
            label = f"buffers[{name!r}]"
            if not (is_torch(array) or isinstance(array, np.ndarray)):
                raise TypeError(
                    f"{label}: expected an array or a tensor, got {type(array).__name__}"
                )
            self._labels.append(f"{label} of shape {tuple(array.shape)}, {array.dtype}")
            averaged = dtype_name(array.dtype) in _AVERAGED or "complex" in str(array.dtype)
            if averaged:
                self.floats.append(flat(array, label))
            else:
                self._integers.append(array)
        self._averager: Averager | None = None
        if self.floats:
            wires = [wire_name(dtype_name(view.dtype)) for view in self.floats]
            sizes = [len(view) for view in self.floats]
            self._averager = Averager(runs(self.floats), sizes, wires, self.floats[0])

    def __bool__(self) -> bool:
        return bool(self._labels)

    def layout(self) -> str:
        """Return what has to be equal on all ranks, as text."""
        return "\n".join(self._labels)

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
        return [copied(array) for array in (*self.floats, *self._integers)]

    def restore(self, copies: list[Any]) -> None:
        """Return to what `copies` returned."""
        for array, copy in zip((*self.floats, *self._integers), copies, strict=True):
            array[...] = copy

    def _share_integers(self, group: ProcessGroup, source: int) -> None:
        if not self._integers:
            return
        like = self._integers[0]
        words = np.concatenate([_words(array) for array in self._integers])
        sent: Any = words
        if is_torch(like):
            sent = sys.modules["torch"].from_numpy(words).to(like.device)
        group.broadcast(sent, source).wait()
        words = sent.cpu().numpy() if is_torch(sent) else sent
        start = 0
        for array in self._integers:
            stop = start + len(_words(array))
            values = words[start:stop].reshape(tuple(array.shape))
            array[...] = sys.modules["torch"].from_numpy(values) if is_torch(array) else values
            start = stop


def _words(array: Any) -> Array:
    """Return the values of an array of integers or truth values, as 64-bit ones."""
    array = array.detach().cpu().numpy() if is_torch(array) else array
    return np.ascontiguousarray(array, np.int64).reshape(-1)


_warned = False


def warn_of_batch_norm(parameters: Iterable[Any]) -> None:
    """Warn, once in a process, if a module with these parameters has batch norm."""
    global _warned
    batch_norm = sys.modules.get("torch.nn.modules.batchnorm")
    if _warned or batch_norm is None:
        return
    parameters = list(parameters)
    flat_shapes = [parameter.shape for parameter in parameters if parameter.ndim == 1]
    if len(set(flat_shapes)) == len(flat_shapes):
        return  # batch norm's weight and bias have one shape; the search takes some time
    own = {id(parameter) for parameter in parameters}
    modules = [o for o in gc.get_objects() if issubclass(type(o), sys.modules["torch"].nn.Module)]
    norms = {
        id(module)
        for module in modules
        if issubclass(type(module), batch_norm._NormBase)
        and getattr(module, "running_mean", None) is not None
    }
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
