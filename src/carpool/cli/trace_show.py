"""`carpool trace show`: what a trace says of load, drift, consistency and caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.options import ShowJson
from carpool.cli.table import Column, Row, print_table, say
from carpool.cli.trace import traces

if TYPE_CHECKING:
    from carpool.offloading.consistency import Measured
    from carpool.offloading.summary import Summary


@command("trace show", group=traces)
def show(
    file: Annotated[Path, typer.Argument(help="Trace of `carpool trace`.")],
    phase: Annotated[str, typer.Option(help="Rows to look at: decode, prefill, or all.")] = "all",
    picture: Annotated[Path | None, typer.Option(help="HTML file to write a picture to.")] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals' draws.")] = 0,
    as_json: ShowJson = False,
) -> None:
    """Show how unevenly experts are used, how that drifts, how local it is, and what caches of experts would hit."""
    from carpool.artefacts.files import require_writable, write_text
    from carpool.artefacts.trace import PHASES, Trace
    from carpool.errors import CarpoolError
    from carpool.offloading.recorded import requests_of
    from carpool.offloading.summary import summarise

    if phase not in (*PHASES, "all"):
        raise CarpoolError(f"--phase {phase}: give {', '.join(PHASES)} or all")
    if picture is not None:
        require_writable(picture)
    trace = Trace.load(file)
    found = summarise(requests_of(trace, None if phase == "all" else phase), seed=seed)
    title = f"{trace.facts.architecture or file.name}: {found.tokens:,} tokens of {found.requests} requests"
    if picture is not None:
        from carpool.report.trace import trace_page

        write_text(picture, trace_page(found, title, trace.top_k))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    _print(Console(), found, title, trace.num_experts, trace.top_k)
    if picture is not None:
        Console().print(f"wrote {picture}", highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, found: Summary, title: str, num_experts: int, top_k: int) -> None:
    console.print(f"[bold]{title}[/], {num_experts} experts, {top_k} a token\n", highlight=False)
    print_table(console, *_layers(found))
    say(console, f"drift by chance: {found.chance:.3f}\n")
    console.print("[bold]Local routing consistency[/], % (95 % over requests)")
    columns = [Column("window"), Column("SRP"), Column("", kind="word"), Column("on for", rank=1)]
    rows = [Row([f"{m} tokens", *_percent(one), f"{one.size:.2f}"]) for m, one in found.srp.items()]
    print_table(console, columns, rows)
    columns = [Column("segment cache"), Column("SCH"), Column("", kind="word")]
    print_table(console, columns, [Row([f"{size:g} x {top_k}", *_percent(one)]) for size, one in found.sch.items()])
    if found.curves:
        console.print("[bold]Hit rates[/], %, by experts of a layer that memory holds")
        print_table(console, *_caches(found, num_experts, top_k))


def _percent(one: Measured) -> tuple[str, str]:
    return f"{100 * one.value:.1f}", f"{100 * one.low:.1f} to {100 * one.high:.1f}"


def _layers(found: Summary) -> tuple[list[Column], list[Row]]:
    window = list(found.srp)[min(1, len(found.srp) - 1)] if found.srp else None
    E = found.load_LE.shape[1]
    columns = [
        Column("layer"), Column("busiest", "uses of the busiest expert over the mean's"),
        Column("unused", "experts that no token chose", rank=1), Column("drift", "between halves of the requests"),
        *([Column(f"SRP {window}", "of the layer alone, %")] if window is not None else []),
    ]  # fmt: skip
    rows = []
    for layer, load_E in enumerate(found.load_LE):
        row = [
            str(layer),
            f"{float(load_E.max()) * E:.1f}",
            str(int((load_E == 0).sum())),
            f"{found.drift_L[layer]:.3f}",
        ]
        rows.append(Row(row + ([] if window is None else [f"{100 * found.srp[window].layers[layer]:.1f}"])))
    return columns, rows


def _caches(found: Summary, num_experts: int, top_k: int) -> tuple[list[Column], list[Row]]:
    sizes = sorted({size for size in (top_k, 2 * top_k, num_experts // 4, num_experts // 2) if size <= num_experts})
    columns = [Column("batch"), Column("union", "distinct experts of a step", rank=1), Column("rule", kind="word")]
    columns += [Column(str(size)) for size in sizes]
    rows = [
        Row(
            [str(batch), f"{found.unions[batch]:.1f}", rule, *(f"{100 * float(rates[size - 1]):.1f}" for size in sizes)]
        )
        for (rule, batch), rates in found.curves.items()
    ]
    return columns, rows
