"""One row per policy: what the tests of the contracts need to know about it.

A new policy gets a row here and a twin in `twins`; every property, twin and compile test then covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import twins
from torch import Tensor

Texts = Callable[[int, int], list[str]]  # from E and K


def no_stats(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {}


def no_extras(num_rows: int, num_experts: int) -> dict[str, Any]:
    return {}


def similarities(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Every metric; `frobenius` with many ties, `routed` asymmetric."""

    def matrix() -> Tensor:
        return torch.rand(num_experts, num_experts, generator=generator)

    raw = {name: matrix() for name in ("frobenius", "cosine", "cka", "routed")}
    symmetric = {name: (value + value.T) / 2 for name, value in raw.items()}
    symmetric["frobenius"] = (symmetric["frobenius"] * 8).round() / 8
    symmetric["routed"] = raw["routed"]
    ones = torch.eye(num_experts, dtype=torch.bool)
    return {f"similarity_{name}": value.masked_fill(ones, 1.0) for name, value in symmetric.items()}


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
    hidden: bool = field(default=False)

    def __repr__(self) -> str:
        return self.name


def half(number: int) -> int:
    return max(1, number // 2)


def xshare_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    return max(twins.count(policy.budget, num_experts), int(policy.warmup) * voters)


def des_vote_bound(policy: Any, num_experts: int, top_k: int, voters: int) -> int:
    return twins.count(policy.size if policy.beta is None else policy.beta, num_experts)


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
    ),
    Row(
        name="random",
        texts=lambda E, K: [f"random(budget={half(K)})", "random(budget=0.25, seed=3)"],
        identity=lambda E, K: [f"random(budget={E})"],
        twin=None,
        coreset_bound=lambda policy, E, K, voters: twins.count(policy.budget, E),
        knobs=("budget",),
    ),
)
