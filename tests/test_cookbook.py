"""Every command of docs/cookbook.md runs as it stands there."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carpool import Batch, Plan, RouteSpec, route

PAGE = (Path(__file__).parent.parent / "docs/cookbook.md").read_text()
TASKS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def blocks(task: str, language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a task: the file that a block is, or an empty name, and what stands in it."""
    return re.findall(rf'^```{language}(?: title="(.*?)")?\n(.*?)^```$', TASKS[task], re.M | re.S)


def script(task: str, folder: Path) -> str:
    """Write the task's files; its commands as one script, which stops where one fails."""
    lines = ["set -eu"]
    for language in ("toml", "python"):
        for name, text in blocks(task, language):
            path = folder / (name or "example.py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    lines += [text for _, text in blocks(task, "sh")]
    if (folder / "example.py").exists():
        lines.append("python example.py")
    return "\n".join(lines)


def run(task: str, folder: Path) -> str:
    """What a task prints; packages that it installs go to a folder of their own."""
    target = folder / "installed"
    paths = [str(target), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths), "PIP_TARGET": str(target), "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0", "COLUMNS": "120",
    }  # fmt: skip
    text = script(task, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = text.replace("localhost:8000", f"127.0.0.1:{port}")
    text = text.replace("vllm serve $MODEL", f"vllm serve $MODEL --host 127.0.0.1 --port {port}")
    text = text.replace("sleep 1; done", "kill -0 $!; sleep 1; done")  # a server that ended is not waited for
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=3000
    )
    log = folder / "server.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cookbook")


def test_there_are_five_tasks() -> None:
    assert list(TASKS) == ["Serve a model", "Tune a policy", "Study a method", "Add a policy", "Read a report"]
    for task in TASKS:
        assert blocks(task, "sh"), task


def test_the_policy_of_the_page_counts_points() -> None:
    """Six experts, two a token, three tokens: expert 0 is the best of two tokens, expert 2 of one."""
    made: dict[str, Any] = {}
    ((_, text),) = blocks("Add a policy", "python")
    exec(text, made)
    logits_NE = torch.tensor([[9.0, 8, 3, 2, 1, 0], [0, 1, 9, 8, 2, 1], [9, 0, 1, 2, 3, 8]])
    found = route(Plan(made["Borda"](2)), RouteSpec(top_k=2), logits_NE, Batch.of(3))
    assert found.coreset_GE.tolist() == [[True, False, True, False, False, False]]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_serve(folder: Path) -> None:
    said = run("Serve a model", folder)
    assert "sharing  http" in said
    assert '"policy":"xshare(budget=12) | decode_only() | min_batch(2) | short_circuit() | floor(0.5)"' in said.replace(
        '": "', '":"'
    )
    assert "asks for 999 of 64 experts" in said


@pytest.mark.slow
def test_tune(folder: Path) -> None:
    run("Tune a policy", folder)
    assert (folder / "policy.json").exists()
    assert (folder / "tuned.json").exists()


@pytest.mark.slow
def test_study_and_read(folder: Path) -> None:
    said = run("Study a method", folder)
    assert "tokens that stayed" in said
    run("Read a report", folder)
    assert "What neighbours change" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_add(folder: Path) -> None:
    said = run("Add a policy", folder)
    assert said.count("borda") >= 2
