"""Chunks of prompts beside rows that decode, and retracted requests, in SGLang on a CPU: `make test-sglang`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_models as tiny
import torch
import vllm_models

pytest.importorskip("sglang", reason="SGLang is in a folder of its own: make test-sglang")
pytestmark = pytest.mark.slow

CHUNK, COUNT = 8, 12
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [*range(20, 60)]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_models.write_model("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def spied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spied") / "calls.pt"


@pytest.fixture(scope="module")
def running(model: Path, spied: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARPOOL_SPY", str(spied))
        patch.setenv("SGLANG_TEST_RETRACT", "1")  # as if memory ran out, every few passes
        patch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "5")
        given = {"policy": "oea(k0=1)", "isolation": "batch"}  # experts that prompts read are free
        engine = tiny.engine(model, given, chunked_prefill_size=CHUNK, enable_mixed_chunk=True)
        yield engine
        engine.shutdown()


def test_rows_of_prompts_are_native_beside_rows_that_share(running: Any, spied: Path) -> None:
    for _ in range(6):  # what runs beside what, and is retracted, hangs on when the engine sees the requests
        before = len(torch.load(spied)) if spied.exists() else 0
        running.flush_cache()
        tiny.greedy(running, PROMPTS, COUNT)
        calls = torch.load(spied)[before:]
        mixed = [call for call in calls if call["exempt"].any() and not call["exempt"].all()]
        read = sum(int(call["exempt"].sum()) for call in calls if call["layer"] == 0)
        if mixed and read > sum(map(len, PROMPTS)):
            break
    assert mixed, "no chunk ran beside a row that decodes"
    for call in calls:
        assert len(call["exempt"]) <= CHUNK + len(PROMPTS)
        exempt_N = call["exempt"]
        assert torch.equal(call["ids"][exempt_N], call["native"][exempt_N])
    assert any((call["ids"] != call["native"]).any() for call in mixed)
    assert read > sum(map(len, PROMPTS)), "no request was retracted, and its tokens read again"
    assert all(layer["rows_exempt"] > 0 for layer in tiny.report(running)["layers"])


def test_a_budget_of_all_experts_changes_no_token(running: Any) -> None:
    running.collective_rpc("carpool_set", policy="xshare(budget=32)")
    whole = tiny.greedy(running, PROMPTS, COUNT)
    running.collective_rpc("carpool_set", enabled=False)
    running.flush_cache()
    assert tiny.greedy(running, PROMPTS, COUNT) == whole
