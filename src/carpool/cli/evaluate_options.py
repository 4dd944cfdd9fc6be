"""What `carpool evaluate` takes, and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carpool.cli.options import PREFILL, SEQUENCE, BlockSize, MaskToken, Model, Prefill, Seed, SequenceLength, Texts
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.evaluate.sequences import Sequences
    from carpool.plans.policy_file import AnyPlan
    from carpool.routing.batch import Grouping

LOCKSTEP, BLOCKS = "lockstep", "block-diffusion"
GROUP = {LOCKSTEP: "batch", BLOCKS: "request"}
ONLY = {
    LOCKSTEP: ("check_lockstep", "interference", "devices"),
    BLOCKS: ("block_size", "threshold", "steps", "mask_token", "judge"),
}


@dataclass(frozen=True)
class Options:
    """The options as they are typed; None was not given."""

    model: Model = None
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="'xshare(budget=16) | floor(0.3)', or a policy file; may be repeated."),
    ] = None
    group: Annotated[
        str | None,
        typer.Option(help="Rows that share a coreset: batch, request or block:n; default: batch, of blocks request."),
    ] = None
    batch: Annotated[str, typer.Option(help="Sequences that decode together, such as 1,4,16,64.")] = "16"
    text: Texts = None
    sequence: SequenceLength = SEQUENCE
    prefill: Prefill = PREFILL
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Decoded tokens to measure at every batch size; default: 24,576, of blocks 2,048, or what the text "
            "holds: no two batches share a document, and ten give an interval."
        ),
    ] = None
    batches: Annotated[int | None, typer.Option(help="Batches at every batch size, in place of --tokens.")] = None
    seed: Seed = 0
    stats: Annotated[
        Path | None, typer.Option(help="File of `carpool calibrate` or `compress`, for policies that need it.")
    ] = None
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write all results to.")] = None
    allow_unchanged: Annotated[
        bool, typer.Option("--allow-unchanged", help="Let a policy pass that changes no row.")
    ] = False
    devices: Annotated[
        int | None, typer.Option(help="Devices that experts lie on in order, for policies with a budget per device.")
    ] = None
    check_lockstep: Annotated[
        bool, typer.Option("--check-lockstep", help="Compare with real decoding instead; needs memory for float64.")
    ] = False
    interference: Annotated[
        bool, typer.Option("--interference", help="Measure what its neighbours in the batch do to a sequence instead.")
    ] = False
    co_batches: Annotated[int, typer.Option(help="With --interference: sets of neighbours of every sequence.")] = 16
    decode: Annotated[str, typer.Option(help="lockstep, or block-diffusion for a model that fills masked blocks.")] = (
        LOCKSTEP
    )
    block_size: BlockSize = None
    threshold: Annotated[float | None, typer.Option(help="Of block diffusion: accepted probability; default: 0.9.")] = (
        None
    )
    steps: Annotated[int | None, typer.Option(help="Of block diffusion: most forwards of a block.")] = None
    mask_token: MaskToken = None
    judge: Annotated[
        str | None, typer.Option(help="Of block diffusion: autoregressive model that judges what was generated.")
    ] = None

    def require_one_way(self) -> None:
        """Raises CarpoolError for an unknown way to decode, and for options of the other one."""
        if self.decode not in (LOCKSTEP, BLOCKS):
            raise CarpoolError(f"--decode {self.decode!r}: use {LOCKSTEP} or {BLOCKS}")
        other = LOCKSTEP if self.blocks else BLOCKS
        given = [name for name in ONLY[other] if getattr(self, name) not in (None, False)]
        if given:
            raise CarpoolError(f"--{given[0].replace('_', '-')} belongs to --decode {other}: leave one of them out")

    @property
    def blocks(self) -> bool:
        return self.decode == BLOCKS

    @property
    def plans(self) -> tuple[AnyPlan, ...]:
        """Each once, however it is written; raises CarpoolError for one that cannot be read."""
        given = list(self._read.values())
        return tuple(plan for place, plan in enumerate(given) if plan not in given[:place])

    @property
    def policy_files(self) -> list[Path]:
        from carpool.plans.policy_file import PolicyFile

        return [Path(text) for text, plan in self._read.items() if isinstance(plan, PolicyFile)]

    @cached_property
    def _read(self) -> dict[str, AnyPlan]:
        from carpool.plans.policy_file import plan_or_file

        return {one: plan_or_file(one) for one in self.policy or []}

    @property
    def grouping(self) -> Grouping:
        from carpool.routing.batch import Grouping

        return Grouping.parse(self.group or GROUP[self.decode])

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Raises CarpoolError unless they are whole numbers, 1 or more, each once."""
        try:
            sizes = tuple(int(part) for part in self.batch.split(","))
        except ValueError:
            raise CarpoolError(f"--batch {self.batch!r}: give batch sizes such as 16 or 1,4,16,64") from None
        if min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise CarpoolError(f"--batch {self.batch!r}: give batch sizes of 1 or more, each once")
        return sizes


@dataclass(frozen=True, eq=False)
class Prepared:
    """What an evaluation runs on.

    Attributes:
        model, tokenizer: loaded. statistics: for policies that need some, or None.
        sequences: drawn from the texts, by batch size. texts: their files.
    """

    model: Any
    tokenizer: Any
    statistics: Any
    sequences: list[Sequences]
    texts: list[Path]
