"""Small traces for tests."""

from __future__ import annotations

import torch

from carpool.artefacts.trace import Trace
from carpool.artefacts.trace_facts import TraceFacts

FACTS = TraceFacts(8, (1, 3), 32, 3072, "f" * 64, "Some", "2026-01-01", (("carpool", "0.1"),), (("a.txt", "0" * 64),))


def some_trace(steps=(3, 1, 2), facts=FACTS, top_k=2, seed=0):
    """Random choices; the first step is a prompt's."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(steps)
    scores_TLE = torch.rand(rows, len(facts.layers), facts.num_experts, generator=generator)
    weights_TLK, experts_TLK = scores_TLE.topk(top_k, -1)
    step_T = torch.repeat_interleave(torch.arange(len(steps)), torch.tensor(steps))
    return Trace.of(
        experts_TLK, facts, weights_TLK=weights_TLK, step_T=step_T, request_T=torch.zeros(rows),
        position_T=torch.arange(rows), decode_T=step_T > 0,
    )  # fmt: skip


def same(one, other):
    tensors = one.tensors().keys() == other.tensors().keys()
    return tensors and one.facts == other.facts and all(map(torch.equal, *(t.tensors().values() for t in (one, other))))
