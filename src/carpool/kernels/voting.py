"""The first launch: one program a row adds the row's votes to its group's exact sums."""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.kernels.keys import (
    EXEMPT,
    FREE,
    NATIVE_BIT,
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
from carpool.policies.base_energy import MAX_ENERGY

MOST_ENERGY = tl.constexpr(MAX_ENERGY)


@triton.jit
def vote(
    logits_NE, scores_NE, weights_NE, ids_NK, energy_NE,
    group_N, step_N, real_N, voter_N, exempt_N, prefill_N, scale_E, cost_E, warm,
    sums_GE, flags_GE, members_G3, state_N, sharing,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    UTILITY: tl.constexpr, WARMUP: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """Votes of one row.

    Args:
        logits_NE to exempt_N: as `plans.pipeline.decide` takes them. prefill_N: None unless prompt rows are exempt.
        energy_NE: of each expert's output, for `UTILITY="energy"`. cost_E: for `UTILITY="share"`.
        warm: a 0-d tensor, how many of its best experts a voter keeps; used if `WARMUP`.
        sums_GE: int64, added to. flags_GE: int32, bits added to. members_G3: int32, rows and voters added to.
        state_N: int32, written. sharing: int32, the number of rows that vote before guards, added to.
        UTILITY: what is summed. FOLLOW: padding counts to the first row's group.
    """
    row = tl.program_id(0)
    experts, slots = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside, held = experts < EXPERTS, slots < TOP_K

    logits_E = tl.load(logits_NE + row * EXPERTS + experts, mask=inside, other=0.0).to(tl.float32)
    finite = tl.sum((tl.abs(logits_E) < float("inf")).to(tl.int32)) == BLOCK_E
    read = tl.load(real_N + row) != 0
    chosen = tl.load(voter_N + row) != 0
    tl.atomic_add(sharing, chosen.to(tl.int32), sem="relaxed")
    real = read & finite
    exempt = (tl.load(exempt_N + row) != 0) | (finite == 0)
    voter = chosen & finite
    if prefill_N is not None:
        prompt = tl.load(prefill_N + row) != 0
        exempt = exempt | prompt
        voter = voter & (prompt == 0)
    state = tl.where(real, REAL, 0) | tl.where(voter, VOTER, 0) | tl.where(exempt, EXEMPT, 0)
    state = state | tl.where(finite, 0, NONFINITE) | tl.where(read, READ, 0)
    tl.store(state_N + row, state.to(tl.int32))

    group = tl.load(group_N + tl.where(read | (FOLLOW == 0), row, 0))
    tl.atomic_add(members_G3 + group * 3, 1, sem="relaxed")
    tl.atomic_add(members_G3 + group * 3 + 1, voter.to(tl.int32), sem="relaxed")

    ids_K = tl.maximum(tl.load(ids_NK + row * TOP_K + slots, mask=held, other=0).to(tl.int32), 0)
    bits_K = tl.where(voter, NATURAL, 0) | tl.where(exempt & real, FREE, 0) | tl.zeros_like(slots)
    if WARMUP:
        keys_K = preference(
            scores_NE + row * EXPERTS, ids_K, held, EXPERTS, GROUPS, KEPT, TOP2, BLOCK_G, BLOCK_S
        ) | NATIVE_BIT  # fmt: skip
        bits_K = bits_K | tl.where((rank_of(keys_K, held) < tl.load(warm)) & voter, WARM, 0)
    tl.atomic_or(flags_GE + group * EXPERTS + ids_K, bits_K, mask=held & (bits_K != 0), sem="relaxed")

    if UTILITY == "mass" or UTILITY == "squared" or UTILITY == "draw":
        weights_E = tl.load(weights_NE + row * EXPERTS + experts, mask=inside, other=0.0)
        if UTILITY == "squared":
            weights_E = weights_E * weights_E
        tl.atomic_add(sums_GE + group * EXPERTS + experts, fixed(weights_E), mask=inside & voter, sem="relaxed")
    elif UTILITY != "":
        weights_K = tl.load(weights_NE + row * EXPERTS + ids_K, mask=held, other=0.0)
        if (UTILITY == "share" or UTILITY == "energy") and scale_E is not None:
            scale_K = tl.load(scale_E + ids_K, mask=held, other=0.0)
            weights_K = (weights_K.to(tl.float64) * scale_K.to(tl.float64)).to(tl.float32)  # exact in a double
        if UTILITY == "share":
            total = tl.sum(weights_K.to(tl.float64)).to(tl.float32)
            share_K = tl.div_rn(weights_K, tl.maximum(total, 1e-30))
            weights_K = share_K * share_K * tl.load(cost_E + ids_K, mask=held, other=0.0)
        elif UTILITY == "energy":
            energy_K = tl.load(energy_NE + row * EXPERTS + ids_K, mask=held, other=0.0)
            weights_K = tl.minimum(energy_K, MOST_ENERGY) * (weights_K * weights_K)
        votes_K = fixed(weights_K)
        if UTILITY == "count":
            votes_K = tl.zeros_like(votes_K) + 1
        tl.atomic_add(sums_GE + group * EXPERTS + ids_K, votes_K, mask=held & voter, sem="relaxed")
