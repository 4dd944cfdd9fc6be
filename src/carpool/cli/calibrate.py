"""`carpool calibrate`: how similar are a model's experts on some text?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from carpool.cli.app import command

if TYPE_CHECKING:
    from carpool.stats import Statistics

FEW_TOKENS = 32  # an expert's row of `routed` from fewer tokens is mostly noise


@command("calibrate")
def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name of a transformers model; default: the reference model.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help=".txt, or .jsonl with a field text; may be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Statistics file to write.")] = Path(
        "stats.safetensors"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens to run; text that ends earlier gives fewer.")] = 20_000,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the choice of text.")] = 0,
    energy: Annotated[
        bool, typer.Option(help="Also measure what `base` needs: output norms and their predictor.")
    ] = False,
) -> None:
    """Measure how well each expert stands in for each other one, and write it beside its provenance."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from carpool.calibrate import calibrate as run
    from carpool.calibrate import token_sequences
    from carpool.files import require_writable, sha256_file
    from carpool.texts import load_texts

    console = Console()
    require_writable(output)
    paths = text or []
    documents = load_texts(paths)
    data = [(path.name, sha256_file(path)) for path in paths]

    from carpool.hosts.transformers import find_layers, load_model

    loaded, tokenizer = load_model(model)
    sequences_BT = token_sequences(documents, tokenizer, tokens, sequence, seed)
    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sequences_BT.numel())
        stats = run(
            loaded,
            find_layers(loaded),
            sequences_BT,
            data=data,
            seed=seed,
            energy=energy,
            progress=lambda done: bar.update(task, completed=done),
        )
    stats.save(output)
    _show(console, stats, output)


def _show(console: Console, stats: Statistics, output: Path) -> None:
    """A line per layer: coverage, and the median (10th to 90th percentile) of every similarity between experts."""
    import torch

    from carpool.stats import SIMILARITIES

    other_EE = ~torch.eye(stats.num_experts, dtype=torch.bool)
    points = torch.tensor([0.5, 0.1, 0.9])
    heads = [name.removeprefix("similarity_") for name in SIMILARITIES]
    table = Table("layer", "fewest tokens", *heads, box=None, header_style="bold")
    few: list[str] = []
    for index, tensors in stats.layers.items():
        coverage_E = tensors["coverage"]
        spread = [tensors[name][other_EE].quantile(points).tolist() for name in SIMILARITIES]
        shown = [f"{median:.2f} ({low:.2f} to {high:.2f})" for median, low, high in spread]
        table.add_row(str(index), str(int(coverage_E.min())), *shown)
        few += [f"{index}:{expert} ({n})" for expert, n in enumerate(coverage_E.tolist()) if n < FEW_TOKENS]
    console.print(f"similarity of two experts, median (10th to 90th percentile), over {stats.tokens:,} tokens:")
    console.print(table)
    if few:
        listed = ", ".join(few[:12]) + (f" and {len(few) - 12} more" if len(few) > 12 else "")
        console.print(
            f"[yellow]warning:[/] these experts (layer:expert) got fewer than {FEW_TOKENS} tokens, so that `routed` "
            f"says little about replacing them: {listed}; give more or more varied text",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)
