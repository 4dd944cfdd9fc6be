"""What a trace asks of a placement: loads, experts that tokens choose together, and what follows what.

`T` rows, `L` MoE layers, `K` experts per token, `E` experts. A free slot of a row (weight 0) asks for nothing.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from carpool.artefacts.trace import Trace

ROWS = 1 << 12  # counted together


def chosen_TE(trace: Trace, layer: int) -> Tensor:
    """Bool `[T, E]`: which experts a row computes in the layer at this place."""
    chosen = torch.zeros(len(trace), trace.num_experts, dtype=torch.bool)
    asked_TK = torch.ones(len(trace), trace.top_k, dtype=torch.bool)
    if trace.weights_TLK is not None:
        asked_TK = trace.weights_TLK[:, layer] != 0
    row_T1 = torch.arange(len(trace)).unsqueeze(1).expand_as(asked_TK)
    chosen[row_T1[asked_TK], trace.experts_TLK[:, layer].long()[asked_TK]] = True
    return chosen


def loads_LE(trace: Trace) -> Tensor:
    """Int64 `[L, E]`: rows that each expert computes."""
    return torch.stack([chosen_TE(trace, layer).sum(0) for layer in range(trace.num_layers)])


def coactivation_LEE(trace: Trace) -> Tensor:
    """Int64 `[L, E, E]`: rows that compute both experts; the diagonal has the loads."""
    return torch.stack([_products(chosen_TE(trace, at), chosen_TE(trace, at)) for at in range(trace.num_layers)])


def transitions_JEE(trace: Trace, best_only: bool = False) -> Tensor:
    """Int64 `[L - 1, E, E]`: rows that compute one expert in a layer and the other in the next one.

    Args:
        best_only: count each row once, from its best expert to its best expert.
    """
    if best_only:
        best_LT = trace.experts_TLK[..., 0].long().T
        pairs_JT = best_LT[:-1] * trace.num_experts + best_LT[1:]
        counts = [pairs_T.bincount(minlength=trace.num_experts**2) for pairs_T in pairs_JT]
        return torch.stack(counts).view(-1, trace.num_experts, trace.num_experts)
    chosen = [chosen_TE(trace, layer) for layer in range(trace.num_layers)]
    return torch.stack([_products(one, other) for one, other in pairwise(chosen)])


def _products(first_TE: Tensor, second_TE: Tensor) -> Tensor:
    """Exact: floats of sums below 2^53."""
    sums_EE = torch.zeros(first_TE.shape[1], second_TE.shape[1], dtype=torch.int64)
    for one, other in zip(first_TE.split(ROWS), second_TE.split(ROWS), strict=True):
        sums_EE += (one.float().T @ other.float()).long()  # at most ROWS, so exact in float32
    return sums_EE
