"""What the documentation takes from code and committed results, one file a subject.

A file here defines `blocks()`, parts of pages, and may define `draw()`, which makes pictures. A block whose results are
not there is left out.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs/results"


class Block(NamedTuple):
    """What stands on a page between `<!-- name: ... -->` and `<!-- end -->`."""

    page: str
    name: str
    content: str


def load(name: str) -> dict[str, Any] | None:
    """A committed result, or None if there is none."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def with_interval(found: dict[str, Any], digits: int = 2) -> str:
    """An estimate, with its interval where there is one."""
    value, low, high = (found[name] for name in ("value", "low", "high"))
    between = "" if low is None or low == high else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{between}"


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A markdown table; a heading that starts with `>` is a column of numbers."""
    heads = list(heads)
    marks = ["--:" if head.startswith(">") else "---" for head in heads]
    made = [[head.removeprefix(">") for head in heads], None, *(map(_cell, line) for line in lines)]
    return "".join(f"|{'|'.join(marks)}|\n" if line is None else f"| {' | '.join(line)} |\n" for line in made)


def _cell(text: str) -> str:
    """With code that holds a bar, as plans have it, in a form that no reader of tables takes for the end of a cell."""
    return re.sub(
        r"`([^`|]*\|[^`]*)`",
        lambda code: f"<code>{html.escape(code[1], quote=False).replace('|', '&#124;')}</code>",
        text,
    )
