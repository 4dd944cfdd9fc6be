"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from carpool.evaluate.bootstrap import Estimate
from carpool.evaluate.metrics import Result

CONTROLS = ("topk", "random")


def is_control(result: Result) -> bool:
    """Whether the plan is one that every method has to beat."""
    return result.measured.plan is not None and result.measured.plan.policy.name in CONTROLS


def table(results: Sequence[Result]) -> Table:
    """Rows of one batch size; controls are dim, brackets hold the 95 % interval."""
    layout = results[0].measured.layout
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    made.title = f"batch {layout.rows}, grouped by {layout.grouping}, {results[0].measured.batches} batches"
    made.title_justify, made.title_style = "left", "bold"
    made.add_column("policy", no_wrap=True)
    for name in ("coreset", "union", "of stock", "pairs", "displaced", "KL nats/token", "top-1", "perplexity ratio"):
        made.add_column(name, justify="right", no_wrap=True)
    previous = None
    for result in results:
        plan = result.measured.plan
        family = None if plan is None else plan.policy.name
        if previous is not None and family != previous[0]:
            made.add_section()
        previous = (family,)
        made.add_row(*_cells(result), style="dim" if is_control(result) else "")
    return made


def _cells(result: Result) -> list[Text]:
    stock = result.measured.plan is None
    cells = [
        result.measured.name,
        "–" if result.coreset is None else f"{result.coreset:.1f}",
        f"{result.union.value:.1f}",
        f"{result.union_share.value:.0%}",
        f"{result.pairs:.2f}",
        f"{result.displaced_mass.value:.1%}",
        "0" if stock else with_interval(result.kl, ".4f"),
        "100 %" if stock else f"{100 * result.top1_agreement.value:.1f} %",
        f"1 ({result.perplexity.value:.2f})" if stock else with_interval(result.perplexity_ratio, ".4f"),
    ]
    return [Text(cell) for cell in cells]


def with_interval(estimate: Estimate, form: str) -> str:
    """`value [low, high]`, or the value alone."""
    shown = format(estimate.value, form)
    if estimate.low is None or estimate.high is None:
        return shown
    return f"{shown} [{estimate.low:{form}}, {estimate.high:{form}}]"
