"""SERE: re-route secondary experts to the most similar primary one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy, merge_duplicates
from carpool.policies.parameters import require, require_count, require_within
from carpool.policies.registry import register
from carpool.routing.exact import ordered_int
from carpool.routing.keys import with_ties
from carpool.routing.spec import Routing

METRICS = ("frobenius", "cosine", "cka", "routed")


@register
@dataclass(frozen=True)
class SERE(Policy):
    """Replace an expert outside the batch's primaries by the primary that is most similar to it.

    Based on SERE (arXiv 2602.07616). Primaries are the union of each voter's best `top` experts; a slot whose
    expert is no primary moves to the most similar primary if their similarity reaches `threshold`, else it stays
    ("critical expert"). The router's weights are kept; slots of a row that meet in one expert are merged.

    Parameters:
        top: best experts of each voter that are primaries. The paper's settings are 2 (recommended) and 1 (fast,
            visibly worse). Small batches have few primaries: combine with `min_batch`.
        threshold: least similarity for a move; 0 always moves. Not comparable between metrics or models.
        metric: which statistic of `carpool calibrate` to use: `frobenius` (the paper's main setting), `cosine`,
            `cka`, or `routed` (only tokens that route to the expert, gate-weighted, scale-free; asymmetric).

    Reading of the paper: ties between equally similar primaries go by the fixed tie rule, not to the lowest id;
    similarities stay fp32 (in bf16 most of them tie).

    Identity: `top=K`, or a `threshold` above 1.

    Example: `sere(top=2)`.
    """

    top: int | Tensor
    threshold: float | Tensor = 0.0
    metric: str = "frobenius"

    name = "sere"
    paper = "SERE, arXiv 2602.07616"

    def __post_init__(self) -> None:
        require_count("top", self.top, 1)
        require(
            isinstance(self.threshold, Tensor) or (type(self.threshold) in (int, float) and self.threshold >= 0),
            f"threshold={self.threshold!r}: give a similarity of 0 or more",
        )
        require(self.metric in METRICS, f"metric={self.metric!r}: use one of {', '.join(METRICS)}")

    def check(self, num_experts: int, top_k: int) -> None:
        require_within("top", self.top, top_k)

    def required_stats(self) -> tuple[str, ...]:
        return (f"similarity_{self.metric}",)

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`similarity [E, E]` (how well the column's expert stands in for the row's) and its tie-free sort keys."""
        similarity_EE = stats[f"similarity_{self.metric}"].float()
        # cosine and routed go below 0: the order of such replacements counts, and a threshold of 0 takes them all
        return {"similarity": similarity_EE.clamp_min(0), "keys": with_ties(ordered_int(similarity_EE))}

    def coreset(self, inputs: Inputs) -> Tensor:
        """The primaries, bool `[G, E]`."""
        return inputs.votes(inputs.rank_NE < self.top)

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Primaries, and the experts that no primary is similar enough to, bool `[N, E]`."""
        moves_GE = ((inputs.stats["similarity"] >= self.threshold) & coreset_GE.unsqueeze(1)).any(-1)
        return self.by_row(inputs, coreset_GE | ~moves_GE)

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        """Native slots, those of experts that are not allowed moved to the most similar primary, merged."""
        ids_NK = inputs.native_ids_NK.long()
        target_GE = (inputs.stats["keys"] * coreset_GE.unsqueeze(1)).argmax(-1)  # keys are positive
        target_NE = torch.where(allowed_NE, inputs.experts_E, self.by_row(inputs, target_GE))
        weights_NK = inputs.spec.mix(inputs.weights_NE, ids_NK, torch.ones_like(ids_NK, dtype=torch.bool))
        return merge_duplicates(target_NE.gather(-1, ids_NK), weights_NK)
