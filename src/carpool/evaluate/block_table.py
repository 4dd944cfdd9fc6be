"""Results of block diffusion as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from carpool.evaluate.block_study import BlockResult
from carpool.evaluate.intervals import Estimate
from carpool.evaluate.table import WIDE, comparison, of_batches

NOTE = (
    "T: distinct experts read in a layer and denoising forward; of stock: over stock's; pairs: experts computed for a "
    "token in a layer; displaced: share of a token's native weight whose experts are not computed for it; expected "
    "loss: the same, with what is left to surrogates at what calibration expects to be lost; tokens/forward: accepted "
    "for a request in a denoising forward; agreement: positions that hold stock's token; blocks: the same with each "
    "block decoded after stock's text; perplexity: of the generated text under an autoregressive model, over stock's. "
    "On masked tokens of held-out text: KL, stock against policy, in nats; top-1: tokens whose likeliest token stays; "
    "denoising: perplexity over stock's. 95 %: interval over batches that share no document."
)


def table(results: Sequence[BlockResult], console: Console) -> Table:
    """Rows of one batch size; controls are dim; intervals only where the console is wide enough."""
    settings, layout = results[0].settings, results[0].denoised.measured.layout
    wide = console.width >= WIDE + 20
    title = (
        f"blocks of {settings.decoding.block}, threshold {settings.decoding.threshold:g}, batch {layout.batch_size}, "
        f"grouped by {settings.grouping}, {of_batches(results[0].denoised.measured.batches)}"
    )
    foreseen = any(result.denoised.surrogates for result in results)
    return comparison(title, [(result.name, result.plan, _cells(result, wide, foreseen)) for result in results])


def _cells(result: BlockResult, wide: bool, foreseen: bool) -> dict[str, str]:
    """Cells after the policy's name, by heading."""
    text, made = result.denoised, result.decoded
    loss = f"{made.expected_loss.value:.1%}" if text.surrogates else "–"
    cells = {
        "T": f"{made.union.value:.1f}",
        "of stock": f"{made.union_share.value:.0%}",
        "pairs": f"{made.pairs:.2f}",
        "displaced": f"{made.displaced_mass.value:.1%}",
        **({"expected loss": loss} if foreseen else {}),
        "tokens/forward": f"{made.tokens_per_forward.value:.2f}",
        "agreement": f"{made.agreement.value:.1%}",
        "agreement 95 %": _interval(made.agreement),
        "blocks": _share(made.followed_agreement),
        "perplexity": "–" if made.perplexity_ratio is None else f"{made.perplexity_ratio.value:.3f}",
        "KL": f"{text.kl.value:.4f}",
        "KL 95 %": _interval(text.kl),
        "top-1": f"{text.top1_agreement.value:.1%}",
        "denoising": f"{text.perplexity_ratio.value:.3f}",
    }
    return cells if wide else {name: cell for name, cell in cells.items() if "95 %" not in name}


def _share(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.1%}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return "–"
    return f"{estimate.low:.4f}–{estimate.high:.4f}"
