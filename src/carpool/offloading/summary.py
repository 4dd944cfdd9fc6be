"""What a trace says of caching: how unevenly experts are used, how that drifts, how local it is, what caches would hit.

Shapes: `R` requests, `T` tokens of one, `L` MoE layers, `E` experts, `K` experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from carpool.offloading.accesses import lockstep
from carpool.offloading.consistency import WINDOWS, Measured, chosen, consistency, segment_cache
from carpool.offloading.curves import hits
from carpool.offloading.recorded import Requests
from carpool.offloading.rules import Belady, Lru, Pinned

RATIOS = (1.0, 2.0, 3.0)  # sizes of segment caches, in experts a token
CACHE_WINDOW = 16  # tokens that a segment cache knows
BATCHES = (1, 4, 16)
MOST_EVENTS = 16_000  # tokens times layers that caches are simulated on; more say the same


@dataclass(frozen=True, eq=False)
class Summary:
    """What was found.

    Attributes:
        tokens, requests: how many.
        load_LE: share of a layer's uses that each expert has, float64.
        drift_L: how far the load of the later half of each request is from that of the earlier half: total variation,
            0 to 1. chance: what equal halves of so many tokens would have, the mean over layers.
        srp: by window. sch: by size in experts a token.
        curves: by rule and batch, hit rate at each cache size `[E]`, caches of all layers alike; the rule `pinned` is
            fitted on other requests.
        unions: by batch, distinct experts a layer and step.
    """

    tokens: int
    requests: int
    load_LE: Tensor
    drift_L: Tensor
    chance: float
    srp: dict[int, Measured]
    sch: dict[float, Measured]
    curves: dict[tuple[str, int], Tensor]
    unions: dict[int, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens, "requests": self.requests, "load": self.load_LE.tolist(),
            "drift": self.drift_L.tolist(), "drift_by_chance": self.chance,
            "srp": {str(window): asdict(one) for window, one in self.srp.items()},
            "sch": {f"{size:g}": asdict(one) for size, one in self.sch.items()},
            "hit_rate": {f"{rule} at batch {batch}": rate.tolist() for (rule, batch), rate in self.curves.items()},
            "union": {str(batch): union for batch, union in self.unions.items()},
        }  # fmt: skip


def summarise(requests: Requests, windows: Sequence[int] = WINDOWS, seed: int = 0) -> Summary:
    """Measure a trace's requests; windows that no request reaches are left out."""
    E = requests.num_experts
    counts_RLE = torch.stack([chosen(one, E).sum(0) for one in requests.experts]).double()
    longest = max(map(len, requests.experts))
    halves = [[chosen(part, E).sum(0) for part in one.chunk(2)] for one in requests.experts if len(one) > 1]
    drift_L = torch.zeros(counts_RLE.shape[1], dtype=torch.float64)
    chance = 0.0
    if halves:
        early_LE, late_LE = (torch.stack([pair[side] for pair in halves]).sum(0).double() for side in (0, 1))
        drift_L = (_shares(early_LE) - _shares(late_LE)).abs().sum(-1) / 2
        chance = _by_chance(early_LE, late_LE)
    short = _first(requests, MOST_EVENTS // counts_RLE.shape[1])
    return Summary(
        sum(map(len, requests.experts)), len(requests), _shares(counts_RLE.sum(0)), drift_L, chance,
        {window: consistency(requests.experts, E, window, seed) for window in windows if window <= longest},
        {size: segment_cache(short.experts, E, CACHE_WINDOW, size, seed) for size in RATIOS},
        dict(_curves(short)),
        {batch: lockstep(requests.experts, E, batch).mean_union for batch in BATCHES if batch <= len(requests)},
    )  # fmt: skip


def _curves(requests: Requests) -> Iterator[tuple[tuple[str, int], Tensor]]:
    for batch in BATCHES:
        if 2 * batch > len(requests):
            continue
        known, scored = (lockstep(half.experts, requests.num_experts, batch) for half in requests.split())
        for name, rule in (("lru", Lru()), ("pinned", Pinned.fit(known)), ("belady", Belady.fit(scored))):
            yield (name, batch), hits(scored, rule).sum(0) / scored.needed_SLE.sum().double()


def _first(requests: Requests, tokens: int) -> Requests:
    """As many requests as have about so many tokens, no fewer than the largest batch needs."""
    kept, total = 0, 0
    while kept < len(requests) and (total < tokens or kept < 2 * BATCHES[-1]):
        total += len(requests.experts[kept])
        kept += 1
    weights = None if requests.weights is None else requests.weights[:kept]
    return Requests(requests.experts[:kept], weights, requests.num_experts)


def _shares(counts_LE: Tensor) -> Tensor:
    return counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1)


def _by_chance(early_LE: Tensor, late_LE: Tensor) -> float:
    """Total variation of two samples of one distribution: each difference is nearly normal."""
    both_LE = _shares(early_LE + late_LE)
    sizes_L1 = 1 / early_LE.sum(-1, keepdim=True).clamp_min(1) + 1 / late_LE.sum(-1, keepdim=True).clamp_min(1)
    spread_LE = (both_LE * (1 - both_LE) * sizes_L1).sqrt()
    return float((spread_LE * (2 / torch.pi) ** 0.5).sum(-1).mean() / 2)
