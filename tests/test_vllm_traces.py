"""Traces from vLLM's outputs, which stand-ins have in the shape that vLLM documents."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trace_tools import FACTS

from carpool import CarpoolError
from carpool.hosts.vllm.traces import trace_of


def output(prompt: int, decoded: int, seed: int, layers: int = 4) -> Any:
    generator = np.random.default_rng(seed)
    ids = np.argsort(generator.random((prompt + decoded, layers, 8)), -1)[..., :2].astype(np.uint8)
    return SimpleNamespace(prompt_token_ids=[0] * prompt, outputs=[SimpleNamespace(routed_experts=ids)])


def test_requests_decode_in_step() -> None:
    outputs = [output(3, 2, 0), output(2, 4, 1)]
    trace = trace_of(outputs, FACTS)
    assert [rows.stop - rows.start for rows in trace.steps()] == [5, 2, 2, 1, 1]
    assert trace.phase_T.tolist() == [0] * 5 + [1] * 6
    assert trace.weights_TLK is None
    for row in range(len(trace)):
        request, position = int(trace.request_T[row]), int(trace.position_T[row])
        ids = outputs[request].outputs[0].routed_experts[position]
        assert trace.experts_TLK[row].tolist() == ids[[1, 3]].tolist()  # the layers that the facts name


def test_outputs_without_routing_are_refused() -> None:
    bare = SimpleNamespace(prompt_token_ids=[0], outputs=[SimpleNamespace(routed_experts=None)])
    with pytest.raises(CarpoolError, match="request 0 came back without its experts"):
        trace_of([bare], FACTS)
    with pytest.raises(CarpoolError, match=r"has no layer 5"):
        trace_of([output(1, 1, 0)], replace(FACTS, layers=(0, 5)))
    with pytest.raises(CarpoolError, match="no request came back"):
        trace_of([], FACTS)
