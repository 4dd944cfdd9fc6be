"""Two ranks of tensor parallelism, and routers that are bypassed, in a real SGLang on a CPU: `make test-sglang`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sglang_models as tiny
import torch
import vllm_models

pytest.importorskip("sglang", reason="SGLang is in a folder of its own: make test-sglang")
pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24]]
COUNT = 6
POLICY = {"policy": vllm_models.POLICY, "isolation": "batch"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_models.write_model("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


def test_ranks_decide_alike(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank by itself: no collective is added, and no rank chooses other experts."""
    spied = tmp_path / "calls.pt"
    monkeypatch.setenv("CARPOOL_SPY", str(spied))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")  # SGLang wants a NUMA node for each rank otherwise
    running = tiny.engine(model, POLICY, tp_size=2)
    try:
        tokens = tiny.greedy(running, PROMPTS, COUNT)
        found = tiny.report(running)
        running.collective_rpc("carpool_set", enabled=False)
        native = tiny.greedy(running, PROMPTS, COUNT)
    finally:
        running.shutdown()
    assert tokens != native
    assert all(layer["rows_changed"] > 0 for layer in found["layers"])
    first, second = torch.load(spied), torch.load(f"{spied}.1")
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["ids"], other["ids"])


BYPASSED = """
import json, sys
from pathlib import Path
import sglang_models as tiny
folder, prompts, policy = json.loads(sys.argv[1])
if __name__ == "__main__":
    running = tiny.engine(Path(folder), policy)
    print("TOKENS", tiny.greedy(running, prompts, 6))
"""


def test_a_router_that_is_bypassed_stops_the_server(model: Path, tmp_path: Path) -> None:
    """As a kernel that routes for itself would: batches that decode never reach `select_experts`, prompts do. The
    device's counters say it."""
    program = tmp_path / "serve.py"
    program.write_text(BYPASSED)
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(program), json.dumps([str(model), PROMPTS, POLICY])], capture_output=True, text=True,
        check=False, timeout=500, env=os.environ | {"PYTHONPATH": path, "CARPOOL_BYPASS": str(len(PROMPTS))},
    )  # fmt: skip
    assert done.returncode != 0
    assert "TOKENS" not in done.stdout
    assert "the engine bypassed the router in 1 of 1 steps that should share" in done.stderr
