"""One row per policy: what the tests of the contracts need to know about it.

A new policy gets a row here and a twin in `twins`; every property, twin and compile test then covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import more_twins
import torch
import twins
from layer_statistics import (
    allow_lists,
    no_stats,
    norm_predictor,
    planes,
    sensitivity,
    similarities,
    together,
    unexplained,
    usual_tokens,
)
from torch import Tensor

Texts = Callable[[int, int], list[str]]  # from E and K


def no_extras(num_rows: int, num_experts: int) -> dict[str, Any]:
    return {}


def three_devices(num_rows: int, num_experts: int) -> dict[str, Any]:
    """Experts scattered over three devices that hold unequal numbers."""
    return {"device_E": (torch.arange(num_experts) ** 2 + torch.arange(num_experts) // 3) % 3}


def pairs_of_rows(num_rows: int, num_experts: int) -> dict[str, Any]:
    """Two rows a request."""
    return {"request_N": torch.arange(num_rows) // 2, "num_requests": num_rows // 2 + 1}


@dataclass(frozen=True)
class Row:
    """A policy under test.

    Attributes:
        texts: settings to try for a layer with E experts, K a token.
        identity: settings that must give the native routing bit for bit, whatever the batch.
        coreset_bound: largest coreset of a group (free experts not counted) that a setting allows, given the policy,
            E, K and the number of voters; None where the method has no bound.
        knobs: parameters that may be 0-d tensors.
        stats: per-layer statistics as `carpool calibrate` writes them (what `Policy.prepare` receives).
        extras: further arguments of `Batch.of` for N rows and E experts (e.g. `device_E`).
        hidden: whether the policy needs the router's input.
        critical: whether a row may keep native experts outside the coreset (SERE's critical experts).
        stages: how many masks over groups or requests it builds on the way (operations are counted per mask).
        twin: the slow version; None for policies tested by properties alone.
    """

    name: str
    texts: Texts
    identity: Texts
    twin: twins.Twin | None
    coreset_bound: Callable[[Any, int, int, int], int] | None = None
    knobs: tuple[str, ...] = ()
    stats: Callable[[int, torch.Generator], dict[str, Tensor]] = no_stats
    extras: Callable[[int, int], dict[str, Any]] = no_extras
    hidden: bool = False
    critical: bool = False
    stages: int = 1

    def __repr__(self) -> str:
        return self.name


def half(number: int) -> int:
    return max(1, number // 2)


def xshare_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    return max(twins.count(policy.budget, num_experts), int(policy.warmup) * voters)


def des_vote_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    return twins.count(policy.size if policy.beta is None else policy.beta, num_experts)


def budget_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    return twins.count(policy.budget, num_experts)


def lynx_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    return max(twins.count(policy.budget, num_experts), voters)


def expert_parallel_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    return policy.warmup * voters + 3 * policy.budget_per_device


def speculative_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    own = policy.warmup * voters
    if policy.merge == "topup":
        own += voters * twins.count(policy.request_budget, num_experts)
    return max(twins.count(policy.budget, num_experts), own)


ROWS = (
    Row(
        name="topk",
        texts=lambda E, K: [f"topk({half(K)})", "topk(k=1)"],
        identity=lambda E, K: [f"topk(k={K})"],
        twin=twins.TOPK,
        knobs=("k",),
    ),
    Row(
        name="oea",
        texts=lambda E, K: [f"oea(k0={half(K)})", "oea(1)"],
        identity=lambda E, K: [f"oea(k0={K})"],
        twin=twins.OEA,
        coreset_bound=lambda policy, E, K, voters: policy.k0 * voters,
        knobs=("k0",),
    ),
    Row(
        name="xshare",
        texts=lambda E, K: [
            f"xshare(budget={half(E)})",
            "xshare(budget=0.25, warmup=0)",
            f"xshare(budget={K}, warmup=0, utility='squared')",
            f"xshare(budget={half(K)}, warmup=1, utility='topk_mass')",
            f"xshare(budget=1, warmup={half(K)})",
        ],
        identity=lambda E, K: [f"xshare(budget={E})", "xshare(budget=1.0, warmup=0)"],
        twin=twins.XSHARE,
        coreset_bound=xshare_bound,
        knobs=("budget", "warmup"),
    ),
    Row(
        name="des_seq",
        texts=lambda E, K: [f"des_seq(k0={half(K)})"],
        identity=lambda E, K: [f"des_seq(k0={K})"],
        twin=twins.OEA,
        coreset_bound=lambda policy, E, K, voters: policy.k0 * voters,
        knobs=("k0",),
    ),
    Row(
        name="des_vote",
        texts=lambda E, K: [f"des_vote(size={K})", f"des_vote(beta={max(0.5, K / E)})"],
        identity=lambda E, K: [f"des_vote(size={E})", "des_vote(beta=1.0)"],
        twin=twins.DES_VOTE,
        coreset_bound=des_vote_bound,
        knobs=("size",),
    ),
    Row(
        name="sere",
        texts=lambda E, K: [
            f"sere(top={half(K)})",
            "sere(top=1, threshold=0.5)",
            "sere(top=1, threshold=0.8, metric='cosine')",
            "sere(top=1, threshold=0.6, metric='cka')",
            "sere(top=1, threshold=0.7, metric='routed')",
        ],
        identity=lambda E, K: [f"sere(top={K})", "sere(top=1, threshold=1.5)"],
        twin=twins.SERE,
        coreset_bound=lambda policy, E, K, voters: policy.top * voters,
        knobs=("top", "threshold"),
        stats=similarities,
        critical=True,
    ),
    Row(
        name="random",
        texts=lambda E, K: [
            f"random(budget={half(E)})",
            f"random(budget={half(K)}, warmup=0)",
            "random(budget=0.25, warmup=0, seed=3)",
            f"random(budget=1, warmup={half(K)}, seed=-5)",
        ],
        identity=lambda E, K: [f"random(budget={E})", "random(budget=1.0, warmup=0)"],
        twin=more_twins.RANDOM,
        coreset_bound=xshare_bound,
        knobs=("budget", "warmup"),
    ),
    Row(
        name="lynx",
        texts=lambda E, K: [f"lynx({half(E)})", f"lynx(budget={half(K)})", "lynx(0.25)"],
        identity=lambda E, K: [f"lynx({E})", "lynx(1.0)"],
        twin=more_twins.LYNX,
        coreset_bound=lynx_bound,
        knobs=("budget",),
    ),
    Row(
        name="base",
        texts=lambda E, K: [f"base({half(E)})", f"base(budget={half(K)})"],
        identity=lambda E, K: [f"base({E})", "base(1.0)"],
        twin=None,  # energies are floats, which two ways to compute them round differently; see test_base_energy
        coreset_bound=budget_bound,
        knobs=("budget",),
        stats=norm_predictor,
        hidden=True,
    ),
    Row(
        name="surrogate",
        texts=lambda E, K: [
            f"surrogate({half(E)})",
            f"surrogate(budget={half(K)}, warmup=0, least=0.5)",
            "surrogate(0.25, select='energy', warmup=0)",
            f"surrogate({K}, select='squared')",
            f"surrogate({half(E)}, least=2)",
        ],
        identity=lambda E, K: [f"surrogate({E})", "surrogate(1.0, warmup=0)", f"surrogate({E}, least=2)"],
        twin=None,  # costs are floats, see test_surrogate
        coreset_bound=xshare_bound,
        knobs=("budget", "warmup"),
        stats=unexplained,
    ),
    Row(
        name="depth",
        texts=lambda E, K: [
            "depth(price=0.03)",
            "depth(price=0.3, levels=[0, 2, 16])",
            "depth(price=0.1, levels=[2, 4], energy='equal')",
            "depth(bytes=0.15)",
            "depth(price=30)",
        ],
        identity=lambda E, K: ["depth(price=0, levels=[0, 16])"],
        twin=None,  # lost energies are floats, see test_depth
        stats=planes,
    ),
    Row(
        name="hobbit",
        texts=lambda E, K: ["hobbit(4, 2)", "hobbit(high=16, low=3, first=0.3, second=1.0)", "hobbit(3, 2, 0.0, 0.0)"],
        identity=lambda E, K: ["hobbit(high=16, low=16, second=1.0)"],
        twin=None,  # shares are floats, see test_depth_rules
        stats=planes,
    ),
    Row(
        name="bit_plan",
        texts=lambda E, K: ["bit_plan(bits=2.5)", "bit_plan(4, levels=[4])", "bit_plan(3, alpha=0, beta=0)"],
        identity=lambda E, K: [],
        twin=None,  # see test_depth_rules
        stats=planes,
    ),
    Row(
        name="top_p",
        texts=lambda E, K: ["top_p(0.3)", "top_p(p=0.05)", "top_p(0.5, renormalize=True)", "top_p(0.0)"],
        identity=lambda E, K: ["top_p(1.0)"],
        twin=more_twins.TOP_P,
        knobs=("p",),
    ),
    Row(
        name="tail_mass",
        texts=lambda E, K: ["tail_mass(0.3)", "tail_mass(0.6, renormalize=False)", "tail_mass(beta=1.0)"],
        identity=lambda E, K: ["tail_mass(0.0)"],
        twin=more_twins.TAIL_MASS,
        knobs=("beta",),
    ),
    Row(
        name="layer_threshold",
        texts=lambda E, K: ["layer_threshold(0.03)", "layer_threshold(0.06, renormalize=True)", "layer_threshold(1.0)"],
        identity=lambda E, K: ["layer_threshold(0.0)"],
        twin=more_twins.LAYER_THRESHOLD,
        knobs=("tau",),
        stats=sensitivity,
    ),
    Row(
        name="odp",
        texts=lambda E, K: ["odp()", "odp(0.3, protect=0)", "odp(quantile=0.85, protect=0.4)"],
        identity=lambda E, K: ["odp(0.0)", "odp(0.7, protect=1.0)"],
        twin=more_twins.ODP,
        stats=usual_tokens,
        hidden=True,
    ),
    Row(
        name="c2r",
        texts=lambda E, K: [f"c2r({max(1, K - 1)})", f"c2r(partners={max(K - 1, E // 2)})"],
        identity=lambda E, K: [f"c2r({E - 1})"],
        twin=more_twins.C2R,
        stats=together,
    ),
    Row(
        name="allow_list",
        texts=lambda E, K: [
            f"allow_list({list(range(0, E, 2))})",
            "allow_list(experts=[1])",
            "allow_list([0, 2], fill='drop')",
            f"allow_list(size={half(E)})",
            "allow_list(size=0.25, fill='drop')",
            "allow_list(size=0.5, domain='code')",
            "allow_list(size=0.5, score='reap')",
        ],
        identity=lambda E, K: [f"allow_list({list(range(E))})", "allow_list(size=1.0)", f"allow_list(size={E})"],
        twin=more_twins.ALLOW_LIST,
        stats=allow_lists,
    ),
    Row(
        name="xshare_expert_parallel",
        texts=lambda E, K: [
            f"xshare_expert_parallel({max(1, E // 8)})",
            f"xshare_expert_parallel(budget_per_device={half(K)}, warmup=0)",
            f"xshare_expert_parallel(1, warmup={half(K)})",
        ],
        identity=lambda E, K: [f"xshare_expert_parallel({E})", "xshare_expert_parallel(1.0, warmup=0)"],
        twin=more_twins.EXPERT_PARALLEL,
        coreset_bound=expert_parallel_bound,
        knobs=("budget_per_device", "warmup"),
        extras=three_devices,
    ),
    Row(
        name="xshare_speculative",
        texts=lambda E, K: [
            f"xshare_speculative({half(E)}, {half(K)})",
            f"xshare_speculative(budget=1, request_budget={K}, warmup=0)",
            f"xshare_speculative(0.25, {K}, merge='prune')",
            f"xshare_speculative({half(K)}, 0.5, 0, merge='prune')",
        ],
        identity=lambda E, K: [
            f"xshare_speculative({E}, 1)",
            f"xshare_speculative({E}, {E}, warmup=0, merge='prune')",
        ],
        twin=more_twins.SPECULATIVE,
        coreset_bound=speculative_bound,
        knobs=("budget", "request_budget", "warmup"),
        extras=pairs_of_rows,
        stages=3,  # what is free for each request, the requests' sets, the batch's
    ),
)
