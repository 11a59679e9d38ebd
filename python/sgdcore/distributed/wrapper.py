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

from sgdcore.distributed._flat import is_torch
from sgdcore.distributed.buffers import Buffers, warn_of_batch_norm
from sgdcore.distributed.groups import ProcessGroup, as_process_group
from sgdcore.distributed.header import Headers, Ranks, RoundError, checksums, compare
from sgdcore.distributed.parameters import Parameters
from sgdcore.optimizer import Optimizer


class _Inner:
    """An attribute that is the inner optimizer's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Wrapper | None, owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper._optimizer, self._name)

    def __set__(self, wrapper: Wrapper, value: Any) -> None:
        setattr(wrapper._optimizer, self._name, value)


class _State(UserDict[Any, Any]):
    """A torch optimizer's state, which counts as there even while it is empty.

    torch's checkpoint API (``get_optimizer_state_dict``) takes a step with any optimizer whose state is empty; a
    wrapper's would be a round with the other ranks.
    """

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

    _optimizer: Any
    _group: ProcessGroup
    _buffers: Buffers
    _parameters: Parameters
    _number: int  # among the wrappers of this program; the same on all ranks
    _verified: bool  # ranks have compared what one of them alone may have loaded

    _numbers = count(1)  # of this process's next wrapper

    param_groups = _Inner()
    defaults = _Inner()
    zero_grad = _Inner()
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
        if torch is not None and isinstance(optimizer, torch.optim.Optimizer):
            return cast(Self, object.__new__(_torch_flavour(cls)))  # type: ignore[arg-type]
        return object.__new__(cls)

    def _wrap(self, optimizer: Any, group: Any, model: Any, buffers: Any) -> None:
        """Take the optimizer over, after checking what it is."""
        torch = sys.modules.get("torch")
        kinds = (Optimizer,) if torch is None else (Optimizer, torch.optim.Optimizer)
        if isinstance(optimizer, Wrapper):
            raise TypeError(f"optimizer: it is distributed already, got {type(optimizer).__name__}")
        if not isinstance(optimizer, kinds):
            raise TypeError(
                f"optimizer: expected one of sgdcore or torch.optim, got {type(optimizer).__name__}"
            )
        if torch is not None and isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer: LBFGS evaluates its closure several times a step, with parameters and gradients that are "
                "not averaged in between; expected an optimizer that steps with one gradient"
            )
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError("optimizer: expected at least one parameter, got none")
        if model is not None and not (torch is not None and isinstance(model, torch.nn.Module)):
            raise TypeError(f"model: expected a torch.nn.Module or None, got {model!r}")
        self._optimizer, self._group = optimizer, as_process_group(group)
        self._number, self._verified = 0, False
        if buffers is None and model is not None:
            buffers = dict(model.named_buffers())
        self._buffers, self._parameters = Buffers(buffers), Parameters(optimizer, model)
        if model is None and not self._buffers.layout and self._group.size > 1:
            warn_of_batch_norm(self._parameters.all)

    def _start(self, status: int) -> None:
        """Meet the other ranks for the first time."""
        if hasattr(self._optimizer, "_in_backward"):
            self._optimizer._wrapper = weakref.ref(self)  # step_in_backward asks it
            if self._optimizer._in_backward is not None:
                self.check_step_in_backward()
        self._bind()
        self._meet(status)
        self._parameters.others().broadcast(self._group, 0)

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        state = self._optimizer.state
        return state if isinstance(self._optimizer, Optimizer) else _State(state)

    @state.setter
    def state(self, value: Any) -> None:
        self._optimizer.state = value

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

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.finish()

    def check_step_in_backward(self) -> None:
        """Raise a ValueError if stepping in the backward pass cannot go with this wrapper."""
        raise NotImplementedError

    def __repr__(self) -> str:
        inner = "\n".join("  " + line for line in repr(self._optimizer).splitlines())
        return f"{type(self).__name__} over {self._group!r} of\n{inner}"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} belongs to its process group and cannot be copied or pickled; save its state_dict()"
        )

    # Changes of the parameters

    def _bind(self) -> None:
        """Make what is kept beside the parameters, for new ones and where they are now."""

    def _follow_moves(self) -> None:
        """Look where parameters are that were given other memory."""
        if self._parameters.moved():
            self._parameters.read()
            self._bind()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, on all ranks; they get rank 0's values.

        Raises:
            TypeError, ValueError: as the inner optimizer does, or where ranks add different ones.
        """
        self._follow_moves()
        self._optimizer.add_param_group(param_group)
        self._parameters.read()
        self._bind()
        self._introduce(self._status())
        self._parameters.averager().broadcast(self._group, self._parameters.flats)

    # What ranks tell each other

    def _status(self) -> int:
        """Return what decides whose parameters all take when ranks meet: those of the highest."""
        raise NotImplementedError

    def _meet(self, status: int) -> None:
        """See that ranks agree, and bring those behind to where the one with the highest status is."""
        raise NotImplementedError

    def _ranks(self, group: ProcessGroup | None = None) -> Ranks:
        return Ranks(group or self._group, self._parameters.flats[0])

    def _facts(self) -> dict[str, str]:
        """Return what has to be equal on all ranks when they meet, by name."""
        layouts = {"parameters": self._parameters.layout, "buffers": self._buffers.layout}
        return {"optimizer": type(self).__name__, **layouts}

    def _introduce(self, status: int) -> list[int]:
        """Compare what has to be equal on all ranks, and agree on this wrapper's number; returns each one's status."""
        facts = self._facts()
        said = {"facts": facts, "status": status, "number": next(Wrapper._numbers)}
        headers = self._gather("to meet", self._ranks(), None, said)
        for name in facts:
            compare(name, [theirs.get(name) for theirs in headers["facts"]], error=ValueError)
        self._number = max(headers["number"])
        Wrapper._numbers = count(self._number + 1)
        return headers["status"]

    def _gather(
        self, call: str, ranks: Ranks, failed: Exception | None, said: dict[str, Any]
    ) -> Headers:
        """Tell ranks what this one calls, why it cannot take part, and what else there is to say by name."""
        reason = failed and f"{type(failed).__name__}: {failed}".encode(errors="replace").decode()
        everyone = ranks.gather({"call": call, "failed": reason, **said})
        calls = [each["call"] for each in everyone]
        compare("ranks call different things", calls, error=RoundError)
        for rank, each in enumerate(everyone):
            if each["failed"]:
                raise RuntimeError(f"rank {rank} failed with {each['failed']}") from failed
        return {name: [each[name] for each in everyone] for name in said}

    def _exchange(
        self,
        operation: str,
        prepare: Callable[[], dict[str, Any]],
        group: ProcessGroup | None = None,
        **said: Any,
    ) -> Headers:
        """Tell ranks where this one is; returns what all say by name, once all can take part.

        Args:
            operation: what the ranks are to do together.
            prepare: called first, returns more to say. If it fails, all ranks raise.
            group: the ranks; default: all.
            **said: what there is to say.
        """
        ranks, failed = self._ranks(group), None
        try:
            self._follow_moves()
            said |= prepare()
        except Exception as error:  # noqa: BLE001 (raised below, on all ranks)
            failed = error
        said |= {"layout": self._parameters.fingerprint, "unverified": not self._verified}
        first = self._parameters.labels[0]
        call = f"{operation} ({type(self).__name__} number {self._number}, {first})"
        headers = self._gather(call, ranks, failed, said)
        if len(set(headers["layout"])) > 1:
            what = "parameters: the layout in memory changed on some ranks since they were wrapped"
            compare(what, ranks.gather(self._parameters.layout))
        return headers

    def _checksums(self) -> str:
        """Return what has to be equal before ranks go on, one thing a line."""
        return "\n".join(checksums(self._parameters.labels, self._parameters.flats))

    def _verify(self, headers: Headers, what: str, among: list[Any] | None = None) -> None:
        """Compare `_checksums` of the ranks, where one of them may have changed alone; raise on all."""
        if any(headers["unverified"]):
            compare(what, self._ranks().gather(self._checksums()), among)
            self._verified = True

    # States that come from another rank

    def _state_of(self, source: int, state: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `state` returns on a rank, with tensors on the CPU; a TypeError if pickle refuses."""
        content = b""
        if self._group.rank == source:
            try:
                content = pickle.dumps(_on_cpu(state()))
            except Exception as error:  # noqa: BLE001 (raised below, on all ranks)
                message = f"optimizer: its state cannot be sent to the other ranks: {error}"
                content = pickle.dumps(TypeError(message))
        received = pickle.loads(self._ranks().broadcast(content, source))
        if isinstance(received, TypeError):
            raise received
        return cast(dict[str, Any], received)

    def _load_inner(self, state: dict[str, Any]) -> None:
        """Load a state into the inner optimizer; tensors among its hyperparameters stay those a program refers to."""
        tensors = [{k: v for k, v in each.items() if is_torch(v)} for each in self.param_groups]
        self._optimizer.load_state_dict(state)
        for group, own in zip(self.param_groups, tensors, strict=True):
            for name in own.keys() & group.keys():
                own[name][...] = group[name]
                group[name] = own[name]


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
    base = sys.modules["torch"].optim.Optimizer
    attributes = {"__module__": cls.__module__}
    return cls if issubclass(cls, base) else type(cls.__name__, (cls, base), attributes)
