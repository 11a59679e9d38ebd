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
    Refusal(
        "`max_grad_norm`, `skip_nonfinite`",
        "`step_in_backward`",
        "no step there has all gradients together; `clip_value` can go with it",
        "`step_in_backward`, or setting the option after it",
    ),
    Refusal(
        "`clip_value`, `max_grad_norm`, `skip_nonfinite`",
        "`differentiable=True`",
        "autograd records torch's own step; torch.nn.utils clips before it",
        "`step`",
    ),
    Refusal("`clip_value`", "complex parameters", "complex numbers have no order", "`step`"),
    Refusal(
        "`max_grad_norm`, `skip_nonfinite`",
        "DTensors (`fully_shard`)",
        "other processes have parts of them; torch.nn.utils.clip_grad_norm_ adds these up",
        "`step`",
    ),
    Refusal(
        "`max_grad_norm`, `skip_nonfinite`",
        "tensors with operations instead of memory",
        "the core cannot read their elements",
        "`step`",
    ),
    Refusal(
        "`max_grad_norm`, `skip_nonfinite`",
        "tensors without memory (meta, fake)",
        "they have no elements",
        "`step`",
    ),
    Refusal(
        "`max_grad_norm`, `skip_nonfinite`",
        "gradients on several devices",
        "a device would wait for the other",
        "`step`",
    ),
    Refusal(
        "`skip_nonfinite`",
        "sparse gradients on a device",
        "their rows do not know whether a first step happened",
        "`step`",
    ),
    Refusal(
        "`skip_nonfinite`",
        "averages, or a rule that counts steps, on a device",
        "the host counts the steps, and does not wait for the device's decision",
        "`step`",
    ),
    Refusal(
        "`precision`",
        "a parameter of another dtype",
        '`"split"` is for bfloat16, the others for bfloat16 and float16',
        "the constructor, `add_param_group`, `load_state_dict`, `step`",
    ),
    Refusal(
        "`precision`",
        "`differentiable=True`",
        "autograd records torch's own step, which rounds parameters",
        "the constructor, `add_param_group`",
    ),
    Refusal(
        "`precision`",
        "sparse gradients, views with gaps, subclasses with operations of their own",
        "the core reads both halves of a parameter as it reads the parameter",
        "`step`",
    ),
    Refusal(
        "`precision`",
        "a CUDA device",
        "the device steps plain parameters only",
        "`step`",
    ),
    Refusal(
        '`precision="stochastic"`',
        "`step_in_backward`",
        "rounding needs a parameter's position among all",
        "`step_in_backward`",
    ),
    Refusal(
        '`precision="split"`, `"kahan"`',
        "`LocalSGD`'s `outer`, `wire_dtype`, `transactional`",
        "they move or restore what the model sees alone",
        "`LocalSGD`",
    ),
)


def as_markdown() -> str:
    """Return the table as docs/options.md has it."""
    lines = ["| option | cannot go with | because | refused by |", "|---|---|---|---|"]
    lines += [f"| {each.option} | {each.other} | {each.reason} | {each.when} |" for each in REFUSED]
    return "\n".join(lines) + "\n"
