"""An optimizer's parameters, and their momentum, as the flat memory that travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgdcore.distributed._flat import (
    address,
    compute_dtype,
    copied,
    dtype_name,
    element_strides,
    flat,
    is_torch,
    item_bytes,
    overlap,
    runs,
    zeros_like,
)
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.header import fingerprint
from sgdcore.parameter import Parameter

__all__ = ["Momenta", "Parameters", "data_of", "momentum_of", "set_zero_momentum", "wire_name"]


class Parameters:
    """An optimizer's parameters as flat memory, in the order of the groups.

    Attributes:
        all: the parameters themselves.
        group_of: for each, the position of its group.
        names: for each, its name; an empty one where it has none.
        labels: for each, what errors call it.
        data: for each, its values as an array or a tensor outside of autograd.
        flats: for each, its values as a flat view.
        runs: the positions of those that lie side by side, together; never across groups.
        fingerprint: of the layout.
        momenta: their momentum.
    """

    def __init__(self, optimizer: Any, names: Mapping[int, str] | None = None) -> None:
        self.momenta = Momenta(optimizer, self)
        self.all: list[Any] = []
        self.group_of: list[int] = []
        self.names: list[str] = []
        self.labels: list[str] = []
        for i, group in enumerate(optimizer.param_groups):
            given = group.get("param_names") or ()
            for j, parameter in enumerate(group["params"]):
                name = given[j] if j < len(given) else getattr(parameter, "name", None)
                name = name or (names or {}).get(id(parameter), "")
                self.all.append(parameter)
                self.group_of.append(i)
                self.names.append(name)
                place = f"param_groups[{i}]['params'][{j}]"
                self.labels.append(f"parameter '{name}'" if name else place)
        self.read()

    def read(self) -> None:
        """Look where the parameters are; if that fails, what was known of them stays.

        Raises:
            TypeError, ValueError: if there are gaps in a parameter, or two overlap: averaged at once, they would hold
                anything.
        """
        data = [data_of(parameter) for parameter in self.all]
        flats = [flat(each, label) for each, label in zip(data, self.labels, strict=True)]
        if pair := overlap(flats):
            first, second = (self.labels[i] for i in pair)
            raise ValueError(f"params: {first} and {second} overlap in memory")
        self.data, self.flats = data, flats
        self.runs = [part for run in runs(flats) for part in _split(run, self.group_of)]
        self._places = self._where()
        self._averagers: dict[str | None, Averager] = {}
        self._layout = self._describe()
        self.fingerprint = fingerprint(self._layout)

    def _where(self) -> list[int]:
        """Return what tells other memory from that in `data`: a tensor's address, an array's identity."""
        # Each average looks here, so that it has to be quick.
        if is_torch(self.data[0]):
            return [parameter.data_ptr() for parameter in self.all]
        return [id(parameter.data) for parameter in self.all]

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
        return self._layout

    def _describe(self) -> str:
        lines = []
        for i, (name, data) in enumerate(zip(self.names, self.data, strict=True)):
            called = f"number {i} '{name}'" if name else f"number {i}"
            strides, dtype = element_strides(data), dtype_name(data.dtype)
            lines.append(f"{called} of shape {tuple(data.shape)}, strides {strides}, {dtype}")
        lines.append(f"those side by side in memory {self.runs}")
        lines.append(f"param_groups {self.group_of}")
        return "\n".join(lines)

    def averager(self, wire: str | None = None, feedback: ErrorFeedback | None = None) -> Averager:
        """Return what averages the parameters, as they are or rounded to a wire's dtype."""
        if wire not in self._averagers:
            wires = [wire_name(dtype_name(view.dtype), wire) for view in self.flats]
            sizes = [len(view) for view in self.flats]
            self._averagers[wire] = Averager(self.runs, sizes, wires, self.flats[0], feedback)
        return self._averagers[wire]


def wire_name(dtype: str, wire: str | None = None) -> str:
    """Return the dtype on the wire for arrays of a dtype: 16-bit ones are added up in float32 unless `wire` says so."""
    if wire is not None and item_bytes(wire) <= item_bytes(dtype):
        return wire
    return compute_dtype(dtype)


def _split(run: list[int], key: Sequence[int]) -> list[list[int]]:
    """Split a run where the key changes."""
    if len(run) == 1:
        return [run]
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
        parameters: its parameters.
    """

    def __init__(self, optimizer: Any, parameters: Parameters) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._averager: tuple[Any, Averager, list[Any]] | None = None

    def all(self) -> list[Any]:
        """Return each parameter's momentum buffer, or None."""
        return [momentum_of(self._optimizer, parameter) for parameter in self._parameters.all]

    def averager(self, wanted: Sequence[bool]) -> tuple[Averager, list[Any]] | None:
        """Return what averages those that are wanted, and their views; zeros take the place of those missing here.

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
                views.append(flat(self._get(i), f"momentum of {self._parameters.labels[i]}"))
                dtypes.append(wire_name(self._dtype(i)))
        # The parameters' runs, which all ranks have in common; they can change where momentum stays.
        runs = [[position[i] for i in run if wanted[i]] for run in self._parameters.runs]
        runs = [run for run in runs if run]
        plan = [address(view) for view in views], runs, dtypes
        if self._averager is None or self._averager[0] != plan:
            averager = Averager(runs, [len(view) for view in views], dtypes, views[0])
            self._averager = plan, averager, views
        return self._averager[1:]

    def average(self, group: ProcessGroup, wanted: Sequence[bool], factor: float) -> None:
        """Average those that are wanted over the ranks."""
        found = self.averager(wanted)
        if found is not None:
            found[0].average(group, found[1], factor)

    def broadcast(
        self, group: ProcessGroup, wanted: Sequence[bool], source: int, keep: bool
    ) -> None:
        """Give all ranks the momentum of one of them, and none where it has none.

        Args:
            group: the ranks.
            wanted: for each parameter whether the rank `source` has momentum of it.
            source: that rank.
            keep: this rank keeps its own.
        """
        own = self.all()
        if keep:
            own = [copied(momentum) for momentum in own]
        found = self.averager(wanted)
        if found is not None:
            found[0].broadcast(group, found[1], source)
        for parameter, momentum, there in zip(self._parameters.all, own, wanted, strict=True):
            if keep and momentum is not None:
                self._optimizer.state[parameter]["momentum_buffer"][...] = momentum
            elif (momentum is None and there) if keep else (momentum is not None and not there):
                del self._optimizer.state[parameter]["momentum_buffer"]

    def _group(self, i: int) -> dict[str, Any]:
        group: dict[str, Any] = self._optimizer.param_groups[self._parameters.group_of[i]]
        return group

    def _get(self, i: int) -> Any:
        parameter = self._parameters.all[i]
        momentum = momentum_of(self._optimizer, parameter)
        if momentum is None:
            return set_zero_momentum(self._optimizer, parameter, self._group(i))
        data = self._parameters.data[i]
        if element_strides(momentum) != element_strides(data):
            # A loaded one may be in another order, which the other ranks do not share.
            ordered = zeros_like(data, momentum.dtype)
            ordered[...] = momentum
            momentum = self._optimizer.state[parameter]["momentum_buffer"] = ordered
        return momentum

    def _dtype(self, i: int) -> str:
        """Return what the options say, since a loaded buffer's dtype may be its own."""
        return dtype_name(self._group(i).get("momentum_dtype") or self._parameters.flats[i].dtype)
