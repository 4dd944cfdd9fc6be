"""The table of modules."""

from __future__ import annotations

import ast

from generators import ROOT, Block, rows

SOURCE = ROOT / "src/carpool"


def blocks() -> list[Block]:
    return [Block("docs/architecture.md", "modules", module_table())]


def module_table() -> str:
    """One line a module: its path and the first line of its docstring."""
    lines = []
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "__init__.py":
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n", 1)[0]
            lines.append((f"`{path.relative_to(SOURCE).as_posix()}`", first))
    return rows(("module", "what it is for"), lines)
