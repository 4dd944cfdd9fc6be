"""Tables in a terminal: names and legends at every width; colours that are readable on dark and light grounds."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import carpool
from carpool.cli import block_table, evaluation_table, interference
from carpool.cli.table import PIPED, Column, Row, Sheet, print_table, say

WIDTHS = (60, 80, 110, 200)
NAMES = ("stock", "topk(k=4)", "xshare(budget=24, utility='topk_mass') | floor(0.3)", "mine.json: surrogate(budget=20)")
KINDS = {
    "evaluate": evaluation_table.COLUMNS, "blocks": block_table.COLUMNS, "interference": interference.COLUMNS,
}  # fmt: skip


def rendered(columns: tuple[Column, ...], width: int | None) -> str:
    """A table with its legend, as a terminal of this width shows it; None: as a pipe does."""
    cells = ["0.0296–0.0327" if "95" in one.head else "0.0311" for one in columns[1:]]
    console = Console(file=io.StringIO(), force_terminal=width is not None, width=width or 80, color_system=None)
    file = console.file
    assert isinstance(file, io.StringIO)
    print_table(console, columns, [Row([name, *cells]) for name in NAMES])
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def parts(text: str) -> tuple[list[str], str]:
    """Lines of the table, and the legend in one line."""
    lines = text.splitlines()
    end = next(place for place, line in enumerate(lines) if re.match(r"(coreset|union|of stock|T|KL|between): ", line))
    return lines[:end], " ".join(" ".join(lines[end:]).split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_table_loses_a_policys_name(kind: str, width: int) -> None:
    table, _ = parts(rendered(KINDS[kind], width))
    assert max(map(cell_len, table)) <= width
    first = next(place for place, line in enumerate(table) if line.startswith("stock"))
    wide = min(line.index("0.0311") for line in table if "0.0311" in line)
    names = " ".join(" ".join(line[:wide] for line in table[first:]).split())
    for name in NAMES:
        assert name in names
    assert len(table) <= 1 + 3 * len(NAMES), "a name is broken at words, not letter by letter"


@pytest.mark.parametrize("width", [*WIDTHS, None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_legend_explains_what_is_shown_and_nothing_else(kind: str, width: int | None) -> None:
    columns = KINDS[kind]
    table, legend = parts(rendered(columns, width))
    explained, _, left = legend.partition("Not shown at")
    heads = re.split(r" {2,}", table[0].strip())
    assert heads == [one.head for one in columns if one.head in heads]
    for one in columns[1:]:
        alike = [other.head for other in columns if other.about == one.about and other.head in heads]
        assert (f"{', '.join(alike)}: {one.about}" in explained) == bool(alike)
        assert (one.head in left.rpartition(": ")[2].rstrip(".").split(", ")) == (one.head not in heads)
    assert {"of stock", "KL"} <= set(heads) or kind != "evaluate"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_gets_everything_whole(kind: str) -> None:
    table, legend = parts(rendered(KINDS[kind], None))
    assert "Not shown" not in legend
    for name in NAMES:
        assert sum(line.startswith(name) for line in table) == 1
    assert len(table) == 1 + len(NAMES)


@given(
    names=st.lists(st.text(alphabet="abc(=, )|漢", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=4),
    ranks=st.lists(st.integers(0, 8), max_size=9),
    width=st.integers(30, 220),
)
def test_a_sheet_fits_and_leaves_out_by_rank(names: list[str], ranks: list[int], width: int) -> None:
    columns = [Column("policy", kind="text"), *(Column(f"m{place}", rank=rank) for place, rank in enumerate(ranks))]
    sheet = Sheet(columns, [Row([name, *("1.25" for _ in ranks)]) for name in names], width)
    assert sheet.shown[0] == 0
    left = [columns[place].rank for place in range(len(columns)) if place not in sheet.shown]
    assert all(rank > 0 for rank in left)
    assert all(columns[place].rank <= min(left, default=9) for place in sheet.shown), "what is left out ranks highest"
    rank_0 = [place for place in sheet.shown if columns[place].rank == 0]
    if 12 + 6 * len(rank_0) <= width:
        assert sum(sheet._widths(sheet.shown)) + 2 * (len(sheet.shown) - 1) <= width


def test_an_evaluation_at_eighty_columns() -> None:
    """The trial's own case: rows without names at 80 columns, and a legend of columns that were not there at 110."""
    text = rendered(evaluation_table.COLUMNS, 80)
    assert re.search(r"^stock +0\.0311", text, re.M)
    assert "KL 95 %: interval" not in text


def test_prose_goes_on_in_the_next_line_of_a_pipe_too() -> None:
    console = Console(file=io.StringIO(), width=80)
    columns = [Column("guard", kind="word"), Column("parameters", kind="text"), Column("what", kind="prose")]
    print_table(console, columns, [Row(["floor", "tau, " * 12, "No row loses more than a share of it. " * 8])])
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert PIPED - 12 < max(map(len, lines)) <= PIPED
    assert ("tau, " * 12).strip() in lines[1], "a text alone stays whole"


def test_columns_of_one_meaning_are_explained_once() -> None:
    columns = [Column("layer", kind="word"), *(Column(f"{depth} bits", "energy that is lost") for depth in (2, 3))]
    assert Sheet(columns, [Row(["0", "9 %", "1 %"])], None).legend() == "2 bits, 3 bits: energy that is lost."


@given(st.lists(st.sampled_from(["word", "longer words", "`a command to paste`,", "\n"]), max_size=30))
def test_a_command_is_never_broken(parts: list[str]) -> None:
    said = " ".join(parts)
    console = Console(file=io.StringIO(), force_terminal=True, width=24, color_system=None)
    say(console, said, "note:")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 24
    assert " ".join(" ".join(lines).split()) == " ".join(f"note: {said}".split())
    assert sum(line.count("`a command to paste`") for line in lines) == parts.count("`a command to paste`,")


def test_styles_are_readable_on_dark_and_light_grounds() -> None:
    """Only attributes, and red: yellow and cyan vanish on white, blue on black."""
    colour = re.compile(r"[\"\[ ](yellow|cyan|green|blue|magenta|white|black)[\"\] ]")
    for file in (Path(carpool.__file__).parent / "cli").glob("*.py"):
        assert not colour.search(file.read_text()), file.name
