"""Pictures of results: ratios as bars, and bytes per second against the size of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sgdcore.bench.cases import TRAINING, WORKLOADS, Case
from sgdcore.bench.contenders import RIVAL_OF
from sgdcore.bench.measure import Result
from sgdcore.bench.report import results_of

__all__ = ["bars", "plot", "roofline"]

_COLOURS = {
    "torch loop": "#b5482f",
    "torch foreach": "#dd7f3c",
    "torch fused": "#e8b44c",
    "torch compiled": "#8c8a3f",
    "NumPy": "#7f7f7f",
    "NumPy out=": "#b3b3b3",
    "numba": "#7b5ea7",
    "optax": "#b79ad0",
    "sgdcore": "#0f766e",
    "sgdcore flat": "#14b8a6",
    "sgdcore.torch": "#1d4ed8",
    "memory streams": "#111111",
}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "sgdcore",  # the same file from the same results
}
# The case of each workload that is drawn.
_USUAL = {"hyper": "nesterov", "dtype": "float32", "grads": "warm", "clear": False}


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw both pictures into one file; its suffix chooses the format.

    Raises:
        ValueError: if the document holds no times of the usual kind (nesterov, float32, warm gradients), or none of
            ours.
    """
    _draw(document, path, [_draw_bars, _draw_roofline], [1.35, 1])


def bars(document: dict[str, Any], path: Path, source: str | None = None) -> None:
    """Draw, for each workload, everybody's time over ours; `source` is noted in an SVG. Raises as `plot` does."""
    _draw(document, path, [_draw_bars], [1.35], source)


def roofline(document: dict[str, Any], path: Path, source: str | None = None) -> None:
    """Draw each step's bytes per second against the bytes it has to move; the rest as for `bars`."""
    _draw(document, path, [_draw_roofline], [1], source)


Cases = list[tuple[Case, dict[str, Result]]]


def _draw(
    document: dict[str, Any],
    path: Path,
    parts: Sequence[Callable[[Any, Cases], None]],
    heights: Sequence[float],
    source: str | None = None,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = _usual_cases(document)
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(11, 5.6 * sum(heights)), layout="constrained")
        for part, each in zip(
            parts,
            figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0],
            strict=True,
        ):
            part(each, cases)
        try:
            svg = {"metadata": {"Date": None, "Source": source}}
            figure.savefig(path, **(svg if path.suffix == ".svg" else {"dpi": 130}))
        finally:
            plt.close(figure)


def _usual_cases(document: dict[str, Any]) -> Cases:
    """Return the cases that are drawn: of each workload the one with most threads, in the workloads' order."""
    found = {
        Case.of(each): results_of(each)
        for each in document["cases"]
        if all(each[name] == value for name, value in _USUAL.items())
        and any(contender["seconds"] for contender in each["contenders"].values())
    }
    if not found:
        raise ValueError("there are no times of nesterov, float32, warm: nothing to draw")
    threads = max(case.threads for case in found)
    order = [*WORKLOADS, *TRAINING]
    chosen = [case for case in found if case.threads == threads]
    return [(case, found[case]) for case in sorted(chosen, key=lambda c: order.index(c.workload))]


def _subtitle(cases: Cases) -> str:
    threads = cases[0][0].threads
    return f"momentum, weight decay and Nesterov, float32, {threads} thread{'s' * (threads > 1)}"


def _draw_bars(figure: Any, cases: Cases) -> None:
    panels = [
        ("torch tensors: time over that of sgdcore.torch", "sgdcore.torch", ("torch",)),
        ("NumPy and JAX arrays: time over that of sgdcore", "sgdcore", ("numpy", "jax")),
    ]
    timed = {name for _, results in cases for name, result in results.items() if result.seconds}
    panels = [panel for panel in panels if panel[1] in timed]
    if not panels:
        raise ValueError("nothing of ours was timed: there are no ratios to draw")
    shown = [each for each in cases if any(base in each[1] for _, base, _ in panels)]
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for each, (title, base, kinds) in zip(axes, panels, strict=True):
        _draw_panel(each, shown, title, base, kinds)
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    axes[0].set_yticks(range(len(shown)), [_row_name(case) for case, _ in shown])
    figure.suptitle(
        f"How many times as long everybody else's step takes ({_subtitle(cases)})", fontsize=11
    )


def _draw_panel(axes: Any, shown: Cases, title: str, base: str, kinds: Sequence[str]) -> None:
    rivals = [
        name
        for name in _COLOURS
        if not name.startswith("sgdcore")
        and any(name in f and f[name].kind in kinds and f[name].seconds for _, f in shown)
    ]
    height = 0.84 / max(1, len(rivals))
    for i, name in enumerate(rivals):
        for row, (_, found) in enumerate(shown):
            result, ours = found.get(name), found.get(base)
            if result is None or ours is None or not result.seconds or not ours.seconds:
                continue
            value, low, high = result.over(ours)
            y = row + (i - (len(rivals) - 1) / 2) * height
            axes.barh(y, value, height * 0.9, color=_COLOURS[name])
            axes.plot([low, high], [y, y], color="#222222", linewidth=0.8)
            axes.annotate(
                f"{value:.2f}" if value < 9.95 else f"{value:.0f}",
                (max(value, high), y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
            )
        axes.barh([-9], [1], color=_COLOURS[name], label=name)  # for the legend
    axes.axvline(1, color=_COLOURS[base], linewidth=1.5, label=base)
    axes.set_xscale("log")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.6)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.legend(fontsize=7.5, loc="lower right", framealpha=0.95)


def _row_name(case: Case) -> str:
    if case.is_training:
        part = "step in training" if case.is_step_alone else "whole step"
        return f"{case.workload}\n({part})"
    count, tensors = case.elements, len(case.shapes)
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if count >= scale:
            elements = f"{count / scale:.3g}{unit}"
            break
    else:
        elements = str(count)
    names = f"{tensors:,} tensors, " if tensors > 1 else ""
    return f"{case.workload}\n{names}{elements}"


def _draw_roofline(figure: Any, cases: Cases) -> None:
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for case, results in cases:
        if case.is_training:
            continue
        for name, result in results.items():
            if result.seconds and result.kind in (*RIVAL_OF, "ceiling") and name != "empty call":
                points.setdefault(name, []).append((case.bytes, case.bytes / result.median / 1e9))
    for name, colour in _COLOURS.items():
        if name not in points:
            continue
        x, y = zip(*sorted(points[name]), strict=True)
        ours, ceiling = name.startswith("sgdcore"), name == "memory streams"
        axes.plot(
            x,
            y,
            color=colour,
            label=name,
            marker="_" if ceiling else "o",
            markersize=16 if ceiling else 7 if ours else 5,
            markeredgewidth=2.5 if ceiling else 0,
            linestyle="none",
            zorder=4 if ceiling else 3 if ours else 2,
        )
    for size, name in _groups(case for case, _ in cases if not case.is_training):
        axes.annotate(
            name,
            (size, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=7.5,
            color="#555555",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 12)  # room for the names
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bytes that a step has to read and write")
    axes.set_ylabel("these bytes over the time of a step, GB/s")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    figure.suptitle(f"Bytes per second against size ({_subtitle(cases)})", fontsize=11)


def _groups(cases: Iterable[Case]) -> list[tuple[float, str]]:
    """Return sizes and names of workloads, those of about the same size together."""
    groups: list[list[Case]] = []
    for case in sorted(cases, key=lambda c: c.bytes):
        if groups and case.bytes < 1.5 * groups[-1][0].bytes:
            groups[-1].append(case)
        else:
            groups.append([case])
    return [(group[0].bytes, ", ".join(case.workload for case in group)) for group in groups]
