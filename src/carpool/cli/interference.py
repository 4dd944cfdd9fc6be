"""`carpool evaluate --interference`: what its neighbours in the batch do to a sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from carpool.artefacts.files import write_text
from carpool.cli.common import progress
from carpool.cli.evaluation_table import POLICY
from carpool.cli.table import DETAIL, Column, Row, Sheet, say
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from pathlib import Path

    from carpool.cli.evaluate_options import Options, Prepared
    from carpool.evaluate.interference import Interference
    from carpool.evaluate.study import Settings

NEXT = "one set of neighbours against the next"
COLUMNS = (
    POLICY,
    Column("KL", "stock against policy, nats a token, mean", rank=1),
    Column("p99", "its 99th percentile", rank=DETAIL),
    Column("worst", "its maximum", rank=2),
    Column("between", f"{NEXT}, mean"),
    Column("p99 between", "its 99th percentile", rank=DETAIL),
    Column("worst between", "its maximum", rank=DETAIL),
    Column("flipped", "tokens whose likeliest next token is not stock's", rank=4),
    Column("unstable", "tokens whose likeliest next token depends on the neighbours"),
    Column("displaced", "largest share of a row's native weight that is not computed", rank=3),
)
NOTE = "Every sequence decodes beside several sets of neighbours; stock's row shows the rounding of the kernels."


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
    show(console, found)
    if options.json_path is not None:
        write(options.json_path, found, ready.tokenizer.decode, co_batches=options.co_batches, **facts)
        console.print(f"wrote {options.json_path}", highlight=False, markup=False, soft_wrap=True)


def show(console: Console, found: Many[Interference]) -> None:
    """A row a policy, and what its columns mean."""
    first, rows = found[0], []
    for one in found:
        spreads = [
            f"{value:.2g}"
            for spread in (one.loss, one.between)
            for value in (spread.mean, spread.quantiles_Q[2], spread.quantiles_Q[-1])
        ]
        rows.append(
            Row([one.name, *spreads, *(f"{share:.1%}" for share in (one.flipped, one.unstable, one.displaced))])
        )
    sheet = Sheet.of(console, COLUMNS, rows)
    beside = f"{first.sequences} sequences beside {first.deals} sets of neighbours each"
    sheet.show(console, title=f"batch {first.layout.batch_size}, {beside}")
    console.print()
    say(console, f"{NOTE} {sheet.legend()}")


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
