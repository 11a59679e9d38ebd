"""The command line: ``python -m sgdcore demo | bench | info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from sgdcore import __version__, build_info


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
    except ValueError as error:  # SGDCORE_ISA names an unknown instruction set
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


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from sgdcore import demo

    def run(args: argparse.Namespace) -> int:
        if not args.distributed:
            return demo.main(args)
        from sgdcore import demo_distributed

        return demo.main(args, demo_distributed.run)

    demo.add_arguments(parser)
    parser.set_defaults(run=run)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from sgdcore.bench import command

    command.add_arguments(parser)
    parser.set_defaults(run=command.main)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_print_info)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("train a network on handwritten digits", _add_demo),
    "bench": ("time whole steps beside torch, NumPy and others", _add_bench),
    "info": ("print version, instruction sets, threads and build flags", _add_info),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sgdcore", description="Stochastic gradient descent in one pass."
    )
    parser.add_argument("--version", action="version", version=f"sgdcore {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    given = sys.argv[1:] if argv is None else argv
    # Only the chosen command's module is imported. No option of `parser` takes a value.
    chosen = next((argument for argument in given if not argument.startswith("-")), None)
    for name, (text, add_arguments) in _COMMANDS.items():
        command_parser = commands.add_parser(name, help=text)
        if name == chosen:
            add_arguments(command_parser)
    args = parser.parse_args(given)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
