"""`vllm serve` with the plugin: many requests, policies that change in between, clients that vanish, metrics."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import vllm_models as tiny

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
REQUESTS = 1000
STARTUP = 1800  # seconds; three processes import vLLM


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port

    def post(self, path: str, content: dict[str, Any], **headers: str) -> tuple[int, Any]:
        """Status and answer."""
        headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=900) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def set(self, **settings: Any) -> tuple[int, Any]:
        """Change the policy as the documentation says."""
        return self.post("/collective_rpc", {"method": "carpool_set", "kwargs": settings})

    def metrics(self) -> dict[str, float]:
        """Our metrics by name."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = [line.rpartition(" ") for line in lines if line.startswith("carpool_")]
        assert all('engine="0",model_name="tiny"' in name for name, _, _ in found)  # vLLM's own
        return {name.partition("{")[0]: float(value) for name, _, value in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.write_model("qwen3_moe", tmp_path_factory.mktemp("served"))
    write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, tiny.SHARING) as running:
        yield running


@contextlib.contextmanager
def serving(folder: Path, carpool: dict[str, Any]) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | tiny.ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "tiny",
        "--port", str(port), "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 24), "--max-model-len", "256",
        "--max-num-seqs", "16", "--block-size", "32", "--dtype", "float32",
        "--additional-config", json.dumps({"carpool": carpool}),
    ]  # fmt: skip
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    running = Server(port)
    try:
        wait_for(running, process, folder / "log.txt")
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        said = (folder / "log.txt").read_text()
        assert "metrics cleanup" not in said


def write_tokenizer(folder: Path) -> None:
    """One word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)


def wait_for(server: Server, process: subprocess.Popen[Any], log: Path) -> None:
    """Until the server answers."""
    for _ in range(STARTUP):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(server.url + "/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    pytest.fail("the server did not come up")


def test_nothing_is_lost_while_policies_change_and_clients_vanish(server: Server) -> None:
    start = server.metrics()
    assert start["carpool_enabled"] == 1
    assert start["carpool_refusals_total"] == 0
    finished = threading.Event()
    changes = [
        {"policy": "xshare(budget=12)"}, {"policy": "oea(k0=2)"}, {"enabled": False}, {"enabled": True},
        {"policy": "nonsense(1)"}, {"policy": "des_vote(size=10) | floor(0.3)"},
    ]  # fmt: skip
    statuses: list[int] = []

    def change() -> None:
        while not finished.is_set():
            for settings in changes:
                statuses.append(server.set(**settings)[0])
                time.sleep(0.5)

    def vanish() -> None:
        body = {"model": "tiny", "prompt": [5] * 20, "max_tokens": 200, "stream": True, "ignore_eos": True}
        content = json.dumps(body).encode()
        headers = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}")
        head = "\r\n".join(("POST /v1/completions HTTP/1.1", *headers, "", ""))
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(head.encode() + content)
                client.recv(1000)  # the first tokens have come
            time.sleep(0.5)

    def complete(i: int) -> bool:
        body: dict[str, Any] = {"model": "tiny", "prompt": [3 + (i * 31 + j * 17) % 500 for j in range(1 + i * 7 % 90)]}
        body |= {"max_tokens": 1 + i % 12, "temperature": 0, "ignore_eos": True}
        if i % 9 == 0:
            body["vllm_xargs"] = {"carpool": "off"}
        status, answer = server.post("/v1/completions", body)
        return status == 200 and answer["usage"]["completion_tokens"] == body["max_tokens"]

    others = [threading.Thread(target=change), threading.Thread(target=vanish)]
    for thread in others:
        thread.start()
    with ThreadPoolExecutor(32) as pool:
        complete_all = list(pool.map(complete, range(REQUESTS)))
    finished.set()
    for thread in others:
        thread.join()
    assert all(complete_all)
    assert set(statuses) == {200, 500}  # only what cannot be read is refused
    server.set(policy=tiny.POLICY, enabled=True)
    time.sleep(2)
    end = server.metrics()
    assert end["carpool_refusals_total"] == statuses.count(500)
    assert 0 < end["carpool_rows_changed_total"] < end["carpool_rows_total"]
    assert end["carpool_experts_read_total"] < end["carpool_experts_natural_total"]
    assert set(end) == set(start)  # whatever was served, the series are the same


def test_a_request_that_says_nonsense_is_answered_with_an_error(server: Server) -> None:
    status, answer = server.post(
        "/v1/completions", {"model": "tiny", "prompt": [5], "max_tokens": 2, "vllm_xargs": {"carpool": "xshare(8)"}}
    )
    assert status == 400
    assert "\"carpool\": 'xshare(8)'" in json.loads(answer)["error"]["message"]


def test_samples_of_one_request_share_and_strangers_do_not(folder: Path) -> None:
    """Over HTTP, where clients choose ids and parameters."""
    with serving(folder, {"policy": "xshare(budget=6)", "group": "prompt"}) as server:

        def changed(requests: list[dict[str, Any]], **headers: str) -> float:
            before = server.metrics()["carpool_rows_changed_total"]
            body = {"model": "tiny", "prompt": [5] * 20, "max_tokens": 64, "temperature": 1, "ignore_eos": True}
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda more: server.post("/v1/completions", body | more, **headers), requests))
            assert [status for status, _ in answers] == [200] * len(requests)
            assert [len(answer["choices"]) for _, answer in answers] == [one.get("n", 1) for one in requests]
            time.sleep(2)
            return server.metrics()["carpool_rows_changed_total"] - before

        forged = {"_carpool_samples": "x", "carpool_prompt": "x", "carpool_tenant": "x"}
        strangers = [{"vllm_xargs": forged, "seed": seed} for seed in range(4)]
        assert changed([{"n": 4}]) > 0
        assert changed(strangers, **{"X-Request-Id": "0_x"}) == 0
