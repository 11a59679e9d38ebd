"""An optimizer's parameters, and their momentum, as the flat memory that travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import dtype_name, element_strides, wire_name
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.feedback import ErrorFeedback
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.header import fingerprint
from sgdcore.parameter import Parameter


class Parameters:
    """An optimizer's parameters as flat memory, in the order of the groups.

    Attributes:
        all, group_of, names, labels: each parameter, its group's position, its name or "", what errors call it.
        data, flats: each parameter's values outside of autograd, in its shape and as a flat view.
        runs: the positions of those that lie side by side, together; never across groups.
        layout, fingerprint: what has to be equal on all ranks, as text, and a hash of it.
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
                place = f"param_groups[{i}]['params'][{j}]"
                self.all.append(parameter)
                self.group_of.append(i)
                self.names.append(name)
                self.labels.append(f"parameter '{name}'" if name else place)
        self.read()

    def read(self) -> None:
        """Look where the parameters are; raise where there are gaps in one, or two overlap, and know what was known."""
        data = [p.data if isinstance(p, Parameter) else p.detach() for p in self.all]
        flats = [_flat.flat(each, label) for each, label in zip(data, self.labels, strict=True)]
        if pair := _flat.overlap(flats):
            first, second = (self.labels[i] for i in pair)
            raise ValueError(f"params: {first} and {second} overlap in memory")
        self.data, self.flats = data, flats
        self.runs = _flat.runs(flats, self.group_of)
        self._places = self._where()
        self._averagers: dict[str | None, Averager] = {}
        self.layout = self._describe()
        self.fingerprint = fingerprint(self.layout)

    def _where(self) -> list[int]:
        """Return what tells other memory from that in `data`: a tensor's address, an array's identity."""
        # Each average looks here, so that it has to be quick.
        if _flat.is_torch(self.data[0]):
            return [parameter.data_ptr() for parameter in self.all]
        return [id(parameter.data) for parameter in self.all]

    def moved(self) -> bool:
        """Return whether a parameter was given other memory since."""
        return self._where() != self._places

    def shaped(self, values: Sequence[Any]) -> list[Any]:
        """Return flat arrays, one for each parameter or None, as views in the parameters' shapes."""
        pairs = zip(values, self.data, strict=False)
        return [None if value is None else _flat.shaped(value, data) for value, data in pairs]

    def load(self, values: Sequence[Any], saved: Sequence[Any]) -> None:
        """Copy arrays in the parameters' shapes, or None, into flat ones."""
        for target, source in zip(self.shaped(values), saved, strict=False):
            if source is not None:
                target[...] = source

    def reorder(self, values: Sequence[Any], before: Sequence[Any]) -> None:
        """Bring flat arrays, or None, from the order in memory that `data` had before into that of now, in place."""
        for value, old, new in zip(values, before, self.data, strict=False):
            same = old.shape != new.shape or element_strides(old) == element_strides(new)
            if value is not None and not same:
                _flat.reorder(value, old, new)

    def _describe(self) -> str:
        lines = []
        for i, (name, data) in enumerate(zip(self.names, self.data, strict=True)):
            called = f"number {i} '{name}'" if name else f"number {i}"
            strides, dtype = element_strides(data), dtype_name(data.dtype)
            lines.append(f"{called} of shape {tuple(data.shape)}, strides {strides}, {dtype}")
        side_by_side = f"those side by side in memory {self.runs}"
        return "\n".join([*lines, side_by_side, f"param_groups {self.group_of}"])

    def averager(self, wire: str | None = None, feedback: ErrorFeedback | None = None) -> Averager:
        """Return what averages the parameters, as they are or rounded to a wire's dtype."""
        if wire not in self._averagers:
            averager = Averager(self.flats, self.runs, wire=wire, feedback=feedback)
            self._averagers[wire] = averager
        return self._averagers[wire]


def momentum_of(optimizer: Any, parameter: Any) -> Any:
    """Return a parameter's momentum buffer, or None."""
    if parameter not in optimizer.state:
        return None
    return optimizer.state[parameter].get("momentum_buffer")


def set_zero_momentum(optimizer: Any, parameter: Any, group: Mapping[str, Any]) -> Any:
    """Give a parameter a momentum buffer of zeros."""
    data = parameter.data if isinstance(parameter, Parameter) else parameter.detach()
    momentum = _flat.zeros_like(data, group.get("momentum_dtype"))
    optimizer.state[parameter]["momentum_buffer"] = momentum
    # The optimizer may keep it in memory of its own.
    return optimizer.state[parameter]["momentum_buffer"]


class Momenta:
    """The momentum buffers of an optimizer's parameters, as far as they exist on some rank."""

    def __init__(self, optimizer: Any, parameters: Parameters) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._averager: tuple[Any, Any] = None, None

    def all(self) -> list[Any]:
        """Return each parameter's momentum buffer, or None."""
        return [momentum_of(self._optimizer, parameter) for parameter in self._parameters.all]

    def existing(self) -> list[Any]:
        """Return those momentum buffers that there are."""
        return [momentum for momentum in self.all() if momentum is not None]

    def present(self) -> list[bool]:
        """Return for each parameter whether it has momentum."""
        return [momentum is not None for momentum in self.all()]

    def averager(self) -> Averager:
        """Return what averages them."""
        parameters, groups = self._parameters, self._optimizer.param_groups
        # What the options say, since a loaded buffer's dtype may be its own.
        wires = [
            wire_name(dtype_name(groups[group].get("momentum_dtype") or view.dtype))
            for group, view in zip(parameters.group_of, parameters.flats, strict=True)
        ]
        key = parameters.runs, wires
        if self._averager[0] != key:
            self._averager = key, Averager(parameters.flats, *key)
        averager: Averager = self._averager[1]
        return averager

    def average(self, group: ProcessGroup, wanted: Sequence[bool], factor: float) -> None:
        """Average those that are wanted, the same on all ranks; zeros take the place of those missing here."""
        if any(wanted):
            averager = self.averager()
            averager.average(group, self._views(wanted), factor, wanted=wanted)
            averager.release()

    def broadcast(
        self, group: ProcessGroup, wanted: Sequence[bool], source: int, keep: bool
    ) -> None:
        """Give all ranks the momentum of the rank `source`, where it has some; one that is to `keep` its own does."""
        own = [_flat.copied(momentum) if keep else momentum for momentum in self.all()]
        if any(wanted):
            averager = self.averager()
            averager.broadcast(group, self._views(wanted), source, wanted)
            averager.release()
        for parameter, momentum, there in zip(self._parameters.all, own, wanted, strict=True):
            if keep and momentum is not None:
                self._optimizer.state[parameter]["momentum_buffer"][...] = momentum
            elif there if keep else (momentum is not None and not there):
                del self._optimizer.state[parameter]["momentum_buffer"]

    def _views(self, wanted: Sequence[bool]) -> list[Any]:
        """Return flat views of those that are wanted, which all exist afterwards, and None for the others."""
        labels = self._parameters.labels
        return [
            _flat.flat(self._get(i), f"momentum of {labels[i]}") if each else None
            for i, each in enumerate(wanted)
        ]

    def _get(self, i: int) -> Any:
        parameter, data = self._parameters.all[i], self._parameters.data[i]
        momentum = momentum_of(self._optimizer, parameter)
        if momentum is None:
            group = self._optimizer.param_groups[self._parameters.group_of[i]]
            return set_zero_momentum(self._optimizer, parameter, group)
        if element_strides(momentum) != element_strides(data):
            # A loaded one may be in another order, which the other ranks do not share.
            ordered = _flat.zeros_like(data, momentum.dtype)
            ordered[...] = momentum
            momentum = self._optimizer.state[parameter]["momentum_buffer"] = ordered
        return momentum
