"""The plugin in SGLang's own server, on a CPU: `make test-sglang`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import sglang_models as tiny
import vllm_models

pytest.importorskip("sglang", reason="SGLang is in a folder of its own: make test-sglang")
pytestmark = pytest.mark.slow

FLAGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend",
    "none", "--disable-overlap-schedule", "--skip-tokenizer-init", "--dtype", "float32", "--max-total-tokens", "2048",
    "--max-running-requests", "8", "--mem-fraction-static", "0.8", "--skip-server-warmup", "--enable-metrics",
    "--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled",
)  # fmt: skip
STARTS = 400  # seconds, on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_models.write_model("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


def command(model: Path, carpool: Any, port: int) -> list[str]:
    given = json.dumps({"carpool": carpool})
    place = ["--model-path", str(model), "--port", str(port), "--served-model-name", "m"]
    return [sys.executable, "-m", "sglang.launch_server", *place, *FLAGS, "--json-model-override-args", given]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("log") / "server.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as said:
        started = subprocess.Popen(
            command(model, {"policy": vllm_models.POLICY, "isolation": "batch"}, port), stdout=said, stderr=said,
            env=os.environ | tiny.ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
    try:
        for _ in range(STARTS):
            assert started.poll() is None, log.read_text()[-3000:]
            try:
                urlopen(f"{url}/health").read()
            except (URLError, OSError):
                time.sleep(1)
            else:
                break
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def asked(url: str, given: Any = None) -> Any:
    data = None if given is None else json.dumps(given).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"})) as answer:
        text = answer.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


def generate(server: str, prompt: list[int], **parameters: Any) -> list[int]:
    given = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True} | parameters
    found: list[int] = asked(f"{server}/generate", {"input_ids": prompt, "sampling_params": given})["output_ids"]
    return found


def metrics(server: str) -> dict[str, float]:
    lines = [line for line in asked(f"{server}/metrics").splitlines() if line.startswith("carpool_")]
    assert all('model_name="m"' in line for line in lines)
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_session(server: str) -> None:
    with ThreadPoolExecutor() as at_once:
        list(at_once.map(lambda first: generate(server, [first, 6, 7]), range(10, 16)))
    found = asked(f"{server}/server_info")["internal_states"][0]["carpool"]
    assert found["policy"].startswith(vllm_models.POLICY)
    changed = sum(layer["rows_changed"] for layer in found["layers"])
    assert changed > 0
    time.sleep(2)  # counters are read once a second
    counted = metrics(server)
    assert counted["carpool_enabled"] == 1
    assert counted["carpool_rows_changed_total"] == changed
    assert 0 < counted["carpool_experts_read_total"] < counted["carpool_experts_natural_total"]
    assert asked(f"{server}/carpool_set", {"enabled": False})["enabled"] is False
    assert metrics(server)["carpool_enabled"] == 0
    assert asked(f"{server}/carpool_set", {"enabled": True})["enabled"] is True


def test_changes_over_http(server: str) -> None:
    made = asked(f"{server}/carpool_set", {"policy": "oea(k0=1)", "group": "request"})
    assert (made["policy"].partition(" |")[0], made["group"], made["isolation"]) == ("oea(k0=1)", "request", "batch")
    assert "layers" not in made
    for given, sentence in (
        ({"policy": "xshare(budget=99)"}, "99 of 32 experts"), ({"polcy": "oea(k0=1)"}, "carpool_set has no 'polcy'"),
        ({"file": "/nowhere.json"}, "/nowhere.json"),
    ):  # fmt: skip
        with pytest.raises(HTTPError) as refused:
            asked(f"{server}/carpool_set", given)
        assert refused.value.code == 400
        assert sentence in json.loads(refused.value.read())["error"]
    found = asked(f"{server}/server_info")["internal_states"][0]["carpool"]
    assert found["policy"] == made["policy"], "nothing changed"
    assert asked(f"{server}/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 1}}) == [True], "SGLang's"
    assert asked(f"{server}/carpool_set", {"policy": vllm_models.POLICY, "group": "batch"})["group"] == "batch"


def test_a_request_that_is_not_understood_is_the_clients_error(server: str) -> None:
    with pytest.raises(HTTPError) as refused:
        generate(server, [5, 6], custom_params={"carpool": "of"})
    assert refused.value.code == 400
    assert "leave the key out" in refused.value.read().decode()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"policy": "xshare(budget=99)", "isolation": "batch"},
            "carpool: budget=99 asks for 99 of 32 experts",
        ),
        ({"policy": "xshare(budget=8)"}, 'write "isolation": "batch" to accept that'),
    ],
)
def test_what_cannot_work_stops_the_server_with_one_sentence(model: Path, given: Any, sentence: str) -> None:
    done = subprocess.run(
        command(model, given, free_port()), capture_output=True, text=True, check=False, timeout=STARTS,
        env=os.environ | tiny.ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
