"""The texts that `carpool tune` measures on, and the measuring: search, verification, other batch sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.artefacts.files import sha256_file
from carpool.cli.common import progress
from carpool.cli.tune_files import measured_on
from carpool.cli.tune_options import Options, Prepared
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.evaluate.layout import Layout
    from carpool.evaluate.sequences import Cut, Sequences
    from carpool.tune import AtBatch, Target, Trials, Tuned

TOKENS = 9_216  # decoded on either half unless told otherwise, or ten batches


def draw(cut: Cut, options: Options, layout: Layout) -> Sequences:
    """Batches of one half of the text; raises CarpoolError where it does not hold enough that share no document."""
    from carpool.evaluate.intervals import FEWEST

    most = wanted(options, layout)
    least = FEWEST if options.tokens is None else most
    lower = "--sequence, --batch or --tokens" if least > FEWEST else "--sequence or --batch"
    fewer = f"lower {lower} (half of the text is searched, the other half verified on)"
    return cut.draw_within(least, most, layout.batch_size, seed=options.seed, fewer=fewer)


def wanted(options: Options, layout: Layout) -> int:
    """Batches, if the text holds as many."""
    from carpool.evaluate.intervals import FEWEST

    return max(FEWEST, round((options.tokens or TOKENS) / (layout.batch_size * layout.decoded)))


def trials(ready: Prepared, options: Options, memory: Path, advance: Callable[[str], None]) -> tuple[Trials, Trials]:
    """On the text to search on, taken up where an interrupted run left off, and on the text to verify on."""
    from carpool.artefacts.statistics import Statistics
    from carpool.tune import Trials

    path = ready.statistics
    searched = hashlib.sha256(ready.search.ids_ST.numpy().tobytes()).hexdigest()
    depends = {
        "model": ready.identity.name, "searched": searched, **measured_on(ready, options),
        "statistics": None if path is None else sha256_file(path),
    }  # fmt: skip
    stats = None if path is None else Statistics.load(path)
    given: dict[str, Any] = {"stats": stats, "settings": depends, "advance": advance}
    return (
        Trials(ready.model, ready.moe, ready.search, ready.layout, memory=memory, **given),
        Trials(ready.model, ready.moe, ready.verify, ready.layout, **given),
    )


def elsewhere(options: Options, ready: Prepared, target: Target, found: Tuned, verify: Trials) -> list[AtBatch]:
    """What was chosen at the batch size that it was searched for, and at the others that were asked for."""
    from carpool.artefacts.statistics import Statistics
    from carpool.evaluate.intervals import FEWEST
    from carpool.tune import Trials, at_batches

    sizes = sorted({options.batch, *batch_sizes(options.also_batch)})
    rivals = len(sizes) * (1 + len(ready.depths))
    stats = None if ready.statistics is None else Statistics.load(ready.statistics)
    with progress("at other batch sizes", rivals, "trials") as bar:

        def of_size(size: int) -> Trials:
            if size == options.batch:
                return verify
            layout = replace(ready.layout, batch_size=size)
            drawn = ready.unseen.draw_within(FEWEST, wanted(options, layout), size, seed=options.seed)
            return Trials(ready.model, ready.moe, drawn, layout, stats=stats, advance=lambda policy: bar(1))

        return at_batches(found.plan, target, sizes, of_size, ready.depths, ready.moe.top_k)


def batch_sizes(text: str) -> list[int]:
    """From `1,4,16`; raises CarpoolError for what is none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part) < 10_000 for part in parts):
        raise CarpoolError(f"--also-batch {text}: give numbers of sequences, such as 1,4,16,64")
    return [int(part) for part in parts]
