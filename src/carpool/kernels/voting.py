"""The first launch: one program a row adds the row's votes to its group's exact sums."""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.kernels.packed import (
    EXEMPT,
    FREE,
    NATURAL,
    NONFINITE,
    READ,
    REAL,
    VOTER,
    WARM,
    fixed,
    preference,
    rank_of,
)
from carpool.kernels.scoring import scores_of
from carpool.policies.base_energy import MAX_ENERGY

MOST_ENERGY = tl.constexpr(MAX_ENERGY)


@triton.jit
def vote(
    logits_NE, scores_NE, weights_NE, ids_NK, energy_NE,
    group_N, step_N, real_N, voter_N, exempt_N, prefill_N, bias_E, scale_E, cost_E, warm,
    sums_GE, flags_GE, members_G4, state_N, sharing,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, SCORES: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, SCORING: tl.constexpr,
    UTILITY: tl.constexpr, WARMUP: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """Votes of one row.

    Args:
        logits_NE to exempt_N: as `plans.pipeline.decide` takes them; scores and weights are written unless `SCORING`
            is "given". prefill_N: None unless prompt rows are exempt.
        energy_NE: of each expert's output, for `UTILITY="energy"`. cost_E: for `UTILITY="share"`.
        warm: a 0-d tensor, how many of its best experts a voter keeps; used if `WARMUP`.
        sums_GE: int64, added to. flags_GE: int32, bits added to. members_G4: int32, rows and voters added to.
        state_N: int32, written. sharing: int32, rows that vote before guards, added to if `FOLLOW`.
        UTILITY: what is summed. FOLLOW: padding counts to the first row's group.
    """
    row = tl.program_id(0)
    experts, slots = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside, held = experts < EXPERTS, slots < TOP_K

    logits = tl.load(logits_NE + row * EXPERTS + experts, mask=inside, other=0.0).to(tl.float32)
    finite = tl.sum((tl.abs(logits) < float("inf")).to(tl.int32)) == BLOCK_E
    read = tl.load(real_N + row) != 0
    chosen = tl.load(voter_N + row) != 0
    exempt = (tl.load(exempt_N + row) != 0) | (finite == 0)
    voter = chosen & finite
    if prefill_N is not None:
        prompt = tl.load(prefill_N + row) != 0
        exempt = exempt | prompt
        voter = voter & (prompt == 0)
    real = read & finite
    state = tl.where(real, REAL, 0) | tl.where(voter, VOTER, 0) | tl.where(exempt, EXEMPT, 0)
    state = state | tl.where(finite, 0, NONFINITE) | tl.where(read, READ, 0)
    tl.store(state_N + row, state.to(tl.int32))

    place = row
    if FOLLOW:
        place = tl.where(read, row, 0)
        tl.atomic_add(sharing, chosen.to(tl.int32), sem="relaxed")
    group = tl.load(group_N + place)
    tl.atomic_add(members_G4 + group * 4, 1, sem="relaxed")
    tl.atomic_add(members_G4 + group * 4 + 1, voter.to(tl.int32), mask=voter, sem="relaxed")

    ids = tl.maximum(tl.load(ids_NK + row * TOP_K + slots, mask=held, other=0).to(tl.int32), 0)
    scores_E, weights_E = scores_NE + row * EXPERTS, weights_NE + row * EXPERTS
    bits = tl.where(voter, NATURAL, 0) | tl.where(exempt & real, FREE, 0) | tl.zeros_like(slots)
    if SCORING != "given":
        if exempt == 0:  # nobody looks at the scores of others
            choice, weights = scores_of(logits, inside, bias_E, experts, SCORING, SCORES)
            tl.store(scores_E + experts, choice, mask=inside)
            tl.store(weights_E + experts, weights, mask=inside)
        tl.debug_barrier()  # other threads read them below
    if voter:
        if WARMUP:
            keys = preference(scores_E, ids, held, EXPERTS, GROUPS, KEPT, TOP2, SCORES, BLOCK_G, BLOCK_S)
            bits = bits | tl.where(rank_of(keys, held) < tl.load(warm), WARM, 0)
        if UTILITY == "mass" or UTILITY == "squared" or UTILITY == "draw":
            votes = tl.load(weights_E + experts, mask=inside, other=0.0)
            if UTILITY == "squared":
                votes = votes * votes
            tl.atomic_add(sums_GE + group * EXPERTS + experts, fixed(votes), mask=inside, sem="relaxed")
        elif UTILITY != "":
            votes = pair_votes(weights_E, ids, held, energy_NE, row * EXPERTS, scale_E, cost_E, UTILITY)
            tl.atomic_add(sums_GE + group * EXPERTS + ids, votes, mask=held, sem="relaxed")
    tl.atomic_or(flags_GE + group * EXPERTS + ids, bits, mask=held & (bits != 0), sem="relaxed")


@triton.jit
def pair_votes(weights_E, ids, held, energy_NE, start, scale_E, cost_E, UTILITY: tl.constexpr):
    """What a row gives to each of its native experts, in fixed point."""
    weights = tl.load(weights_E + ids, mask=held, other=0.0)
    if UTILITY == "count":
        return fixed(weights) * 0 + 1
    if scale_E is not None:
        scale = tl.load(scale_E + ids, mask=held, other=0.0)
        weights = (weights.to(tl.float64) * scale.to(tl.float64)).to(tl.float32)  # exact in a double
    if UTILITY == "share":
        total = tl.sum(weights.to(tl.float64)).to(tl.float32)
        part = tl.div_rn(weights, tl.maximum(total, 1e-30))
        weights = part * part * tl.load(cost_E + ids, mask=held, other=0.0)
    elif UTILITY == "energy":
        weights = tl.minimum(tl.load(energy_NE + start + ids, mask=held, other=0.0), MOST_ENERGY) * (weights * weights)
    return fixed(weights)
