"""Finds parameters whose gradients torch averages over the ranks only after their hooks have run.

A hook must not use such a gradient. torch.nn.parallel.DistributedDataParallel (DDP) averages in that order, and keeps
no list of the modules that it wraps. DDP's existing modules are found among the objects of Python's garbage collector,
later ones when they register the module that they wrap. FullyShardedDataParallel (FSDP1) marks its parameters, and runs
no hooks of parameters that it wraps later. ``fully_shard`` (FSDP2) runs hooks after it has averaged.
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
    """Tell whether FSDP1 has made the parameter a part of a flat parameter, or it is a flat parameter."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def averaged_parameters() -> set[int]:
    """Return the ids of all parameters in the DDP modules that exist."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return set()
    return {
        id(parameter)
        for wrapper in gc.get_objects()
        # isinstance would run code of proxies.
        if issubclass(type(wrapper), _DDP)
        for module in wrapper.children()
        for _, parameter in _averaged(module)
    }


def watch_wrappers(found: Callable[[str, str, Tensor], None]) -> Any:
    """Call `found` with each parameter that DDP wraps from now on, before DDP has changed anything.

    `found` gets the name of the wrapper's class, the parameter's name in the module, and the parameter. An exception of
    `found` ends the wrapping. Returns a handle with ``remove()``.
    """

    @not_compiled
    def registered(wrapper: torch.nn.Module, _: str, module: torch.nn.Module | None) -> None:
        if module is not None and issubclass(type(wrapper), _DDP):
            for name, parameter in _averaged(module):
                found(type(wrapper).__name__, name, parameter)

    return register_module_module_registration_hook(registered)


def _averaged(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and parameters whose gradients DDP averages."""
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    for name, parameter in module.named_parameters():
        if name not in ignored:
            yield name, parameter
