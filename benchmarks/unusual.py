"""What is unusual in a training with torch, beside torch.optim.SGD: sparse gradients, one odd parameter among many,
DTensors, first steps, steps after a garbage collection, many groups.

Run ``python benchmarks/unusual.py [--rounds 30] [names ...]``. Every case times all contenders in turn, in one process
and on one thread, and prints the median time of each and the median of sgdcore's ratio to the others.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import sgdcore

HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
Make = Callable[[Any], Any]
# By name: the contender in whose ratio the case is judged, and what makes an optimizer.
LOOP: dict[str, Make] = {"loop": lambda p: torch.optim.SGD(p, foreach=False, **HYPER)}
FOREACH: dict[str, Make] = {"foreach": lambda p: torch.optim.SGD(p, foreach=True, **HYPER)}
FUSED: dict[str, Make] = {"fused": lambda p: torch.optim.SGD(p, fused=True, **HYPER)}
OURS: dict[str, Make] = {"sgdcore": lambda p: sgdcore.torch.SGD(p, **HYPER)}
CASES: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {}


def case(name: str) -> Callable[[Callable[[], dict[str, Callable[[], Any]]]], Any]:
    """Register what returns one function to time for each contender."""

    def register(function: Any) -> Any:
        CASES[name] = function
        return function

    return register


def parameters(count: int, shape: tuple[int, ...] = (8,)) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(shape)
    return made


def stepping(make: Make, params: list[Any]) -> Callable[[], Any]:
    optimizer = make(params)
    optimizer.step()
    step: Callable[[], Any] = optimizer.step
    return step


@case("26 sparse gradients")
def sparse() -> dict[str, Callable[[], Any]]:
    def bags() -> list[nn.Parameter]:
        tables = parameters(26, (1000, 16))
        for table in tables:
            index = torch.randint(1000, (1, 64))
            table.grad = torch.sparse_coo_tensor(index, torch.randn(64, 16), (1000, 16))
        return tables

    plain = {
        "loop": lambda p: torch.optim.SGD(p, lr=0.01, foreach=False),
        "sgdcore": lambda p: sgdcore.torch.SGD(p, lr=0.01),
    }
    return {name: stepping(make, bags()) for name, make in plain.items()}


@case("26 EmbeddingBags in the backward pass")
def backward() -> dict[str, Callable[[], Any]]:
    def training(make: Make, in_backward: bool) -> Callable[[], Any]:
        bags = nn.ModuleList(nn.EmbeddingBag(1000, 16, sparse=True) for _ in range(26))
        optimizer = make(bags.parameters())
        if in_backward:
            sgdcore.torch.step_in_backward(optimizer)
        indices, offsets = torch.randint(1000, (64,)), torch.arange(0, 64, 4)

        def iterate() -> None:
            sum(bag(indices, offsets).sum() for bag in bags).backward()
            optimizer.step()
            optimizer.zero_grad()

        return iterate

    return {
        "loop": training(lambda p: torch.optim.SGD(p, lr=0.01, foreach=False), False),
        "sgdcore": training(lambda p: sgdcore.torch.SGD(p, lr=0.01), True),
    }


def odd_parameters() -> dict[str, Callable[[], nn.Parameter]]:
    def complex_one() -> nn.Parameter:
        odd = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        odd.grad = torch.randn(8, dtype=torch.complex64)
        return odd

    def with_gaps() -> nn.Parameter:
        odd = nn.Parameter(torch.randn(8, 2)[:, 0])
        odd.grad = torch.randn(8)
        return odd

    def subclass() -> nn.Parameter:
        kind: Any = type("Named", (nn.Parameter,), {})
        odd: nn.Parameter = kind(torch.randn(8))
        odd.grad = torch.randn(8)
        return odd

    return {"complex": complex_one, "with gaps": with_gaps, "of a subclass": subclass}


for _name, _odd in odd_parameters().items():

    @case(f"161 and one {_name}")
    def one_odd(odd: Callable[[], nn.Parameter] = _odd) -> dict[str, Callable[[], Any]]:
        contenders = LOOP | OURS
        return {
            name: stepping(make, [*parameters(161), odd()]) for name, make in contenders.items()
        }


@case("161 DTensors")
def dtensors() -> dict[str, Callable[[], Any]]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
        )
    mesh = init_device_mesh("cpu", (1,))

    def distributed() -> list[nn.Parameter]:
        made = []
        for _ in range(161):
            parameter = nn.Parameter(distribute_tensor(torch.randn(8), mesh, [Replicate()]))
            parameter.grad = distribute_tensor(torch.randn(8), mesh, [Replicate()])
            made.append(parameter)
        return made

    contenders = FOREACH | OURS
    return {name: stepping(make, distributed()) for name, make in contenders.items()}


def first_steps(count: int, steps: int) -> dict[str, Callable[[], Any]]:
    def training(make: Make) -> Callable[[], Any]:
        params = parameters(count)

        def train() -> None:
            optimizer = make(params)
            for _ in range(steps):
                optimizer.step()

        return train

    return {name: training(make) for name, make in (LOOP | OURS).items()}


for _count, _steps in ((60, 1), (60, 5), (161, 1), (10_000, 1)):

    @case(f"construction and {_steps} of {_count}")
    def construction(count: int = _count, steps: int = _steps) -> dict[str, Callable[[], Any]]:
        return first_steps(count, steps)


@case("161 after a garbage collection")
def collected() -> dict[str, Callable[[], Any]]:
    return {
        name: Prepared(stepping(make, parameters(161)), gc.collect)
        for name, make in (FUSED | OURS).items()
    }


class Prepared:
    """A function with something to do before it that is not timed."""

    def __init__(self, function: Callable[[], Any], prepare: Callable[[], Any]) -> None:
        self.function = function
        self.prepare = prepare

    def __call__(self) -> Any:
        return self.function()


for _groups in (1, 10, 465, 3000):

    @case(f"an optimizer of {_groups} groups")
    def groups(count: int = _groups) -> dict[str, Callable[[], Any]]:
        tensors = parameters(count)
        arrays = [sgdcore.Parameter(np.zeros(8, np.float32)) for _ in range(count)]
        return {
            "torch": lambda: torch.optim.SGD([{"params": [p]} for p in tensors], **HYPER),
            "sgdcore": lambda: sgdcore.SGD([{"params": [p]} for p in arrays], **HYPER),
        }


@case("3,000 groups one by one")
def one_by_one() -> dict[str, Callable[[], Any]]:
    tensors = parameters(3000)
    arrays = [sgdcore.Parameter(np.zeros(8, np.float32)) for _ in range(3000)]

    def add(make: Make, params: list[Any]) -> Callable[[], Any]:
        def run() -> None:
            optimizer = make([{"params": params[:1]}])
            for parameter in params[1:]:
                optimizer.add_param_group({"params": [parameter]})

        return run

    return {
        "torch": add(lambda p: torch.optim.SGD(p, **HYPER), tensors),
        "sgdcore": add(lambda p: sgdcore.SGD(p, **HYPER), arrays),
    }


def time_of(function: Callable[[], Any]) -> float:
    if isinstance(function, Prepared):
        function.prepare()
    start = time.thread_time()
    function()
    return time.thread_time() - start


def measure(name: str, rounds: int) -> str:
    functions = CASES[name]()
    times: dict[str, list[float]] = {each: [] for each in functions}
    for turn in range(rounds + 1):
        for each, function in functions.items():
            # The least of three: other programs only make it longer.
            least = min(time_of(function) for _ in range(3))
            if turn > 0:  # the first is a warm-up
                times[each].append(least)
    other = next(each for each in functions if each != "sgdcore")
    ratios = [a / b for a, b in zip(times["sgdcore"], times[other], strict=True)]
    medians = {each: 1e6 * statistics.median(values) for each, values in times.items()}
    shown = ", ".join(f"{each} {median:.1f} us" for each, median in medians.items())
    return f"{name:40} {statistics.median(ratios):6.3f} of {other:8} ({shown})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("names", nargs="*", help="parts of the cases' names; all if none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sgdcore.set_num_threads(1)
    for name in CASES:
        if not options.names or any(part in name for part in options.names):
            rounds = min(options.rounds, 3) if "3,000" in name or "3000" in name else options.rounds
            print(measure(name, rounds), flush=True)


if __name__ == "__main__":
    main()
