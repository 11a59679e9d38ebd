"""What is measured: workloads (shapes), and the cases that cross them with hyperparameters, dtypes and threads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from sgdcore import _core
from sgdcore._rules import rule_of

__all__ = [
    "DTYPES",
    "HYPERS",
    "SGD",
    "TRAINING",
    "WORKLOADS",
    "Case",
    "Grid",
    "Shapes",
    "full",
    "quick",
    "rule_in",
    "select",
    "states_in",
]

Shapes = list[tuple[int, ...]]

SGD = "sgd"

# By name. The learning rate is large enough that three steps which do nothing are found wrong in any dtype. Each rule
# but SGD has one set of its own name, with all its numbers, so that all its states take part.
HYPERS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
    **{
        rule: dict.fromkeys(rule_of(rule).numbers, 0.1)
        for rule in _core.rule_names()
        if rule != SGD
    },
}
DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}  # and their bytes


def rule_in(hyper: str) -> str:
    """Return the rule that a name in HYPERS is for."""
    return hyper if hyper in _core.rule_names() else SGD


def states_in(hyper: str) -> int:
    """Return how many states take part in a step with a name in HYPERS."""
    rule = rule_of(rule_in(hyper))
    group = (
        dict.fromkeys((*rule.numbers, *rule.flags, *rule.modes, *rule.counts), 0) | HYPERS[hyper]
    )
    return len(rule.states_in(group)[0])


def _resnet50() -> Shapes:
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


def _transformer_block(d: int) -> Shapes:
    norm: Shapes = [(d,), (d,)]
    attention: Shapes = [(3 * d, d), (3 * d,), (d, d), (d,)]
    mlp: Shapes = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return norm + attention + norm + mlp


def _vit_b16() -> Shapes:
    d = 768
    start: Shapes = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)]
    return [*start, *(12 * _transformer_block(d)), (d,), (d,), (1000, d), (1000,)]


def _gpt2() -> Shapes:
    d = 768
    return [(50257, d), (1024, d), *(12 * _transformer_block(d)), (d,), (d,)]


WORKLOADS: dict[str, Shapes] = {
    "tiny": [(10,)],
    "mlp": [(64, 128), (128,), (128, 10), (10,)],
    "161x8": [(8,)] * 161,
    "100x1000": [(1000,)] * 100,
    "1000x8": [(8,)] * 1000,
    "1000x10": [(10,)] * 1000,
    "resnet50": _resnet50(),
    "vit_b16": _vit_b16(),
    "gpt2": _gpt2(),
    # Not 2**26: the addresses of arrays 2**28 bytes apart may collide in a cache, for whom is a matter of luck.
    "flat64M": [(64_000_000,)],
}

# Whole training steps (forward, backward and update), and the step alone in a training; see training.py.
TRAINING = ("train-mlp", "train-cnn", "train-deep", "step-resnet50")


@dataclass(frozen=True)
class Case:
    """One thing to measure: a workload under one combination of conditions.

    Attributes:
        workload: a name in WORKLOADS or TRAINING.
        hyper: a name in HYPERS.
        dtype: of parameters, gradients and states.
        threads: how many threads each contender may use.
        grads: "warm": the same gradient arrays at each step; "cold": other ones at each step, and caches emptied
            before it.
        clear: whether a step also sets the gradients to zero.
    """

    workload: str
    hyper: str
    dtype: str
    threads: int
    grads: str = "warm"
    clear: bool = False

    @property
    def is_training(self) -> bool:
        """True for training workloads, which have neither shapes nor elements here."""
        return self.workload in TRAINING

    @property
    def is_step_alone(self) -> bool:
        """True if of a training the optimizer's step alone is timed."""
        return self.is_training and self.workload.startswith("step-")

    @property
    def is_loaded(self) -> bool:
        """True if gradients are put in place before each sample."""
        return self.grads == "cold" or self.clear or self.is_step_alone

    @property
    def rule(self) -> str:
        """The name of the rule."""
        return rule_in(self.hyper)

    @property
    def shapes(self) -> Shapes:
        """The tensors' shapes."""
        return WORKLOADS[self.workload]

    @property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """The least that a step moves: p and g read, p written; states read and written; a cleared g written."""
        streams = 3 + 2 * states_in(self.hyper) + self.clear
        return streams * self.elements * DTYPES[self.dtype]

    @property
    def title(self) -> str:
        """Such as "resnet50, nesterov, float32, 2 threads"."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        words = [self.workload, self.hyper, self.dtype, threads]
        return ", ".join(words + ["cold"] * (self.grads == "cold") + ["clearing"] * self.clear)

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)

    @classmethod
    def of(cls, found: dict[str, Any]) -> Case:
        """Return the case that a result file describes; other keys are ignored."""
        return cls(**{field.name: found[field.name] for field in fields(cls)})


# The values of each condition; a grid stands for all their combinations.
Grid = dict[str, list[Any]]


def quick(threads: int) -> list[Grid]:
    """Return what is measured in less than a minute."""
    return [
        {
            "workload": ["tiny", "mlp", "1000x10", "resnet50", "train-mlp"],
            "hyper": ["nesterov"],
            "dtype": ["float32"],
            "threads": [threads],
            "grads": ["warm"],
            "clear": [False],
        }
    ]


def full(threads: int) -> list[Grid]:
    """Return everything: all hyperparameters x dtypes x threads; cold and cleared gradients for one of them.

    Rules but SGD are measured in float32 and bfloat16, with small and large tensors. For workloads of more than 2**25
    elements hyperparameters and dtypes are not crossed, which would take most of the time and show what smaller ones
    show.
    """
    large = [name for name in WORKLOADS if Case(name, "plain", "float32", 1).elements > 1 << 25]
    everything: Grid = {
        "workload": [name for name in WORKLOADS if name not in large] + list(TRAINING),
        "hyper": [hyper for hyper in HYPERS if rule_in(hyper) == SGD],
        "dtype": list(DTYPES),
        "threads": sorted({1, threads}),
        "grads": ["warm"],
        "clear": [False],
    }
    dtypes: Grid = {**everything, "workload": large, "hyper": ["nesterov"]}
    hypers: Grid = {**everything, "workload": large, "dtype": ["float32"]}
    gradients: Grid = {
        **everything,
        "workload": list(WORKLOADS),
        "hyper": ["nesterov"],
        "dtype": ["float32"],
        "grads": ["warm", "cold"],
        "clear": [False, True],
    }
    rules: Grid = {
        **everything,
        "workload": ["tiny", "161x8", "resnet50"],
        "hyper": [hyper for hyper in HYPERS if rule_in(hyper) != SGD],
        "dtype": ["float32", "bfloat16"],
    }
    return [everything, dtypes, hypers, gradients, rules]


def select(grids: Sequence[Grid], filters: Mapping[str, list[Any] | None]) -> list[Case]:
    """Return the cases of all grids, workload by workload.

    Args:
        grids: as `quick` and `full` return them.
        filters: for a condition's name the values to take instead of the grid's; None or [] leaves the grid's.
    """
    found: dict[Case, None] = {}
    for grid in grids:
        values = [filters.get(name) or grid[name] for name in grid]
        for combination in product(*values):
            case = Case(**dict(zip(grid, combination, strict=True)))
            if not case.is_training or _trains(case):
                found[case] = None
    order = [*WORKLOADS, *TRAINING]
    return sorted(found, key=lambda case: order.index(case.workload))


def _trains(case: Case) -> bool:
    """True if a training workload has such a case: its own gradients, in float32, with the usual hyperparameters."""
    return (case.hyper, case.dtype, case.grads, case.clear) == (
        "nesterov",
        "float32",
        "warm",
        False,
    )
