"""What both launches share: exact keys and sums, as `routing.exact` and `routing.keys` define them.

Every function works on one row, on a vector over experts or over the row's slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.routing.exact import FRACTION_BITS
from carpool.routing.keys import KEPT, NATIVE, TIE, TIE_FACTOR, TIE_SHIFT

TIES = tl.constexpr(TIE.width)
TIE_MASK = tl.constexpr((1 << TIE.width) - 1)
FACTOR = tl.constexpr(TIE_FACTOR)
SHIFT = tl.constexpr(TIE_SHIFT)
INVERSE = tl.constexpr(pow(TIE_FACTOR, -1, 1 << TIE.width))
ONE = tl.constexpr(float(1 << FRACTION_BITS))
NATIVE_BIT = tl.constexpr(NATIVE.unit)
KEPT_SHIFT = tl.constexpr(KEPT.shift - TIE.width)

# of a group's expert
NATURAL = tl.constexpr(1)  # a voter picks it natively
WARM = tl.constexpr(2)  # it is among a voter's best
FREE = tl.constexpr(4)  # an exempt row reads it

# of a row, between the launches
REAL = tl.constexpr(1)
VOTER = tl.constexpr(2)
EXEMPT = tl.constexpr(4)
NONFINITE = tl.constexpr(8)
READ = tl.constexpr(16)  # real before non-finite rows were dropped


@triton.jit
def fixed(weights):
    """`routing.exact.to_fixed`."""
    return (tl.minimum(tl.maximum(weights.to(tl.float32), 0.0), 15.99) * ONE).to(tl.int64)


@triton.jit
def tie(experts):
    """`routing.keys.tie_order`."""
    return (experts.to(tl.int64) * FACTOR + SHIFT) & TIE_MASK


@triton.jit
def expert_of(key):
    """The expert whose tie number a key ends with."""
    return (((key & TIE_MASK) - SHIFT) * INVERSE) & TIE_MASK


@triton.jit
def ordered(scores):
    """`routing.exact.ordered_int`."""
    scores = scores.to(tl.float32)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Finite float32 values as a narrower type has them; bfloat16 by hand, for the interpreter truncates."""
    if tl.bfloat16 == DTYPE:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE).to(tl.float32)


@triton.jit
def in_kept_groups(scores_E, experts, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
                   TOP2: tl.constexpr, SCORES: tl.constexpr, BLOCK_G: tl.constexpr,
                   BLOCK_S: tl.constexpr):  # fmt: skip
    """`RouteSpec.in_kept_groups` for these experts of the row whose scores begin at `scores_E`, int64 0 or 1."""
    SIZE: tl.constexpr = EXPERTS // GROUPS
    groups, members = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    inside = (groups < GROUPS)[:, None] & (members < SIZE)[None, :]
    scores = tl.load(scores_E + groups[:, None] * SIZE + members[None, :], mask=inside, other=-float("inf"))
    scores = scores.to(tl.float32)
    best = tl.max(scores, 1)
    if TOP2:
        first = tl.min(tl.where(scores == best[:, None], members[None, :], BLOCK_S), 1)
        second = tl.max(tl.where(members[None, :] == first[:, None], -float("inf"), scores), 1)
        best = rounded(best + second, SCORES)  # the router adds in the dtype of its scores
    best = tl.where(groups < GROUPS, best, -float("inf"))
    earlier = (best[None, :] == best[:, None]) & (groups[None, :] < groups[:, None])
    ahead = ((best[None, :] > best[:, None]) | earlier) & (groups < GROUPS)[None, :]
    kept = tl.sum(ahead.to(tl.int32), 1) < KEPT
    mine = (experts // SIZE)[:, None] == groups[None, :]
    return tl.sum((mine & kept[None, :]).to(tl.int32), 1).to(tl.int64)


@triton.jit
def preference(scores_E, experts, inside, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
               TOP2: tl.constexpr, SCORES: tl.constexpr, BLOCK_G: tl.constexpr,
               BLOCK_S: tl.constexpr):  # fmt: skip
    """`Inputs.preference_NE` for these experts of one row, without the bit of native ones."""
    key = ordered(tl.load(scores_E + experts, mask=inside, other=0.0))
    if KEPT < GROUPS:
        kept = in_kept_groups(scores_E, experts, EXPERTS, GROUPS, KEPT, TOP2, SCORES, BLOCK_G, BLOCK_S)
        key = key | (kept << KEPT_SHIFT)
    return (key << TIES) | tie(experts)


@triton.jit
def rank_of(keys, held):
    """Rank of each held slot by its key, 0 for the largest."""
    ahead = (keys[None, :] > keys[:, None]) & held[None, :]
    return tl.sum(ahead.to(tl.int32), 1)
