"""What the wrappers of an optimizer have in common: they stand in for it, and meet the other ranks."""

from __future__ import annotations

import pickle
import sys
import weakref
from collections import UserDict
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, NoReturn, Self, cast

from sgdcore._mistakes import warn_of_batch_norm
from sgdcore.distributed._flat import is_torch
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.distributed.header import Headers, Ranks, RoundError, checksums, compare
from sgdcore.distributed.parameters import Buffers, Parameters
from sgdcore.optimizer import Optimizer


class _Inner:
    """An attribute that is the inner optimizer's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Wrapper | None, owner: type) -> Any:
        if wrapper is None:
            return self
        value = getattr(wrapper.optimizer, self._name)
        on_tensors = not isinstance(wrapper.optimizer, Optimizer)
        return _State(value) if self._name == "state" and on_tensors else value

    def __set__(self, wrapper: Wrapper, value: Any) -> None:
        setattr(wrapper.optimizer, self._name, value)


class _State(UserDict[Any, Any]):
    """A torch optimizer's state. torch's checkpoint API takes a step, here a round, where it counts as empty."""

    def __init__(self, state: Any) -> None:
        self.data = state

    def __bool__(self) -> bool:
        return True

    def __missing__(self, key: Any) -> Any:
        return self.data[key]  # which makes one


class Wrapper:
    """Stands in for an optimizer: groups, state, hooks and `zero_grad` are the inner one's.

    Around a torch optimizer it is a torch.optim.Optimizer itself, so that schedulers and GradScaler take it.
    """

    optimizer: Any  # which does the steps
    group: ProcessGroup
    _buffers: Buffers
    _parameters: Parameters
    _number: int  # among the wrappers of this program; the same on all ranks
    _verified: bool  # ranks have compared what one of them alone may have loaded

    _numbers = count(1)  # of this process's next wrapper

    param_groups = _Inner()
    state = _Inner()
    defaults = _Inner()
    add_param_group = _Inner()
    zero_grad = _Inner()
    averaged = _Inner()
    grad_norm = _Inner()
    skipped_steps = _Inner()
    state_dict = _Inner()
    register_step_pre_hook = _Inner()
    register_step_post_hook = _Inner()
    register_state_dict_pre_hook = _Inner()
    register_state_dict_post_hook = _Inner()
    register_load_state_dict_pre_hook = _Inner()
    register_load_state_dict_post_hook = _Inner()

    def __new__(cls, optimizer: Any = None, *_: Any, **__: Any) -> Self:
        """Return an instance that is a torch.optim.Optimizer around one."""
        torch = sys.modules.get("torch")
        on_torch = torch is not None and isinstance(optimizer, torch.optim.Optimizer)
        kind: Any = cls
        return cast(Self, object.__new__(_torch_flavour(kind) if on_torch else kind))

    def _wrap(self, optimizer: Any, group: Any, model: Any, buffers: Any) -> None:
        """Take the optimizer over, after checking what it is."""
        torch, got = sys.modules.get("torch"), type(optimizer).__name__
        kinds = (Optimizer,) if torch is None else (Optimizer, torch.optim.Optimizer)
        if isinstance(optimizer, Wrapper):
            raise TypeError(f"optimizer: it is distributed already, got {got}")
        if not isinstance(optimizer, kinds):
            raise TypeError(f"optimizer: expected one of sgdcore or torch.optim, got {got}")
        if torch is not None and isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer: LBFGS evaluates its closure several times between averages")
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError("optimizer: expected at least one parameter, got none")
        if model is not None and not (torch is not None and isinstance(model, torch.nn.Module)):
            raise TypeError(f"model: expected a torch.nn.Module or None, got {model!r}")
        self.optimizer, self.group = optimizer, as_process_group(group)
        self._number, self._verified = 0, False
        if buffers is None and model is not None:
            buffers = dict(model.named_buffers())
        self._buffers, self._parameters = Buffers(buffers), Parameters(optimizer, model)
        if model is None and not self._buffers.layout and self.group.size > 1:
            warn_of_batch_norm(self._parameters.all)

    def _start(self, status: int, model: Any) -> None:
        """Meet the other ranks for the first time."""
        if hasattr(self.optimizer, "_in_backward"):
            self.optimizer._wrapper = weakref.ref(self)  # step_in_backward asks it
            if self.optimizer._in_backward is not None:
                self.check_step_in_backward()
        self._meet(status)
        if model is not None:
            own = set(map(id, self._parameters.all))
            frozen = {k: p.detach() for k, p in model.named_parameters() if id(p) not in own}
            Buffers(frozen).broadcast(self.group, 0)

    def finish(self) -> None:
        """End training on this rank."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.finish()

    def check_step_in_backward(self) -> None:
        """Raise a ValueError if a backward pass that steps cannot go with this wrapper."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} belongs to its process group and cannot be copied or pickled; save its state_dict()"
        )

    # What ranks tell each other

    def _meet(self, status: int) -> None:
        """See that ranks agree, and bring those behind to where the one with the highest status is."""

    def _ranks(self, group: ProcessGroup | None = None) -> Ranks:
        return Ranks(group or self.group, self._parameters.flats[0])

    def _facts(self) -> dict[str, str]:
        """Return what has to be equal on all ranks when they meet, by name."""
        layouts = {"parameters": self._parameters.layout, "buffers": self._buffers.layout}
        return {"optimizer": type(self).__name__, **layouts}

    def _introduce(self, status: int) -> list[int]:
        """Compare what has to be equal, and agree on this wrapper's number; returns each rank's status."""
        self._number, facts, number = 0, self._facts(), next(Wrapper._numbers)
        said = {"facts": facts, "status": status, "number": number}
        headers = self._exchange("to meet", lambda: said)
        for name in facts:
            compare(name, [theirs.get(name) for theirs in headers["facts"]], error=ValueError)
        self._number = max(headers["number"])
        Wrapper._numbers = count(self._number + 1)
        return headers["status"]

    def _exchange(
        self,
        operation: str,
        prepare: Callable[[], dict[str, Any]],
        group: ProcessGroup | None = None,
    ) -> Headers:
        """Tell ranks what this one calls, and what `prepare` returns; if that fails, all raise."""
        parameters, reason, failed, said = self._parameters, "", None, dict[str, Any]()
        try:
            parameters.follow()
            said = {"unverified": not self._verified, **prepare()}
        except Exception as error:  # noqa: BLE001 (raised below, on all ranks)
            failed = error
            reason = f"{type(error).__name__}: {error}".encode(errors="replace").decode()
        if self._number:
            name, layout = f"{type(self).__name__} number {self._number}", parameters.fingerprint
            operation += f" ({name}, {parameters.labels[0]}, layout in memory {layout})"
        everyone = self._ranks(group).gather((operation, reason, said))
        calls = [call for call, _, _ in everyone]
        compare("ranks call different things", calls, error=RoundError)
        for rank, (_, reason, _) in enumerate(everyone):
            if reason:
                raise RuntimeError(f"rank {rank} failed with {reason}") from failed
        return {name: [theirs[name] for _, _, theirs in everyone] for name in said}

    def _checksums(self) -> str:
        """Return what has to be equal before ranks go on, one thing a line."""
        return "\n".join(checksums(self._parameters.labels, self._parameters.flats))

    def _verify(self, headers: Headers, what: str, among: list[Any] | None = None) -> None:
        """Compare `_checksums` of the ranks, where one of them may have changed alone; raise on all."""
        if any(headers["unverified"]):
            compare(what, self._ranks().gather(self._checksums()), among)
            self._verified = True

    def _take_values(self, source: int) -> None:
        """Give all ranks the parameters and buffers of one."""
        self._parameters.averager().broadcast(self.group, self._parameters.flats, source)
        self._buffers.broadcast(self.group, source)

    def _state_of(self, source: int) -> dict[str, Any]:
        """Return a rank's state dict, with tensors on the CPU; an error on all ranks if pickle refuses."""
        content = b""

        def prepare() -> dict[str, Any]:
            nonlocal content
            if self.group.rank == source:
                content = pickle.dumps(_on_cpu(self.state_dict()))
            return {}

        self._exchange("a state", prepare)
        return cast(dict[str, Any], self._ranks().of(source, content))


def _on_cpu(value: Any) -> Any:
    """Return a state dict, or part of one, with the tensors in it on the CPU."""
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_on_cpu(each) for each in value]
    return value.detach().cpu() if is_torch(value) else value


@cache
def _torch_flavour(cls: Any) -> Any:
    """Return the class's subclass that is a torch.optim.Optimizer, too."""
    bases = cls, sys.modules["torch"].optim.Optimizer
    return type(cls.__name__, bases, {"__module__": cls.__module__})
