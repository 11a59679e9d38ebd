"""README.md: its examples run and print what it says, and its commands are the ones that CI runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples() -> None:
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_commands_are_one_line_each() -> None:
    """`.ci/run` takes the test command from its marker."""
    text = README.read_text()
    for marker, last in (("demo", "-m sgdcore demo"), ("test", "-m pytest -n 2 --dist loadfile")):
        blocks = re.findall(rf"<!-- {marker} command -->\n```sh\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == 1
        assert blocks[0].count("\n") == 1
        assert blocks[0].strip().endswith(last)
