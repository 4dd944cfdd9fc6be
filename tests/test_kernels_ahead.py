"""The kernels of routing compile for GPUs that are not here, and the benchmark of a layer is rehearsed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ABSENT = ("safetensors", "transformers", "vllm", "typer", "rich", "prometheus_client", "scipy", "plotly")


def run(*arguments: str, interpret: bool) -> list[dict[str, Any]]:
    """Lines of `gpu_layer.py` in a process of its own: Triton decides at its import whether it interprets. There is
    nothing beside torch and Triton, not even NumPy where no interpreter asks for it."""
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    with tempfile.TemporaryDirectory() as folder:
        for name in (*ABSENT, *(() if interpret else ("numpy",))):
            (Path(folder) / f"{name}.py").write_text("raise ModuleNotFoundError(f'no module named {__name__}')\n")
        environment["PYTHONPATH"] = os.pathsep.join([folder, environment.get("PYTHONPATH", "")])
        return _lines(environment, *arguments)


def _lines(environment: dict[str, str], *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / "gpu_layer.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compiles_ahead() -> None:
    """For three generations of GPUs; every value of a program stays in registers."""
    lines = run("--compile", "--sizes", "tiny", "--halves", "routing", "--policies", "xshare(0.25)", interpret=False)
    assert {(line["kernel"], line["gpu"]) for line in lines} == {
        (kernel, gpu) for kernel in ("vote", "decide") for gpu in ("sm_80", "sm_90", "sm_100")
    }
    assert all(line["spills"] == 0 for line in lines)


def test_kernels_of_experts_compile_ahead() -> None:
    lines = run("--compile", "--sizes", "tiny", "--halves", "experts", interpret=False)
    assert {(line["kernel"], line["gpu"]) for line in lines} == {
        (kernel, gpu) for kernel in ("into_product", "out_product", "combine") for gpu in ("sm_80", "sm_90", "sm_100")
    }
    assert all(line["spills"] <= 16 for line in lines)


@pytest.mark.slow
def test_every_policy_compiles_for_the_largest_layer() -> None:
    """All but a register or two that are saved around a division."""
    lines = run("--compile", "--halves", "routing", "--sizes", "largest", "deepseek-v3", interpret=False)
    assert all(line["spills"] <= 16 for line in lines)
    assert all(line["registers"] < 255 for line in lines)


def test_rehearsal(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    lines = run(
        "--sizes", "tiny", "--policies", "xshare(0.25)", "top_p(0.4)", "--output", str(output), interpret=True
    )  # fmt: skip
    *routing, experts = lines
    assert len(routing) == 4
    assert all(line["rows_with_other_experts"] == 0 and line["counters_equal"] for line in routing)
    assert any(line["rows_changed"] for line in routing)
    assert experts["experts_error"] < 1e-5
    assert json.loads(output.read_text())["lines"] == lines


def test_without_a_gpu_it_says_what_to_do() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_layer.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "set TRITON_INTERPRET=1 to rehearse" in done.stderr
