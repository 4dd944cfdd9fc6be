"""`carpool top`: what sharing does in a running server, as it happens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from carpool.cli.app import command
from carpool.cli.common import require_number
from carpool.cli.scrape import Scrape, metrics_url, scrape
from carpool.errors import CarpoolError

BAR = 24  # characters
Show = Callable[[float], str]


def _number(value: float) -> str:
    return f"{value:,.1f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


RATIOS: tuple[tuple[str, str, str, str, Show], ...] = (  # key, label, over, under
    ("experts_natively", "experts a layer and step, natively", "experts_natural", "layer_steps", _number),
    ("experts_read", "experts a layer and step, read", "experts_read", "layer_steps", _number),
    ("experts_share", "experts read, of natively", "experts_read", "experts_natural", _share),
    ("bytes_share", "bytes read, of natively", "read_bytes", "natural_bytes", _share),
    ("surrogates_read", "surrogates a layer and step", "surrogates_read", "layer_steps", _number),
    ("rows_changed", "rows changed", "rows_changed", "rows", _share),
    ("rows_exempt", "rows exempt", "rows_exempt", "rows", _share),
    ("displaced_mass", "displaced mass of a row", "displaced_mass", "rows", _share),
    ("expected_loss", "expected loss of a row", "expected_loss", "rows", _share),
    ("floor_overflow", "experts for the floor alone, a layer and step", "floor_overflow", "layer_steps", _number),
)
TOTALS = (  # key and name of the metric, label
    ("rows_nonfinite", "rows with NaN or infinite logits"),
    ("layer_steps", "layer steps in which a policy ran"),
    ("steps", "steps with a request"),
    ("steps_alone", "of these, every row was alone"),
    ("steps_exempt", "of these, prompts or opted out"),
    ("refusals", "changes refused"),
)


@command("top")
def top(
    url: Annotated[str, typer.Argument(help="A running server, such as localhost:8000 or http://host:8000.")],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end, for scripts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and print JSON.")] = False,
) -> None:
    """Watch what sharing does in a running server: experts read, rows changed, mass displaced, changes refused."""
    require_number("--interval", interval, 0.1, 3600)
    page = metrics_url(url)
    first = scrape(page)
    console = Console()
    if as_json:
        typer.echo(json.dumps(summary(first)))
    elif once:
        console.print(view(page, first))
    else:
        _watch(page, first, interval, console)


def _watch(page: str, first: Scrape, interval: float, console: Console) -> None:
    before = first
    with Live(view(page, first), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                try:
                    now = scrape(page)
                except CarpoolError as error:  # a server that restarts is waited for
                    live.update(Group(view(page, before), Text(str(error), style="bold")), refresh=True)
                    continue
                live.update(view(page, now, now.since(before)), refresh=True)
                before = now
        except KeyboardInterrupt:
            return


def summary(found: Scrape) -> dict[str, float | bool | None]:
    """What follows from the totals since the server started: shares in [0, 1], means, counts; None: nothing ran."""
    ratios = {key: found.ratio(over, under) for key, _, over, under, _ in RATIOS}
    return {"enabled": _enabled(found), **ratios, **{key: found.total(key) for key, _ in TOTALS}}


def view(page: str, found: Scrape, change: Scrape | None = None) -> RenderableType:
    """The table, in which a line that the server does not know is left out.

    Args:
        page: where it is from. found: since the server started. change: since the last look.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("since start", justify="right", no_wrap=True)
    for _, label, over, under, show in RATIOS:
        if found.total(over) is not None:
            now = None if change is None else change.ratio(over, under)
            table.add_row(label, _shown(now, show), _shown(found.ratio(over, under), show))
    for name, label in TOTALS:
        if (total := found.total(name)) is not None:
            now = None if change is None else change.total(name)
            table.add_row(label, _shown(now, _count), _count(total))
    return Group(_head(page, found, change), _bar(change or found), Text(), table)


def _head(page: str, found: Scrape, change: Scrape | None) -> Text:
    state, style = ("sharing", "bold") if _enabled(found) else ("switched off", "bold reverse")
    head = Text.assemble((state, style), f"  {page}")
    if "requests" in found.values:
        head.append(f"  {found.values['requests']:.0f} requests running")
    if change is not None and "tokens" in change.values and change.at > 0:
        head.append(f", {change.values['tokens'] / change.at:,.1f} tokens/s")
    if not found.total("layer_steps"):
        head.append(f"\nno policy has run yet: {_idle(found)}", style="italic")
    elif change is not None and not change.total("layer_steps"):
        head.append("\nno policy ran since the last look", style="dim")
    return head


def _idle(found: Scrape) -> str:
    """Why nothing is shared, as far as the server says."""
    steps, alone = found.total("steps"), found.total("steps_alone")
    if not steps or alone is None:
        return "lone requests and prompts keep their native routing"
    return f"of {steps:,.0f} steps {alone:,.0f} had every row alone, the others prompts or requests that opted out"


def _bar(found: Scrape) -> Text:
    """Experts read, of those that native routing would have read."""
    share = found.ratio("experts_read", "experts_natural")
    if share is None:
        return Text()
    filled = round(BAR * min(share, 1.0))
    return Text.assemble(("█" * filled, "bold"), ("░" * (BAR - filled), "dim"), f" {share:.0%} of the experts")


def _enabled(found: Scrape) -> bool:
    return found.values.get("carpool_enabled", 0.0) > 0


def _shown(value: float | None, show: Show) -> str:
    return "–" if value is None else show(value)
