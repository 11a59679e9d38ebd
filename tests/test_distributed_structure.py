"""sgdcore.distributed stays small: few lines, and few attributes in a class."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python/sgdcore/distributed"
MOST_ATTRIBUTES = 12
MOST_LINES = 2600


def classes(source: str) -> dict[str, ast.ClassDef]:
    return {
        node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)
    }


KINDS = {
    name: kind for path in PACKAGE.rglob("*.py") for name, kind in classes(path.read_text()).items()
}


def attributes(kind: ast.ClassDef, kinds: dict[str, ast.ClassDef]) -> set[str]:
    """What a class and its bases in the package declare, and what their methods assign to self."""
    found = {
        node.target.id
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    stored = (
        node
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    )
    found |= {
        node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    for base in kind.bases:
        if isinstance(base, ast.Name) and base.id in kinds:
            found |= attributes(kinds[base.id], kinds)
    return found


def test_attributes_are_found() -> None:
    kinds = classes("""
class Base:
    inherited: int

class Example(Base):
    declared: int

    def __init__(self) -> None:
        self.one, (self.two, self.other.three) = 1, (2, 3)
        self.four: int = 4
        self.five += other.six
        for self.seven in ():
            print(self.eight)
""")
    expected = {"inherited", "declared", "one", "two", "four", "five", "seven"}
    assert attributes(kinds["Example"], kinds) == expected


@pytest.mark.parametrize("name", sorted(KINDS))
def test_classes_have_a_dozen_attributes_at_most(name: str) -> None:
    assert len(attributes(KINDS[name], KINDS)) <= MOST_ATTRIBUTES


def test_the_package_has_few_lines() -> None:
    assert sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")) <= MOST_LINES
