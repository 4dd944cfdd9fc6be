"""`carpool trace show`: what a trace says of load, drift, consistency and caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from carpool.artefacts.trace import Trace
from carpool.artefacts.trace_facts import TraceFacts
from carpool.cli.commands import app
from carpool.offloading.recorded import requests_of
from carpool.offloading.summary import summarise

E, K, L, T, R = 8, 2, 2, 20, 4


def trace() -> Trace:
    """Requests decode in pairs; in the first layer each keeps to two experts, in the second to none."""
    generator = torch.Generator().manual_seed(0)
    experts_TLK = torch.rand(R * T, L, E, generator=generator).topk(K, -1).indices
    request_T = torch.arange(R * T) % 2 + 2 * (torch.arange(R * T) // (2 * T))
    experts_TLK[:, 0] = torch.stack([request_T, request_T + 4], -1)
    position_T, step_T = torch.arange(R * T) // 2 % T, torch.arange(R * T) // 2
    weights_TLK = torch.rand(R * T, L, K, generator=generator) + 0.1
    facts = TraceFacts(num_experts=E, layers=(0, 3), architecture="Tiny")
    decode_T = position_T >= 4
    return Trace.of(
        experts_TLK, facts, step_T=step_T, weights_TLK=weights_TLK, request_T=request_T, position_T=position_T,
        decode_T=decode_T,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trace().save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


def test_requests_are_taken_apart_in_the_order_of_their_tokens() -> None:
    made = trace()
    found = requests_of(made, None)
    assert [tuple(one.shape) for one in found.experts] == [(T, L, K)] * R
    for request, experts_TLK in enumerate(found.experts):
        assert torch.equal(experts_TLK, made.experts_TLK[made.request_T == request].long())
        assert bool((experts_TLK[:, 0] == torch.tensor([request, request + 4])).all())
    assert [len(one) for one in requests_of(made).experts] == [T - 4] * R
    half, other = found.split()
    assert torch.equal(half.experts[1], found.experts[2])
    assert torch.equal(other.experts[0], found.experts[1])


def test_what_is_local_and_what_is_not() -> None:
    found = summarise(requests_of(trace(), None))
    assert list(found.srp) == [4, 16], "no request has 64 tokens"
    assert found.srp[16].layers[0] == 1
    assert found.srp[16].layers[1] < 0.7
    assert float(found.drift_L[0]) == 0
    assert found.chance > 0
    assert torch.allclose(found.load_LE.sum(-1), torch.ones(L, dtype=torch.float64))
    assert found.sch[1.0].layers[0] == pytest.approx(1 - 1 / T), "all but the first token"
    assert set(found.curves) == {("lru", 1), ("pinned", 1), ("belady", 1)}
    assert float(found.curves["belady", 1][-1]) == float(found.curves["lru", 1][-1])
    assert found.unions[1] == K
    assert K < found.unions[4] <= E


def test_the_command_prints_and_draws(path: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["trace", "show", str(path), "--picture", str(tmp_path / "p.html")])
    assert shown.exit_code == 0, shown.output
    assert "Tiny: 80 tokens of 4 requests" in shown.output
    assert "Local routing consistency" in shown.output
    assert "Hit rates" in shown.output
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "consistency: SRP over the window" in page
    assert "by chance" in page


def test_json_and_phases(path: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["trace", "show", str(path), "--json", "--phase", "decode"]).output)
    assert found["tokens"] == R * (T - 4)
    assert found["srp"]["4"]["layers"][0] == 1
    refused = CliRunner().invoke(app, ["trace", "show", str(path), "--phase", "late"])
    assert refused.exit_code == 2
    assert "--phase late: give prefill, decode or all" in " ".join(refused.output.split())
