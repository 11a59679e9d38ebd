"""What the wrappers of an optimizer have in common: they stand in for it, and know its parameters as flat memory."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from sgdcore.distributed._flat import (
    address,
    dtype_name,
    element_strides,
    empty,
    flat,
    is_torch,
    numbers,
    runs,
    zeros_like,
)
from sgdcore.distributed._traffic import Averager, wire_name
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.optimizer import Optimizer
from sgdcore.parameter import Parameter

__all__ = [
    "Momenta",
    "Views",
    "Wrapper",
    "call_closure",
    "check_failures",
    "check_fingerprints",
    "compare",
    "fingerprint",
    "momentum_of",
    "on_my_place",
    "set_zero_momentum",
    "share_settings",
    "take_settings",
]


class _Inner:
    """An attribute that is the inner optimizer's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Wrapper | None, owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper._optimizer, self._name)

    def __set__(self, wrapper: Wrapper, value: Any) -> None:
        setattr(wrapper._optimizer, self._name, value)


class Wrapper:
    """Stands in for an optimizer: groups, state, hooks and `zero_grad` are the inner one's.

    Around a torch optimizer it is a torch.optim.Optimizer itself, so that schedulers and GradScaler take it.
    """

    _optimizer: Any
    _group: ProcessGroup
    _errors: list[Any]

    param_groups = _Inner()
    state = _Inner()
    defaults = _Inner()
    zero_grad = _Inner()
    register_step_pre_hook = _Inner()
    register_step_post_hook = _Inner()
    register_state_dict_pre_hook = _Inner()
    register_state_dict_post_hook = _Inner()
    register_load_state_dict_pre_hook = _Inner()
    register_load_state_dict_post_hook = _Inner()

    def __new__(cls, optimizer: Any = None, *_: Any, **__: Any) -> Self:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(optimizer, torch.optim.Optimizer):
            flavour: type[Self] = _torch_flavour(cls, torch.optim.Optimizer)
            return object.__new__(flavour)
        return object.__new__(cls)

    def _wrap(self, optimizer: Any, group: Any) -> None:
        """Take the optimizer over, after checking what it is."""
        if isinstance(optimizer, Wrapper):
            raise TypeError(f"optimizer: it is distributed already, got {type(optimizer).__name__}")
        torch = sys.modules.get("torch")
        kinds = (Optimizer,) if torch is None else (Optimizer, torch.optim.Optimizer)
        if not isinstance(optimizer, kinds):
            raise TypeError(
                f"optimizer: expected one of sgdcore or torch.optim, got {type(optimizer).__name__}"
            )
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError("optimizer: expected at least one parameter, got none")
        self._group = as_process_group(group)
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Any:
        """The optimizer that does the steps."""
        return self._optimizer

    @property
    def group(self) -> ProcessGroup:
        """The process group."""
        return self._group

    def finish(self) -> None:
        """End training on this rank."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.finish()

    def _forget_errors(self) -> None:
        """Start anew with what rounding to the wire's dtype leaves over."""
        for error in self._errors:
            error[...] = 0

    def _steps_in_backward(self) -> bool:
        """Return whether `sgdcore.torch.step_in_backward` holds for the optimizer."""
        return getattr(self._optimizer, "_in_backward", None) is not None

    def _inner_step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Let the inner optimizer step, as GradScaler wants it."""
        attributes = self.__dict__
        found_inf, scale = attributes.get("found_inf"), attributes.get("grad_scale")
        if found_inf is None and scale is None:
            step = self._optimizer.step
            return step(**kwargs) if closure is None else step(closure, **kwargs)
        inner = self._optimizer
        if getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf, inner.grad_scale = found_inf, scale
            try:
                return inner.step(**kwargs)
            finally:
                for name in ("found_inf", "grad_scale"):
                    if hasattr(inner, name):
                        delattr(inner, name)
        if found_inf is not None and float(found_inf) != 0:
            return None
        if scale is not None:
            factor = scale.double().reciprocal().float()  # as GradScaler.unscale_ computes it
            for group in inner.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor.to(parameter.grad.device))
        return inner.step(**kwargs)

    def _forget_scaling(self) -> None:
        """Drop what GradScaler set for one step; it removes it itself only where that step succeeds."""
        self.__dict__.pop("found_inf", None)
        self.__dict__.pop("grad_scale", None)

    def __repr__(self) -> str:
        inner = "\n".join("  " + line for line in repr(self._optimizer).splitlines())
        return f"{type(self).__name__} over {self._group!r} of\n{inner}"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} belongs to its process group and cannot be copied or pickled; save its state_dict()"
        )


_flavours: dict[type, type] = {}


def _torch_flavour(cls: type, base: type) -> Any:
    """Return the class's subclass that is a torch.optim.Optimizer, too."""
    if issubclass(cls, base):
        return cls
    if cls not in _flavours:
        # GradScaler would leave out `step` for an overflow on this rank alone, and the ranks would no longer agree on when
        # a round ends; told that `step` knows about scaling, it always calls it.
        attributes = {"__module__": cls.__module__, "_step_supports_amp_scaling": True}
        _flavours[cls] = type(cls.__name__, (cls, base), attributes)
    return _flavours[cls]


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
                label = f"parameter '{names[j]}'" if named else f"param_groups[{i}]['params'][{j}]"
                self.labels.append(label)
        self.read()

    def read(self) -> None:
        """Look where the parameters are."""
        self.data = [data_of(parameter) for parameter in self.parameters]
        self.flats = [flat(d, label) for d, label in zip(self.data, self.labels, strict=True)]
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

    def layout(self) -> str:
        """Return what has to be equal on all ranks, as text."""
        lines = []
        for data in self.data:
            lines.append(f"{tuple(data.shape)} {element_strides(data)} {dtype_name(data.dtype)}")
        return "\n".join(lines) + f"\n{self.runs}\n{self.group_of}"


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


def call_closure(closure: Callable[[], Any], parameter: Any) -> Any:
    """Call a closure that computes gradients, with autograd enabled where there is one."""
    if is_torch(parameter):
        with sys.modules["torch"].enable_grad():
            return closure()
    return closure()


def compare(group: ProcessGroup, like: Any, facts: dict[str, str]) -> None:
    """Raise on all ranks if they differ in something.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        facts: what has to be equal, by name.

    Raises:
        ValueError: naming it.
    """
    hashes = []
    for text in facts.values():
        number = fingerprint(text)
        hashes += [number, -number]
    extremes = numbers(like, hashes, "int64")
    group.all_reduce(extremes, "max").wait()
    highest = [int(value) for value in extremes.tolist()]
    for i, (name, text) in enumerate(facts.items()):
        if highest[2 * i] != -highest[2 * i + 1]:
            raise ValueError(
                f"{name}: expected the same on all ranks, got on rank {group.rank}: {text}"
            )


def fingerprint(text: str) -> int:
    """Return a hash that is the same in all processes, and a number that float64 holds."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def on_my_place(group: ProcessGroup, value: float) -> list[float]:
    """Return what adds up to the values of all ranks, in their order."""
    return [float(value) if i == group.rank else 0.0 for i in range(group.size)]


def check_fingerprints(everyone: Sequence[float]) -> None:
    """Raise a ValueError if ranks have laid out what they are about to average in different ways."""
    if min(everyone) != max(everyone):
        raise ValueError(
            "parameters: expected the same layout in memory on all ranks, and the same ones frozen; since they were wrapped, "
            "some ranks have changed that and others have not"
        )


def check_failures(
    group: ProcessGroup, like: Any, failures: Sequence[float], own: Exception | None
) -> None:
    """Raise on all ranks what the first of those that failed has to say.

    Args:
        group: the ranks.
        like: an array of the kind that the group takes.
        failures: for each rank whether it failed; the same on all.
        own: what this rank failed with.

    Raises:
        RuntimeError: naming the rank, and its error's type and text.
    """
    if not any(failures):
        return
    first = [failed > 0 for failed in failures].index(True)
    text = f"{type(own).__name__}: {own}".encode(errors="replace")
    told = _broadcast_bytes(group, like, text, first).decode()
    raise RuntimeError(f"rank {first} failed with {told}") from own


def _broadcast_bytes(group: ProcessGroup, like: Any, content: bytes, source: int) -> bytes:
    """Give all ranks the bytes of one of them."""
    size = numbers(like, [len(content)], "int64")
    group.broadcast(size, source).wait()
    count = int(size.tolist()[0])
    words = np.frombuffer(content.ljust(-(-count // 8) * 8, b"\0"), np.int64)
    array = empty(like, len(words), "int64")
    array[...] = sys.modules["torch"].from_numpy(words.copy()) if is_torch(like) else words
    group.broadcast(array, source).wait()
    received = array.cpu().numpy() if is_torch(array) else array
    return bytes(received.tobytes()[:count])


def share_settings(group: ProcessGroup, optimizer: Any, views: Views, source: int) -> Any:
    """Return one rank's hyperparameters, and what its optimizer keeps beside momentum, such as Adam's moments.

    Raises:
        TypeError: on all ranks, naming what pickle does not take.
    """
    content = _pickled_settings(optimizer, views) if group.rank == source else b""
    # From a rank of this program.
    settings = pickle.loads(_broadcast_bytes(group, views.flats[0], content, source))
    if isinstance(settings, TypeError):
        raise settings
    return settings


def _pickled_settings(optimizer: Any, views: Views) -> bytes:
    """Return what `share_settings` sends: the settings, or the error that all ranks raise."""
    hyper = [
        {k: v for k, v in each.items() if k not in ("params", "param_names")}
        for each in optimizer.param_groups
    ]
    kept = [_kept_of(optimizer, p) for p in views.parameters]
    try:
        return pickle.dumps((hyper, kept))
    except Exception as error:  # noqa: BLE001 (pickle raises whatever the objects do)
        named = [(f"param_groups[{i}]", each) for i, each in enumerate(hyper)]
        named += [(f"the state of {views.labels[i]}: ", each) for i, each in enumerate(kept)]
        bad = (f"{name}[{k!r}]" for name, each in named for k, v in each.items() if not _pickles(v))
        place = next(bad, "optimizer")
        return pickle.dumps(TypeError(f"{place}: it cannot be sent to the other ranks: {error}"))


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # noqa: BLE001 (as above)
        return False
    return True


def take_settings(optimizer: Any, views: Views, settings: Any) -> None:
    """Set what another rank shared."""
    hyper, kept = settings
    for own, theirs in zip(optimizer.param_groups, hyper, strict=True):
        for key, value in theirs.items():
            if is_torch(own.get(key)):
                own[key].copy_(value)
            else:
                own[key] = value
    for parameter, values in zip(views.parameters, kept, strict=True):
        for key in _kept_of(optimizer, parameter).keys() - values.keys():
            del optimizer.state[parameter][key]
        for key, (value, beside) in values.items():
            if is_torch(value) and beside:  # the parameter's device may be another one here
                value = value.to(parameter.device)
            optimizer.state[parameter][key] = value


def _kept_of(optimizer: Any, parameter: Any) -> dict[str, tuple[Any, bool]]:
    """Return a parameter's state without momentum; for each value whether it is where the parameter is."""
    if parameter not in optimizer.state:
        return {}
    return {
        key: (
            value.detach().cpu().clone() if is_torch(value) else value,
            is_torch(value) and value.device == parameter.device,
        )
        for key, value in optimizer.state[parameter].items()
        if key != "momentum_buffer"
    }


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
        wires: list[str] = []
        position: dict[int, int] = {}
        for i, each in enumerate(wanted):
            if each:
                position[i] = len(views)
                views.append(flat(self._get(i), f"momentum of {self._views.labels[i]}"))
                wires.append(self._wire(i))
        # The parameters' runs, which all ranks have in common; they can change where momentum stays.
        runs = [[position[i] for i in run if wanted[i]] for run in self._views.runs]
        plan = [address(view) for view in views], runs, wires
        if self._averager is None or self._averager[0] != plan:
            self._averager = plan, Averager(views, [run for run in runs if run], wires=wires)
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

    def _wire(self, i: int) -> str:
        """Return the dtype on the wire: what the options say, since a loaded buffer's may be its own."""
        dtype = self._group(i).get("momentum_dtype") or self._views.flats[i].dtype
        return wire_name(dtype_name(dtype))
