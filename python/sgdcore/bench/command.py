"""``python -m sgdcore bench``: the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgdcore._hints import needs
from sgdcore.bench import cases
from sgdcore.bench.cases import DTYPES, HYPERS, TRAINING, WORKLOADS, Case

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from sgdcore.bench.measure import Extent, Measured

__all__ = ["add_arguments", "main"]

_CONDITIONS = ("workload", "hyper", "dtype", "threads", "grads", "clear")
_COMPILED = "torch compiled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="less than a minute; the default")
    extent.add_argument("--full", action="store_true", help="everything; more than half an hour")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda: other cases, for tensors on the first CUDA device; of the options only --full and --json count",
    )
    parser.add_argument(
        "--list", action="store_true", help="list contenders and cases; measure nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results: .png or .svg")
    parser.add_argument(
        "--fail-below",
        type=float,
        metavar="RATIO",
        help="exit code 1 if anywhere a rival's time over ours is below this with its whole interval",
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="samples of each contender")
    files = parser.add_argument_group("instead of measuring")
    files.add_argument(
        "--from", dest="source", nargs="+", type=Path, metavar="FILE", help="take these results"
    )
    files.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare results: before, after"
    )
    filters = parser.add_argument_group(
        "filters; each may be repeated, and replaces its condition's values"
    )
    filters.add_argument("--workload", action="append", choices=[*WORKLOADS, *TRAINING])
    filters.add_argument("--hyper", action="append", choices=list(HYPERS))
    filters.add_argument("--dtype", action="append", choices=list(DTYPES))
    filters.add_argument("--threads", action="append", type=_positive, metavar="N")
    filters.add_argument("--grads", action="append", choices=["warm", "cold"])
    filters.add_argument("--clear", action="append", type=_yes_or_no, metavar="yes|no")
    filters.add_argument(
        "--contender", action="append", metavar="NAME", help="as --list names them"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")
    return text == "yes"


class _UsageError(Exception):
    """Something is wrong with what the user asked for."""


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, 1 if a wanted ratio is missed or a result of ours is wrong, or 2."""
    try:
        import rich.console
    except ImportError as error:
        print(needs("python -m sgdcore bench", "rich", "bench", error), file=sys.stderr)
        return 2
    console = rich.console.Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        return _run(args, console)
    except _UsageError as error:
        print(f"python -m sgdcore bench: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, console: Console) -> int:
    from sgdcore.bench import report

    _check_targets(args)
    if args.device == "cuda":
        from sgdcore.bench import cuda

        return cuda.main(args.full, args.json, console)
    if args.compare:
        report.compare(console, *_read(args.compare))
        return 0
    if args.source:
        return _show(args, console)
    names = _contenders(args)
    chosen = _cases(args)
    if args.list:
        _list(console, chosen, names)
        return 0
    measured: list[Measured] = []
    skipped: list[tuple[Case, str]] = []
    interrupted = False
    try:
        _measure(console, chosen, names, args, measured, skipped)
    except KeyboardInterrupt:
        interrupted = True  # what was measured by then is not lost
    _summary(console, measured, skipped)
    found = report.document(measured, skipped, _command())
    if args.json:
        report.write(args.json, found)
    if args.plot and not interrupted:
        _plot(found, args.plot)
    return 130 if interrupted else _verdict(console, measured, args.fail_below)


def _command() -> str:
    """Return what was typed, without the folders of files, which are nobody else's business."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "sgdcore", *words])


def _check_targets(args: argparse.Namespace) -> None:
    """Find what would go wrong after minutes of measuring."""
    for option, target in (("--json", args.json), ("--plot", args.plot)):
        if target is not None and not target.parent.is_dir():
            raise _UsageError(f"{option}: there is no folder {target.parent}")
    if args.plot is None:
        return
    if args.plot.suffix not in (".png", ".svg"):
        raise _UsageError(f"--plot: expected a name ending in .png or .svg, got {str(args.plot)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise _UsageError(needs("--plot", "matplotlib", "bench", error)) from None


def _read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    from sgdcore.bench import report

    try:
        return [report.read(path) for path in paths]
    except (OSError, ValueError) as error:
        raise _UsageError(str(error)) from None


def _show(args: argparse.Namespace, console: Console) -> int:
    """Print, and draw or write if so asked, the results of earlier runs."""
    from sgdcore.bench import report
    from sgdcore.bench.measure import Measured

    try:
        found = report.merge(_read(args.source))
    except ValueError as error:
        raise _UsageError(f"--from: {error}") from None
    measured = []
    wanted = {name: getattr(args, name) for name in _CONDITIONS if getattr(args, name)}
    for each in found["cases"]:
        if all(each[name] in values for name, values in wanted.items()):
            measured.append(Measured(Case.of(each), report.results_of(each), each["others"]))
            report.print_case(console, measured[-1])
    if args.json:
        report.write(args.json, found)
    if args.plot:
        _plot(found, args.plot)
    return _verdict(console, measured, args.fail_below)


def _contenders(args: argparse.Namespace) -> list[str]:
    from sgdcore.bench.contenders import CONTENDERS
    from sgdcore.bench.training import IN_BACKWARD

    versions = {name: each.version() for name, each in CONTENDERS.items()}
    versions[IN_BACKWARD] = versions["sgdcore.torch"]
    for name in args.contender or []:
        if name not in versions:
            raise _UsageError(f"--contender: expected one of {', '.join(versions)}, got {name!r}")
        if versions[name] is None:
            raise _UsageError(f"--contender: {name}: {CONTENDERS[name].needs} is not installed")
    chosen = args.contender or versions
    if not args.full and not args.contender:
        # Compiling takes longer than all others.
        chosen = [name for name in chosen if name != _COMPILED]
    return [name for name in versions if name in chosen and (versions[name] or args.list)]


def _cases(args: argparse.Namespace) -> list[Case]:
    threads = len(os.sched_getaffinity(0))
    grids = cases.full(threads) if args.full else cases.quick(threads)
    found = cases.select(grids, {name: getattr(args, name) for name in _CONDITIONS})
    if not found:
        raise _UsageError(
            "the filters leave no case: training exists in float32 with nesterov only"
        )
    return found


def _extent(args: argparse.Namespace) -> Extent:
    from sgdcore.bench.measure import Extent

    if args.full:
        return Extent(args.rounds or 15, turn=2e-3, budget=5.0)
    return Extent(args.rounds or 31, turn=4e-3, budget=6.0)


def _list(console: Console, chosen: Sequence[Case], names: Sequence[str]) -> None:
    from sgdcore.bench.contenders import CONTENDERS

    console.print("contenders", style="bold")
    for name in names:
        each = CONTENDERS.get(name)
        if each is None:
            console.print(f"  {name:<26} whole training steps only", markup=False)
            continue
        summary = (each.__doc__ or "").partition("\n")[0]
        state = each.version() or "not installed"
        console.print(f"  {name:<26} {each.needs} {state}: {summary}", markup=False)
    console.print("cases", style="bold")
    for case in chosen:
        console.print(f"  {case.title}", markup=False)


def _measure(
    console: Console,
    chosen: Sequence[Case],
    names: Sequence[str],
    args: argparse.Namespace,
    measured: list[Measured],
    skipped: list[tuple[Case, str]],
) -> None:
    """Measure all cases; append to `measured` and `skipped`."""
    from sgdcore.bench import measure, report
    from sgdcore.bench.contenders import CONTENDERS

    extent = _extent(args)
    console.print(_versions() + "\n", markup=False)
    with _progress(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.title)
            reason = _reason_to_skip(case, names)
            if reason:
                skipped.append((case, reason))
                console.print(f"{case.title}: skipped: {reason}\n", markup=False)
            else:
                kept = measure.fitting(case, names, _available_memory())
                found = measure.run(case, kept, extent, args.contender or ())
                for name in names:
                    if name not in kept and name in CONTENDERS:
                        kind = CONTENDERS[name].kind
                        found.results[name] = measure.Result(kind, "unsuitable", _NO_MEMORY)
                measured.append(found)
                report.print_case(console, found)
            progress.advance(task)


_NO_MEMORY = "there is no memory left for it; --contender measures fewer at a time"


def _progress(console: Console) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Below the tables if those go to the terminal; else where it does not mix with them.
    shown = console if console.is_terminal else Console(stderr=True)
    return Progress(*columns, console=shown, transient=True)


def _reason_to_skip(case: Case, names: Sequence[str]) -> str:
    from sgdcore.bench import measure, training
    from sgdcore.bench.contenders import CONTENDERS

    if case.is_training:
        if CONTENDERS["sgdcore.torch"].version() is None:
            return "torch is not installed"
        return "" if set(names) & set(training.variants()) else "no contender trains"
    if not measure.fitting(case, names, _available_memory()):
        return f"its arrays do not fit into {_available_memory() / 2**30:.1f} GiB of memory"
    return ""


def _versions() -> str:
    import sgdcore
    from sgdcore.bench import report
    from sgdcore.bench.contenders import CONTENDERS

    info = sgdcore.build_info()
    versions = {c.needs: c.version() for c in CONTENDERS.values() if c.needs != "sgdcore"}
    named = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    return (
        f"sgdcore {info['version']} ({info['isa']}, {info['compiler']}), {named}; "
        f"{report.machine()['type']}; {time.strftime('%Y-%m-%d')}"
    )


def _available_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _summary(console: Console, measured: Sequence[Measured], skipped: Sequence[object]) -> None:
    from sgdcore.bench.stats import NOISY

    results = [result for each in measured for result in each.results.values()]
    taken = [result.spread for result in results if result.seconds]
    noisy = sum(spread > NOISY for spread in taken)
    wrong = sum(result.check == "wrong" for result in results)
    console.print(
        f"{len(measured)} cases measured, {len(skipped)} skipped; {len(taken)} times taken, {noisy} with a spread "
        f"above {NOISY:.0%}; {wrong} wrong results",
        markup=False,
    )
    if noisy > len(taken) / 4:
        console.print(
            "! The machine was busy: run this again when nothing else runs.", markup=False
        )


def _plot(found: dict[str, Any], path: Path) -> None:
    from sgdcore.bench.plot import plot

    try:
        plot(found, path)
    except ValueError as error:
        raise _UsageError(f"--plot: {error}") from None


def _verdict(console: Console, measured: Sequence[Measured], fail_below: float | None) -> int:
    from sgdcore.bench import report

    found = [r for each in measured for r in report.rivalries(each.case, each.results)]
    for title, each in (
        ("smallest", min(found, default=None)),
        ("largest", max(found, default=None)),
    ):
        if each is not None:
            console.print(
                f"{title} ratio of a rival's time to ours: {each.ratio}, {each.rival} in {each.case.title}",
                markup=False,
            )
    wrong = [
        f"{name}: {result.check} in {each.case.title}"
        for each in measured
        for name, result in each.results.items()
        if name.startswith("sgdcore") and result.check in ("wrong", "failed")
    ]
    for line in wrong:
        console.print(line, markup=False)
    if fail_below is None:
        return int(bool(wrong))
    if not found:
        raise _UsageError("--fail-below: no rival was timed beside ours")
    slower = report.below(found, fail_below)
    for each in slower:
        console.print(
            f"below {fail_below:g}: {each.ratio}, {each.rival} in {each.case.title}", markup=False
        )
    return int(bool(wrong or slower))
