"""An optimizer's parameters, and their momentum, as the flat memory that travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgdcore.distributed._agreement import fingerprint
from sgdcore.distributed._flat import (
    address,
    dtype_name,
    element_strides,
    flat,
    is_torch,
    numbers,
    overlap,
    runs,
    zeros_like,
)
from sgdcore.distributed._traffic import Averager
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.parameter import Parameter

__all__ = ["Momenta", "Views", "momentum_of", "set_zero_momentum"]


class Views:
    """An optimizer's parameters as flat memory, in the order of the groups.

    Attributes:
        parameters: the parameters themselves.
        group_of: for each, the position of its group.
        flats: for each, its values as a flat view.
        runs: the positions of those that lie side by side, together; never across groups.
        fingerprint: of the layout.
    """

    def __init__(self, optimizer: Any) -> None:
        self.parameters: list[Any] = []
        self.group_of: list[int] = []
        self.labels: list[str] = []
        for i, group in enumerate(optimizer.param_groups):
            names = group.get("param_names")
            for j, parameter in enumerate(group["params"]):
                self.parameters.append(parameter)
                self.group_of.append(i)
                named = names is not None and j < len(names)
                name = names[j] if named else getattr(parameter, "name", None)
                place = f"param_groups[{i}]['params'][{j}]"
                self.labels.append(f"parameter '{name}'" if name else place)
        self.read()

    def read(self) -> None:
        """Look where the parameters are; if that fails, what was known of them stays.

        Raises:
            TypeError, ValueError: if there are gaps in a parameter, or two overlap: averaged at once, they would hold
                anything.
        """
        data = [data_of(parameter) for parameter in self.parameters]
        flats = [flat(d, label) for d, label in zip(data, self.labels, strict=True)]
        if pair := overlap(flats):
            first, second = (self.labels[i] for i in pair)
            raise ValueError(f"params: {first} and {second} overlap in memory")
        self.data, self.flats = data, flats
        self.runs = [part for run in runs(self.flats) for part in _split(run, self.group_of)]
        self._places = self._where()
        self.fingerprint = fingerprint(self.layout())

    def _where(self) -> list[int]:
        """Return what tells other memory from that in `data`: a tensor's address, an array's identity."""
        # Each step looks here, so that it has to be quick.
        if is_torch(self.data[0]):
            return [parameter.data_ptr() for parameter in self.parameters]
        return [id(parameter.data) for parameter in self.parameters]

    def moved(self) -> bool:
        """Return whether a parameter was given other memory since."""
        return self._where() != self._places

    def reordered(self, before: Sequence[Any]) -> list[tuple[int, Any, Any]]:
        """Return which parameters are in another order in memory now: their positions, and the data before and now.

        Args:
            before: `data` of an earlier time, of these parameters or the first of them.
        """
        return [
            (i, old, new)
            for i, (old, new) in enumerate(zip(before, self.data, strict=False))
            if old.shape == new.shape and element_strides(old) != element_strides(new)
        ]

    def layout(self) -> str:
        """Return what has to be equal on all ranks, as text."""
        lines = []
        for i, data in enumerate(self.data):
            strides, dtype = element_strides(data), dtype_name(data.dtype)
            lines.append(f"number {i} of shape {tuple(data.shape)}, strides {strides}, {dtype}")
        lines.append(f"those side by side in memory {self.runs}")
        lines.append(f"param_groups {self.group_of}")
        return "\n".join(lines)


def _split(run: list[int], key: Sequence[int]) -> list[list[int]]:
    """Split a run where the key changes."""
    parts: list[list[int]] = []
    for i in run:
        if parts and key[parts[-1][-1]] == key[i]:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def data_of(parameter: Any) -> Any:
    """Return a parameter's values, as an array or a tensor outside of autograd."""
    return parameter.data if isinstance(parameter, Parameter) else parameter.detach()


def momentum_of(optimizer: Any, parameter: Any) -> Any:
    """Return a parameter's momentum buffer, or None."""
    if parameter not in optimizer.state:
        return None
    return optimizer.state[parameter].get("momentum_buffer")


def set_zero_momentum(optimizer: Any, parameter: Any, group: dict[str, Any]) -> Any:
    """Give a parameter a momentum buffer of zeros."""
    data, dtype = data_of(parameter), group.get("momentum_dtype")
    optimizer.state[parameter]["momentum_buffer"] = zeros_like(data, dtype)
    return optimizer.state[parameter]["momentum_buffer"]


class Momenta:
    """The momentum buffers of an optimizer's parameters, as far as they exist on some rank.

    Args:
        optimizer: the optimizer.
        views: its parameters.
    """

    def __init__(self, optimizer: Any, views: Views) -> None:
        self._optimizer, self._views = optimizer, views
        self._averager: tuple[Any, Averager] | None = None

    def all(self) -> list[Any]:
        """Return each parameter's momentum buffer, or None."""
        return [momentum_of(self._optimizer, parameter) for parameter in self._views.parameters]

    def averager(self, wanted: Sequence[bool]) -> Averager | None:
        """Return what averages those that are wanted; zeros take the place of those missing here.

        Args:
            wanted: for each parameter, equal on all ranks.
        """
        if not any(wanted):
            return None
        views: list[Any] = []
        dtypes: list[str] = []
        position: dict[int, int] = {}
        for i, each in enumerate(wanted):
            if each:
                position[i] = len(views)
                views.append(flat(self._get(i), f"momentum of {self._views.labels[i]}"))
                dtypes.append(self._dtype(i))
        # The parameters' runs, which all ranks have in common; they can change where momentum stays.
        runs = [[position[i] for i in run if wanted[i]] for run in self._views.runs]
        plan = [address(view) for view in views], runs, dtypes
        if self._averager is None or self._averager[0] != plan:
            self._averager = plan, Averager(views, [run for run in runs if run], dtypes=dtypes)
        return self._averager[1]

    def broadcast(self, group: ProcessGroup, source: int) -> None:
        """Give all ranks the momentum of one of them, and none where it has none."""
        own = self.all()
        present = numbers(self._views.flats[0], [momentum is not None for momentum in own])
        group.broadcast(present, source).wait()
        wanted = [each > 0 for each in present.tolist()]
        for parameter, momentum, there in zip(self._views.parameters, own, wanted, strict=True):
            if momentum is not None and not there:
                del self._optimizer.state[parameter]["momentum_buffer"]
        averager = self.averager(wanted)
        if averager is not None:
            averager.broadcast(group, source)

    def _group(self, i: int) -> dict[str, Any]:
        group: dict[str, Any] = self._optimizer.param_groups[self._views.group_of[i]]
        return group

    def _get(self, i: int) -> Any:
        parameter = self._views.parameters[i]
        momentum = momentum_of(self._optimizer, parameter)
        if momentum is None:
            return set_zero_momentum(self._optimizer, parameter, self._group(i))
        data = self._views.data[i]
        if element_strides(momentum) != element_strides(data):
            # A loaded one may be in another order, which the other ranks do not share.
            ordered = zeros_like(data, momentum.dtype)
            ordered[...] = momentum
            momentum = self._optimizer.state[parameter]["momentum_buffer"] = ordered
        return momentum

    def _dtype(self, i: int) -> str:
        """Return what the options say, since a loaded buffer's dtype may be its own."""
        return dtype_name(self._group(i).get("momentum_dtype") or self._views.flats[i].dtype)
