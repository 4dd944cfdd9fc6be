"""Every table of the command line: what a row is about is always readable, numbers make room for it.

Where a terminal is too narrow, detailed columns are left out first, then names go on in the next line, then more
columns are left out; those of rank 0 stay. The legend explains what is shown and names what is not. Output that is no
terminal (a pipe, a file) stays whole, a line a row; prose alone goes on in the next line there, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2  # between columns
DETAIL = 5  # from this rank on a column is shown only where no name has to be broken for it
NARROWEST = 24  # of a text that goes on in the next line, unless it is shorter
LAST_RESORT = 12  # where there is no room for that and a number or two
PIECE = re.compile(r"(\s*)((?:`[^`]*`|\S)+)")  # a word, or a command with what touches it
PIPED = 120  # columns of a table with prose, where there is no terminal


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: above it.
        about: what it is, for the legend; empty where nobody has to be told.
        rank: 0 stays whatever happens; of the others the highest rank is left out first.
        kind: a `number` (to the right), a `word` (a name or the like, as it is), `text`, which may go on in the next
            line of a terminal, or `prose`, which may do so anywhere.
    """

    head: str
    about: str = ""
    rank: int = 0
    kind: Literal["number", "word", "text", "prose"] = "number"

    @property
    def folds(self) -> bool:
        return self.kind in ("text", "prose")


@dataclass(frozen=True)
class Row:
    """Cells by column, and the style of the line."""

    cells: Sequence[str]
    style: str = ""


@dataclass(frozen=True)
class Sheet:
    """Columns and rows, fitted to a width; parts of it with the same columns are printed by `show`.

    Attributes:
        columns: all of them. rows: of all parts, for the widths.
        width: of the terminal; None: as wide as it takes.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    width: int | None
    shown: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shown", self._fitting())

    @classmethod
    def of(cls, console: Console, columns: Sequence[Column], rows: Sequence[Row]) -> Sheet:
        """Fitted to a console."""
        return cls(columns, rows, console.width if console.is_terminal else None)

    def show(self, console: Console, rows: Sequence[Row] | None = None, title: str = "") -> None:
        """Print some of the rows, or all."""
        if title:
            console.print(Text(title, "bold"), soft_wrap=self.width is None)
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
        for place, width in zip(self.shown, self._widths(self.shown), strict=True):
            column = self.columns[place]
            side: Literal["left", "right"] = "right" if column.kind == "number" else "left"
            table.add_column(Text(column.head), justify=side, width=width, no_wrap=not column.folds, overflow="fold")
        for row in self.rows if rows is None else rows:
            table.add_row(*(Text(row.cells[place]) for place in self.shown), style=row.style)
        total = sum(self._widths(self.shown)) + GAP * len(self.shown)
        if self.width is None:
            console.width = max(console.width, total)
        console.print(table, width=total, crop=False)

    def legend(self) -> str:
        """What the shown columns mean, and which are left out."""
        heads: dict[str, list[str]] = {}
        for one in (self.columns[place] for place in self.shown):
            heads.setdefault(one.about, []).append(one.head)
        said = "; ".join(f"{', '.join(named)}: {about}" for about, named in heads.items() if about)
        out = [one.head for place, one in enumerate(self.columns) if place not in self.shown]
        if out:
            left = f"not shown at {self.width} columns, whole in a wider terminal or a file: {', '.join(out)}"
            said = f"{said}. {left[0].upper()}{left[1:]}" if said else left
        return f"{said}." if said else ""

    def _fitting(self) -> list[int]:
        """The columns for which there is room."""
        shown = list(range(len(self.columns)))
        if self.width is None:
            return shown
        for rank in sorted({column.rank for column in self.columns}, reverse=True):
            for place in reversed([place for place in shown if self.columns[place].rank == rank]):
                least = sum(self._natural(one) if rank >= DETAIL else self._least(one) for one in shown)
                if least + GAP * (len(shown) - 1) <= self.width or rank == 0:
                    return shown
                shown.remove(place)
        return shown

    def _widths(self, shown: Sequence[int]) -> list[int]:
        """Of the shown columns: as wide as their cells; where that is too much, texts are narrowed, the last first."""
        widths = [self._natural(place) for place in shown]
        over = sum(widths) + GAP * (len(widths) - 1) - (self.width or PIPED)
        for narrowest in (NARROWEST, LAST_RESORT):
            for at in reversed(range(len(widths))):
                kind = self.columns[shown[at]].kind
                if over > 0 and (kind == "prose" or (kind == "text" and self.width is not None)):
                    less = min(over, max(widths[at] - narrowest, 0))
                    widths[at] -= less
                    over -= less
        return widths

    def _cells(self, place: int) -> list[str]:
        return [self.columns[place].head, *(row.cells[place] for row in self.rows)]

    def _natural(self, place: int) -> int:
        return max(map(cell_len, self._cells(place)))

    def _least(self, place: int) -> int:
        """Numbers and words as they are, texts as narrow as is well to read."""
        if not self.columns[place].folds:
            return self._natural(place)
        return min(self._natural(place), NARROWEST)


def print_table(console: Console, columns: Sequence[Column], rows: Sequence[Row], title: str = "") -> None:
    """A table alone, with its legend below where there is one."""
    sheet = Sheet.of(console, columns, rows)
    sheet.show(console, title=title)
    if said := sheet.legend():
        say(console, said)


def say(console: Console, text: str, head: str = "", style: str = "bold") -> None:
    """Prose: broken at words in a terminal, in one line elsewhere; what stands in backquotes is never broken, so that a
    command can be pasted.

    Args:
        head: printed before it, in a style of its own.
    """
    lines = [f"{head} {text}" if head else text]
    if console.is_terminal:
        lines = [line for part in lines[0].split("\n") for line in _lines(part, console.width)]
    for place, line in enumerate(lines):
        shown = Text(line)
        if head and place == 0:
            shown.stylize(style, 0, len(head))
        console.print(shown, highlight=False, soft_wrap=True)


def _lines(text: str, width: int) -> list[str]:
    """Of this width, as far as words and commands allow; of an indented text later lines are indented further."""
    lines, indent = [""], 2 * text[: len(text) - len(text.lstrip())]
    for space, word in PIECE.findall(text):
        longer = lines[-1] + space + word
        if lines[-1] and cell_len(longer) > width:
            lines.append(indent + word)
        else:
            lines[-1] = longer
    return lines
