"""What the benchmarks of the vLLM host compute without an engine, and a rehearsal of the GPU's checks."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (4, 19), (16, 32), (64, 100), (2, 16)])
def test_random_ids_are_valid_and_as_many(rows: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states = script("vllm_states", monkeypatch)
    like = [[torch.arange(rows * 8).reshape(rows, 8) % (size - layer % (1 + (size > 8))) for layer in range(3)]] * 2
    ids, again = (states.random_ids(rows, 8, 128, like, seed=0) for _ in range(2))
    assert [[len(layer.unique()) for layer in step] for step in ids] == [
        [len(layer.unique()) for layer in step] for step in like
    ]
    for layer, same in zip((x for step in ids for x in step), (x for step in again for x in step), strict=True):
        assert layer.dtype == torch.int32
        assert layer.shape == (rows, 8)
        assert layer.is_contiguous()
        assert all(len(row.unique()) == 8 for row in layer)
        assert torch.equal(layer, same)


def test_throughput_ratios_are_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = script("vllm_rounds", monkeypatch)
    slow = np.array([2.0, 4.0, 3.0, 2.5, 2.2, 2.1])  # a machine that slows down and recovers
    states = [rounds.State(name, lambda: None, 10.0) for name in ("stock", "p(1)", "ideal: p(1)")]
    for state, faster in zip(states, (1, 2, 2.2), strict=True):
        state.seconds = list(slow / faster)
    rows = rounds.summarise(states, tokens=32, steps=2, bandwidth=10.0, bytes_per_expert=10**9)
    assert rows["p(1)"]["throughput_over_stock"] == pytest.approx({"value": 2, "low": 2, "high": 2})
    assert rows["p(1)"]["throughput_over_ideal"]["value"] == pytest.approx(2 / 2.2)
    assert rows["stock"]["tokens_per_second"] == pytest.approx(32 / np.median(slow))
    assert rows["stock"]["expert_gb_per_step"] == 10
    assert rows["stock"]["share_of_read_bandwidth"] == pytest.approx(10 * 2 / np.median(slow) / 10)
    assert "throughput_over_stock" not in rows["stock"]


def test_intervals_of_medians_are_order_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, ones = script("vllm_rounds", monkeypatch), np.ones(10)
    found = rounds.paired(np.arange(10.0), ones)  # 2 (1 + 10) / 2**10 is below 5 %, with the next 45 it is not
    assert (found.value, found.low, found.high) == (4.5, 1, 8)
    few = rounds.paired(ones[:5], ones[:5])
    assert (few.value, few.low, few.high) == (1, None, None)


@pytest.mark.parametrize("name", ["vllm-decode", "vllm-decode-methods", "vllm-decode-surrogates", "diffusion-layer"])
def test_committed_intervals_are_those_of_the_rounds_beside_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = script("vllm_rounds", monkeypatch)
    content = json.loads((BENCHMARKS.parent / f"docs/results/{name}.json").read_text())
    found = 0
    for states in (cell["states"] for cell in content["cells"].values()):
        seconds_M = {state: np.array(row.get("seconds_per_block") or row["seconds"]) for state, row in states.items()}
        for state, row in states.items():
            others = {"stock": "stock", "ideal": f"ideal: {state}", "replayed": f"replayed: {state}"}
            for key, other in others.items():
                shown = row.get(f"throughput_over_{key}") or row.get(f"speed_over_{key}")
                if shown is not None:
                    expected = vars(rounds.paired(seconds_M[other], seconds_M[state]))
                    assert shown == pytest.approx(expected, rel=1e-4), f"{state} over {other}"
                    found += 1
    assert found > 20


def test_without_a_gpu_the_check_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    check = script("gpu_check", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--output", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.strip() == check.NO_GPU
    assert not (tmp_path / "x.json").exists()


def test_one_failed_step_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = script("gpu_check", monkeypatch)
    monkeypatch.setattr(check, "about", dict)

    def apart(_: Any, step: str, seconds: float, runner: str = "") -> dict[str, Any]:
        assert 0 < seconds <= 8 * 60
        return {"failed": ["no"] if (step, runner) == ("shared", "V2") else [], "outputs": [[1], [0.5]]}

    monkeypatch.setattr(check, "apart", apart)
    output = tmp_path / "x.json"
    assert check.main(["--device", "cpu", "--output", str(output)]) == 1
    content: dict[str, Any] = json.loads(output.read_text())
    assert [content[name]["failed"] for name in ("V2", "V1", "quality")] == [["no"], [], []]
    assert content["V2"]["same_as_not_configured"]


def test_what_does_not_fit_into_the_time_is_not_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    check = script("gpu_check", monkeypatch)
    monkeypatch.setattr(check, "about", dict)
    output = tmp_path / "x.json"
    assert check.main(["--device", "cpu", "--minutes", "0.1", "--output", str(output)]) == 1
    assert "V2: not run: the 0.1 minutes were over (--minutes)" in capsys.readouterr().out
    assert not json.loads(output.read_text())["V1"]["same_as_not_configured"]
    monkeypatch.setattr(check, "LEAST", 0)
    assert check.main(["--device", "cpu", "--minutes", "0.001", "--output", str(output)]) == 1
    assert "V2: stopped: the 0.001 minutes were over" in capsys.readouterr().out


@pytest.mark.parametrize(("runner", "expected"), [("V2", None), ("V1", "0")])
def test_v2_is_checked_as_the_default(runner: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the owner's shell says."""
    check = script("gpu_check", monkeypatch)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    asked: list[str | None] = []

    def start(*_: Any, **settings: Any) -> Any:
        asked.append(os.environ.get("VLLM_USE_V2_MODEL_RUNNER"))
        return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=True)))

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    options = check.parse_arguments([f"--runner={runner}", "--output=x.json"])
    llm = check.engine(options, None)
    assert asked == [expected]
    found = ["runner: vLLM started V2, and its log says why"] if runner == "V1" else []
    assert check.other_runner(llm, options) == found


@pytest.mark.slow
@pytest.mark.vllm
def test_rehearsal_of_the_gpu_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is an extra")
    import vllm_models as tiny

    check = script("gpu_check", monkeypatch)
    for name, value in tiny.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "x.json"
    given = ["--device", "cpu", "--model", str(tiny.qwen3()), "--policy", "xshare(budget=8)", "--wider"]
    given += ["xshare(budget=16)", "--batch", "6", "--tokens", "8", "--repeats", "1", "--quality-tokens", "512"]
    from carpool_demo import MODEL

    given += ["--quality-model", str(MODEL), "--quality-policy", "xshare(budget=16)", "--output", str(output)]
    runner = "V2" if tiny.v2() else "V1"
    given += ["--runners", runner, "--minutes", "60"]
    assert check.main(given) == 0, output.read_text()
    content = json.loads(output.read_text())
    assert content[runner]["same_as_not_configured"]
    states = content[runner]["shared"]["states"]
    assert list(states) == ["xshare(budget=8)", "xshare(budget=16)", "xshare(budget=1.0)", "off"]
    assert states["xshare(budget=8)"]["union"] < states["xshare(budget=16)"]["union"]
    assert [row["policy"] for row in content["quality"]["results"]] == ["stock", "xshare(budget=16)"]
