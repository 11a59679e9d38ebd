"""The guide for several workers and its measurements.

The guide's examples run, the tables of the measurements are those of the committed results, and links lead somewhere.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/distributed.md"
MEASUREMENTS = ROOT / "docs/distributed-measurements.md"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("local_sgd_digits", "local-sgd-digits"),
        ("local_sgd_digits", "local-sgd-digits-batch-norm"),
        ("throttled_link", "throttled-link"),
    ],
)
def test_tables_are_those_of_the_results(
    name: str, results: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # dataclasses look their module up.
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    path = ROOT / "benchmarks/results/distributed" / f"{results}.json"
    assert benchmark(name).table(json.loads(path.read_text())) in MEASUREMENTS.read_text()


def test_table_of_the_traffic_is_that_of_the_results() -> None:
    folder = ROOT / "benchmarks/results/distributed"
    results: dict[str, Any] = {}
    for engine in ("gloo", "mpi"):
        text = (folder / f"round-{engine}-epyc-2-cores.json").read_text()
        results |= json.loads(text)["results"]
    assert benchmark("distributed").table(results) in MEASUREMENTS.read_text()


def test_examples_of_the_guide() -> None:
    result = doctest.testfile(str(GUIDE), module_relative=False)
    assert result.attempted >= 2
    assert result.failed == 0


@pytest.mark.parametrize("page", [GUIDE, MEASUREMENTS], ids=lambda page: page.name)
def test_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert len(links) > 3
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_guide_is_read_in_ten_minutes() -> None:
    prose = re.sub(r"```.*?```", "", GUIDE.read_text(), flags=re.DOTALL)
    assert len(prose.split()) <= 2_000
