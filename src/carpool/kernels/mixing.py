"""Experts and weights of one row: what stands in a slot, and what it weighs by the model's rule."""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.kernels.packed import expert_of, rounded


@triton.jit
def take(keys_E, first_only, slots, TOP_K: tl.constexpr):
    """The experts with the largest keys, in their order; keys below 0 are not taken.

    Args:
        keys_E: distinct, at least one of 0 or more. first_only: take one.

    Returns:
        ids (the first in place of missing ones) and whether a slot holds an expert of its own.
    """
    best = tl.max(keys_E)
    first = expert_of(best).to(tl.int32)
    ids = tl.zeros_like(slots) + first
    kept = slots == 0
    for slot in range(1, TOP_K):
        keys_E = tl.where(keys_E == best, -1, keys_E)
        best = tl.max(keys_E)
        here = (slots == slot) & (best >= 0) & (first_only == 0)
        ids = tl.where(here, expert_of(best).to(tl.int32), ids)
        kept = kept | here
    return ids, kept


@triton.jit
def mix(weights_E, ids, kept, slots, scale_E, RENORMALIZE: tl.constexpr, EPS: tl.constexpr, SCALING: tl.constexpr,
        DTYPE: tl.constexpr):  # fmt: skip
    """`RouteSpec.mix` for the row whose weights begin at `weights_E`, in float32 after rounding to `DTYPE`."""
    raw = tl.load(weights_E + ids, mask=kept, other=0.0)
    if RENORMALIZE:
        total = tl.sum(raw)
        raw = tl.where(total > 0, tl.div_rn(raw, total + EPS), (slots == 0).to(tl.float32))
    if SCALING != 1.0:
        raw = raw * SCALING
    if scale_E is not None:
        raw = raw * tl.load(scale_E + ids, mask=kept, other=0.0)
    return rounded(raw, DTYPE)


@triton.jit
def in_front(ids, weights, kept):
    """What is kept in front, in its order, freed slots after it (`policies.skipping.skip`)."""
    slots = tl.arange(0, ids.shape[0])
    before = slots[None, :] < slots[:, None]
    place = tl.sum((kept[None, :] & before).to(tl.int32), 1)
    lands = kept[None, :] & (place[None, :] == slots[:, None])  # slot, from
    first = tl.sum(tl.where(kept & (place == 0), ids, 0))
    filled = tl.sum(lands.to(tl.int32), 1) > 0
    ids = tl.where(filled, tl.sum(tl.where(lands, ids[None, :], 0), 1), first)
    return ids, tl.sum(tl.where(lands, weights[None, :], 0.0), 1)


@triton.jit
def merged(ids, weights, held, DTYPE: tl.constexpr):
    """`policies.base.merge_duplicates`."""
    slots = tl.arange(0, ids.shape[0])
    same = (ids[:, None] == ids[None, :]) & held[None, :]
    earlier = tl.sum((same & (slots[None, :] < slots[:, None])).to(tl.int32), 1)
    first = earlier == 0
    weights = rounded(tl.sum(tl.where(same, weights[None, :], 0.0), 1), DTYPE)
    return tl.where(first, ids, tl.sum(tl.where(slots == 0, ids, 0))), tl.where(first, weights, 0.0)
