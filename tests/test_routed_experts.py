"""Traces of what vLLM says of its requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carpool import CarpoolError
from carpool.hosts.vllm.routed_experts import trace_of

E, L, K = 12, 2, 3


def output(name: str, prompt: int, tokens: int, samples: int = 1) -> Any:
    generator = torch.Generator().manual_seed(prompt)
    rows = [torch.rand(tokens, L, E, generator=generator).topk(K, -1).indices.short().numpy() for _ in range(samples)]
    outputs = [SimpleNamespace(routed_experts=row) for row in rows]
    return SimpleNamespace(request_id=name, prompt_token_ids=list(range(prompt)), outputs=outputs)


def test_every_sample_is_a_request_of_the_trace() -> None:
    given = [output("a", 3, 7), output("b", 5, 6, samples=2)]
    made = trace_of(given, E, layers=(1, 4))
    assert (len(made), made.num_layers, made.top_k, made.facts.layers) == (19, L, K, (1, 4))
    assert made.weights_TLK is None
    samples = [sample for one in given for sample in one.outputs]
    for request, sample in enumerate(samples):
        mine = made.request_T == request
        assert made.position_T[mine].tolist() == list(range(len(sample.routed_experts)))
        assert torch.equal(made.experts_TLK[mine].long(), torch.as_tensor(sample.routed_experts).long())
    first = made.request_T == 0
    assert made.phase_T[first].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert made.step_T[first].tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert made.step_T[made.request_T == 2].tolist() == [0, 0, 0, 0, 0, 1]


def test_what_says_nothing_is_refused() -> None:
    silent = output("a", 3, 7)
    silent.outputs[0].routed_experts = None
    with pytest.raises(CarpoolError, match="request a says nothing of its experts; start vLLM with"):
        trace_of([silent], E)
    with pytest.raises(CarpoolError, match="experts of 2 tokens and a prompt of 3"):
        trace_of([output("b", 3, 2)], E)
    with pytest.raises(CarpoolError, match="no request, no trace"):
        trace_of([], E)
