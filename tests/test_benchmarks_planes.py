"""What the benchmarks on planes write, and a rehearsal of the whole model's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks_vllm import BENCHMARKS, script

from carpool.artefacts.statistics import Statistics
from carpool.experts.stored import StoredExperts


def test_a_random_checkpoint_is_written_as_one_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, planes = (script(name, monkeypatch) for name in ("engines", "random_planes"))
    planes.write_checkpoint(engines.GEOMETRIES["tiny"], 11, tmp_path, (2, 3, 4), 32, 0)
    whole = Statistics.load(tmp_path / planes.PLANES_FILE)
    whole.save(tmp_path / "again")
    assert sorted(whole.layers) == list(range(11))
    found = StoredExperts.of(whole.for_layer(10))
    assert found.depths == (2, 3, 4)
    assert float(found.into.planes_DERB.float().mean()) == pytest.approx(127.5, rel=0.02)
    made = found.into.read(4)[0] @ torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    assert 0.3 < float(made.std()) < 3


@pytest.mark.slow
@pytest.mark.vllm
def test_the_whole_model_is_rehearsed(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is an extra")
    command = [sys.executable, str(BENCHMARKS / "whole_model.py"), "--quick", "--folder", str(tmp_path)]
    subprocess.run([*command, "--output", str(tmp_path / "found.json")], check=True, env=os.environ)
    content = json.loads((tmp_path / "found.json").read_text())
    assert [host["host"] for host in content["hosts"]] == ["transformers", "vllm"]
    for host in content["hosts"]:
        assert all(len(ids) == 13 for cell in host["states"]["as stored"] for ids in cell["ids"])
    assert not list(tmp_path.glob("carpool-whole-*"))
