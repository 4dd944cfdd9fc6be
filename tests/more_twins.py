"""Slow versions of the methods that `twins` does not hold; same rules: plain loops, written from the equations."""

from __future__ import annotations

import math
from typing import Any

from twins import Choice, Twin, World, count, drop, fixed, single, top_by


def best_of(world: World, rows: list[int], number: int) -> set[int]:
    """Union of the rows' first choices."""
    return {expert for row in rows for expert in world.order(row)[:number]}


def column_sums(world: World, rows: list[int]) -> dict[int, int]:
    """Gating mass: u_e = sum over tokens of g_te."""
    return {e: sum(fixed(world.weights[row][e]) for row in rows) for e in range(world.num_experts)}


def fill(chosen: set[int], values: dict[int, int], size: int, free: set[int]) -> set[int]:
    """Add the most valuable of the other experts until there are `size`; free ones neither count nor are added."""
    left = {expert: value for expert, value in values.items() if expert not in chosen | free}
    return chosen | top_by(left, max(0, size - len(chosen - free)))


def budget_limit(world: World, policy: Any) -> int:
    return count(policy.budget, world.num_experts)


# -- coresets ------------------------------------------------------------------------------------------------------


def lynx_coreset(world: World, group: int, policy: Any) -> set[int]:
    """Lynx: cnt_e = number of tokens with e in their top-K; the most frequent ones, and every token's best."""
    voters = world.voters(group)
    popularity = {e: sum(e in world.native[row] for row in voters) for e in range(world.num_experts)}
    return fill(best_of(world, voters, 1), popularity, budget_limit(world, policy), world.free(group))


def random_coreset(world: World, group: int, policy: Any) -> set[int]:
    """The control: every token's best, and others by a number that a hash of all column sums gives each that somebody
    picks. Whole numbers modulo 2**64, read as signed where they are shifted."""

    def signed(number: int) -> int:
        return (number + 2**63) % 2**64 - 2**63

    def multiplier(number: int) -> int:
        bits = (number + 1) * 11400714819323198485 % 2**64
        bits = (bits ^ bits // 2**30) * 13787848793156543929 % 2**64
        return (bits ^ bits // 2**27) * 10723151780598845931 % 2**64 // 2 * 2 + 1

    voters = world.voters(group)
    own = []
    for expert, mass in column_sums(world, voters).items():
        mixed = signed((mass + expert * 2**51) * multiplier(2 * policy.seed))
        own.append(mixed ^ (mixed >> 32))
    every = signed(sum(own))
    draw = {e: (signed((one ^ every) * multiplier(2 * policy.seed + 1)) >> 24) % 2**40 for e, one in enumerate(own)}
    picked = {expert for row in voters for expert in world.native[row]}
    draw = {expert: draw[expert] if expert in picked else 0 for expert in draw}
    chosen = best_of(world, voters, int(policy.warmup))
    return fill(chosen, draw, budget_limit(world, policy), world.free(group))


def base_cost(world: World, group: int) -> dict[int, int]:
    """BASE: D_e = sum over tokens with e in their top-K of w^2 * ||E_e(x)||^2, the norm predicted as exp(a.x + b)."""
    weight, bias, scale = (world.stats[name] for name in ("norm_weight", "norm_bias", "norm_scale"))
    cost = dict.fromkeys(range(world.num_experts), 0)
    for row in world.voters(group):
        for e in world.native[row]:
            log_norm = sum(a * x for a, x in zip(weight[e], world.extra["hidden"][row], strict=True)) + bias[e]
            energy = min(math.exp(min(2 * (log_norm - scale), 500.0)), 1e12)
            cost[e] += fixed(energy * world.native_weight(row, e) ** 2)
    return cost


def base_coreset(world: World, group: int, policy: Any) -> set[int]:
    return fill(set(), base_cost(world, group), budget_limit(world, policy), world.free(group))


def expert_parallel_coreset(world: World, group: int, policy: Any) -> set[int]:
    """XShare, expert parallel: after the warm-up, each device adds its own best experts up to its cap."""
    voters, free, device = world.voters(group), world.free(group), world.extra["device_E"]
    mass, chosen = column_sums(world, voters), best_of(world, voters, int(policy.warmup))
    for number in set(device):
        held = {e for e in range(world.num_experts) if device[e] == number}
        cap = policy.budget_per_device
        cap = max(1, math.floor(cap * len(held))) if isinstance(cap, float) else int(cap)
        chosen |= fill(chosen & held, {e: mass[e] for e in held}, cap, free)
    return chosen


def speculative_coreset(world: World, group: int, policy: Any) -> set[int]:
    """XShare, speculative: S_r of each request; their union S; then S topped up to, or pruned to, the budget."""
    request, free, warmup = world.extra["request_N"], world.free(group), int(policy.warmup)
    voters = world.voters(group)
    union: set[int] = set()
    for number in {request[row] for row in voters}:
        own = [row for row in voters if request[row] == number]
        size = count(policy.request_budget, world.num_experts)
        union |= fill(best_of(world, own, warmup), column_sums(world, own), size, free)
    size, mass = budget_limit(world, policy), column_sums(world, voters)
    if policy.merge == "topup":
        return fill(union, mass, size, free)
    return fill(best_of(world, voters, warmup), {e: mass[e] for e in union}, size, free)


# -- skipping ------------------------------------------------------------------------------------------------------


def by_weight(world: World, row: int, scaled: bool = True) -> list[tuple[int, int]]:
    """The row's native experts, heaviest first (the host's order among equals), with fixed-point weights."""
    weight = {e: world.native_weight(row, e) if scaled else world.weights[row][e] for e in world.native[row]}
    return [(expert, fixed(single(weight[expert]))) for expert in sorted(weight, key=lambda e: -weight[e])]


def top_p_allowed(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    """Dynamic routing: the smallest t with p_1 + ... + p_t > p."""
    total, reached, kept = sum(fixed(w) for w in world.weights[row]), 0, set()
    for expert, weight in by_weight(world, row, scaled=False):
        if kept and reached > float(policy.p) * total:
            break
        kept.add(expert)
        reached += weight
    return kept


def tail_mass_allowed(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    """NAEE for any K: experts j..K go if their mass is below beta times the mass of all K."""
    pairs = by_weight(world, row)
    total = sum(weight for _, weight in pairs)
    for j in range(1, len(pairs)):
        if sum(weight for _, weight in pairs[j:]) < float(policy.beta) * total:
            return {expert for expert, _ in pairs[:j]}
    return {expert for expert, _ in pairs}


def layer_threshold_allowed(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    """MoDES: expert i goes if alpha_l * g_i < tau; the heaviest one stays."""
    pairs, alpha = by_weight(world, row), world.stats["sensitivity"]
    total = sum(weight for _, weight in pairs)
    # products, not quotients: a weight of 0 out of 0 is not below 0
    return {e for j, (e, weight) in enumerate(pairs) if j == 0 or alpha * weight >= float(policy.tau) * total}


def odp_allowed(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    """MC: rank j goes if w_j / w_1 is below the quantile of its rank; important tokens keep all."""

    def quantile(values: list[float], share: float) -> float:
        place = share * (len(values) - 1)
        low = min(int(place), len(values) - 2)
        return values[low] + (values[low + 1] - values[low]) * (place - low)

    pairs, size = by_weight(world, row), sum(abs(value) for value in world.extra["hidden"][row])
    if policy.quantile == 0 or (
        policy.protect > 0 and size >= quantile(world.stats["l1_quantiles"], 1 - policy.protect)
    ):
        return {e for e, _ in pairs}
    least = [quantile(values, policy.quantile) for values in world.stats["ratio_quantiles"]]
    return {e for j, (e, weight) in enumerate(pairs) if j == 0 or weight >= least[j] * pairs[0][1]}


def odp_assign(world: World, row: int, policy: Any, allowed: set[int], coreset: set[int]) -> Choice:
    return drop(world, row, policy, allowed, coreset)


def c2r_allowed(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    """The best expert, and those that text chooses most often with it; of equal counts the lower number first."""
    best = world.order(row)[0]
    counts = world.stats["coactivation"][best]
    others = sorted((e for e in range(world.num_experts) if e != best), key=lambda e: (-counts[e], e))
    return {best, *others[: policy.partners]}


def skip_assign(world: World, row: int, policy: Any, allowed: set[int], coreset: set[int]) -> Choice:
    """What is left, mixed anew or with the weights it had."""
    if policy.renormalize:
        return drop(world, row, policy, allowed, coreset)
    return {e: weight for e, weight in world.mixed(row, world.native[row]).items() if e in allowed}


# -- allow lists ---------------------------------------------------------------------------------------------------


def listed(world: World, policy: Any) -> set[int]:
    """The layer's list: given, or the highest scores of EASY-EP or REAP."""
    if policy.experts is not None:
        return set(policy.experts)
    name = policy.score if policy.domain is None else "easy_ep/" + policy.domain
    scores = {expert: int(single(score) * 2**40) for expert, score in enumerate(world.stats[name])}
    return top_by(scores, count(policy.size, world.num_experts))


def allow_list_assign(world: World, row: int, policy: Any, allowed: set[int], coreset: set[int]) -> Choice:
    return (drop if policy.fill == "drop" else BACKFILL.assign)(world, row, policy, allowed, coreset)


BACKFILL = Twin()
LYNX = Twin(coreset=lynx_coreset, limit=budget_limit)
RANDOM = Twin(coreset=random_coreset, limit=budget_limit)
BASE = Twin(coreset=base_coreset, limit=budget_limit)
EXPERT_PARALLEL = Twin(coreset=expert_parallel_coreset)
SPECULATIVE = Twin(coreset=speculative_coreset, limit=budget_limit)
TOP_P = Twin(allowed=top_p_allowed, assign=skip_assign)
TAIL_MASS = Twin(allowed=tail_mass_allowed, assign=skip_assign)
LAYER_THRESHOLD = Twin(allowed=layer_threshold_allowed, assign=skip_assign)
ODP = Twin(allowed=odp_allowed, assign=odp_assign)
C2R = Twin(allowed=c2r_allowed)
ALLOW_LIST = Twin(
    coreset=lambda world, group, policy: listed(world, policy),
    allowed=lambda world, row, policy, coreset: listed(world, policy),
    assign=allow_list_assign,
)
