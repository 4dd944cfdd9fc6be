"""Slow, obvious versions of what `carpool.offloading` computes, in plain Python; nothing here comes from `carpool`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Steps = list[list[set[int]]]  # by step and layer, the experts that are needed
Rank = Callable[[int, int, int, int], float]  # step, layer, then layer and expert of the one that is ranked


def srp(sequences: Sequence[Sequence[set[int]]], experts: int, window: int) -> tuple[float, float]:
    """Best F1 of one threshold for all experts of a layer, and tokens on over activations."""
    best = (0.0, 0.0)
    for threshold in range(1, window + 1):
        hit = on = total = 0
        for tokens in sequences:
            for first in range(len(tokens) - window + 1):
                for expert in range(experts):
                    often = sum(expert in token for token in tokens[first : first + window])
                    total += often
                    if often >= threshold:
                        hit, on = hit + often, on + window
        if total and on and 2 * hit / (on + total) > best[0]:
            best = 2 * hit / (on + total), on / total
    return best


def segment_hits(tokens: Sequence[set[int]], capacity: int, window: int) -> int:
    """Hits of a cache that lets leave what the next tokens activate least, of equals what was used longest ago."""
    held: set[int] = set()
    last: dict[int, int] = {}
    hits = 0
    for now, needed in enumerate(tokens):
        hits += len(held & needed)
        held |= needed
        last.update(dict.fromkeys(needed, now))
        while len(held) > capacity:
            soon = {one: sum(one in later for later in tokens[now + 1 : now + 1 + window]) for one in held}
            held.remove(min(held - needed, key=lambda one: (soon[one], last[one])))
    return hits


def misses(steps: Steps, rank: Rank, capacity: int, shared: bool = False) -> int:
    """Loads of a cache of so many experts a layer, or of all layers together."""
    layers = len(steps[0])
    held: set[tuple[int, int]] = set()
    loads = 0
    for step, row in enumerate(steps):
        for layer, needed in enumerate(row):
            mine = {(layer, one) for one in needed}
            loads += len(mine - held)
            held |= mine
            for place in [None] if shared else range(layers):
                while len(some := [one for one in held if place in (None, one[0])]) > capacity:
                    # others than the needed first; of equals the later expert
                    held.remove(min(some, key=lambda o: (o in mine, rank(step, layer, *o), (-o[0], -o[1]))))
    return loads


def uses_until(steps: Steps, step: int, layer: int, of: int, expert: int) -> list[int]:
    """Events that used an expert so far."""
    layers = len(steps[0])
    return [
        s * layers + of for s, row in enumerate(steps) if (s, of) <= (step, layer) and expert in row[of]
    ]  # fmt: skip


def next_use(steps: Steps, step: int, layer: int, of: int, expert: int) -> int:
    """The event that needs an expert next, or one after all."""
    layers = len(steps[0])
    later = [s * layers + of for s, row in enumerate(steps) if (s, of) > (step, layer) and expert in row[of]]
    return min(later, default=len(steps) * layers + of)


def fewest_misses(steps: Sequence[set[int]], capacity: int) -> int:
    """The least that any eviction could load, of one layer: every choice is tried."""
    from itertools import combinations

    states: dict[frozenset[int], int] = {frozenset(): 0}
    for needed in steps:
        after: dict[frozenset[int], int] = {}
        for held, loads in states.items():
            cost = loads + len(needed - held)
            others = held - needed
            room = capacity - len(needed)
            sizes = [min(room, len(others))] if room >= 0 else [0]
            for size in sizes:
                kept = combinations(sorted(needed), capacity) if room < 0 else [tuple(needed)]
                for mine in kept:
                    for more in combinations(sorted(others), size):
                        state = frozenset(mine) | frozenset(more)
                        after[state] = min(after.get(state, cost), cost)
        states = after
    return min(states.values())
