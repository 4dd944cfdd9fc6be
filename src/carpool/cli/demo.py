"""`carpool demo`: what published methods save and cost on a trained MoE, in one command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.common import (
    embedded_texts,
    may_be_shipped,
    model_facts,
    open_model,
    progress,
    require_number,
    statistics_of,
)
from carpool.cli.evaluation_table import show_results
from carpool.cli.table import say

JSON, PICTURE = "carpool-demo.json", "carpool-demo.png"


@command("demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(),
    batches: Annotated[
        int | None,
        typer.Option(help="Batches to decode; default: 12. Fewer than ten allow no verdict."),
    ] = None,
) -> None:
    """Compare stock and every method on the reference model: a table, a picture, and what they mean."""
    from carpool.artefacts.files import require_writable
    from carpool.artefacts.texts import load_texts
    from carpool.evaluate.findings import findings, over_controls
    from carpool.evaluate.plot import plot
    from carpool.evaluate.results import text_facts, write
    from carpool.evaluate.series import Curve, load_demo
    from carpool.evaluate.study import Settings, require_possible, sequences_for, study
    from carpool.routing.batch import Grouping

    console = Console()
    require_number("--batches", batches, 1)
    json_path, picture_path = (require_writable(output / name) for name in (JSON, PICTURE))
    paths = embedded_texts()
    documents = load_texts(paths)
    opened = open_model(None)
    tokenizer, shipped = opened.tokenizer, may_be_shipped(opened)
    numbers, series = load_demo()
    without = [one for one in series if shipped is None and any(plan.required_stats() for plan in one.plans)]
    series = [one for one in series if one not in without]
    settings = Settings(
        plans=tuple(plan for one in series for plan in one.plans),
        grouping=Grouping.parse(numbers["group"]),
        batch_sizes=(numbers["batch"],),
        sequence=numbers["sequence"], prefill=numbers["prefill"],
        batches=numbers["batches"] if batches is None else batches, seed=numbers["seed"],
    )  # fmt: skip
    sequences = sequences_for(settings, documents, tokenizer, fewer="lower --batches")
    model = opened.weights()
    statistics = statistics_of(model, None)
    require_possible(model, settings, statistics)
    with progress("decoding in lockstep", settings.num_rows(sequences)) as advance:
        (results,) = study(model, settings, sequences, stats=statistics, advance=advance)
    curves = [Curve.of(one, results) for one in series]
    said = findings(curves)

    show_results(console, [results])
    for one in without:
        console.print(f"{one.label} is left out: the installed reference model has no statistics.", markup=False)
    console.print()
    for sentence in said:
        say(console, sentence)
    console.print()
    decoded = int(results[0].measured.tokens_M.sum())
    plot(
        curves,
        picture_path,
        f"Carpool's reference model (4 layers, 64 experts, 8 a token), batch {numbers['batch']}, {decoded:,} decoded "
        f"tokens of {', '.join(sequences[0].domains)}",
    )
    write(
        json_path, results, decode=tokenizer.decode,
        model=model_facts(model, None), texts=text_facts(paths), seed=settings.seed,
        arguments={**numbers, "batches": settings.batches}, findings=said,
        over_controls=[asdict(one) for one in over_controls(curves)],
        series=[{"label": s.label, "control": s.control, "policies": list(map(str, s.plans))} for s in series],
    )  # fmt: skip
    console.print(f"wrote {picture_path} and {json_path}", highlight=False, markup=False, soft_wrap=True)
