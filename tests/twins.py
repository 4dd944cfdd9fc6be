"""Slow, obvious versions of every method: loops over rows and plain Python numbers, written from the papers' equations.

Nothing here comes from `carpool`: the fixed-point rule and the tie rule are restated. A twin is three small functions
(`Twin`): which experts a group may use, which a row may use, and what a row is given. `run` puts them together with
the guards. To add a policy, write its `coreset` (or `allowed`/`assign`) and name the `Twin` in `policies_under_test`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

Choice = dict[int, float]  # expert -> weight, of one row


def single(value: float) -> float:
    """Rounded to single precision."""
    return struct.unpack("f", struct.pack("f", value))[0]


def fixed(value: float) -> int:
    """A weight as a whole number of 2**-28 parts, rounded down, at most (the single-precision) 15.99."""
    return int(min(max(value, 0.0), single(15.99)) * 2**28)


def tie(expert: int) -> int:
    """Which of two equal experts wins: the one with the larger number here."""
    return (761 + 1267 * expert) % 2048


@dataclass
class World:
    """One layer's batch in plain lists; `[N]` and `[N][E]` like the tensors of the same names."""

    scores: list[list[float]]
    weights: list[list[float]]
    native: list[list[int]]
    top_k: int
    num_experts: int
    group: list[int]
    num_groups: int
    step: list[int]
    real: list[bool]
    voter: list[bool]
    exempt: list[bool]
    prefill: list[bool]
    kept: list[list[bool]] | None = None  # experts in the expert groups that the model allows a row
    renormalize: bool = True
    eps: float = 0.0
    scaling: float = 1.0
    per_expert: list[float] | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # e.g. device_E as a list, hidden states

    @property
    def rows(self) -> range:
        return range(len(self.scores))

    def voters(self, group: int) -> list[int]:
        return [row for row in self.rows if self.group[row] == group and self.voter[row]]

    def order(self, row: int) -> list[int]:
        """A row's experts by preference: native ones, then those in its allowed expert groups, then the others."""

        def key(expert: int) -> tuple[bool, bool, float, int]:
            inside = self.kept is None or self.kept[row][expert]
            return expert in self.native[row], inside, self.scores[row][expert], tie(expert)

        return sorted(range(self.num_experts), key=key, reverse=True)

    def free(self, group: int) -> set[int]:
        """What exempt rows of the group read."""
        exempt = [row for row in self.rows if self.exempt[row] and self.real[row] and self.group[row] == group]
        return {expert for row in exempt for expert in self.native[row]}

    def native_weight(self, row: int, expert: int) -> float:
        """Share of a native expert up to the row's common factor."""
        return self.weights[row][expert] * (1.0 if self.per_expert is None else self.per_expert[expert])

    def mixed(self, row: int, experts: list[int]) -> Choice:
        """The model's weights of these experts, best first."""
        raw = [self.weights[row][expert] for expert in experts]
        if self.renormalize:
            total = sum(raw)
            raw = [w / (total + self.eps) for w in raw] if total > 0 else [1.0] + [0.0] * (len(raw) - 1)
        scale = [1.0 if self.per_expert is None else self.per_expert[expert] for expert in experts]
        return {expert: w * self.scaling * s for expert, w, s in zip(experts, raw, scale, strict=True)}


def top_by(values: dict[int, int], size: int) -> set[int]:
    """The `size` experts of largest value, ties by the tie rule."""
    return set(sorted(values, key=lambda expert: (values[expert], tie(expert)), reverse=True)[:size])


def count(budget: float | int, num_experts: int) -> int:
    """A budget as a number of experts; a share is the simple fraction that its binary form stands for."""
    return int(Fraction(budget).limit_denominator(10**6) * num_experts) if isinstance(budget, float) else budget


# -- the three functions of a twin, with their defaults ----------------------------------------------------------


def every_expert(world: World, group: int, policy: Any) -> set[int]:
    return set(range(world.num_experts))


def the_coreset(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    return set(coreset)


def backfill(world: World, row: int, policy: Any, allowed: set[int], coreset: set[int]) -> Choice:
    """The row's best K allowed experts."""
    return world.mixed(row, [expert for expert in world.order(row) if expert in allowed][: world.top_k])


def drop(world: World, row: int, policy: Any, allowed: set[int], coreset: set[int]) -> Choice:
    """The row's native experts that are allowed; its best allowed one if there is none."""
    best = [expert for expert in world.order(row) if expert in allowed]
    native = [expert for expert in best if expert in world.native[row]]
    return world.mixed(row, native or best[:1])


@dataclass(frozen=True)
class Twin:
    coreset: Callable[[World, int, Any], set[int]] = every_expert
    allowed: Callable[[World, int, Any, set[int]], set[int]] = the_coreset
    assign: Callable[[World, int, Any, set[int], set[int]], Choice] = backfill
    # largest coreset a budget asks for, or None; for short_circuit
    limit: Callable[[World, Any], int | None] = lambda world, policy: None


# -- methods -------------------------------------------------------------------------------------------------------


def topk_allowed(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    """A smaller K."""
    return set(world.order(row)[: int(policy.k)])


def oea_coreset(world: World, group: int, policy: Any) -> set[int]:
    """OEA, simplified algorithm: S_base = union over tokens of TopK(R(x), k0). DES-Seq, equation 5, is the same."""
    return {expert for row in world.voters(group) for expert in world.order(row)[: int(policy.k0)]}


def xshare_coreset(world: World, group: int, policy: Any) -> set[int]:
    """XShare: S0 = union of top-`warmup`; u_e = sum over tokens of g_te; add argmax u until |S| = m (free ones not
    counted)."""
    free = world.free(group)
    chosen: set[int] = set()
    for row in world.voters(group):
        chosen |= set(world.order(row)[: int(policy.warmup)])
    mass = dict.fromkeys(range(world.num_experts), 0)
    for row in world.voters(group):
        for expert in mass:
            g = world.weights[row][expert]
            if policy.utility == "squared":
                g = single(g * g)
            if policy.utility == "topk_mass":
                g = single(world.native_weight(row, expert)) if expert in world.native[row] else 0.0
            mass[expert] += fixed(g)
    while len(chosen - free) < count(policy.budget, world.num_experts):
        left = {expert: u for expert, u in mass.items() if expert not in chosen | free}
        if not left:
            break
        chosen.add(max(left, key=lambda expert: (left[expert], tie(expert))))
    return chosen


def xshare_limit(world: World, policy: Any) -> int:
    return count(policy.budget, world.num_experts)


def des_vote_limit(world: World, policy: Any) -> int:
    return count(policy.beta if policy.size is None else policy.size, world.num_experts)


def des_vote_coreset(world: World, group: int, policy: Any) -> set[int]:
    """DES-Vote, equation 6: V_i = sum over tokens of the weight of expert i where i is in the token's own top-K."""
    votes = {expert: 0 for expert in range(world.num_experts) if expert not in world.free(group)}
    for row in world.voters(group):
        for expert in world.native[row]:
            if expert in votes:
                votes[expert] += fixed(single(world.native_weight(row, expert)))
    return top_by(votes, des_vote_limit(world, policy))


def sere_coreset(world: World, group: int, policy: Any) -> set[int]:
    """SERE's primaries: E_p = union over tokens of the top-S experts."""
    return {expert for row in world.voters(group) for expert in world.order(row)[: int(policy.top)]}


def sere_target(world: World, policy: Any, expert: int, primaries: set[int]) -> int | None:
    """The most similar primary if it is similar enough."""
    similarity = world.stats[f"similarity_{policy.metric}"][expert]
    best = max(primaries, key=lambda primary: (similarity[primary], tie(primary)))
    return best if similarity[best] >= float(policy.threshold) else None


def sere_allowed(world: World, row: int, policy: Any, coreset: set[int]) -> set[int]:
    """Primaries and the row's critical experts."""
    critical = {e for e in world.native[row] if e not in coreset and sere_target(world, policy, e, coreset) is None}
    return coreset | critical


def sere_assign(world: World, row: int, policy: Any, allowed: set[int], coreset: set[int]) -> Choice:
    """Slots move with the weight the router gave them; slots that meet add up."""
    given: Choice = {}
    for expert, weight in world.mixed(row, world.native[row]).items():
        target = expert if expert in allowed else sere_target(world, policy, expert, coreset)
        assert target is not None
        given[target] = given.get(target, 0.0) + weight
    return given


TOPK = Twin(allowed=topk_allowed, assign=drop)
OEA = Twin(coreset=oea_coreset)
XSHARE = Twin(coreset=xshare_coreset, limit=xshare_limit)
DES_VOTE = Twin(coreset=des_vote_coreset, limit=des_vote_limit)
SERE = Twin(coreset=sere_coreset, allowed=sere_allowed, assign=sere_assign)


# -- guards and the whole way --------------------------------------------------------------------------------------


def floor_adds(world: World, row: int, tau: float, allowed: set[int]) -> set[int]:
    """The row's heaviest displaced native experts, until no more than `tau` of its native weight is displaced."""
    order = sorted(world.native[row], key=lambda e: -world.native_weight(row, e))
    total = sum(world.native_weight(row, e) for e in order)
    out = [e for e in order if e not in allowed]
    added = set()
    while out and (tau == 0 or sum(world.native_weight(row, e) for e in out) > tau * total):
        added.add(out.pop(0))
    return added


def regret_adds(world: World, row: int, tau: float, allowed: set[int], *, fills: bool) -> set[int]:
    """The row's heaviest displaced native experts, as few as leave it at most `tau` of routing probability short."""
    chance = [Fraction(weight) for weight in world.weights[row]]
    native = sorted(world.native[row], key=lambda e: -chance[e])
    out = [e for e in native if e not in allowed]
    others = [e for e in world.order(row) if e in allowed and e not in native] if fills else []

    def short(back: int) -> Fraction:
        missing = out[back:]
        return sum(chance[e] for e in missing) - sum(chance[e] for e in others[: len(missing)])

    bad = [back for back in range(len(out)) if short(back) > Fraction(tau) * sum(chance)]
    return set(out[: max(bad) + 1]) if bad else set()


@dataclass
class Result:
    choices: list[Choice]
    coresets: list[set[int]]
    displaced: list[float]
    changed: list[bool]
    world: World


def run(world: World, twin: Twin, policy: Any, guards: tuple[Any, ...] = (), kind: str = "group") -> Result:
    """Route every row of the world."""
    if any(guard.name == "decode_only" for guard in guards):
        exempt = [a or b for a, b in zip(world.exempt, world.prefill, strict=True)]
        voter = [a and not b for a, b in zip(world.voter, world.prefill, strict=True)]
        world = replace(world, exempt=exempt, voter=voter)
    everything = set(range(world.num_experts))
    coresets, native_groups = [], []
    for group in range(world.num_groups):
        voters = world.voters(group)
        natural = {expert for row in voters for expert in world.native[row]}
        coreset = twin.coreset(world, group, policy) | world.free(group) if voters else set(everything)
        few = False
        for guard in guards:
            if guard.name == "protect" and voters:
                coreset |= natural & set(guard.experts)
            if guard.name == "min_batch" and kind == "group" and len(voters) < guard.voters:
                coreset, few = set(everything), True
            limit = twin.limit(world, policy)
            fits = limit is not None and len(natural - world.free(group)) <= limit
            if guard.name == "short_circuit" and voters and fits and coreset != everything:
                coreset = natural | world.free(group)
        coresets.append(coreset)
        native_groups.append(few)
    choices, displaced, changed = [], [], []
    for row in world.rows:
        coreset = coresets[world.group[row]]
        allowed = twin.allowed(world, row, policy, coreset)
        if world.exempt[row] or native_groups[world.group[row]]:
            allowed = allowed | everything
        for guard in guards:
            if guard.name == "protect":
                allowed |= set(world.native[row]) & set(guard.experts)
        for guard in guards:
            if guard.name == "floor":
                allowed |= floor_adds(world, row, float(guard.tau), allowed)
        for guard in guards:
            if guard.name == "regret":
                allowed |= regret_adds(world, row, float(guard.tau), allowed, fills=twin.assign is backfill)
        lost = [expert for expert in world.native[row] if expert not in allowed]
        if lost:
            choices.append(twin.assign(world, row, policy, allowed, coreset))
        else:
            choices.append(world.mixed(row, world.native[row]))
        total = sum(world.native_weight(row, expert) for expert in world.native[row])
        displaced.append(sum(world.native_weight(row, expert) for expert in lost) / total if total else 0.0)
        changed.append(bool(lost))
    return Result(choices, coresets, displaced, changed, world)
