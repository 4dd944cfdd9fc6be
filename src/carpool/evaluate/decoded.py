"""What decoding by block diffusion costs and keeps: experts read, tokens a forward, agreement with stock, perplexity.

Every metric is a ratio of sums over batches (`carpool.evaluate.generations`), or e to the power of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carpool.evaluate.generations import Generated
from carpool.evaluate.intervals import Array, Estimate, estimate, ratio


@dataclass(frozen=True)
class Decoded:
    """The metrics of one plan's generations; what has an interval is an `Estimate`.

    Attributes:
        union: distinct experts read in a layer and denoising forward (DES's T). union_share: the same over stock's.
        union_of_group: the same of one group's rows alone: of one request, where requests are groups.
        union_with_commits: `union` with the forwards that write finished blocks to the cache.
        natural_union: what the rows of this run would have read under native routing.
        pairs: experts computed for a row in a layer. displaced_mass: mean over rows and layers.
        expected_loss: the same, with pairs left to surrogates at what calibration expects to be lost.
        tokens_per_forward: accepted tokens of a request in a denoising forward it takes part in.
        forwards: denoising forwards of a batch.
        agreement: share of positions that hold stock's token. agreed_prefix: share before the first other token.
        equal: share of requests whose tokens are all stock's.
        followed_agreement: share of positions that hold stock's token, each block decoded after stock's text.
        perplexity: of the generated text under the judge; None without one. perplexity_ratio: over stock's.
        repeated: share of runs of four tokens that their text holds before (degenerate text has a low perplexity).
        union_by_masked: mean union of a group by masked share of the blocks (quarters, all masked); None where none was
            seen.
    """

    union: Estimate
    union_share: Estimate
    union_of_group: Estimate
    union_with_commits: float
    natural_union: float
    pairs: float
    displaced_mass: Estimate
    expected_loss: Estimate
    tokens_per_forward: Estimate
    forwards: float
    agreement: Estimate
    agreed_prefix: Estimate
    equal: float
    followed_agreement: Estimate | None
    perplexity: Estimate | None
    perplexity_ratio: Estimate | None
    repeated: float
    union_by_masked: list[float | None]


def metrics(generated: Sequence[Generated]) -> list[Decoded]:
    """Metrics of stock (the first) and of every plan on the same prompts."""
    return [_metrics(one.sums, generated[0].sums, one.by_masked) for one in generated]


def _metrics(s: dict[str, Array], stock: dict[str, Array], by_masked: Array) -> Decoded:
    per_forward = ratio(stock["union"], stock["layer_forwards"])
    perplexity = change = followed = None
    if s["judged"].any():
        perplexity = estimate(s["judge_nll"], s["judged"], "exp")
        # paired: equal numbers of tokens unless somebody met an end token
        as_many_M = stock["judge_nll"] * s["judged"] / np.maximum(stock["judged"], 1)
        change = estimate(s["judge_nll"] - as_many_M, s["judged"], "exp")
    if s["followed"].any():
        followed = estimate(s["followed_same"], s["followed"], "share")
    return Decoded(
        union=estimate(s["union"], s["layer_forwards"]),
        union_share=estimate(s["union"], s["layer_forwards"] * per_forward),
        union_of_group=estimate(s["group_union"], s["groups"]),
        union_with_commits=ratio(s["union"] + s["commit_union"], s["layer_forwards"] + s["layer_commits"]),
        natural_union=ratio(s["natural_union"], s["layer_forwards"]),
        pairs=ratio(s["pairs"], s["rows"]),
        displaced_mass=estimate(s["displaced"], s["rows"], "share"),
        expected_loss=estimate(s["expected_loss"], s["rows"], "share"),
        tokens_per_forward=estimate(s["accepted"], s["request_forwards"]),
        forwards=float(s["forwards"].mean()),
        agreement=estimate(s["same"], s["tokens"], "share"),
        agreed_prefix=estimate(s["before"], s["tokens"], "share"),
        equal=ratio(s["equal"], s["requests"]),
        followed_agreement=followed,
        perplexity=perplexity,
        perplexity_ratio=change,
        repeated=ratio(s["repeated"], s["grams"]),
        union_by_masked=[float(union / count) if count else None for union, count in by_masked.tolist()],
    )
