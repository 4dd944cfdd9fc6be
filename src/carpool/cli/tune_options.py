"""What `carpool tune` takes, and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carpool.cli.options import (
    PREFILL,
    SEQUENCE,
    Model,
    PolicyFileToWrite,
    Prefill,
    Seed,
    SequenceLength,
    ShowJson,
    Texts,
)

if TYPE_CHECKING:
    from carpool.artefacts.identity import Identity
    from carpool.evaluate.layout import Layout
    from carpool.evaluate.loop import MoE
    from carpool.evaluate.sequences import Cut, Sequences
    from carpool.tune import Family


@dataclass(frozen=True)
class Options:
    """What `carpool tune` takes."""

    model: Model = None
    text: Texts = None
    output: PolicyFileToWrite = Path("policy.json")
    max_kl: Annotated[float | None, typer.Option(help="Target: KL(stock || policy), nats a decoded token.")] = None
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Target: perplexity over stock's.")] = None
    share: Annotated[
        float | None, typer.Option("--bytes", help="Target instead: share of the bytes that stock reads, least KL.")
    ] = None
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Name, or a plan whose number is tuned; may be repeated.")
    ] = None
    group: Annotated[str, typer.Option(help="Rows that share a coreset: batch, request or block:n.")] = "batch"
    batch: Annotated[int, typer.Option(help="Sequences that decode together where you serve.")] = 16
    also_batch: Annotated[
        str, typer.Option(help="Batch sizes at which what was chosen is measured too, on the unseen half; '' for none.")
    ] = "1,4,16,64"
    sequence: SequenceLength = SEQUENCE
    prefill: Prefill = PREFILL
    tokens: Annotated[
        int | None,
        typer.Option(help="Decoded tokens of the search, and as many to verify; default: 9,216, at least ten batches."),
    ] = None
    seed: Seed = 0
    stats: Annotated[
        Path | None, typer.Option(help="Statistics of `carpool calibrate`; made on the way where policies need some.")
    ] = None
    as_json: ShowJson = False
    device_map: Annotated[str | None, typer.Option(help="Passed on to transformers, such as auto.")] = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a search runs on.

    Attributes:
        families: to choose from. layout: of a batch.
        data: names and hashes of the files of text. search, verify: sequences of their halves.
        unseen: the half to verify on, to draw batches of other sizes from.
        depths: at which the experts are stored in planes; empty without any.
        model: loaded. moe: its numbers. identity: what files made for it are checked against.
        statistics: file that some families need, or None. planes: the model's experts, where they are planes of bits.
        made: statistics that this run made.
    """

    families: list[Family]
    layout: Layout
    data: list[tuple[str, str]]
    search: Sequences
    verify: Sequences
    unseen: Cut
    depths: tuple[int, ...]
    model: Any
    moe: MoE
    identity: Identity
    statistics: Path | None
    planes: Path | None
    made: Path | None = None
