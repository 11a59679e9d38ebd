"""The command line: ``python -m sgdcore demo | bench | info``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sgdcore import __version__, build_info, demo
from sgdcore.bench import command as bench


def _cuda_text(info: dict[str, Any]) -> str:
    built = ""
    if info["cuda_built"]:
        built = f"built with {info['cuda_compiler']} for {' '.join(info['cuda_architectures'])}; "
    if info["cuda"]:
        return f"{built}in use: {', '.join(info['cuda_devices'])}"
    return f"{built}not usable: {info['cuda_reason']}" if built else f"no: {info['cuda_reason']}"


def _print_info(_: argparse.Namespace) -> int:
    try:
        info = build_info()
    except ValueError as error:  # of SGDCORE_ISA
        print(f"python -m sgdcore info: {error}", file=sys.stderr)
        return 2
    isa = ", ".join(
        name + (" (in use)" if name == info["isa"] else "") for name in info["isa_available"]
    )
    lacking = [name for name in info["isa_built"] if name not in info["isa_available"]]
    rows = {
        "sgdcore": info["version"],
        "instruction sets": isa
        + (f"; built, but not on this machine: {', '.join(lacking)}" if lacking else ""),
        "threads": info["threads"],
        "compiler": info["compiler"],
        "build flags": info["build_flags"],
        "CUDA": _cuda_text(info),
        "Python": info["python"],
        "NumPy": info["numpy"],
    }
    for key, value in rows.items():
        print(f"{key:<17} {value}")
    return 0


def _run_demo(args: argparse.Namespace) -> int:
    if not args.distributed:
        return demo.main(args)
    from sgdcore import demo_distributed

    return demo.main(args, demo_distributed.run)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sgdcore", description="Stochastic gradient descent in one pass."
    )
    parser.add_argument("--version", action="version", version=f"sgdcore {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo_parser = commands.add_parser("demo", help="train a network on handwritten digits")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=_run_demo)
    bench_parser = commands.add_parser(
        "bench", help="time whole steps beside torch, NumPy and others"
    )
    bench.add_arguments(bench_parser)
    bench_parser.set_defaults(run=bench.main)
    info_parser = commands.add_parser(
        "info", help="print version, instruction sets, threads and build flags"
    )
    info_parser.set_defaults(run=_print_info)
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
