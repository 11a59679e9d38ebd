"""What was measured, for people and for programs: tables, the JSON document, and the comparison of two of those.

docs/measuring.md describes the document.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import sgdcore
from sgdcore.bench.cases import Case
from sgdcore.bench.contenders import CONTENDERS, RIVAL_OF
from sgdcore.bench.measure import Measured, Result
from sgdcore.bench.stats import NOISY, Ratio, ratio_of_runs

__all__ = [
    "SCHEMA",
    "Rivalry",
    "below",
    "compare",
    "document",
    "duration",
    "machine",
    "merge",
    "print_case",
    "read",
    "results_of",
    "rivalries",
    "write",
]

SCHEMA = 1
BUSY = 0.1  # of all cores, used by other programs: then times are not to be believed


# --- The document ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what the times depend on: processor, cores, caches, memory, kernel."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in reversed(lines) if ":" in line)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    processor = found.get("model name", platform.processor() or platform.machine())
    if "cpu family" in found:  # a virtual machine may not tell more
        processor += f" (family {found['cpu family']}, model {found['model']})"
    return {
        "type": f"{processor}, {len(os.sched_getaffinity(0))} cores",
        "memory_gib": round(pages / 2**30, 1),
        "virtual": "hypervisor" in found.get("flags", "").split(),
        "kernel": platform.release().partition("-")[0],
    }


def document(
    measured: Iterable[Measured], skipped: Iterable[tuple[Case, str]], command: str
) -> dict[str, Any]:
    """Return all results as one JSON document."""
    versions = {"numpy": None, **{c.needs: c.version() for c in CONTENDERS.values()}}
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "build": sgdcore.build_info(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version is not None},
        "cases": [_case(each) for each in measured],
        "skipped": [{**case.as_dict(), "reason": reason} for case, reason in skipped],
    }


def _case(measured: Measured) -> dict[str, Any]:
    case, results = measured.case, measured.results
    found: dict[str, Any] = case.as_dict()
    if not case.is_training:
        found |= {"tensors": len(case.shapes), "elements": case.elements, "bytes": case.bytes}
    return {
        **found,
        "others": measured.others,
        "contenders": {name: _contender(result, results) for name, result in results.items()},
    }


def _contender(result: Result, results: dict[str, Result]) -> dict[str, Any]:
    found: dict[str, Any] = asdict(result)
    if result.seconds:
        bases = {name: results[name] for name in _bases(results)}
        found["median"] = float(f"{result.median:.5g}")
        found["spread"] = round(result.spread, 4)
        found["ratios"] = {
            name: [float(f"{x:.4g}") for x in result.over(base)] for name, base in bases.items()
        }
    return found


def _bases(results: dict[str, Result]) -> list[str]:
    """Return which of ours were timed; the others are compared with them."""
    return [b for b in dict.fromkeys(RIVAL_OF.values()) if b in results and results[b].seconds]


def results_of(case: dict[str, Any]) -> dict[str, Result]:
    """Return the results in a document's case."""
    names = Result.__dataclass_fields__
    return {
        contender: Result(**{name: found[name] for name in names if name in found})
        for contender, found in case["contenders"].items()
    }


def read(path: Path) -> dict[str, Any]:
    """Read a document; raises ValueError if the file holds something else."""
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a result of sgdcore bench, schema {SCHEMA}")
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a document, one contender a line."""
    head = json.dumps({**found, "cases": []}, indent=1)
    cases = []
    for case in found["cases"]:
        contenders = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(result)}"
            for name, result in case["contenders"].items()
        )
        conditions = json.dumps({k: v for k, v in case.items() if k != "contenders"})
        cases.append(f'  {conditions[:-1]}, "contenders": {{\n{contenders}\n  }}}}')
    body = '"cases": [\n' + ",\n".join(cases) + "\n ]" if cases else '"cases": []'
    path.write_text(head.replace('"cases": []', body, 1) + "\n")


def merge(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one document of parts that were measured on one machine; of a case measured twice, the newest.

    Raises:
        ValueError: if there is no document, or they come from different types of machine.
    """
    if not documents:
        raise ValueError("there is no document to merge")
    types = sorted({found["machine"]["type"] for found in documents})
    if len(types) > 1:
        raise ValueError(f"these are measurements of different machines: {'; '.join(types)}")
    ordered = sorted(documents, key=lambda found: found["date"])
    cases = {Case.of(case): case for found in ordered for case in found["cases"]}
    skipped = {Case.of(case): case for found in ordered for case in found["skipped"]}
    return {
        **ordered[-1],
        "cases": list(cases.values()),
        "skipped": [case for key, case in skipped.items() if key not in cases],
    }


# --- Tables ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Return such as "1.23 µs"."""
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def print_case(console: Console, measured: Measured) -> None:
    """Print one case as a table, and what was not timed below it."""
    case, results = measured.case, measured.results
    table = _table(case.title)
    table.add_column("contender", min_width=14)
    for heading in ("median", "spread"):
        table.add_column(heading, justify="right")
    bases = _bases(results)
    for base in bases:
        table.add_column(f"time / {base}", justify="right", min_width=20)
    for heading in ("GB/s", "faults", "allocates"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for name, result in results.items():
        if not result.seconds:
            continue
        moves = not case.is_training and name != "empty call"
        table.add_row(
            name,
            duration(result.median),
            f"{result.spread:.0%}" + ("!" if result.spread > NOISY else ""),
            *["1" if name == b else str(result.over(results[b])) for b in bases],
            f"{case.bytes / result.median / 1e9:.3g}" if moves else "",
            f"{result.page_faults:g}",
            _size(result.allocated_bytes),
            _check(result),
            style="bold" if name in bases else "",
        )
    console.print(table)
    for line in _remarks(measured):
        console.print(f"  {line}", markup=False)
    console.print()


def _check(result: Result) -> str:
    if result.check == "rounding":
        return f"{result.roundings:.2g} eps"
    return "" if result.check == "ceiling" else result.check


def _table(title: str = "") -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _remarks(measured: Measured) -> Iterator[str]:
    results = measured.results
    for name, result in results.items():
        if result.check == "wrong":
            yield f"{name}: WRONG, not timed: {result.detail}"
        elif result.check == "failed":
            yield f"{name}: FAILED, not timed: {result.detail}"
        elif not result.seconds:
            yield f"{name}: not timed: {result.detail}"
    noisy = [name for name, result in results.items() if result.spread > NOISY]
    if noisy:
        yield f"! spread above {NOISY:.0%}, too busy a machine to believe: {', '.join(noisy)}"
    if measured.others is not None and measured.others > BUSY:
        yield f"! other programs used {measured.others:.0%} of the machine meanwhile"


# --- Verdicts -------------------------------------------------------------------------------------


class Rivalry(NamedTuple):
    """The time of somebody else's step over that of ours."""

    ratio: Ratio
    rival: str
    case: Case


def rivalries(case: Case, results: dict[str, Result]) -> list[Rivalry]:
    """Return the ratio of each rival to the one of ours that works on the same kind of arrays."""
    found = []
    for name, result in results.items():
        ours = results.get(RIVAL_OF.get(result.kind, ""))
        if result.seconds and ours is not None and ours.seconds and not name.startswith("sgdcore"):
            found.append(Rivalry(result.over(ours), name, case))
    return found


def below(found: Iterable[Rivalry], least: float) -> list[Rivalry]:
    """Return the rivalries whose ratio is below `least` with its whole interval, the smallest first."""
    return sorted(each for each in found if each.ratio.high < least)


def compare(console: Console, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print how the times of two documents differ, case by case.

    A ratio below 1 means that `after` takes less time. What did not change between the two, everybody else's
    contenders, shows how far the machine itself was slower or faster.
    """
    for label, found in (("before", before), ("after", after)):
        build = found["build"]
        console.print(
            f"{label}: sgdcore {build['version']} ({build['isa']}), {found['machine']['type']}, "
            f"{found['date']}",
            markup=False,
        )
    if before["machine"]["type"] != after["machine"]["type"]:
        console.print("! Different machines: only ratios within one file can be compared.")
    earlier = {Case.of(case): results_of(case) for case in before["cases"]}
    table = _table()
    for heading in ("case", "contender", "before", "after", "after / before", ""):
        left = heading in ("case", "contender", "")
        table.add_column(heading, justify="left" if left else "right")
    controls = []
    for each in after["cases"]:
        case = Case.of(each)
        title = case.title
        for name, now in results_of(each).items():
            was = earlier.get(case, {}).get(name)
            if was is None or not was.seconds or not now.seconds:
                continue
            found_ratio = ratio_of_runs(now.seconds, was.seconds, now.placements, was.placements)
            if not name.startswith("sgdcore"):
                controls.append(found_ratio.value)
            times = duration(was.median), duration(now.median)
            table.add_row(title, name, *times, str(found_ratio), verdict(found_ratio))
            title = ""
    if not table.row_count:
        console.print("The two files have no case in common.")
        return
    console.print(table)
    if controls:
        console.print(
            f"What did not change, {len(controls)} times of others, moved by {median(controls):.3f} in the median, "
            f"{min(controls):.3f} to {max(controls):.3f}: the machine's part in all of the above.",
            markup=False,
        )


def verdict(found: Ratio) -> str:
    """Return in words what a ratio of after to before says."""
    if found.high < 1:
        return "faster"
    return "slower" if found.low > 1 else "no difference seen"
