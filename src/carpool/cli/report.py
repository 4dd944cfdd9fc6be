"""`carpool report`: results of evaluations as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carpool.cli.app import command
from carpool.errors import CarpoolError


@command("report")
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="JSON files of `carpool evaluate --json` or `carpool demo`; --interference too."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    like: Annotated[
        str | None, typer.Option(help="Model or configuration whose expert size the bandwidth section begins with.")
    ] = None,
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth the section begins with, GB/s.")] = 1000.0,
    placement: Annotated[
        Path | None, typer.Option(help="Placement of `carpool place`: devices by experts, with --trace.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace of the placement's model.")] = None,
) -> None:
    """Show results as one HTML file that needs no network: frontier, layers, domains, worst tokens, comparison."""
    from rich.console import Console

    from carpool.artefacts.files import require_writable, write_text
    from carpool.report.load import load
    from carpool.report.page import page

    if not 0 < bandwidth < float("inf"):
        raise CarpoolError(f"--bandwidth {bandwidth}: give GB/s above 0")
    if (placement is None) != (trace is None):
        raise CarpoolError("--placement and --trace go together: a placement is shown with what a trace asks of it")
    require_writable(output)
    evaluations, interferences = load(results)
    diagnosis = None
    if like is not None:
        from carpool.doctor import diagnose

        diagnosis = diagnose(like)
    extra = [] if placement is None or trace is None else [_placement(placement, trace)]
    write_text(output, page(evaluations, interferences, like=diagnosis, bandwidth=bandwidth, extra=extra))
    Console().print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)


def _placement(placement: Path, trace: Path) -> str:
    from carpool.artefacts.trace import Trace
    from carpool.placement.placement_file import PlacementFile
    from carpool.report.experts_placed import placement_section

    return placement_section(PlacementFile.load(placement), Trace.load(trace))
