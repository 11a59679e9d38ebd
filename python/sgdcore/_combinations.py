"""What cannot be combined with what. docs/options.md shows the table, and tests/test_combinations.py tries each row."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["REFUSED", "Refusal", "as_markdown"]


class Refusal(NamedTuple):
    """Two things that cannot go together.

    Attributes:
        option: the option, as users write it.
        other: what it cannot go with.
        reason: why.
        when: what raises the error.
    """

    option: str
    other: str
    reason: str
    when: str


REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "`average`",
        "`ScheduleFreeSGD`",
        "the rule averages by itself; `eval()` shows its average",
        "the constructor",
    ),
    Refusal(
        "`average`",
        "`differentiable=True`",
        "autograd records torch's own step, which has no averages",
        "the constructor, `add_param_group`",
    ),
    Refusal(
        "`average`",
        "`step_in_backward`",
        "parameters step one by one there, and averages belong to the step of all",
        "`step_in_backward`",
    ),
    Refusal(
        "`average=Polyak()`",
        "a captured CUDA graph",
        "the graph would repeat the weight of one step; `EMA`'s does not change",
        "`step`, during the capture",
    ),
    Refusal(
        "`step_in_backward`",
        "`ScheduleFreeSGD`",
        "a step counts for all parameters of a group at once",
        "`step_in_backward`",
    ),
    Refusal(
        '`sparse_mode="lazy"`',
        "`ScheduleFreeSGD`",
        "a step averages all rows",
        "the constructor, `add_param_group`",
    ),
    Refusal(
        "a captured CUDA graph",
        "`ScheduleFreeSGD`",
        "the graph would repeat the numbers of one step",
        "`step`, during the capture",
    ),
    Refusal(
        '`LocalSGD(momentum_sync="keep")`, `"reset"`',
        "`ScheduleFreeSGD`",
        "z belongs to the parameters, and is averaged with them",
        "`LocalSGD`",
    ),
    Refusal(
        "`LocalSGD`'s `outer`, `levels`, `transactional`, `exclude_nonfinite`",
        "`ScheduleFreeSGD`",
        "they change parameters or states alone, or take steps back",
        "`LocalSGD`",
    ),
)


def as_markdown() -> str:
    """Return the table as docs/options.md has it."""
    lines = ["| option | cannot go with | because | refused by |", "|---|---|---|---|"]
    lines += [f"| {each.option} | {each.other} | {each.reason} | {each.when} |" for each in REFUSED]
    return "\n".join(lines) + "\n"
