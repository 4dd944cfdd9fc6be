"""A group's coreset from its sums, in registers: every row of the group comes to the same one."""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.kernels.packed import FREE, NATURAL, TIES, WARM, tie
from carpool.policies.controls import DRAW, EXPERT
from carpool.routing.keys import TIE, TIER

TIER_SHIFT = tl.constexpr(TIER.shift - TIE.width)
EXPERT_SHIFT = tl.constexpr(EXPERT.shift)
DRAWN = tl.constexpr(DRAW)


@triton.jit
def mixed(sums, experts, MIX: tl.constexpr):
    """The first half of `RandomCoreset`'s hash."""
    own = (sums | (experts.to(tl.int64) << EXPERT_SHIFT)) * MIX
    return own ^ (own >> 32)


@triton.jit
def utility_key(sums_E, flags_E, total, experts, inside, UTILITY: tl.constexpr, WARMUP: tl.constexpr,
                MIX: tl.constexpr, STIR: tl.constexpr):  # fmt: skip
    """Distinct keys of these experts in the order in which a budget takes them; -1 outside."""
    utility = tl.load(sums_E + experts, mask=inside, other=0)
    flags = tl.load(flags_E + experts, mask=inside, other=0)
    if UTILITY == "draw":
        drawn = ((mixed(utility, experts, MIX) ^ total) * STIR) >> 24
        utility = tl.where((flags & NATURAL) != 0, drawn & DRAWN, 0)
    costly = (flags & FREE) == 0
    tier = costly.to(tl.int64)
    if WARMUP:
        tier = tier + (costly & ((flags & WARM) != 0)).to(tl.int64)
    return tl.where(inside, ((utility + (tier << TIER_SHIFT)) << TIES) | tie(experts), -1)


@triton.jit
def utility_rank(sums_E, flags_E, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
                 UTILITY: tl.constexpr, WARMUP: tl.constexpr, MIX: tl.constexpr, STIR: tl.constexpr):  # fmt: skip
    """`Inputs.utility_rank`, by counting what comes before, a few experts at a time."""
    experts = tl.arange(0, BLOCK_E)
    inside = experts < EXPERTS
    total = 0
    if UTILITY == "draw":
        sums = tl.load(sums_E + experts, mask=inside, other=0)
        total = tl.sum(tl.where(inside, mixed(sums, experts, MIX), 0))
    mine = utility_key(sums_E, flags_E, total, experts, inside, UTILITY, WARMUP, MIX, STIR)
    rank = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, EXPERTS, CHUNK):
        others = start + tl.arange(0, CHUNK)
        theirs = utility_key(sums_E, flags_E, total, others, others < EXPERTS, UTILITY, WARMUP, MIX, STIR)
        rank += tl.sum((theirs[None, :] > mine[:, None]).to(tl.int32), 1)
    return rank


@triton.jit
def coreset(sums_E, flags_E, voters, size, list_E, protected_E, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
            CHUNK: tl.constexpr, RULE: tl.constexpr, UTILITY: tl.constexpr, WARMUP: tl.constexpr, MIX: tl.constexpr,
            STIR: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
            LEAST: tl.constexpr):  # fmt: skip
    """The coreset of the group whose sums begin at `sums_E`, guards applied; bool over experts, False outside.

    Args:
        voters: of the group. size: a 0-d tensor. list_E, protected_E: bool.
        FIRST, SECOND, THIRD: names of guards that change coresets, in their order. LEAST: voters of `min_batch`.
    """
    experts = tl.arange(0, BLOCK_E)
    inside = experts < EXPERTS
    flags = tl.load(flags_E + experts, mask=inside, other=0)
    free = (flags & FREE) != 0
    if UTILITY != "":
        chosen = utility_rank(sums_E, flags_E, EXPERTS, BLOCK_E, CHUNK, UTILITY, WARMUP, MIX, STIR) < tl.load(size)
        if WARMUP:
            chosen = chosen | ((flags & WARM) != 0)
    elif WARMUP:
        chosen = (flags & WARM) != 0
    elif RULE == "list":
        chosen = tl.load(list_E + experts, mask=inside, other=0) != 0
    else:
        chosen = inside
    chosen = (chosen | free | (voters == 0)) & inside
    chosen = guarded(chosen, flags, voters, size, protected_E, EXPERTS, BLOCK_E, FIRST, LEAST)
    chosen = guarded(chosen, flags, voters, size, protected_E, EXPERTS, BLOCK_E, SECOND, LEAST)
    return guarded(chosen, flags, voters, size, protected_E, EXPERTS, BLOCK_E, THIRD, LEAST)


@triton.jit
def guarded(chosen, flags, voters, size, protected_E, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
            GUARD: tl.constexpr, LEAST: tl.constexpr):  # fmt: skip
    """A coreset after one guard (`plans.guards`)."""
    experts = tl.arange(0, BLOCK_E)
    inside = experts < EXPERTS
    natural, free = (flags & NATURAL) != 0, (flags & FREE) != 0
    if GUARD == "min_batch":
        chosen = (chosen | (voters < LEAST)) & inside
    elif GUARD == "protect":
        chosen = chosen | (natural & (tl.load(protected_E + experts, mask=inside, other=0) != 0))
    elif GUARD == "short_circuit":
        fits = tl.sum((natural & (free == 0)).to(tl.int32)) <= tl.load(size)
        fits = fits & (voters > 0) & (tl.sum(chosen.to(tl.int32)) < EXPERTS)
        chosen = tl.where(fits, natural | free, chosen)
    return chosen
