"""The modules import each other in one direction: what a module imports, its types too, never leads back to it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import carpool

ROOT = Path(carpool.__file__).parent
MODULES = {
    ".".join(("carpool", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
CIRCLES = ("carpool.hosts.transformers",)  # that are still there


def imported(nodes: list[ast.stmt]) -> set[str]:
    """Modules that these statements import, for type checkers too; what functions import when they run stays out."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{one.name}" for one in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.If):
            found |= imported(node.body + node.orelse)
        elif isinstance(node, ast.Try | ast.With):
            found |= imported(node.body)
    return found & set(MODULES)


@cache
def needs(name: str) -> frozenset[str]:
    return frozenset(imported(ast.parse(MODULES[name].read_text(encoding="utf-8")).body) - {name})


def reached(name: str) -> set[str]:
    """Everything that is loaded with a module."""
    seen: set[str] = set()
    todo = list(needs(name))
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += needs(one)
    return seen


@pytest.mark.parametrize("name", sorted(name for name in MODULES if not name.startswith(CIRCLES)))
def test_no_module_is_needed_by_what_it_needs(name: str) -> None:
    assert name not in reached(name)


def test_imports_are_found() -> None:
    text = "import carpool.errors\nif True:\n from carpool.cli import app\nif TYPE_CHECKING:\n import carpool.doctor"
    assert imported(ast.parse(text).body) == {"carpool.errors", "carpool.cli.app", "carpool.doctor"}
    assert "carpool.cli.app" in reached("carpool.cli.commands")


@pytest.mark.parametrize("folder", ["benchmarks", "leaderboard", "recipes", "docs"])
def test_scripts_import_what_there_is(folder: str) -> None:
    """Nobody runs them every day; a name that has moved is noticed here. (Kernels need Triton to be imported.)"""
    missing = []
    for path in sorted((ROOT.parents[1] / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("carpool."):
                continue
            source = MODULES.get(str(node.module))
            names = set() if source is None else defined(source)
            missing += [
                f"{path.name}: {node.module}.{one.name}"
                for one in node.names
                if one.name not in names and f"{node.module}.{one.name}" not in MODULES
            ]
    assert not missing


def defined(path: Path) -> set[str]:
    """Names that a module's top level gives."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(one.asname or one.name).split(".")[0] for one in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
