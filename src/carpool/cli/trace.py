"""`carpool trace`: who chose whom, step by step, in a file; and what other commands of traces register with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from carpool.cli.app import app, command
from carpool.cli.common import calibration_texts, open_model, progress, require_model, require_number
from carpool.cli.options import PREFILL, SEQUENCE, Model, Prefill, Seed, SequenceLength, Texts
from carpool.cli.table import say

RECORD = "record"


class RecordUnlessNamed(TyperGroup):
    """`carpool trace MODEL ...` is `carpool trace record MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [RECORD, *args]
        return super().parse_args(ctx, args)


traces = typer.Typer(cls=RecordUnlessNamed, help="Record which experts every token chooses (`record` may be left out).")
app.add_typer(traces, name="trace")


@dataclass(frozen=True)
class Options:
    """What `carpool trace record` takes."""

    model: Model = None
    text: Texts = None
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace to write.")] = Path("trace.safetensors")
    tokens: Annotated[int, typer.Option(help="Tokens to record; text that ends earlier gives fewer.")] = 32_768
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 16
    sequence: SequenceLength = SEQUENCE
    prefill: Prefill = PREFILL
    seed: Seed = 0


@command(f"trace {RECORD}", group=traces)
def record(options: Options) -> None:
    """Record which experts every token of some text chooses, and with which weights.

    Sequences decode in batches: the prompts of a batch are one step, then every position is one. The text itself is not
    in the file.
    """
    require_model(options.model)
    from carpool.artefacts.files import require_writable
    from carpool.evaluate.sequences import Cut
    from carpool.evaluate.tracing import record as run

    console = Console()
    for name, least in (("tokens", 1), ("batch", 1), ("prefill", 1), ("sequence", options.prefill + 1), ("seed", 0)):
        require_number(f"--{name}", getattr(options, name), least, 2**31 - 1)
    require_writable(options.output, ".safetensors")
    documents, data = calibration_texts(console, options.text)
    opened = open_model(options.model)
    cut = Cut.of(documents, opened.tokenizer, length=options.sequence, seed=options.seed)
    held = sum(len(windows) for domain in cut.windows.values() for windows in domain) // options.batch
    batches = max(1, min(held, round(options.tokens / (options.batch * options.sequence))))
    sequences = cut.draw(1, batches * options.batch, seed=options.seed, fewer="lower --batch or --sequence")
    with progress("recording", batches * options.batch * options.sequence, "tokens") as advance:
        rows = run(
            opened.weights(), sequences, options.output, batch_size=options.batch, prefill=options.prefill,
            data=tuple(data), seed=options.seed, progress=advance,
        )  # fmt: skip
    say(
        console,
        f"wrote {options.output}: {rows:,} tokens of {len(sequences.ids_ST)} sequences in {batches} batches of "
        f"{options.batch}",
    )
