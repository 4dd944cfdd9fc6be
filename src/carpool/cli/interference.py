"""`carpool evaluate --interference`: what its neighbours in the batch do to a sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from carpool.artefacts.files import write_text
from carpool.cli.common import progress
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from pathlib import Path

    from carpool.cli.evaluate_options import Options, Prepared
    from carpool.evaluate.interference import Interference
    from carpool.evaluate.study import Settings

NOTE = (
    "every sequence decodes beside several sets of neighbours. KL: stock against policy, nats a token; between: "
    "one set of neighbours against the next; flipped: tokens whose likeliest next token is not stock's; unstable: "
    "whose likeliest next token depends on the neighbours; displaced: largest share of a row's native weight that is "
    "not computed. Stock's row shows the rounding of the kernels."
)


def for_interference(settings: Settings, co_batches: int) -> Settings:
    """The settings with so many batches that about `tokens` tokens are decoded under every policy.

    Raises:
        CarpoolError: more than one batch size, a batch of one, or fewer than two sets of neighbours.
    """
    if co_batches < 2:
        raise CarpoolError(f"--co-batches {co_batches}: give 2 or more")
    if len(settings.batch_sizes) > 1 or settings.batch_sizes[0] < 2:
        raise CarpoolError("--interference takes one batch size of 2 or more, such as --batch 16")
    from carpool.evaluate.study import TOKENS

    (layout,) = settings.layouts()
    wanted = settings.batches or round((settings.tokens or TOKENS) / (layout.batch_size * layout.decoded * co_batches))
    return replace(settings, batches=max(2, wanted))


def report_interference(console: Console, ready: Prepared, settings: Settings, options: Options, **facts: Any) -> None:
    """Measure, print the table, write the JSON; `facts` go beside the results."""
    from carpool.evaluate.interference import interference
    from carpool.evaluate.study import describe

    (layout,) = settings.layouts()
    (sequences,) = ready.sequences
    rows = len(sequences.ids_ST) * layout.positions * (1 + options.co_batches * (1 + len(settings.plans)))
    with progress("evaluating", rows) as advance:
        found = interference(
            ready.model, describe(ready.model), settings.plans, sequences, layout, options.co_batches,
            seed=settings.seed, stats=ready.statistics, advance=advance,
        )  # fmt: skip
    console.print(table(found))
    console.print()
    console.print(NOTE, highlight=False, markup=False)
    if options.json_path is not None:
        write(options.json_path, found, ready.tokenizer.decode, co_batches=options.co_batches, **facts)
        console.print(f"wrote {options.json_path}", highlight=False, markup=False, soft_wrap=True)


def table(found: Many[Interference]) -> Table:
    """A row a policy."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    first = found[0]
    made.title = (
        f"batch {first.layout.batch_size}, {first.sequences} sequences beside {first.deals} sets of neighbours each"
    )
    made.title_justify, made.title_style = "left", "bold"
    made.add_column("policy", overflow="fold")
    heads = ("KL mean", "p99", "worst", "between mean", "p99", "worst", "flipped", "unstable", "displaced")
    for name in heads:
        made.add_column(name, justify="right", no_wrap=True)
    for one in found:
        spreads = [f"{value:.2g}" for s in (one.loss, one.between)
                   for value in (s.mean, s.quantiles_Q[2], s.quantiles_Q[-1])]  # fmt: skip
        shares = [f"{value:.1%}" for value in (one.flipped, one.unstable, one.displaced)]
        made.add_row(Text(one.name), *map(Text, (*spreads, *shares)))
    return made


def write(path: Path, found: Many[Interference], decode: Callable[[list[int]], str], **facts: Any) -> None:
    """Write the results in one piece; `facts` go beside them."""
    from carpool.evaluate.interference import EDGES, as_dict
    from carpool.evaluate.results import SCHEMA, provenance

    content = {
        "schema": SCHEMA,
        "kind": "carpool interference",
        **provenance(),
        **facts,
        "histogram_edges": list(EDGES),
    }
    content["results"] = [as_dict(one, decode) for one in found]
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
