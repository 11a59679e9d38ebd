"""The state of an optimizer of arrays: for each parameter the states of its rule and of options, and users' values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from sgdcore import _core
from sgdcore._arrays import Array, storage_dtype
from sgdcore._devices import CPU
from sgdcore._hints import naming_allocation
from sgdcore._precision import MASTER_LOW, PRECISION_STATES, STEPS_TAKEN
from sgdcore._rules import State, rule_of
from sgdcore.device_array import DeviceArray
from sgdcore.parameter import Parameter, ParameterBuffer

__all__ = [
    "OptimizerState",
    "ParameterState",
    "StateStorage",
    "as_array",
    "as_integers",
    "as_storage",
    "clear_rests",
    "copied",
    "copy_into",
    "dtype_of",
    "filled_storage",
    "new_storage",
    "on_host",
    "read_low",
    "read_state",
]

_REQUIRED: Any = object()  # stands for a default that was not given


class DeclaredStates(NamedTuple):
    """The states that an optimizer keeps for each parameter.

    Attributes:
        rule: the name of its rule.
        extras: those of its options, as the core's bits: bit n is the state of number n.
        states: all of them.
    """

    rule: str
    extras: int
    states: tuple[State, ...]

    @classmethod
    def of(cls, rule: str, extras: Sequence[State]) -> DeclaredStates:
        """Return those of a rule and of the options' states that are given."""
        bits = sum(1 << state.number for state in extras)
        return cls(rule, bits, (*rule_of(rule).states, *extras))


class ParameterState(MutableMapping[str, Any]):
    """The state of one parameter: the states of the optimizer's rule and options, and values that users add.

    SGD's only state is ``"momentum_buffer"``; ``average=`` adds ``"average"``. Such a state may be read, changed in
    place, replaced by an array of the parameter's shape (float64, float32, float16 or bfloat16), or deleted, which
    makes the next step a first one. A ParameterState that was taken out of the optimizer's state keeps its values. Once
    its parameter is gone, setting one of the states raises a ReferenceError.
    """

    __slots__ = ("_declared", "_other", "slots")

    def __init__(self, declared: DeclaredStates, parameter: Parameter) -> None:
        self.slots = _core.StateSlots(declared.rule, parameter, declared.extras)
        self._declared = declared
        self._other: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        state = self._find(key)
        if not self._holds(state):
            return self.slots.steps if self._is_steps(key) else self._other[key]
        array = self.slots.array(state)
        return as_integers(array) if state == MASTER_LOW.number else array

    def __setitem__(self, key: str, value: Any) -> None:
        state = self._find(key)
        if state >= 0:
            self.slots.set(state, as_storage(value) if state == MASTER_LOW.number else value)
        elif key == STEPS_TAKEN:
            self.slots.steps = value
        else:
            self._other[key] = value
            self.slots.note_other_values(True)

    def __delitem__(self, key: str) -> None:
        state = self._find(key)
        if self._holds(state):
            self.slots.set(state, None)
        elif self._is_steps(key):
            self.slots.steps = 0
        else:
            del self._other[key]
            self.slots.note_other_values(bool(self._other))

    def __iter__(self) -> Iterator[str]:
        yield from (s.key for s in self._declared.states if self.slots.holds(s.number))
        if self.slots.steps > 0:
            yield STEPS_TAKEN
        yield from self._other

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _find(self, key: object) -> int:
        """Return the number of the state with that key; -1 if neither the rule nor an option has one."""
        return self.slots.find(key) if isinstance(key, str) else -1

    def _is_steps(self, key: object) -> bool:
        return key == STEPS_TAKEN and self.slots.steps > 0

    def _holds(self, state: int) -> bool:
        return state >= 0 and self.slots.holds(state)


class OptimizerState(MutableMapping[Parameter, MutableMapping[str, Any]]):
    """Maps each parameter to its state. An empty state is made on demand.

    Only parameters whose state is not empty are listed and kept alive.

    Args:
        rule: the name of the rule.
        extras: the states of the optimizer's options.
    """

    def __init__(self, rule: str, extras: Sequence[State] = ()) -> None:
        self._declared = DeclaredStates.of(rule, (*extras, *PRECISION_STATES))
        # A state that is not empty keeps its parameter alive while it is in this mapping.
        self._states: WeakKeyDictionary[Parameter, ParameterState] = WeakKeyDictionary()

    def __del__(self) -> None:
        for state in self._states.values():
            state.slots.detach()

    def __getitem__(self, parameter: Parameter) -> ParameterState:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"state: expected a Parameter as key, got {_core.repr_text(parameter)}")
        state = self._states.get(parameter)
        if state is None:
            state = self._states[parameter] = ParameterState(self._declared, parameter)
        return state

    def __setitem__(self, parameter: Parameter, value: Mapping[str, Any]) -> None:
        state = self[parameter]
        fresh = ParameterState(self._declared, parameter)
        fresh.update(value)  # raises before anything is replaced
        state.clear()
        state.update(fresh)

    def __delitem__(self, parameter: Parameter) -> None:
        self.pop(parameter)

    def pop(self, parameter: Parameter, default: Any = _REQUIRED) -> Any:
        """Remove and return a parameter's state. If it has none, return `default`, or raise KeyError without one."""
        if parameter in self:
            state = self._states.pop(parameter)
            state.slots.detach()
            return state
        if default is _REQUIRED:
            raise KeyError(parameter)
        return default

    # The inherited methods would return the empty state that is made on demand.
    def get(self, parameter: Parameter, default: Any = None) -> Any:
        """Return a parameter's state; `default` if the parameter has none."""
        return self._states[parameter] if parameter in self else default

    def setdefault(self, parameter: Parameter, default: Any = None) -> Any:
        """Return a parameter's state. If it has none, it gets the values of `default`, a mapping or None."""
        if parameter not in self:
            self[parameter] = {} if default is None else default
        return self[parameter]

    @property
    def states(self) -> tuple[State, ...]:
        """The states that the optimizer's rule and options keep."""
        return self._declared.states

    def __iter__(self) -> Iterator[Parameter]:
        return (parameter for parameter, state in self._states.items() if state)

    def __contains__(self, parameter: object) -> bool:
        return isinstance(parameter, Parameter) and bool(self._states.get(parameter))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Remove the state of every parameter."""
        states = list(self._states.values())
        self._states.clear()
        for state in states:
            state.slots.detach()

    def __repr__(self) -> str:
        return repr(dict(self))


class StateStorage(NamedTuple):
    """Describes the storage of a parameter's state."""

    parameter: Parameter
    state: State
    dtype: np.dtype[Any]


def as_integers(low: Any) -> Any:
    """Return the lower halves of split parameters, which the core keeps as 16-bit words of any type, as int16."""
    return low.view(np.int16) if isinstance(low, np.ndarray) else low


def as_storage(low: Any) -> Any:
    """Return them, given as int16, as an array that the core reads."""
    if isinstance(low, np.ndarray) and low.dtype in (np.int16, np.uint16):
        return low.view(np.float16)
    return low


def dtype_of(state: State, group: Mapping[str, Any], parameter: Parameter) -> np.dtype[Any]:
    """Return the dtype of a parameter's new state: the one that the group names, else the parameter's."""
    return storage_dtype(group.get(state.dtype_key) or parameter.dtype, state.dtype_key)


class _FlatState(NamedTuple):
    """One flat array of a state, which all parameters with these properties share."""

    buffer: ParameterBuffer
    state: State
    dtype: np.dtype[Any]
    device: int

    @classmethod
    def of(cls, storage: StateStorage) -> _FlatState:
        parameter = storage.parameter
        return cls(parameter.buffer, storage.state, storage.dtype, parameter.device)

    def allocate(self, size: int) -> Any:
        if self.device == CPU:
            what = f"the {self.state.key} of a ParameterBuffer"
            with naming_allocation(what, (size,), self.dtype):
                return _core.allocate(size, self.dtype)
        return DeviceArray.empty(size, self.dtype, self.device)


def new_storage(wanted: Sequence[StateStorage]) -> list[Array | DeviceArray]:
    """Return storage for each state, laid out like its parameter.

    The storage for parameters of one buffer is one flat array, so a step runs through all of them without a break.
    """
    sizes: dict[_FlatState, int] = {}
    for each in wanted:
        if each.parameter.buffer is not None:
            flat = _FlatState.of(each)
            sizes[flat] = sizes.get(flat, 0) + each.parameter.size
    arrays = {flat: flat.allocate(size) for flat, size in sizes.items()}
    starts = dict.fromkeys(arrays, 0)
    storage: list[Array | DeviceArray] = []
    for each in wanted:
        if each.parameter.buffer is None:
            storage.append(_separate(each))
            continue
        flat = _FlatState.of(each)
        start = starts[flat]
        starts[flat] = start + each.parameter.size
        storage.append(arrays[flat][start : starts[flat]].reshape(each.parameter.shape))
    return storage


def _separate(wanted: StateStorage) -> Array | DeviceArray:
    """Return storage laid out like the parameter, for a parameter outside of a buffer.

    Large storage on the CPU gets a mapping of its own. malloc would often place it right behind the parameter, where a
    step may take several times as long: see csrc/buffer.cpp.
    """
    parameter, state, dtype = wanted
    data = parameter.data
    if parameter.device != CPU:
        return DeviceArray.empty_like(DeviceArray.of(data), dtype)
    what = f"the {state.key} of parameter {parameter.name!r}" if parameter.name else state.key
    with naming_allocation(what, data.shape, dtype):
        if data.size * dtype.itemsize < 2 * _core.huge_page or not data.flags.c_contiguous:
            return np.empty_like(data, dtype=dtype, subok=False)
        return _core.allocate(data.size, dtype).reshape(data.shape)


def filled_storage(
    wanted: Sequence[tuple[StateStorage, Array | DeviceArray]],
) -> list[tuple[StateStorage, Array | DeviceArray]]:
    """Return storage as `new_storage` does, filled with the given values."""
    filled = []
    arrays = new_storage([storage for storage, _ in wanted])
    for (storage, values), array in zip(wanted, arrays, strict=True):
        copy_into(array, values)
        filled.append((storage, array))
    return filled


def clear_rests(made: Iterable[tuple[StateStorage, Array | DeviceArray]]) -> None:
    """Zero new second halves of parameters: nothing was lost yet."""
    for storage, array in made:
        if storage.state in PRECISION_STATES:
            copy_into(array, np.zeros(array.shape, array.dtype))


def as_array(array: Any) -> Array | DeviceArray:
    """Return an array of a parameter or a state as one that `copied` and `copy_into` take."""
    return array if isinstance(array, np.ndarray) else DeviceArray.of(array)


def copied(array: Array | DeviceArray) -> Array | DeviceArray:
    """Return a copy, laid out like the array."""
    if isinstance(array, np.ndarray):
        return np.array(array, order="K", copy=True)
    copy = DeviceArray.empty_like(array, array.dtype)
    copy.assign(array)
    return copy


def copy_into(array: Array | DeviceArray, values: Array | DeviceArray) -> None:
    """Copy values into an array of the same shape, rounding them to its dtype."""
    if not isinstance(array, DeviceArray):
        np.copyto(array, np.asarray(values), casting="unsafe")
    elif isinstance(values, DeviceArray) and (
        values.strides != array.strides or values.dtype != array.dtype
    ):
        array.assign(values.numpy())  # a device only copies arrays of one dtype and memory order
    else:
        array.assign(values)


def on_host(array: Any) -> Array:
    """Return an array of a parameter or a state in host memory."""
    return array if isinstance(array, np.ndarray) else DeviceArray.of(array).numpy()


def read_low(argument: str, value: Any, parameter: Parameter) -> Array:
    """Return the lower halves of a split parameter, from a checkpoint, as `as_storage` does.

    Raises:
        TypeError, ValueError: as `read_state` does; the dtype is int16.
    """
    try:
        array = on_host(value) if _core.is_on_device(value) else np.asarray(value)
        if not hasattr(value, "dtype") and array.dtype.kind in "iu":
            array = array.astype(np.int16, casting="unsafe")
    except Exception as error:
        raise TypeError(f"{argument}: {error}") from error
    stored: Array = as_storage(array)
    if stored.dtype.itemsize != 2:
        raise TypeError(f"{argument}: expected dtype int16, got {array.dtype}")
    if array.shape != parameter.shape:
        raise ValueError(
            f"{argument}: expected shape {parameter.shape}, the parameter's, got {array.shape}"
        )
    return stored


def read_state(
    argument: str, value: Any, parameter: Parameter, dtype: np.dtype[Any]
) -> Array | DeviceArray:
    """Return a state of a checkpoint as an array of a storage type. A state in lists gets `dtype`.

    Raises:
        TypeError: if the value is no such array.
        ValueError: if its shape is not the parameter's. Both name the `argument`.
    """
    _core.require_plain(value, argument)
    try:
        array: Array | DeviceArray
        if _core.is_on_device(value):
            array = DeviceArray.of(value)
            if parameter.device != array.device:
                array = array.numpy()
        else:
            # DLPack has torch's bfloat16. NumPy's own conversion lacks it.
            shared = not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__")
            array = _core.from_dlpack(value) if shared else np.asarray(value)
            if not hasattr(value, "dtype") and array.dtype.kind in "iuf":
                array = array.astype(dtype)
    except Exception as error:
        raise TypeError(f"{argument}: {error}") from error
    storage_dtype(array.dtype, argument)
    if array.shape != parameter.shape:
        raise ValueError(
            f"{argument}: expected shape {parameter.shape}, the parameter's, got {array.shape}"
        )
    return array
