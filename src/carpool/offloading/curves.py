"""Hit rates for every size of a layer's memory, from one pass (Mattson et al. 1970).

What a cache of `c` experts holds is held by every larger one, because ranks do not hang on the size. So one stack says
it all: the first `c` of it are what a cache of `c` holds.

Shapes: `S` steps, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from carpool.offloading.accesses import Accesses
from carpool.offloading.rules import History, Rule


def hits(accesses: Accesses, rule: Rule) -> Tensor:
    """Uses that a cache of 1, 2, ..., E experts a layer would have hit, int64 `[L, E]`.

    Caches begin empty. Ranks must not hang on what is held; no rule of `carpool.offloading.rules` does.
    """
    S, L, E = accesses.needed_SLE.shape
    history, found_LE = History(L, E), torch.zeros(L, E, dtype=torch.int64)
    stacks: list[list[int]] = [[] for _ in range(L)]
    for step in range(S):
        if bool(accesses.begins_S[step]):
            history.begin()
        for layer in range(L):
            needed_E = accesses.needed_SLE[step, layer]
            history.observe(step, layer, needed_E)
            now = set(needed_E.nonzero().flatten().tolist())
            for place, expert in enumerate(stacks[layer]):
                if expert in now:
                    found_LE[layer, place] += 1
            stacks[layer] = _restacked(stacks[layer], now, rule.rank(history)[layer].tolist())
    return found_LE.cumsum(-1)


def hit_rates(accesses: Accesses, rule: Rule) -> Tensor:
    """The same over all uses of a layer, float64 `[L, E]`."""
    return hits(accesses, rule) / accesses.needed_SLE.sum((0, 2)).clamp_min(1).unsqueeze(-1).double()


def _restacked(stack: list[int], now: set[int], rank: list[float]) -> list[int]:
    """The stack after a step: what it needed, then at every size the best of what a smaller memory has dropped."""
    made = sorted(now, key=lambda expert: (-rank[expert], expert))
    dropped: list[tuple[float, int]] = []
    for size, expert in enumerate(stack, 1):
        if expert not in now:
            heapq.heappush(dropped, (-rank[expert], expert))
        if size > len(now):
            made.append(heapq.heappop(dropped)[1])
    while dropped:  # memories that are not full yet
        made.append(heapq.heappop(dropped)[1])
    return made
