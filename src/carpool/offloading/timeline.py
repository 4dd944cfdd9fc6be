"""What a cache's misses cost: one link that carries one expert after the other, and experts that are fetched ahead.

A model of time, not a measurement: layers compute for a fixed time, the link has a bandwidth and a time for each
transfer, and what it has begun it ends. What a layer waits for goes before what might be needed later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.offloading.accesses import Accesses
from carpool.offloading.cache import WHOLE, Cache, Scope
from carpool.offloading.rules import Rule
from carpool.offloading.simulate import Depths, wanted

Foretell = Callable[[int, int, Tensor], Sequence[int]]
"""From a step, a layer and what it needs, bool `[E]`: the experts to fetch for the next layer, the likeliest first."""


@dataclass(frozen=True)
class Link:
    """What carries experts, and what computes on them.

    Attributes:
        expert: seconds that an expert of the deepest level takes on the link. start: seconds before each transfer.
        layer: seconds that a layer computes once it has its experts.
    """

    expert: float
    start: float = 0.0
    layer: float = 0.0

    def takes(self, size: float) -> float:
        """Seconds of a transfer; size in experts."""
        return self.start + size * self.expert if size > 0 else 0.0


@dataclass(frozen=True)
class Timed:
    """What a run would take under this model of time.

    Attributes:
        seconds: in all. stalled: of them waiting for experts.
        read: experts' worth of bytes. misses: uses that waited, a fetch that had not ended in time among them.
        uses: experts needed. fetched: ahead of need. useful: of them needed by the layer they were fetched for.
    """

    seconds: float
    stalled: float
    read: float
    misses: int
    uses: int
    fetched: int
    useful: int

    @property
    def stall_share(self) -> float:
        return self.stalled / self.seconds if self.seconds else 0.0

    @property
    def precision(self) -> float:
        """Of what was fetched ahead, the share that was needed."""
        return self.useful / self.fetched if self.fetched else 0.0


def run(
    accesses: Accesses,
    rule: Rule,
    capacity: float,
    link: Link,
    *,
    foretell: Foretell | None = None,
    scope: Scope = "layer",
    sizes: Sequence[float] = WHOLE,
    depths: Depths | None = None,
) -> Timed:
    """Seconds of all steps, one after the other; arguments as of `simulate`.

    Args:
        foretell: what to fetch ahead; it begins once a layer has what it waits for. Default: nothing is.
    """
    S, L, E = accesses.needed_SLE.shape
    cache, size_J = Cache.of(rule, capacity, L, E, scope, tuple(sizes)), torch.tensor(sizes).double()
    now = free = 0.0  # when the layer begins; when the link is done with what it has begun
    stalled = read = 0.0
    misses = fetched = useful = 0
    ahead: dict[int, float] = {}  # of the coming layer: when each fetched expert is there
    for step in range(S):
        if bool(accesses.begins_S[step]):
            cache.history.begin()
        for layer in range(L):
            wanted_E = wanted(accesses, step, layer, depths, len(sizes) - 1)
            ready = now
            for expert, when in ahead.items():
                if wanted_E[expert] > 0:
                    useful += 1
                    misses += when > now
                    ready = max(ready, when)
            read_E = cache.use(step, layer, wanted_E)
            for expert in (read_E > 0).nonzero().flatten().tolist():
                free = max(free, now) + link.takes(float(read_E[expert]))
                ready = max(ready, free)
                read, misses = read + float(read_E[expert]), misses + 1
            stalled += ready - now
            begun, now = ready, ready + link.layer
            ahead, coming = {}, (layer + 1) % L
            queue = deque([] if foretell is None else foretell(step, layer, wanted_E > 0))
            protected_LE = torch.zeros(L, E, dtype=torch.bool)
            protected_LE[layer] = wanted_E > 0
            free = max(free, begun)
            while queue and free < now:  # what the link has not begun when the next layer asks is forgotten
                expert = queue.popleft()
                size = float(size_J[-1] - size_J[cache.level_LE[coming, expert]])
                if size <= 0:
                    protected_LE[coming, expert] = True
                    continue
                free += link.takes(size)
                ahead[expert], fetched, read = free, fetched + 1, read + size
                protected_LE[coming, expert] = True
                cache.add(coming, expert, protected_LE)
    uses = int(accesses.needed_SLE.sum())
    return Timed(now, stalled, read, misses, uses, fetched, useful)


def as_before(accesses: Accesses) -> Foretell:
    """Fetches what the next layer needed in the step before."""

    def foretell(step: int, layer: int, needed_E: Tensor) -> list[int]:
        L = accesses.needed_SLE.shape[1]
        before = step - 1 if layer + 1 < L else step
        return [] if before < 0 else accesses.needed_SLE[before, (layer + 1) % L].nonzero().flatten().tolist()

    return foretell


def successors(known: Accesses, most: int) -> Foretell:
    """Fetches what other requests needed most often after a layer's experts.

    Args:
        known: of those requests. most: experts to fetch.
    """
    needed_SLE = known.needed_SLE.double()
    L = needed_SLE.shape[1]
    after_SLE = torch.cat([needed_SLE[:, 1:], needed_SLE[:, :1].roll(-1, 0)], 1)
    counts_LEE = torch.einsum("sle,slf->lef", needed_SLE, after_SLE)
    assert len(counts_LEE) == L

    def foretell(step: int, layer: int, needed_E: Tensor) -> list[int]:
        likely = (needed_E.double() @ counts_LEE[layer]).topk(most)
        return likely.indices[likely.values > 0].tolist()

    return foretell


def by_gates(foretold_SLK: Tensor) -> Foretell:
    """Fetches what the next layer's router says of the present layer's input, recorded with the trace.

    Args:
        foretold_SLK: at `[s, l]` the experts of layer `l + 1`, the likeliest first; below 0 is nobody.
    """

    def foretell(step: int, layer: int, needed_E: Tensor) -> list[int]:
        return [expert for expert in foretold_SLK[step, layer].tolist() if expert >= 0]

    return foretell
