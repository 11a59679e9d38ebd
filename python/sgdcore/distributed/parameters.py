"""An optimizer's parameters, and their momentum, as the flat memory that travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgdcore.distributed import _flat
from sgdcore.distributed._flat import dtype_name, flat, strides_of, wire_name
from sgdcore.distributed.averager import Averager
from sgdcore.distributed.buffers import Buffers
from sgdcore.distributed.groups import ProcessGroup
from sgdcore.distributed.header import fingerprint
from sgdcore.parameter import Parameter


class Parameters:
    """An optimizer's parameters as flat memory, in the order of the groups.

    Attributes:
        all, group_of, labels: each parameter, its group's position, what errors call it.
        data, flats: each parameter's values outside of autograd, in its shape and as a flat view.
        runs: the positions of those of a group that lie side by side in memory, together.
        layout, fingerprint: what has to be equal on all ranks, as text, and a hash of it.
    """

    def __init__(self, optimizer: Any, model: Any = None) -> None:
        self._optimizer, self._model = optimizer, model
        self.read()

    def read(self) -> None:
        """List the parameters and look where they are; raise where one has gaps, or two overlap, and change nothing."""
        known = {id(parameter): name for name, parameter in self._named()}
        all_: list[Any] = []
        group_of, called, labels = [], [], []
        for i, group in enumerate(self._optimizer.param_groups):
            given = group.get("param_names") or ()
            for j, parameter in enumerate(group["params"]):
                name = given[j] if j < len(given) else getattr(parameter, "name", None)
                name = name or known.get(id(parameter))
                called.append(f"number {len(all_)} '{name}'" if name else f"number {len(all_)}")
                labels.append(
                    f"parameter '{name}'" if name else f"param_groups[{i}]['params'][{j}]"
                )
                all_.append(parameter)
                group_of.append(i)
        data = [p.data if isinstance(p, Parameter) else p.detach() for p in all_]
        flats = [flat(each, label) for each, label in zip(data, labels, strict=True)]
        dtypes = [dtype_name(view.dtype) for view in flats]
        for other in set(dtypes).difference(_flat.FLOATS):
            label = labels[dtypes.index(other)]
            raise TypeError(f"{label}: expected a floating-point tensor, got {other}")
        if pair := _flat.overlap(flats):
            raise ValueError(f"params: {labels[pair[0]]} and {labels[pair[1]]} overlap in memory")
        self.all, self.labels, self.data, self.flats = all_, labels, data, flats
        self.group_of, self.runs = group_of, _flat.runs(flats, group_of)
        self._places = self._where()
        self._averagers: dict[Any, Averager] = {}
        lines = [
            f"{name} of shape {tuple(each.shape)}, strides {strides_of(each)}, {dtype}, group {i}"
            for name, each, dtype, i in zip(called, data, dtypes, group_of, strict=True)
        ]
        self.layout = "\n".join([*lines, f"those side by side in memory {self.runs}"])
        self.fingerprint = fingerprint(self.layout)

    def _named(self) -> list[tuple[str, Any]]:
        return [] if self._model is None else list(self._model.named_parameters())

    def others(self) -> Buffers:
        """Return the model's parameters that the optimizer does not have, by name."""
        own = set(map(id, self.all))
        return Buffers({name: p.detach() for name, p in self._named() if id(p) not in own})

    def _where(self) -> list[int]:
        """Return what tells other memory from that in `data`: a tensor's address, an array's identity."""
        # Each average looks here, so that it has to be quick.
        if _flat.is_torch(self.data[0]):
            return [parameter.data_ptr() for parameter in self.all]
        return [id(parameter.data) for parameter in self.all]

    def moved(self) -> bool:
        """Return whether a parameter was given other memory since `read`."""
        return self._where() != self._places

    def averager(self, wire: str | None = None) -> Averager:
        """Return what averages arrays like the parameters, in their dtypes or rounded to a wire's."""
        if wire not in self._averagers:
            wires = [wire_name(dtype_name(view.dtype), wire) for view in self.flats]
            self._averagers[wire] = Averager(self.flats, self.runs, wires)
        return self._averagers[wire]

    # Momentum

    def momenta(self) -> list[Any]:
        """Return each parameter's momentum buffer, or None."""
        state = self._optimizer.state
        return [state[p].get("momentum_buffer") if p in state else None for p in self.all]

    def momentum(self, i: int) -> Any:
        """Return a parameter's momentum in the parameter's order in memory; new zeros where there was none."""
        state, data = self._optimizer.state[self.all[i]], self.data[i]
        momentum = state.get("momentum_buffer")
        if momentum is None:
            ordered = _flat.zeros_like(data, self._momentum_dtype(i))
        else:
            ordered = _flat.laid_out(momentum, data)
        if ordered is not momentum:
            state["momentum_buffer"] = ordered
        return state["momentum_buffer"]  # the optimizer may keep it in memory of its own

    def _momentum_dtype(self, i: int) -> Any:
        """Return what the options say, since a loaded buffer's dtype may be its own."""
        return self._optimizer.param_groups[self.group_of[i]].get("momentum_dtype")

    def average_momenta(self, group: ProcessGroup, wanted: Sequence[bool], factor: float) -> None:
        """Average the momenta that are wanted, the same on all ranks; zeros take the place of those missing here."""
        if not any(wanted):
            return
        wires = tuple(
            wire_name(dtype_name(self._momentum_dtype(i) or view.dtype))
            for i, view in enumerate(self.flats)
        )
        if wires not in self._averagers:
            self._averagers[wires] = Averager(self.flats, self.runs, wires)
        views = [
            flat(self.momentum(i), f"momentum of {label}") if there else None
            for i, (label, there) in enumerate(zip(self.labels, wanted, strict=True))
        ]
        self._averagers[wires].average(group, views, factor, wanted=wanted)
