"""Random demands and placements for tests, and slow obvious twins of what planners and scores compute."""

from __future__ import annotations

from itertools import permutations, product

import torch
from trace_tools import FACTS

from carpool.artefacts.trace import Trace
from carpool.artefacts.trace_facts import TraceFacts


def random_trace(rows=64, layers=3, experts=8, top_k=2, batch=8, seed=0, skew=1.0):
    """Decode steps of `batch` rows; some experts are popular, and experts follow one another."""
    generator = torch.Generator().manual_seed(seed)
    bias_LE = torch.randn(layers, experts, generator=generator) * skew
    topic_T = torch.randint(0, 4, (rows,), generator=generator)
    liking_4LE = torch.randn(4, layers, experts, generator=generator)
    scores_TLE = torch.randn(rows, layers, experts, generator=generator) + bias_LE + liking_4LE[topic_T]
    weights_TLK, experts_TLK = scores_TLE.softmax(-1).topk(top_k, -1)
    facts = TraceFacts(experts, tuple(range(layers)), 16, 1000, FACTS.fingerprint)
    return Trace.of(
        experts_TLK, facts, weights_TLK=weights_TLK, step_T=torch.arange(rows) // batch,
        request_T=torch.arange(rows) % batch, position_T=torch.arange(rows) // batch,
    )  # fmt: skip


def random_holders(devices, experts, replicas, seed):
    """Bool `[D, E]`: every expert on one device, and `replicas` more of random ones."""
    generator = torch.Generator().manual_seed(seed)
    holds_DE = torch.zeros(devices, experts, dtype=torch.bool)
    holds_DE[torch.randint(0, devices, (experts,), generator=generator), torch.arange(experts)] = True
    for _ in range(replicas):
        holds_DE[
            torch.randint(0, devices, (1,), generator=generator), torch.randint(0, experts, (1,), generator=generator)
        ] = True
    return holds_DE


def every_placement(layers, experts, devices):
    """All balanced placements, as device tensors `[L, E]`; experts of the first layer in a fixed device order."""
    slots = experts // devices
    one = sorted({tuple(order[place] // slots for place in range(experts)) for order in permutations(range(experts))})
    for chosen in product(one, repeat=layers):
        yield torch.tensor(chosen)


def slow_hops(trace, device_LE, best_only=True):
    """Row by row."""
    count = 0
    for row in range(len(trace)):
        for layer in range(trace.num_layers - 1):
            here, there = trace.experts_TLK[row, layer].tolist(), trace.experts_TLK[row, layer + 1].tolist()
            if best_only:
                here, there = here[:1], there[:1]
            count += sum(int(device_LE[layer, a] != device_LE[layer + 1, b]) for a in here for b in there)
    return count


def slow_fan_out(trace, device_LE):
    total = 0
    for row in range(len(trace)):
        for layer in range(trace.num_layers):
            total += len({int(device_LE[layer, e]) for e in trace.experts_TLK[row, layer].tolist()})
    return total / (len(trace) * trace.num_layers)


def slow_eplb(load, replicas, groups, nodes, devices):
    """DeepSeek's algorithm for one layer, in plain lists."""

    def pack(weights, packs):
        bins = [[] for _ in range(packs)]
        full = len(weights) // packs
        if full == 1:
            return [[item] for item in range(len(weights))]
        for item in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
            open_bins = [one for one in range(packs) if len(bins[one]) < full]
            bins[min(open_bins, key=lambda one: (sum(weights[i] for i in bins[one]), one))].append(item)
        return bins

    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    found = []
    for members in pack([sum(load[g * size : (g + 1) * size]) for g in range(groups)], nodes):
        experts = [g * size + one for g in members for one in range(size)]
        copies = list(experts)
        while len(copies) < replicas // nodes:
            copies.append(max(experts, key=lambda e: (load[e] / copies.count(e), -experts.index(e))))
        for bin in pack([load[e] / copies.count(e) for e in copies], devices // nodes):
            found += [copies[one] for one in bin]
    return found
