"""Functions that users hook into an optimizer, as torch.optim has them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, Self

__all__ = ["Hook", "HookHandle", "call_pre_hooks"]

Hook = Callable[..., Any]


class HookHandle:
    """Returned by the ``register_*`` methods. `remove`, or leaving a ``with`` block, takes the hook out again."""

    _ids = count()

    def __init__(self, hooks: OrderedDict[int, Hook], hook: Hook, prepend: bool = False) -> None:
        self._hooks = hooks
        self._id = next(self._ids)
        hooks[self._id] = hook
        if prepend:
            hooks.move_to_end(self._id, last=False)

    def remove(self) -> None:
        """Remove the hook. Further calls do nothing."""
        self._hooks.pop(self._id, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def call_pre_hooks(
    hooks: Iterable[Hook],
    optimizer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    caller: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call each hook before a step, and return the step's arguments. Each hook may replace them.

    Raises:
        RuntimeError: if a hook returns anything but None or (args, kwargs). The text begins with `caller`.
    """
    for hook in hooks:
        replaced = hook(optimizer, args, kwargs)
        if replaced is None:
            continue
        if not (isinstance(replaced, tuple) and len(replaced) == 2):
            raise RuntimeError(
                f"{caller} must return None or a tuple of (new_args, new_kwargs), but got {replaced}"
            )
        args, kwargs = replaced
    return args, kwargs
