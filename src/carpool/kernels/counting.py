"""The layer's counters, kept by the second launch: `plans.counters.measured` in whole numbers.

An expert of a step is counted by the row that sets its bit first, a coreset by the first voter; the last row of a group
clears the group's sums, the last row of all adds up and clears the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.plans.counters import FIELDS, SHARES
from carpool.plans.pipeline import TINY

# bits of a step's expert
NATIVELY = tl.constexpr(1)
COMPUTED = tl.constexpr(2)
STOOD_IN = tl.constexpr(4)  # by its surrogate
ADDED = tl.constexpr(8)  # by the floor
COVERED = tl.constexpr(16)  # some row reads it whatever the floor says

LANES = tl.constexpr(1 << (len(FIELDS) - 1).bit_length())
COUNTED = tl.constexpr(len(FIELDS))
SHARE_UNIT = tl.constexpr(float(1 << 40))  # of shares as whole numbers
LEAST_TOTAL = tl.constexpr(TINY)
CALLS = tl.constexpr(FIELDS.index("calls"))
STEPS = tl.constexpr(FIELDS.index("steps"))
ROWS = tl.constexpr(FIELDS.index("rows"))
ROWS_EXEMPT = tl.constexpr(FIELDS.index("rows_exempt"))
ROWS_CHANGED = tl.constexpr(FIELDS.index("rows_changed"))
ROWS_NONFINITE = tl.constexpr(FIELDS.index("rows_nonfinite"))
NATURAL_UNION = tl.constexpr(FIELDS.index("natural_union"))
UNION = tl.constexpr(FIELDS.index("union"))
CORESET = tl.constexpr(FIELDS.index("coreset"))
PAIRS = tl.constexpr(FIELDS.index("pairs"))
SURROGATES = tl.constexpr(FIELDS.index("surrogates"))
SURROGATE_PAIRS = tl.constexpr(FIELDS.index("surrogate_pairs"))
FLOOR_OVERFLOW = tl.constexpr(FIELDS.index("floor_overflow"))
DISPLACED = tl.constexpr(FIELDS.index("displaced_mass"))
EXPECTED = tl.constexpr(FIELDS.index("expected_loss"))
FIRST_SHARE = tl.constexpr(min(FIELDS.index(name) for name in SHARES))


@triton.jit
def set_first(bits_E, ids, bits, bit: tl.constexpr, mask):
    """Set bits of a step's experts; how many had not yet this one of them."""
    old = tl.atomic_or(bits_E + ids, bits, mask=mask & (bits != 0), sem="relaxed")
    return tl.sum((mask & ((bits & bit) != 0) & ((old & bit) == 0)).to(tl.int32))


@triton.jit
def lane(values, place: tl.constexpr, value):
    """The vector of counters with a value in its place."""
    return tl.where(tl.arange(0, LANES) == place, value.to(tl.int64), values)


@triton.jit
def share(part, weights):
    """What part of the weights is, as a whole number of `1 / SHARE_UNIT`."""
    return (tl.sum(part) / tl.maximum(tl.sum(weights), LEAST_TOTAL) * SHARE_UNIT + 0.5).to(tl.int64)


@triton.jit
def clear_group(sums_E, flags_E, members_4, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    inside = experts < EXPERTS
    tl.store(sums_E + experts, tl.zeros([BLOCK_E], tl.int64), mask=inside)
    tl.store(flags_E + experts, tl.zeros([BLOCK_E], tl.int32), mask=inside)
    tl.store(members_4 + tl.arange(0, 4), tl.zeros([4], tl.int32))


@triton.jit
def add_up(counts, totals, ticket, sharing, steps_SE, num_steps, shares, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
           FOLLOW: tl.constexpr):  # fmt: skip
    """By the last row: what all rows counted goes to the layer's totals, and the buffers are zero again."""
    experts, lanes = tl.arange(0, BLOCK_E), tl.arange(0, LANES)
    overflow = tl.sum(tl.zeros([BLOCK_E], tl.int32))
    for step in range(num_steps):
        # exchanges, like the atomic operations of other programs, pass by the cache of this one
        bits = tl.atomic_xchg(steps_SE + step * EXPERTS + experts, 0, mask=experts < EXPERTS, sem="relaxed")
        bits = tl.where(experts < EXPERTS, bits, 0)
        overflow += tl.sum((((bits & ADDED) != 0) & ((bits & COVERED) == 0)).to(tl.int32))
    counted = tl.atomic_xchg(counts + lanes, tl.zeros([LANES], tl.int64), sem="relaxed")
    counted = lane(counted, FLOOR_OVERFLOW, overflow)
    values = tl.where(lanes == CALLS, 1, tl.where(lanes == STEPS, num_steps, counted)).to(tl.float64)
    values = tl.where(lanes >= FIRST_SHARE, values / SHARE_UNIT, values)
    if FOLLOW:  # a recorded graph also runs where no row shares, which does not count
        values = tl.where(shares > 0, values, 0.0)
    before = tl.load(totals + lanes, mask=lanes < COUNTED, other=0.0)
    tl.store(totals + lanes, before + values, mask=lanes < COUNTED)
    tl.store(ticket, 0)
    if FOLLOW:
        tl.store(sharing, 0)
