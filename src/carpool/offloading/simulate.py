"""What a cache would have hit: a rule and a memory of some size, step by step through what a model read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.offloading.accesses import Accesses
from carpool.offloading.cache import WHOLE, Cache, Scope
from carpool.offloading.rules import Rule


@dataclass(frozen=True)
class Depths:
    """At which level an expert is read by what the heavier experts of its row weigh (HOBBIT's rule).

    Attributes:
        levels: from the deepest; a pair is read at the first whose share its score does not exceed.
        shares: ascending, one for each level but the last; all that is above has the last level.
    """

    levels: tuple[int, ...]
    shares: tuple[float, ...]

    def wanted(self, heavier_E: Tensor) -> Tensor:
        """Levels, int64 `[E]`; 0 for experts that nobody chose."""
        place_E = torch.bucketize(heavier_E, torch.tensor(self.shares, dtype=heavier_E.dtype))
        return torch.where(heavier_E.isinf(), 0, torch.tensor(self.levels)[place_E])


@dataclass(frozen=True, eq=False)
class Simulated:
    """What happened.

    Attributes:
        uses_SL: experts needed. misses_SL: those of them that were not held deep enough.
        read_SL: what was read, in experts of the deepest level.
    """

    uses_SL: Tensor
    misses_SL: Tensor
    read_SL: Tensor

    def hit_rate(self, warm: int = 0) -> float:
        """Share of uses that were held, from some step on."""
        return 1 - float(self.misses_SL[warm:].sum() / self.uses_SL[warm:].sum().clamp_min(1))

    def read_per_step(self, warm: int = 0) -> float:
        """Experts' worth of bytes a step, over all layers."""
        return float(self.read_SL[warm:].sum(1).mean())


def simulate(
    accesses: Accesses,
    rule: Rule,
    capacity: float,
    *,
    scope: Scope = "layer",
    sizes: Sequence[float] = WHOLE,
    depths: Depths | None = None,
) -> Simulated:
    """Run a rule over what was read, from an empty memory.

    Args:
        capacity: of a layer's memory, or of the model's (`scope`), in experts of the deepest level.
        sizes: what an expert takes at each level, 0 first, 1 last.
        depths: at which level experts are read; default: all at the deepest.
    """
    S, L, E = accesses.needed_SLE.shape
    cache = Cache.of(rule, capacity, L, E, scope, tuple(sizes))
    misses_SL, read_SL = torch.zeros(S, L, dtype=torch.int64), torch.zeros(S, L, dtype=torch.float64)
    for step in range(S):
        if bool(accesses.begins_S[step]):
            cache.history.begin()
        for layer in range(L):
            wanted_E = wanted(accesses, step, layer, depths, len(sizes) - 1)
            read_E = cache.use(step, layer, wanted_E)
            misses_SL[step, layer], read_SL[step, layer] = (read_E > 0).sum(), read_E.sum()
    return Simulated(accesses.needed_SLE.sum(-1), misses_SL, read_SL)


def wanted(accesses: Accesses, step: int, layer: int, depths: Depths | None, deepest: int) -> Tensor:
    """The level at which a layer reads each expert, int64 `[E]`."""
    if depths is None:
        return accesses.needed_SLE[step, layer].long() * deepest
    return depths.wanted(accesses.heavier_SLE[step, layer])
