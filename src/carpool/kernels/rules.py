"""Which of its native experts a row keeps: the rules of single rows, and the floor."""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.kernels.packed import expert_of, fixed


@triton.jit
def front(exact, weights_E, held, number, sensitivity, RULE: tl.constexpr, EXPERTS: tl.constexpr,
          BLOCK_E: tl.constexpr):  # fmt: skip
    """Native slots that a skipping rule keeps, from their weights in float64 (`policies.skipping`)."""
    slots = tl.arange(0, exact.shape[0])
    weights = tl.where(held, fixed(exact), 0)
    earlier = (exact[None, :] == exact[:, None]) & (slots[None, :] < slots[:, None])
    ahead = ((exact[None, :] > exact[:, None]) | earlier) & held[None, :]
    before = tl.sum(tl.where(ahead, weights[None, :], 0), 1)
    if RULE == "top_p":
        experts = tl.arange(0, BLOCK_E)
        all_E = fixed(tl.load(weights_E + experts, mask=experts < EXPERTS, other=0.0))
        kept = before.to(tl.float64) <= number * tl.sum(all_E).to(tl.float64)
    elif RULE == "tail":
        total = tl.sum(weights)
        kept = (total - before).to(tl.float64) >= number * total.to(tl.float64)
    else:
        kept = tl.load(sensitivity) * weights.to(tl.float64) >= number * tl.sum(weights).to(tl.float64)
    return kept | (before == 0)


@triton.jit
def floored(weights, allowed, held, tau):
    """Native slots that come back under `floor(tau)`; weights in float64."""
    slots = tl.arange(0, weights.shape[0])
    missing = tl.where(allowed | (held == 0), 0.0, weights)
    later = (missing[None, :] == missing[:, None]) & (slots[None, :] >= slots[:, None])
    lighter = ((missing[None, :] < missing[:, None]) | later) & held[None, :]
    left = tl.sum(tl.where(lighter, missing[None, :], 0.0), 1)
    total = tl.sum(tl.where(held, weights, 0.0))
    most = tl.zeros_like(weights) + tau
    return ((tl.minimum(left, total) > most * total) | (most <= 0)) & held & (allowed == 0)


@triton.jit
def stand_ins(similarity_EE, keys_EE, ids, held, core_E, threshold, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """For every native slot the most similar expert of the coreset, and whether it is similar enough (`SERE`)."""
    experts = tl.arange(0, BLOCK_E)
    inside = (experts < EXPERTS)[None, :] & core_E[None, :] & held[:, None]
    places = ids[:, None] * EXPERTS + experts[None, :]
    similarity = tl.load(similarity_EE + places, mask=inside, other=-1.0)
    moves = tl.sum(((similarity >= threshold) & inside).to(tl.int32), 1) > 0
    return expert_of(tl.max(tl.load(keys_EE + places, mask=inside, other=0), 1)).to(tl.int32), moves
