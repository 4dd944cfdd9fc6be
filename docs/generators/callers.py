"""Who calls a model, what is known and what happens, in docs/rows.md: from `tests/rows_of_callers.py`, as tested."""

from __future__ import annotations

import importlib
import sys
from itertools import accumulate
from typing import Any

from generators import ROOT, Block, rows

HEADS = ("caller", "known from", "what happens", "rows of its forwards")


def blocks() -> list[Block]:
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        callers = importlib.import_module("rows_of_callers").CALLERS
    finally:
        sys.path.pop(0)
    lines = [[one.name, one.known, one.happens, _forwards(one)] for one in callers]
    return [Block("docs/rows.md", "rows of callers", rows(HEADS, lines))]


def _forwards(caller: Any) -> str:
    if caller.refused:
        return "none"
    told = dict.fromkeys(caller.rows)  # the same step over and over says no more
    shown = ", ".join(f"`{forward}`" for forward in told)
    if caller.groups:
        lengths = map(len, caller.rows[-1].split())
        first = [0, *accumulate(lengths)][:-1]
        shown += f"; groups `{' '.join(str(caller.groups[row]) for row in first)}`"
    return shown
