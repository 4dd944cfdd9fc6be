"""What a plan asks of the kernels: the few traits in which policies differ, or why it keeps the general path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from carpool.plans.grammar import Plan
from carpool.plans.guards import DecodeOnly, Floor, Guard, MinBatch, Protect, ShortCircuit
from carpool.policies import (
    BASE,
    C2R,
    ODP,
    OEA,
    SERE,
    AllowList,
    BitPlan,
    Depth,
    DESSeq,
    DESVote,
    Hobbit,
    LayerThreshold,
    Lynx,
    Policy,
    RandomCoreset,
    Surrogate,
    TailMass,
    TopK,
    TopP,
    XShare,
    XShareExpertParallel,
    XShareSpeculative,
)
from carpool.policies.parameters import Number

MOST_EXPERTS, MOST_SLOTS = 512, 16
Utility = Literal["", "mass", "squared", "native", "count", "share", "energy", "draw"]
Rule = Literal["coreset", "list", "rank", "top_p", "tail", "threshold", "similar"]
Assign = Literal["backfill", "drop", "keep", "merge", "leave"]


@dataclass(frozen=True)
class Traits:
    """A policy as the kernels see it.

    Attributes:
        rule: which experts a row may use: its group's `coreset`, a fixed `list`, its best by `rank`, by one of the
            skipping rules (`top_p`, `tail`, `threshold`) or what is `similar` to nothing in the coreset.
        assign: what takes the place of the others.
        utility: what is summed over voters, if the coreset goes by sums.
        warm: each voter's best experts that join the coreset; None for a policy without them.
        size: of a coreset by utility; None: the coreset is what `warm` says.
        number: of the rule (`k`, `p`, `beta`, `tau` or `threshold`).
        seed: of the random draw.
    """

    rule: Rule = "coreset"
    assign: Assign = "backfill"
    utility: Utility = ""
    warm: Number | None = None
    size: Number | None = None
    number: Number | None = None
    seed: int = 0


def _sized(utility: Utility, **more: Any) -> Callable[[Any, int, int], Traits]:
    return lambda policy, E, K: Traits(utility=utility, size=policy.limit(E, K), **more)


def _skipping(policy: TopP | TailMass | LayerThreshold, rule: Rule, number: Number) -> Traits:
    return Traits(rule=rule, assign="drop" if policy.renormalize else "keep", number=number)


def _xshare(policy: XShare, num_experts: int, top_k: int) -> Traits:
    utility: Utility = "native" if policy.utility == "topk_mass" else policy.utility
    return Traits(utility=utility, size=policy.limit(num_experts, top_k), warm=policy.warmup)


def _surrogate(policy: Surrogate, num_experts: int, top_k: int) -> Traits:
    assign: Assign = "leave" if policy.surrogates else "backfill"
    return Traits(assign=assign, utility="share", size=policy.limit(num_experts, top_k), warm=policy.warmup)


# by class, not by name: a subclass may decide otherwise
TRAITS: dict[type[Policy], Callable[[Any, int, int], Traits]] = {
    XShare: _xshare,
    OEA: lambda policy, E, K: Traits(warm=policy.k0),
    DESSeq: lambda policy, E, K: Traits(warm=policy.k0),
    DESVote: _sized("native"),
    Lynx: _sized("count", warm=1),
    BASE: _sized("energy"),
    Surrogate: _surrogate,
    RandomCoreset: lambda policy, E, K: Traits(
        utility="draw", size=policy.limit(E, K), warm=policy.warmup, seed=policy.seed
    ),
    SERE: lambda policy, E, K: Traits("similar", "merge", warm=policy.top, number=policy.threshold),
    TopK: lambda policy, E, K: Traits("rank", "drop", number=policy.k),
    TopP: lambda policy, E, K: _skipping(policy, "top_p", policy.p),
    TailMass: lambda policy, E, K: _skipping(policy, "tail", policy.beta),
    LayerThreshold: lambda policy, E, K: _skipping(policy, "threshold", policy.tau),
    AllowList: lambda policy, E, K: Traits("list", policy.fill),
}
UNFIT: dict[type[Policy], str] = {
    XShareSpeculative: "needs more than two launches: its set for every request comes before that of the batch",
    **dict.fromkeys((Depth, Hobbit, BitPlan), "reads experts at depths, which the kernels do not know"),
    C2R: "lets a row's best expert choose its others, which the kernels do not look up",
    ODP: "looks at the size of each row's hidden state, which the kernels are not given",
    XShareExpertParallel: "needs the device of each expert, which no engine says",
}
KNOWN_GUARDS = (DecodeOnly, MinBatch, Protect, ShortCircuit, Floor)


def uncovered(plan: Plan, num_experts: int, top_k: int) -> str | None:
    """Why the kernels do not take a plan; None if they do."""
    if type(plan.policy) not in TRAITS:
        return f"{plan.policy.name} {UNFIT.get(type(plan.policy), 'is not known to the kernels')}"
    for guard in plan.guards:
        if type(guard) not in KNOWN_GUARDS:
            return f"the guard {guard.name} is not known to the kernels"
    if len({type(guard) for guard in plan.guards}) < len(plan.guards):
        return "a guard is given twice"
    if num_experts > MOST_EXPERTS or top_k > MOST_SLOTS:
        return f"{num_experts} experts, {top_k} a token: the kernels take up to {MOST_EXPERTS} and {MOST_SLOTS}"
    return None


def traits_of(policy: Policy, num_experts: int, top_k: int) -> Traits:
    """The traits of a covered policy."""
    return TRAITS[type(policy)](policy, num_experts, top_k)


def coreset_guards(plan: Plan, num_experts: int, top_k: int) -> list[str]:
    """Names of the guards that change coresets, in their order; those that do nothing here are left out."""

    def acts(guard: Guard) -> bool:
        if isinstance(guard, MinBatch):
            return plan.policy.kind == "group"
        if isinstance(guard, ShortCircuit):
            return plan.policy.limit(num_experts, top_k) is not None
        return isinstance(guard, Protect)

    return [guard.name for guard in plan.guards if acts(guard)]
