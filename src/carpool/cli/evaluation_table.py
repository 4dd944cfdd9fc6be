"""Results of an evaluation in the terminal: a table for every batch size, and what its columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from carpool.cli.common import warn_of_few
from carpool.cli.table import DETAIL, Column, Row, Sheet, say

if TYPE_CHECKING:
    from carpool.evaluate.intervals import Estimate
    from carpool.evaluate.metrics import Result
    from carpool.plans.policy_file import AnyPlan

POLICY = Column("policy", kind="text")
LOSS = Column(
    "expected loss", "as displaced, with what is left to surrogates at what calibration expects to be lost", rank=3
)
COLUMNS = (
    POLICY,
    Column("coreset", "experts that a group may use", rank=DETAIL + 1),
    Column("union", "distinct experts read in a layer and step", rank=1),
    Column("of stock", "bytes read over stock's, surrogates included"),
    Column("pairs", "experts computed for a token in a layer", rank=DETAIL),
    Column("displaced", "share of a token's native weight whose experts are not computed for it", rank=3),
    LOSS,
    Column("KL", "stock against policy, nats a decoded token"),
    Column("KL 95 %", "interval over batches that share no document", rank=DETAIL + 2),
    Column("top-1", "tokens whose likeliest next token stays", rank=2),
    Column("perplexity", "of the text", rank=DETAIL + 1),
    Column("ratio", "perplexity over stock's", rank=4),
    Column("ratio 95 %", "its interval", rank=DETAIL + 3),
)

Cells = dict[str, str]
"""By column, after the policy's name; a column without a cell is left out of the table."""


def show_results(console: Console, by_batch: Sequence[Sequence[Result]]) -> None:
    """A table for every batch size, warnings where there are few batches, and the legend."""
    foreseen = any(result.surrogates for found in by_batch for result in found)
    tables = []
    for found in by_batch:
        first = found[0].measured
        title = f"batch {first.layout.batch_size}, grouped by {first.layout.grouping}, {of_batches(first.batches)}"
        lines = [(one.measured.name, one.measured.plan, _cells(one, foreseen)) for one in found]
        tables.append((title, lines, first.layout.batch_size, first.batches))
    compare(console, COLUMNS, tables)


def compare(
    console: Console,
    columns: Sequence[Column],
    tables: Sequence[tuple[str, Sequence[tuple[str, AnyPlan | None, Cells]], int, int]],
) -> None:
    """Tables of one kind: (title, lines (name, plan or None for stock, cells), batch size, batches) each. A line a
    policy, controls dim."""
    from carpool.policies.controls import CONTROLS

    used = [one for one in columns if one is POLICY or one.head in tables[0][1][0][2]]
    rows: list[list[Row]] = []
    for _, lines, _, _ in tables:
        rows.append([])
        for name, plan, cells in lines:
            style = "dim" if plan is not None and plan.policy.name in CONTROLS else ""
            rows[-1].append(Row([name, *(cells[one.head] for one in used[1:])], style))
    sheet = Sheet.of(console, used, [row for own in rows for row in own])
    for (title, _, batch_size, batches), own in zip(tables, rows, strict=True):
        sheet.show(console, own, title)
        warn_of_few(console, batch_size, batches)
        console.print()
    say(console, sheet.legend())


def of_batches(count: int) -> str:
    """How many batches there are, and whether they are too few for intervals."""
    from carpool.evaluate.intervals import FEWEST

    return f"{count} batch{'es' * (count > 1)}" + (f" (intervals take {FEWEST})" if count < FEWEST else "")


def interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return "–"
    return f"{estimate.low:.4f}–{estimate.high:.4f}"


def _cells(result: Result, foreseen: bool) -> Cells:
    loss = f"{result.expected_loss.value:.1%}" if result.surrogates else "–"
    return {
        "coreset": "–" if result.coreset is None else f"{result.coreset:.1f}",
        "union": f"{result.union.value:.1f}",
        "of stock": f"{result.bytes_share.value:.0%}",
        "pairs": f"{result.pairs:.2f}",
        "displaced": f"{result.displaced_mass.value:.1%}",
        **({"expected loss": loss} if foreseen else {}),
        "KL": f"{result.kl.value:.4f}",
        "KL 95 %": interval(result.kl),
        "top-1": f"{result.top1_agreement.value:.1%}",
        "perplexity": f"{result.perplexity.value:.2f}",
        "ratio": f"{result.perplexity_ratio.value:.4f}",
        "ratio 95 %": interval(result.perplexity_ratio),
    }
