"""Results of block diffusion in the terminal: a table for every batch size, and what its columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from carpool.cli.evaluation_table import LOSS, POLICY, Cells, compare, interval, of_batches
from carpool.cli.table import DETAIL, Column

if TYPE_CHECKING:
    from carpool.evaluate.block_study import BlockResult
    from carpool.evaluate.intervals import Estimate

HELD_OUT = "on masked tokens of held-out text"
COLUMNS = (
    POLICY,
    Column("T", "distinct experts read in a layer and denoising forward", rank=1),
    Column("of stock", "over stock's"),
    Column("pairs", "experts computed for a token in a layer", rank=DETAIL),
    Column("displaced", "share of a token's native weight whose experts are not computed for it", rank=3),
    LOSS,
    Column("tokens/forward", "accepted for a request in a denoising forward", rank=2),
    Column("agreement", "positions that hold stock's token"),
    Column("agreement 95 %", "interval over batches that share no document", rank=DETAIL + 3),
    Column("blocks", "agreement with each block decoded after stock's text", rank=DETAIL),
    Column("perplexity", "of the generated text under an autoregressive model, over stock's", rank=DETAIL),
    Column("KL", f"stock against policy in nats, {HELD_OUT}", rank=1),
    Column("KL 95 %", "its interval", rank=DETAIL + 2),
    Column("top-1", "tokens whose likeliest token stays, there too", rank=4),
    Column("denoising", "perplexity over stock's, there too", rank=DETAIL),
)


def show_blocks(console: Console, by_batch: Sequence[Sequence[BlockResult]]) -> None:
    """A table for every batch size, warnings where there are few batches, and the legend."""
    foreseen = any(result.denoised.surrogates for found in by_batch for result in found)
    tables = []
    for found in by_batch:
        settings, measured = found[0].settings, found[0].denoised.measured
        title = (
            f"blocks of {settings.decoding.block}, threshold {settings.decoding.threshold:g}, batch "
            f"{measured.layout.batch_size}, grouped by {settings.grouping}, {of_batches(measured.batches)}"
        )
        lines = [(one.name, one.plan, _cells(one, foreseen)) for one in found]
        tables.append((title, lines, measured.layout.batch_size, measured.batches))
    compare(console, COLUMNS, tables)


def _cells(result: BlockResult, foreseen: bool) -> Cells:
    text, made = result.denoised, result.decoded
    loss = f"{made.expected_loss.value:.1%}" if text.surrogates else "–"
    return {
        "T": f"{made.union.value:.1f}",
        "of stock": f"{made.union_share.value:.0%}",
        "pairs": f"{made.pairs:.2f}",
        "displaced": f"{made.displaced_mass.value:.1%}",
        **({"expected loss": loss} if foreseen else {}),
        "tokens/forward": f"{made.tokens_per_forward.value:.2f}",
        "agreement": f"{made.agreement.value:.1%}",
        "agreement 95 %": interval(made.agreement),
        "blocks": _share(made.followed_agreement),
        "perplexity": "–" if made.perplexity_ratio is None else f"{made.perplexity_ratio.value:.3f}",
        "KL": f"{text.kl.value:.4f}",
        "KL 95 %": interval(text.kl),
        "top-1": f"{text.top1_agreement.value:.1%}",
        "denoising": f"{text.perplexity_ratio.value:.3f}",
    }


def _share(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.1%}"
