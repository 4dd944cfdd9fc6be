"""`carpool sample-text`: calibration text in the model's own words that reaches its experts evenly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.calibrate import require_windows
from carpool.cli.common import calibration_texts, open_model, progress, require_model, require_number
from carpool.cli.options import Model, Seed, Texts
from carpool.cli.table import Column, Row, print_table, say


@dataclass(frozen=True)
class Options:
    """What `carpool sample-text` takes."""

    model: Model = None
    text: Texts = None
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, JSON lines.")] = Path("own.jsonl")
    tokens: Annotated[int, typer.Option(help="Tokens to sample.")] = 60_000
    sequence: Annotated[int, typer.Option(help="Tokens of each text.")] = 128
    beams: Annotated[int, typer.Option(help="Beams of the search.")] = 4
    temperature: Annotated[float, typer.Option(help="The smaller, the more evenness counts beside likelihood.")] = 1.2
    seed: Seed = 0


@command("sample-text")
def sample_text(options: Options) -> None:
    """Let the model write text that uses its experts evenly, for calibration (EBSS of MoEQuant).

    Shows how evenly the experts are reached by --text (default: the embedded texts) and by what is written.
    """
    require_model(options.model)
    from carpool.artefacts.files import require_writable, write_text
    from carpool.calibrate import token_sequences
    from carpool.calibrate.self_sampling import balanced_samples, imbalance, used
    from carpool.hosts.transformers import find_layers

    console = Console()
    require_windows(options.tokens, options.sequence, options.seed)
    require_number("--beams", options.beams, 1, 64)
    require_number("--temperature", options.temperature, 1e-6)
    require_writable(options.output, ".jsonl")
    documents, _ = calibration_texts(console, options.text)
    opened = open_model(options.model)
    tokenizer = opened.tokenizer
    windows = token_sequences(documents, tokenizer, options.tokens, options.sequence, options.seed)
    model = opened.weights()
    layers = find_layers(model)
    sequences = -(-options.tokens // options.sequence)
    with progress("sampling", sequences * options.sequence, "tokens") as advance:
        ids_ST = balanced_samples(
            model, layers, sequences, options.sequence, width=options.beams, temperature=options.temperature,
            begin=tokenizer("")["input_ids"], seed=options.seed, progress=advance,
        )  # fmt: skip
    lines = [json.dumps({"text": tokenizer.decode(ids)}, ensure_ascii=False) for ids in ids_ST.tolist()]
    write_text(options.output, "\n".join(lines) + "\n")
    counts = [used(model, layers, ids_BT) for ids_BT in (windows.ids_BT[:sequences], ids_ST)]
    columns = [Column("layer", kind="word"), Column("fewest tokens, given text"), Column("fewest tokens, own text"),
               Column("imbalance, given text"), Column("imbalance, own text")]  # fmt: skip
    rows = [
        Row([
            str(layer.index),
            *(f"{int(count_LE[place].min())}" for count_LE in counts),
            *(f"{float(imbalance(count_LE[place].view(1, 1, -1))):.4f}" for count_LE in counts),
        ])
        for place, layer in enumerate(layers)
    ]  # fmt: skip
    print_table(console, columns, rows, "experts reached: fewest tokens of one, and the spread of their shares of use")
    say(console, f"wrote {options.output}: calibrate or compress with --text {options.output}")
