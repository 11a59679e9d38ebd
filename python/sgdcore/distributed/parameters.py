"""What is averaged as flat memory: an optimizer's parameters and what it keeps for them, and a model's buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgdcore._averages import AVERAGE
from sgdcore._kept import declared_states, dtype_of_state, masters_of, set_masters
from sgdcore.distributed import _flat
from sgdcore.distributed._flat import dtype_name, flat, is_torch, strides_of, wire_name
from sgdcore.distributed.averager import Averager
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
        self._optimizer = optimizer
        self._names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        self.layout = ""
        self._read()

    def _read(self) -> None:
        """List the parameters and look where they are; raise where that cannot be averaged, and change nothing."""
        all_: list[Any] = []
        group_of, labels = [], []
        for i, group in enumerate(self._optimizer.param_groups):
            given = group.get("param_names") or ()
            for j, parameter in enumerate(group["params"]):
                name = given[j] if j < len(given) else getattr(parameter, "name", None)
                name = name or self._names.get(id(parameter))
                place = f"param_groups[{i}]['params'][{j}]"
                labels.append(f"parameter '{name}'" if name else place)
                all_.append(parameter)
                group_of.append(i)
        data = [p.data if isinstance(p, Parameter) else p.detach() for p in all_]
        flats = [flat(each, label) for each, label in zip(data, labels, strict=True)]
        dtypes = [dtype_name(view.dtype) for view in flats]
        places = _flat.extents(flats)
        if pair := _flat.overlap(*places):
            first, second = (labels[i] for i in pair)
            raise ValueError(f"params: {first} and {second} overlap in memory")
        lines = "".join(
            f"number {i}, {labels[i]}, of shape {tuple(each.shape)}, strides {strides_of(each)}, {dtypes[i]}, "
            f"group {group_of[i]}\n"
            for i, each in enumerate(data)
        )
        if self.layout and not self.layout.startswith(lines):
            raise ValueError(
                "params: they, or their order in memory, changed since they were wrapped; wrap the optimizer anew"
            )
        self.all, self.labels, self.data, self.flats = all_, labels, data, flats
        self.group_of, self.runs = group_of, _flat.runs(flats, group_of, places)
        self._places = self._where()
        self._averagers: dict[Any, Averager] = {}
        self.layout = f"{lines}those side by side in memory {self.runs}"
        self.fingerprint = fingerprint(self.layout.encode())

    def _where(self) -> list[int]:
        """Return what tells other memory from that in `data`: a tensor's address, an array's identity."""
        # Each average looks here, so that it has to be quick.
        everything = [p for group in self._optimizer.param_groups for p in group["params"]]
        if is_torch(everything[0]):
            return [parameter.data_ptr() for parameter in everything]
        return [id(parameter.data) for parameter in everything]

    def moved(self) -> bool:
        """Return whether a parameter was given other memory since this looked."""
        return self._where() != self._places

    def follow(self) -> None:
        """Look where parameters are that were given other memory."""
        if self.moved():
            self._read()

    def averager(self, wire: str | None = None, key: str | None = None) -> Averager:
        """Return what averages arrays like the parameters, or a rule's state, rounded to a wire's dtype."""
        if (wire, key) not in self._averagers:
            dtypes = [view.dtype for view in self.flats]
            if key is not None:
                dtypes = [self._dtype(key, i) or dtype for i, dtype in enumerate(dtypes)]
            wires = [wire_name(dtype_name(dtype), wire) for dtype in dtypes]
            self._averagers[wire, key] = Averager(self.flats, self.runs, wires)
        return self._averagers[wire, key]

    def masters(self) -> dict[int, Any]:
        """Return the float32 values of the parameters that are kept in two halves, by position."""
        return masters_of(self._optimizer)

    def average_masters(self, masters: dict[int, Any], group: ProcessGroup, factor: float) -> None:
        """Average the values that `masters` returned, in float32, and set the parameters to them."""
        views = [flat(each, f"the master of {self.labels[i]}") for i, each in masters.items()]
        averager = Averager(views, [[i] for i in range(len(views))], ["float32"] * len(views))
        averager.average(group, views, factor)
        set_masters(self._optimizer, masters)

    # The states, such as momentum

    def states(self, rules: bool = True, averages: bool = True) -> dict[str, list[Any]]:
        """Return the rule's states and the averages by key, for each parameter, or None."""
        state = self._optimizer.state
        return {
            key: [state[p].get(key) if p in state else None for p in self.all]
            for key in declared_states(self._optimizer)
            if (averages if key == AVERAGE.key else rules)
        }

    def arrays_of_states(self) -> list[Any]:
        """Return all that there is of the rule's states."""
        found = self.states(averages=False).values()
        return [each for values in found for each in values if each is not None]

    def restore_states(self, states: Mapping[str, Sequence[Any]]) -> None:
        """Set states to what `states` returned before, None included."""
        for key, values in states.items():
            for i, value in enumerate(values):
                if value is not None:
                    self.state(key, i)[...] = value
                elif self.all[i] in self._optimizer.state:
                    self._optimizer.state[self.all[i]].pop(key, None)

    def state(self, key: str, i: int) -> Any:
        """Return a parameter's state in its order in memory.

        Where there was none: zeros, or the parameter's values, of an average and of what the rule lets start as these.
        """
        state, data = self._optimizer.state[self.all[i]], self.data[i]
        if (value := state.get(key)) is None:
            state[key] = _flat.zeros_like(data, self._dtype(key, i))
            declared = declared_states(self._optimizer)[key]
            state[key][...] = data if declared is AVERAGE or declared.start == "parameter" else 0
        elif (ordered := _flat.laid_out(value, data)) is not value:
            state[key] = ordered
        return state[key]  # the optimizer may keep it in memory of its own

    def _dtype(self, key: str, i: int) -> Any:
        """Return what the options say, since a loaded state's dtype may be its own."""
        return dtype_of_state(self._optimizer, key, self.group_of[i])

    def average_state(
        self, key: str, group: ProcessGroup, wanted: Sequence[bool], factor: float
    ) -> None:
        """Average a state where it is wanted, the same on all ranks; see `state` where one is missing."""
        views = [
            flat(self.state(key, i), f"{key} of {label}") if wanted[i] else None
            for i, label in enumerate(self.labels)
        ]
        self.averager(key=key).average(group, views, factor, wanted)


class Buffers:
    """Arrays, or a mapping of them, of which `floats` are averaged; integers are taken from one rank."""

    def __init__(self, buffers: Any) -> None:
        named = buffers if isinstance(buffers, Mapping) else dict(enumerate(buffers or ()))
        self.floats, self._integers, self.layout = list[Any](), list[Any](), ""
        for name, array in named.items():
            label = f"buffers[{name!r}]"
            view = flat(array, label)
            self.layout += f"{label} of shape {tuple(array.shape)}, {array.dtype}\n"
            averaged = dtype_name(array.dtype).startswith(("float", "bfloat", "complex"))
            (self.floats if averaged else self._integers).append(view)
        wires = [wire_name(dtype_name(each.dtype)) for each in self.floats]
        self._of_floats = Averager(self.floats, _flat.runs(self.floats), wires)
        apart = [[i] for i in range(len(self._integers))]
        self._of_integers = Averager(self._integers, apart, ["int64"] * len(apart))

    def average(self, group: ProcessGroup, factor: float, source: int) -> None:
        """Average the values over the ranks; take integers from the rank `source`."""
        self._of_floats.average(group, self.floats, factor)
        self._of_integers.broadcast(group, self._integers, source)

    def broadcast(self, group: ProcessGroup, source: int) -> None:
        """Take all values from the rank `source`."""
        self.average(group, float(group.rank == source), source)

    def copies(self) -> list[Any]:
        """Return copies of all values."""
        return [_flat.copied(each) for each in (*self.floats, *self._integers)]

    def restore(self, copies: Sequence[Any]) -> None:
        """Return to what `copies` returned."""
        _flat.copy_all([*self.floats, *self._integers][: len(copies)], copies)
