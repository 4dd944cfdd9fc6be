"""Experts in vLLM and behind `vllm serve` answer as in transformers; the engine's process ends with its block."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm_models
from tiny_experts import write_expert

from carpool import CarpoolError
from carpool.models.pool import Expert
from carpool.models.questions import Answer, Question
from carpool.models.runners import open_runner
from carpool.models.runners.vllm_process import InAProcess

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
STARTUP = 900  # seconds
QUESTIONS = [
    Question("0", "one"), Question("1", "two and a half"), Question("2", "this is", choices=(" a test", " not", "x")),
    Question("3", "und das", choices=(" auch", " nicht mehr lange")), Question("4", "x" * 300), Question("5", "four"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_expert(tmp_path_factory.mktemp("expert"), 0, ends=False, head_dim=32)


@pytest.fixture(autouse=True)
def quiet_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in vllm_models.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def asked(one: Expert) -> list[Answer]:
    with open_runner(one) as runner:
        return runner.answer(one, QUESTIONS)


def expected(folder: Path, **settings: Any) -> list[Answer]:
    return asked(Expert("a", "transformers", str(folder), max_tokens=10, context=128, **settings))


def assert_alike(found: list[Answer], wanted: list[Answer], besides: str = "") -> None:
    """`besides`: a signal that a server's API does not always tell: of single bytes many are named alike."""
    for one, other in zip(found, wanted, strict=True):
        told, known = ({k: v for k, v in each.confidence.items() if k != besides} for each in (one, other))
        assert told == pytest.approx(known, abs=2e-3)
        plain = {"fingerprint": "", "confidence": {}}
        assert dataclasses.replace(one, **plain) == dataclasses.replace(other, **plain)


def test_an_engine_in_a_process_answers_alike_and_ends(folder: Path) -> None:
    settings = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24, "max_num_seqs": 8}
    one = Expert("a", "vllm", str(folder), max_tokens=10, context=128, settings=settings)
    with open_runner(one) as runner:
        assert isinstance(runner, InAProcess)
        assert_alike(runner.answer(one, QUESTIONS), expected(folder))
        stopping = dataclasses.replace(one, stop=("e", "o", "a"))
        wanted = expected(folder, stop=("e", "o", "a"))
        assert [said.text for said in runner.answer(stopping, QUESTIONS)] == [said.text for said in wanted]
        process = runner.process
        process.send_signal(signal.SIGKILL)
        with pytest.raises(CarpoolError, match=r"the engine of .* ended \(exit code -9\)"):
            runner.answer(one, QUESTIONS)
    assert process.poll() is not None
    missing = dataclasses.replace(one, model=str(folder / "none"))
    with pytest.raises(CarpoolError, match="does not run in vLLM"):
        asked(missing)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 24),
        "--max-model-len", "128", "--max-num-seqs", "8", "--dtype", "float32",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder / "log.txt"
    with log.open("w") as written:
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=written)
        try:
            for _ in range(STARTUP):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def test_a_real_server_answers_alike(folder: Path) -> None:
    with serving(folder) as url:
        assert_alike(
            asked(Expert("a", "server", "tiny", url=url, max_tokens=10, context=128)),
            expected(folder),
            besides="margin",
        )
        chat = Expert("a", "server", "tiny", url=url, max_tokens=10, chat=True, template={"enable_thinking": True})
        local = dataclasses.replace(chat, engine="transformers", model=str(folder), url="", context=128)
        with open_runner(chat) as runner, open_runner(local) as own:
            served, here = (each.answer(one, QUESTIONS[:2]) for each, one in ((runner, chat), (own, local)))
        assert [one.text for one in served] == [one.text for one in here]
    with pytest.raises(CarpoolError, match="no server answers"):
        asked(Expert("a", "server", "tiny", url=url))
