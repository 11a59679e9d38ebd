"""Write docs/benchmarks.md and its pictures from the result files in benchmarks/results/.

    python benchmarks/docs.py

Files of one type of machine are taken together, of a case measured twice the newest. benchmarks/notes.md, which
explains what the numbers show, is included; nothing else adds words or numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sgdcore.bench import plot, report
from sgdcore.bench.cases import TRAINING, WORKLOADS, Case
from sgdcore.bench.measure import Result
from sgdcore.bench.stats import NOISY, Ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOTES = ROOT / "benchmarks" / "notes.md"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"

Found = dict[Case, dict[str, Result]]

HEAD = """\
# Benchmarks

<!-- Written by benchmarks/docs.py from benchmarks/results/ and benchmarks/notes.md: change those. -->

Whole optimizer steps, measured by `python -m sgdcore bench`; [measuring.md](measuring.md) says how, and how to repeat
it. Times are medians; a ratio is somebody's time over ours, so above 1 we are faster, with its 95 % bootstrap interval.
"""


def documents() -> list[dict[str, Any]]:
    """Return one document for each type of machine."""
    found = [report.read(path) for path in sorted(RESULTS.glob("*.json"))]
    found.sort(key=machine_type)
    return [report.merge(list(group)) for _, group in groupby(found, machine_type)]


def machine_type(document: dict[str, Any]) -> str:
    name: str = document["machine"]["type"]
    return name


def slug(document: dict[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine_type(document).lower()).strip("-")


def pictures(document: dict[str, Any]) -> dict[str, Callable[[dict[str, Any], Path, str], None]]:
    """Return the pictures' names, and what draws each."""
    name = slug(document)
    return {f"{name}-bars.svg": plot.bars, f"{name}-roofline.svg": plot.roofline}


def fingerprint(document: dict[str, Any]) -> str:
    """Return what tells the results that a picture was drawn from."""
    return hashlib.sha256(json.dumps(document["cases"]).encode()).hexdigest()


def page(found: Sequence[dict[str, Any]]) -> str:
    """Return the text of docs/benchmarks.md."""
    parts = [HEAD, *(machine_part(document) for document in found)]
    return "\n".join(parts)


def machine_part(document: dict[str, Any]) -> str:
    machine, build = document["machine"], document["build"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    found = {Case.of(case): report.results_of(case) for case in document["cases"]}
    bars, roofline = pictures(document)
    virtual = "a virtual machine with " if machine["virtual"] else ""
    conditions = (
        f"{document['date'][:10]}; {virtual}{machine['memory_gib']:g} GiB of memory, Linux {machine['kernel']}; "
        f"Python {document['python']}, {versions}; {build['compiler']}, kernels for {build['isa']}."
    )
    lines = [
        f"## {machine['type']}",
        "",
        conditions,
        "",
        f"![How many times as long everybody else's step takes](images/{bars})",
        "",
        f"![Bytes per second against size](images/{roofline})",
        "",
        "### What was aimed for",
        "",
        *aims(found),
        "",
        NOTES.read_text().strip(),
        "",
        "### All cases",
        "",
        "Each cell: everybody's time over that of `sgdcore.torch` (torch) or `sgdcore` (NumPy, numba, optax, memory",
        "streams); the columns of ours give their times. `!` marks a spread (interquartile range over median) above",
        "20 %, `wrong` a result that is not timed because it differs from the oracle's. The files in",
        "`benchmarks/results/` hold every sample, spread, page fault and allocation.",
        "",
    ]
    order = [*WORKLOADS, *TRAINING]
    for workload in sorted({case.workload for case in found}, key=order.index):
        lines += details(workload, {c: r for c, r in found.items() if c.workload == workload})
    if document["skipped"]:
        lines += ["Not measured:", ""]
        lines += [f"- {Case.of(each).title}: {each['reason']}" for each in document["skipped"]]
        lines += [""]
    return "\n".join(lines)


# --- Aims -----------------------------------------------------------------------------------------


def aims(found: Found) -> Iterator[str]:
    """Yield the table of what was aimed for and what was reached."""
    yield "| aim | measured | |"
    yield "|---|---|---|"
    rivals = [r for case, results in found.items() for r in report.rivalries(case, results)]
    torch = [r for r in rivals if r.rival.startswith("torch")]
    slower = report.below(torch, 1)
    worst = "".join(f"<br>{r.ratio}: {r.rival}, {r.case.title}" for r in slower)
    unclear = sum(r.ratio.value < 1 for r in torch) - len(slower)
    worst += (
        f"<br>{unclear} more have a median below 1, whose interval reaches it" if unclear else ""
    )
    yield (
        f"| never slower than a variant of torch, in any case | {len(torch) - len(slower)} of {len(torch)} "
        f"comparisons{worst} | {mark(not slower)} |"
    )
    for dtype, least in (("float32", 0.95), ("bfloat16", 0.9)):
        for case, results in cases(found, "flat64M", dtype):
            yield aim(
                f"{case.elements:,} elements, flat, {dtype}, {threads(case)}: "
                f"{100 * least:.0f} % of the memory streams' speed",
                share(results, "memory streams", "sgdcore flat"),
                least,
            )
    for case, results in cases(found, "resnet50", "float32"):
        yield aim(
            f"ResNet-50's separate tensors, {threads(case)}: 85 % of the flat buffer's speed",
            share(results, "sgdcore flat", "sgdcore"),
            0.85,
        )
    for case, results in cases(found, "tiny", "float32"):
        for ours in ("sgdcore", "sgdcore.torch"):
            best = min(
                (r for n, r in results.items() if n.startswith("torch") and r.seconds),
                key=lambda r: r.median,
                default=None,
            )
            if best is not None and ours in results:
                yield aim(
                    f"the smallest step, {ours}, {threads(case)}: 20 times as fast as torch's best",
                    best.over(results[ours]),
                    20,
                )


def cases(found: Found, workload: str, dtype: str) -> list[tuple[Case, dict[str, Result]]]:
    chosen = [
        (case, results)
        for case, results in found.items()
        if (case.workload, case.dtype, case.hyper, case.grads, case.clear)
        == (workload, dtype, "nesterov", "warm", False)
    ]
    return sorted(chosen, key=lambda each: each[0].threads)


def threads(case: Case) -> str:
    return "1 thread" if case.threads == 1 else f"{case.threads} threads"


def share(results: dict[str, Result], of: str, ours: str) -> Ratio | None:
    a, b = results.get(of), results.get(ours)
    return a.over(b) if a and b and a.seconds and b.seconds else None


def aim(what: str, value: Ratio | None, least: float) -> str:
    if value is None:
        return f"| {what} | not measured | |"
    if value.value < least <= value.high:
        return f"| {what} | {value} | not shown: only its interval reaches that |"
    return f"| {what} | {value} | {mark(value.value >= least)} |"


def mark(reached: bool) -> str:
    return "reached" if reached else "**missed**"


# --- All cases ------------------------------------------------------------------------------------


def details(workload: str, found: Found) -> Iterator[str]:
    """Yield a folded table of one workload: a row for each case, a column for each contender."""
    first = next(iter(found))
    size = (
        "" if first.is_training else f": {len(first.shapes):,} tensors, {first.elements:,} elements"
    )
    yield f"<details><summary><b>{workload}</b>{size.replace(': 1 tensors', ': 1 tensor')}</summary>"
    yield ""
    names = [
        name
        for name in dict.fromkeys(n for results in found.values() for n in results)
        if name != "empty call"
        and any(name in r and r[name].check != "unsuitable" for r in found.values())
    ]
    yield "| case | " + " | ".join(names) + " |"
    yield "|---|" + "---:|" * len(names)
    for case, results in found.items():
        title = case.title.removeprefix(f"{workload}, ")
        yield f"| {title} | " + " | ".join(cell(name, results) for name in names) + " |"
    yield ""
    yield "</details>"
    yield ""


def cell(name: str, results: dict[str, Result]) -> str:
    result = results.get(name)
    if result is None or result.check == "unsuitable":
        return ""
    if not result.seconds:
        return result.check
    noisy = "!" if result.spread > NOISY else ""
    if name.startswith("sgdcore"):
        return report.duration(result.median) + noisy
    base = results.get("sgdcore.torch" if result.kind == "torch" else "sgdcore")
    if base is None or not base.seconds:
        return report.duration(result.median) + noisy
    return str(result.over(base)) + noisy


def main() -> None:
    found = documents()
    IMAGES.mkdir(exist_ok=True)
    for old in IMAGES.glob("*.svg"):
        old.unlink()
    for document in found:
        for name, draw in pictures(document).items():
            draw(document, IMAGES / name, fingerprint(document))
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
