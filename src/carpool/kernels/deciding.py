"""The second launch: one program a row gives the row its experts and weights; the last ones count and clean up."""

from __future__ import annotations

import triton
import triton.language as tl

from carpool.kernels.coresets import coreset
from carpool.kernels.counting import (
    ADDED,
    COMPUTED,
    CORESET,
    COVERED,
    DISPLACED,
    EXPECTED,
    LANES,
    NATIVELY,
    NATURAL_UNION,
    PAIRS,
    ROWS,
    ROWS_CHANGED,
    ROWS_EXEMPT,
    ROWS_NONFINITE,
    STOOD_IN,
    SURROGATE_PAIRS,
    SURROGATES,
    UNION,
    add_up,
    clear_group,
    lane,
    set_first,
    share,
)
from carpool.kernels.mixing import in_front, merged, mix, take
from carpool.kernels.packed import (
    EXEMPT,
    NATIVE_BIT,
    NONFINITE,
    READ,
    REAL,
    VOTER,
    expert_of,
    preference,
    rank_of,
    rounded,
)
from carpool.kernels.rules import floored, front, stand_ins


@triton.jit
def decide(
    scores_NE, weights_NE, ids_NK, native_NK,
    group_N, step_N, real_N, scale_E,
    size, number, tau, sensitivity, list_E, protected_E, similarity_EE, keys_EE, loss_E, left_E,
    sums_GE, flags_GE, members_G4, state_N, sharing, steps_SE, num_steps, counts, ticket, totals,
    out_ids_NK, out_NK, left_ids_NK, left_NK,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, SCORES: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    RENORMALIZE: tl.constexpr, EPS: tl.constexpr, SCALING: tl.constexpr, DTYPE: tl.constexpr,
    RULE: tl.constexpr, ASSIGN: tl.constexpr, UTILITY: tl.constexpr, WARMUP: tl.constexpr,
    MIX: tl.constexpr, STIR: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, LEAST: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """The routing of one row.

    Args:
        scores_NE to real_N: as `plans.pipeline.decide` takes them. scale_E: `RouteSpec.per_expert_scale_E`.
        size, number, tau: 0-d tensors, of the coreset, of the rule and of the floor. sensitivity to left_E: what
            `Policy.prepare` made of the layer's statistics; None where the policy has none.
        sums_GE to sharing: what the first launch left; zero again afterwards. steps_SE, counts, ticket: zero before
            and after. totals: float64, the layer's counters, added to.
        out_ids_NK, out_NK, left_ids_NK, left_NK: written.
        FOLLOW: padding gets the first row's experts, and counters grow only where a row votes.
    """
    row = tl.program_id(0)
    experts, slots = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside, held = experts < EXPERTS, slots < TOP_K
    source, group, shares = row, row, 1
    if FOLLOW:
        follows = tl.load(real_N + row) == 0
        shares = tl.load(sharing)
        source, group = tl.where(follows & (shares > 0), 0, row), tl.where(follows, 0, row)
    own = source == row
    group = tl.load(group_N + group)
    members_4 = members_G4 + group * 4
    state = tl.load(state_N + source)
    exempt = (state & EXEMPT) != 0
    rows, voters = tl.load(members_4), tl.load(members_4 + 1)

    ids_K = tl.maximum(tl.load(ids_NK + source * TOP_K + slots, mask=held, other=0).to(tl.int32), 0)
    weights_E, scores_E = weights_NE + source * EXPERTS, scores_NE + source * EXPERTS
    native_KE = (ids_K[:, None] == experts[None, :]) & held[:, None]
    native_E = tl.sum(native_KE.to(tl.int32), 0) > 0
    core_E = experts < 0
    if exempt == 0:
        core_E = coreset(
            sums_GE + group * EXPERTS, flags_GE + group * EXPERTS, voters, size, list_E, protected_E,
            EXPERTS, BLOCK_E, CHUNK, RULE, UTILITY, WARMUP, MIX, STIR, FIRST, SECOND, THIRD, LEAST,
        )  # fmt: skip

    raw_K = tl.load(weights_E + ids_K, mask=held, other=0.0).to(tl.float64)
    own_K = raw_K
    if scale_E is not None:
        own_K = raw_K * tl.load(scale_E + ids_K, mask=held, other=0.0).to(tl.float64)

    # which native experts the row keeps, by slot
    may_E, targets_K = core_E, ids_K
    if RULE == "list":
        may_E = (tl.load(list_E + experts, mask=inside, other=0) != 0) & inside
    if RULE == "coreset" or RULE == "list" or RULE == "similar":
        may_K = tl.sum((native_KE & may_E[None, :]).to(tl.int32), 1) > 0
        if RULE == "similar":
            threshold = tl.load(number).to(tl.float32)
            targets_K, moves_K = stand_ins(
                similarity_EE, keys_EE, ids_K, held, core_E, threshold, EXPERTS, BLOCK_E
            )  # fmt: skip
            may_K = may_K | (moves_K == 0)
    elif RULE == "rank":
        keys_K = preference(scores_E, ids_K, held, EXPERTS, GROUPS, KEPT, TOP2, SCORES, BLOCK_G, BLOCK_S) | NATIVE_BIT
        may_K = rank_of(keys_K, held) < tl.load(number)
    else:
        front_K = raw_K if RULE == "top_p" else own_K
        may_K = front(front_K, weights_E, held, tl.load(number).to(tl.float64), sensitivity, RULE, EXPERTS, BLOCK_E)
    may_K = may_K | exempt | (voters < LEAST)
    if protected_E is not None:
        may_K = may_K | (tl.load(protected_E + ids_K, mask=held, other=0) != 0)
    added_K = tl.zeros_like(held)
    if tau is not None:
        added_K = floored(own_K, may_K, held, tl.load(tau).to(tl.float64))
    may_K = (may_K | added_K) & held
    changed = tl.sum((held & (may_K == 0)).to(tl.int32)) > 0

    # what takes the place of the others
    new_K, mixed_K = ids_K, tl.zeros([BLOCK_K], tl.float32)
    stood_K, stood_in_K = ids_K, tl.zeros([BLOCK_K], tl.float32)
    if changed:
        if ASSIGN == "keep" or ASSIGN == "merge":
            whole_K = mix(weights_E, ids_K, held, slots, scale_E, RENORMALIZE, EPS, SCALING, DTYPE)
            if ASSIGN == "keep":
                new_K, mixed_K = in_front(ids_K, whole_K, may_K)
            else:
                new_K, mixed_K = merged(tl.where(may_K, ids_K, targets_K), whole_K, held, DTYPE)
        else:
            kept_E = tl.sum((native_KE & may_K[:, None]).to(tl.int32), 0) > 0
            may_E = kept_E | (may_E & (native_E == 0)) if RULE == "coreset" or RULE == "list" else kept_E
            keys_E = preference(scores_E, experts, inside, EXPERTS, GROUPS, KEPT, TOP2, SCORES, BLOCK_G, BLOCK_S)
            keys_E = tl.where(native_E, keys_E | NATIVE_BIT, keys_E)
            taken_E, none = may_E, False
            if ASSIGN == "drop":
                none = tl.sum(may_K.to(tl.int32)) == 0
                taken_E = may_E & (native_E | none)
            elif ASSIGN == "leave":
                taken_E = may_E | (native_E & (tl.load(left_E + experts, mask=inside, other=0) != 0))
            new_K, kept_K = take(tl.where(taken_E, keys_E, -1), none, slots, TOP_K)
            mixed_K = mix(weights_E, new_K, kept_K, slots, scale_E, RENORMALIZE, EPS, SCALING, DTYPE)
            if ASSIGN == "leave":
                read_K = tl.sum(((new_K[:, None] == experts[None, :]) & may_E[None, :]).to(tl.int32), 1) > 0
                best = expert_of(tl.max(tl.where(may_E, keys_E, -1))).to(tl.int32)
                stood_K, stood_in_K = new_K, tl.where(read_K, 0.0, mixed_K)
                new_K, mixed_K = tl.where(read_K, new_K, best), tl.where(read_K, mixed_K, 0.0)

    changed = changed & own
    host_K = tl.load(native_NK + row * TOP_K + slots, mask=held, other=0.0)
    final_K = tl.where(changed, rounded(mixed_K, host_K.dtype).to(host_K.dtype), host_K)
    skipped_K = tl.load(ids_NK + row * TOP_K + slots, mask=held, other=0).to(tl.int32)
    shown_K = tl.where(skipped_K < 0, skipped_K, new_K)  # the experts' kernel knows such padding
    tl.store(out_ids_NK + row * TOP_K + slots, shown_K.to(out_ids_NK.dtype.element_ty), mask=held)
    tl.store(out_NK + row * TOP_K + slots, final_K, mask=held)
    if ASSIGN == "leave":
        stood_in_K = tl.where(changed, stood_in_K, 0.0)
        tl.store(left_ids_NK + row * TOP_K + slots, stood_K, mask=held)
        tl.store(left_NK + row * TOP_K + slots, stood_in_K, mask=held)

    # count, and leave the buffers as they were found
    real, read = own & ((state & REAL) != 0), own & ((state & READ) != 0)
    nonfinite = read & ((state & NONFINITE) != 0)
    step_E = steps_SE + tl.load(step_N + row) * EXPERTS
    bits_K = tl.where(read, NATIVELY, 0) | tl.where(added_K & own, ADDED, 0)
    natural = set_first(step_E, ids_K, bits_K, NATIVELY, held)
    bits_K = tl.where(read, COMPUTED, 0) | tl.zeros_like(slots)
    if tau is not None:
        only_K = tl.sum(((new_K[:, None] == ids_K[None, :]) & added_K[None, :]).to(tl.int32), 1) > 0
        bits_K = bits_K | tl.where(read & (only_K == 0), COVERED, 0)
    union = set_first(step_E, new_K, bits_K, COMPUTED, held)

    values = tl.zeros([LANES], tl.int64)
    values = lane(values, ROWS, read)
    values = lane(values, ROWS_EXEMPT, real & exempt)
    values = lane(values, ROWS_CHANGED, changed)
    values = lane(values, ROWS_NONFINITE, nonfinite)
    values = lane(values, NATURAL_UNION, natural)
    values = lane(values, UNION, union)
    values = lane(values, PAIRS, tl.sum((read & held & (final_K != 0)).to(tl.int32)))
    lost_K = tl.where(may_K | (changed == 0), 0.0, own_K)
    displaced = share(lost_K, own_K)
    values = lane(values, DISPLACED, displaced)
    if loss_E is not None:
        displaced = share(lost_K * tl.load(loss_E + ids_K, mask=held, other=0.0).to(tl.float64), own_K)
    values = lane(values, EXPECTED, displaced)
    if ASSIGN == "leave":
        left_K = held & (stood_in_K != 0)
        values = lane(values, SURROGATES, set_first(step_E, stood_K, tl.where(left_K, STOOD_IN, 0), STOOD_IN, held))
        values = lane(values, SURROGATE_PAIRS, tl.sum(left_K.to(tl.int32)))
    if ((state & VOTER) != 0) & own:
        first = tl.atomic_add(members_4 + 3, 1, sem="relaxed") == 0  # of its group: all of it have one coreset
        values = lane(values, CORESET, tl.where(first, tl.sum(core_E.to(tl.int32)), 0))

    tl.debug_barrier()
    if tl.atomic_add(members_4 + 2, 1, sem="acq_rel") == rows - 1:
        clear_group(sums_GE + group * EXPERTS, flags_GE + group * EXPERTS, members_4, EXPERTS, BLOCK_E)
    tl.atomic_add(counts + tl.arange(0, LANES), values, mask=values != 0, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        add_up(counts, totals, ticket, sharing, steps_SE, num_steps, shares, EXPERTS, BLOCK_E, FOLLOW)
