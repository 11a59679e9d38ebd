"""Time sgdcore.torch.SGD beside torch.optim.SGD: whole steps, and whole training steps of a deep MLP.

    python benchmarks/torch_step.py [--quick] [--json FILE]

As in step.py: results are compared before anything is timed, contenders take turns in one process, and ratios count.
Steps are measured with one thread and with all. The deep MLP is trained by separate steps and by steps in the backward
pass, with the most memory that a step allocates.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import HYPER, MLP, Contender, measure, report, write

import sgdcore

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """Return the shapes of ResNet-50's 161 parameters."""
    shapes: Shapes = []

    def convolution(outputs: int, inputs: int, width: int) -> None:
        shapes.extend([(outputs, inputs, width, width), (outputs,), (outputs,)])  # with batch norm

    convolution(64, 3, 7)
    inputs = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(planes, inputs, 1)
            convolution(planes, planes, 3)
            convolution(4 * planes, planes, 1)
            if block == 0:
                convolution(4 * planes, inputs, 1)
            inputs = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """Return the shapes of GPT-2 124M's 148 parameters."""
    d = 768
    norm: Shapes = [(d,), (d,)]
    attention: Shapes = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp: Shapes = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(12 * (norm + attention + norm + mlp)), *norm]


def contender(
    make: Callable[..., Any], shapes: Shapes, dtype: torch.dtype, **path: Any
) -> Contender:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        param.grad = torch.randn(shape, generator=generator).to(dtype)
        params.append(param)
    optimizer = make(params, **HYPER, **path)
    return Contender(optimizer.step, params)


def contenders_of(shapes: Shapes, dtype: torch.dtype) -> dict[str, Contender]:
    """Return all contenders after three steps, having compared what they computed."""
    contenders = {"sgdcore.torch": contender(sgdcore.torch.SGD, shapes, dtype)}
    contenders["torch loop"] = contender(torch.optim.SGD, shapes, dtype, foreach=False)
    contenders["torch foreach"] = contender(torch.optim.SGD, shapes, dtype, foreach=True)
    contenders["torch fused"] = contender(torch.optim.SGD, shapes, dtype, fused=True)
    for name, each in list(contenders.items()):
        try:
            for _ in range(3):
                each.step()
        except RuntimeError as error:
            print(f"  {name}: not timed, it raises: {str(error).splitlines()[0]}")
            del contenders[name]
    expected = contenders["torch loop"].params
    for name, each in contenders.items():
        for param, right in zip(each.params or [], expected or [], strict=True):
            if dtype == torch.float32 and name != "torch fused":
                assert torch.equal(param, right), name
            else:  # torch's fused kernel and its 16-bit arithmetic round differently
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(param, right, rtol=tolerance, atol=tolerance, msg=name)
    return contenders


def peak_memory(function: Callable[[], object]) -> int:
    """Return the most memory, in bytes, that torch's allocator had handed out while the function ran."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def deep_mlp(depth: int, width: int, rounds: int, results: dict[str, Any]) -> None:
    """Compare training steps: optimizers after the backward pass, and ours inside it."""
    inputs = torch.randn(32, width)

    def trainer(make: Callable[..., Any], inside: bool = False, **path: Any) -> Contender:
        torch.manual_seed(0)
        layers: list[torch.nn.Module] = []
        for _ in range(depth):
            layers += [torch.nn.Linear(width, width), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers)
        optimizer = make(model.parameters(), **HYPER, **path)
        if inside:
            sgdcore.torch.step_in_backward(optimizer)

        def step() -> None:
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return Contender(step, list(model.parameters()))

    contenders = {
        "sgdcore.torch in backward": trainer(sgdcore.torch.SGD, inside=True),
        "sgdcore.torch": trainer(sgdcore.torch.SGD),
        "torch foreach": trainer(torch.optim.SGD, foreach=True),
        "torch fused": trainer(torch.optim.SGD, fused=True),
    }
    for each in contenders.values():
        for _ in range(2):
            each.step()
    for ours, plain in zip(
        contenders["sgdcore.torch in backward"].params or [],
        contenders["sgdcore.torch"].params or [],
        strict=True,
    ):
        assert torch.equal(ours, plain)
    title = f"training step of an MLP, {depth} layers of {width} x {width}, {torch.get_num_threads()} threads"
    measure(contenders, rounds, 0)
    report(title, contenders, results)
    gradients = depth * (width * width + width) * 4
    for name, each in contenders.items():
        peak = statistics.median(peak_memory(each.step) for _ in range(5))
        results[title][name]["peak_bytes"] = peak
        print(
            f"  {name:<28} holds at most {peak / 2**20:6.1f} MiB; gradients: {gradients / 2**20:.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, without GPT-2")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    info = sgdcore.build_info()
    print(f"sgdcore {info['version']} ({info['isa']}), torch {torch.__version__}")
    rounds, large_rounds = (15, 7) if args.quick else (61, 21)
    f32, bf16 = torch.float32, torch.bfloat16
    workloads: list[tuple[str, Shapes, torch.dtype]] = [
        ("MLP, 4 tensors, 9,610 elements", MLP, f32),
        ("161 tensors of 8 elements", [(8,)] * 161, f32),
        ("1,000 tensors of 8 elements", [(8,)] * 1000, f32),
        ("ResNet-50, 161 tensors", resnet50(), f32),
        ("ResNet-50, 161 tensors, bfloat16", resnet50(), bf16),
    ]
    if not args.quick:
        workloads += [
            ("GPT-2, 148 tensors", gpt2(), f32),
            ("GPT-2, 148 tensors, bfloat16", gpt2(), bf16),
        ]
    results: dict[str, Any] = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        sgdcore.set_num_threads(threads)
        for title, shapes, dtype in workloads:
            contenders = contenders_of(shapes, dtype)
            large = sum(torch.Size(shape).numel() for shape in shapes) > 1 << 20
            measure(contenders, large_rounds if large else rounds, 0 if large else 5e-3)
            report(f"{title}, threads: {threads}", contenders, results)
    deep_mlp(24, 1024, large_rounds, results)
    if args.json:
        write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
