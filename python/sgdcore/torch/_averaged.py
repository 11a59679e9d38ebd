"""Finds parameters whose gradients torch averages over the ranks after their hooks, where a hook cannot use them.

torch.nn.parallel.DistributedDataParallel (DDP) does, and keeps no list of what it wrapped. Its modules are found among
the objects that Python's garbage collector knows, and later ones as they take the module that they wrap.
FullyShardedDataParallel (FSDP1) marks its parameters; it runs no hooks of those that it takes later. ``fully_shard``
(FSDP2) runs the hooks when it has averaged.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from sgdcore.torch._compile import not_compiled

__all__ = ["averaged_parameters", "is_sharded", "watch_wrappers"]

_DDP = torch.nn.parallel.DistributedDataParallel


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether FSDP1 made a part of a flat parameter of it, or it is one."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def averaged_parameters() -> set[int]:
    """Return the ids of all parameters in the DDP modules that exist."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return set()
    return {
        id(parameter)
        for wrapper in gc.get_objects()
        # Not isinstance, which runs code of proxies.
        if issubclass(type(wrapper), _DDP)
        for module in wrapper.children()
        for _, parameter in _averaged(module)
    }


def watch_wrappers(found: Callable[[str, str, Tensor], None]) -> Any:
    """Call `found` with each parameter that DDP wraps from now on, before DDP has changed anything.

    It gets the name of the wrapper's class and the parameter's name in the module. Its exceptions end the wrapping.
    Returns a handle with ``remove()``.
    """

    @not_compiled
    def registered(wrapper: torch.nn.Module, _: str, module: torch.nn.Module | None) -> None:
        if module is not None and issubclass(type(wrapper), _DDP):
            for name, parameter in _averaged(module):
                found(type(wrapper).__name__, name, parameter)

    return register_module_module_registration_hook(registered)


def _averaged(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that DDP takes over, with their names."""
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    for name, parameter in module.named_parameters():
        if name not in ignored:
            yield name, parameter
