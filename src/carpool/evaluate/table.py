"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from carpool.evaluate.intervals import FEWEST, Estimate
from carpool.evaluate.metrics import Result
from carpool.plans.policy_file import AnyPlan

CONTROLS = ("topk", "random")
WIDE = 118  # columns of the terminal from which intervals are shown
NOTE = (
    "union: distinct experts read in a layer and step; of stock: bytes read over stock's, surrogates included; "
    "pairs: experts computed for a token in a layer; "
    "displaced: share of a token's native weight whose experts are not computed for it; expected loss: the same, with "
    "what is left to surrogates at what calibration expects to be lost; KL: stock against policy, nats a decoded "
    "token; top-1: tokens whose likeliest next token stays; 95 %: interval over batches that share no document."
)


def wide_console() -> Console:
    """Standard output; wide enough for a whole table where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def table(results: Sequence[Result], console: Console) -> Table:
    """Rows of one batch size; controls are dim; intervals only where the console is wide enough."""
    layout = results[0].measured.layout
    wide = console.width >= WIDE
    foreseen = any(result.surrogates for result in results)
    title = f"batch {layout.batch_size}, grouped by {layout.grouping}, {of_batches(results[0].measured.batches)}"
    return comparison(title, [(one.measured.name, one.measured.plan, _cells(one, wide, foreseen)) for one in results])


def of_batches(count: int) -> str:
    """How many batches there are, and whether they are too few for intervals."""
    return f"{count} batch{'es' * (count > 1)}" + (f" (intervals take {FEWEST})" if count < FEWEST else "")


def comparison(title: str, rows: Sequence[tuple[str, AnyPlan | None, dict[str, str]]]) -> Table:
    """A line a policy (name, plan or None for stock, cells by heading), families apart, controls dim."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    made.title, made.title_justify, made.title_style = title, "left", "bold"
    made.add_column("policy", overflow="fold")
    for heading in rows[0][2]:
        made.add_column("95 %" if "95 %" in heading else heading, justify="right", no_wrap=True)
    family = None
    for name, plan, cells in rows:
        if plan is not None and plan.policy.name != family:
            family = plan.policy.name
            made.add_section()
        control = plan is not None and plan.policy.name in CONTROLS
        made.add_row(Text(name), *map(Text, cells.values()), style="dim" if control else "")
    return made


def _cells(result: Result, wide: bool, foreseen: bool) -> dict[str, str]:
    """Cells after the policy's name, by heading."""
    loss = f"{result.expected_loss.value:.1%}" if result.surrogates else "–"
    cells = {
        "coreset": "–" if result.coreset is None else f"{result.coreset:.1f}",
        "union": f"{result.union.value:.1f}",
        "of stock": f"{result.bytes_share.value:.0%}",
        "pairs": f"{result.pairs:.2f}",
        "displaced": f"{result.displaced_mass.value:.1%}",
        **({"expected loss": loss} if foreseen else {}),
        "KL": f"{result.kl.value:.4f}",
        "KL 95 %": _interval(result.kl),
        "top-1": f"{result.top1_agreement.value:.1%}",
        "perplexity": f"{result.perplexity.value:.2f}",
        "ratio": f"{result.perplexity_ratio.value:.4f}",
        "ratio 95 %": _interval(result.perplexity_ratio),
    }
    return cells if wide else {name: cell for name, cell in cells.items() if "95 %" not in name}


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return "–"
    return f"{estimate.low:.4f}–{estimate.high:.4f}"
