"""Shared by the tests: what the machine has, and restoring the process-wide settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import sgdcore


def pytest_report_header() -> list[str]:
    """Show what is tested: version, instruction sets, threads."""
    info = sgdcore.build_info()
    available = ", ".join(info["isa_available"])
    return [
        f"sgdcore {info['version']} from {sgdcore.__file__}",
        f"instruction sets: {available} (default {info['isa']}); threads: {info['threads']}",
    ]


@pytest.fixture(params=sgdcore.build_info()["isa_available"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each instruction set that this machine has."""
    sgdcore.set_isa(request.param)
    yield request.param
    sgdcore.set_isa(None)


@pytest.fixture
def threads() -> Iterator[None]:
    """Let the test change the number of threads."""
    yield
    sgdcore.set_num_threads(0)
