"""`vllm serve` under load for a while: policies that change, clients that vanish, metrics that are read.

    python benchmarks/soak.py --minutes 10 --output docs/results/soak.json

Serves the reference model with 32 places in the batch and more clients than that. One thread changes the policy twice a
second, among them changes that must be refused; one reads the metrics and the memory of all server processes. A calm
phase at the end, of requests whose tokens are known, checks that the counters count exactly those.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from carpool.artefacts.files import require_writable, write_text
from carpool.evaluate.results import provenance

LAYERS = 4
POLICY = "xshare(budget=16)"
CALM = "topk(k=4)"  # token-local: a row that is alone in its step counts, too
CHANGES: tuple[tuple[dict[str, Any], int], ...] = (  # what is asked for, and the answer's status
    ({"policy": "xshare(budget=24) | floor(0.3)"}, 200), ({"policy": "oea(k0=2)"}, 200), ({"enabled": False}, 200),
    ({"enabled": True}, 200), ({"policy": "nonsense(1)"}, 500), ({"policy": "xshare(budget=999)"}, 500),
    ({"policy": "des_vote(size=20)"}, 200), ({"policy": "tail_mass(beta=0.4)"}, 200), ({"policy": "topk(k=4)"}, 200),
    ({"policy": "lynx(budget=16) | floor(0.2)"}, 200), ({"policy": POLICY}, 200),
)  # fmt: skip
CLIENTS = 40
PLACES = 32
EVERY = 5.0  # seconds between two looks at metrics and memory


class Server:
    """A server that was started, and what went through it."""

    def __init__(self, log: Path) -> None:
        from carpool_demo import HERE

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(HERE / "model"), "--served-model-name", "m",
            "--port", str(self.port), "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 27), "--dtype", "float32",
            "--max-model-len", "256", "--max-num-seqs", str(PLACES), "--block-size", "32",
            "--additional-config", json.dumps({"carpool": {"policy": POLICY, "isolation": "batch"}}),
        ]  # fmt: skip
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0",
        }  # fmt: skip
        self._out = log.open("w")
        self.process = subprocess.Popen(command, env=environment, stdout=self._out, stderr=self._out)

    def wait(self, seconds: int) -> None:
        """Until it answers."""
        for _ in range(seconds):
            if self.process.poll() is not None:
                sys.exit(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return
            except OSError:
                time.sleep(1)
        sys.exit(f"the server did not start within {seconds} s")

    def post(self, path: str, content: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def set(self, settings: dict[str, Any]) -> int:
        return self.post("/collective_rpc", {"method": "carpool_set", "kwargs": settings})[0]

    def metrics(self) -> dict[str, float]:
        """Carpool's metrics, and the requests that run."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=120) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith(("carpool_", "vllm:num_requests_running")):
                name, value = line.rsplit(" ", 1)
                found[name.split("{")[0]] = float(value)
        return found

    def megabytes(self) -> float:
        """Resident memory of the server and its workers."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / 2**20

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._out.close()


def body(rng: random.Random, tokens: int) -> dict[str, Any]:
    prompt = [rng.randrange(2, 8000) for _ in range(rng.randrange(1, 60))]
    made: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    extra = {"carpool": "off"} if rng.random() < 0.1 else {}
    return made | {"vllm_xargs": extra | ({"carpool_tenant": rng.choice("abc")} if rng.random() < 0.2 else {})}


def vanish(server: Server, rng: random.Random) -> None:
    """Ask for a long stream and hang up after its beginning."""
    content = json.dumps(body(rng, 190) | {"stream": True}).encode()
    headers = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}")
    head = "\r\n".join(("POST /v1/completions HTTP/1.1", *headers, "", ""))
    with socket.create_connection(("127.0.0.1", server.port), timeout=600) as client:
        client.sendall(head.encode() + content)
        client.recv(1000)


def soak(server: Server, seconds: float, seed: int) -> dict[str, Any]:
    """Load for so long; what was asked, what went wrong, what was read on the way."""
    end, lock = time.monotonic() + seconds, threading.Lock()
    counts = {"requests": 0, "tokens": 0, "disconnects": 0, "errors": 0}
    samples: list[dict[str, float]] = []
    changes: list[tuple[int, int]] = []
    trouble: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            leaves, tokens = rng.random() < 0.08, rng.randrange(4, 40)
            try:
                if leaves:
                    vanish(server, rng)
                    done = True
                else:
                    status, answer = server.post("/v1/completions", body(rng, tokens))
                    done = status == 200 and answer["usage"]["completion_tokens"] == tokens
            except OSError as error:
                done, answer = False, str(error)
            with lock:
                counts["disconnects" if leaves else "requests"] += 1
                counts["tokens"] += 0 if leaves else tokens
                if not done:
                    counts["errors"] += 1
                    trouble.append(str(answer)[:300])

    def change() -> None:
        turn = 0
        while time.monotonic() < end:
            settings, expected = CHANGES[turn % len(CHANGES)]
            changes.append((server.set(settings), expected))
            turn += 1
            time.sleep(0.5)

    def look() -> None:
        began = time.monotonic()
        while time.monotonic() < end:
            samples.append(server.metrics() | {"megabytes": server.megabytes(), "second": time.monotonic() - began})
            time.sleep(EVERY)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    threads += [threading.Thread(target=change), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = [pair for pair in changes if pair[0] != pair[1]]
    return {
        **counts, "changes": len(changes), "refused": sum(status == 500 for status, _ in changes),
        "unexpected_answers": len(wrong), "trouble": trouble[:5], "samples": samples,
    }  # fmt: skip


def calm(server: Server, seed: int) -> dict[str, Any]:
    """After all others have left: known requests under one policy; the counters must hold exactly them."""
    for settings in ({"enabled": True}, {"policy": CALM}):
        server.set(settings)
    for _ in range(120):
        if not server.metrics().get("vllm:num_requests_running"):
            break
        time.sleep(1)
    time.sleep(3)
    before, rng = server.metrics(), random.Random(seed)
    asked = [body(rng, rng.randrange(4, 40)) | {"vllm_xargs": {}} for _ in range(96)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        statuses = [status for status, _ in pool.map(lambda one: server.post("/v1/completions", one), asked)]
    time.sleep(3)
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    voters = grown["carpool_rows_total"] - grown["carpool_rows_exempt_total"]
    return {
        "requests": len(asked), "failed": sum(status != 200 for status in statuses), "decoded_rows_counted": voters,
        "decoded_rows_expected": LAYERS * sum(one["max_tokens"] - 1 for one in asked), "running_at_the_end":
        after.get("vllm:num_requests_running", 0.0), "refusals": after["carpool_refusals_total"],
    }  # fmt: skip


def verdict(found: dict[str, Any], quiet: dict[str, Any]) -> dict[str, Any]:
    """What was promised, yes or no."""
    samples = found["samples"]
    settled = [one["megabytes"] for one in samples[len(samples) // 4 :]]
    third = max(1, len(settled) // 3)
    first, last = sum(settled[:third]) / third, sum(settled[-third:]) / third
    counters = [name for name in samples[0] if name.startswith("carpool_") and name.endswith("_total")]
    errors = found["errors"] + found["unexpected_answers"] + quiet["failed"]
    rising = all(a[name] <= b[name] for a, b in pairwise(samples) for name in counters)
    return {
        "megabytes_after_warm_up": first, "megabytes_at_the_end": last, "growth": last / first - 1,
        "memory_flat": last / first < 1.02, "no_errors": not errors,
        "counters_never_fall": rising, "refusals_counted": quiet["refusals"] == found["refused"],
        "rows_counted": quiet["decoded_rows_counted"] == quiet["decoded_rows_expected"],
        "nobody_left_behind": quiet["running_at_the_end"] == 0,
        "series": len({name for one in samples for name in one if name.startswith("carpool_")}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--startup", type=int, default=1800, help="seconds that the server may take to start")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    require_writable(given.output)
    server = Server(given.output.with_suffix(".log"))
    try:
        server.wait(given.startup)
        found = soak(server, given.minutes * 60, given.seed)
        quiet = calm(server, given.seed)
    finally:
        server.stop()
    arguments = {"minutes": given.minutes, "seed": given.seed, "clients": CLIENTS, "batch": PLACES}
    content = {"kind": "carpool soak", **provenance(), "arguments": arguments, "verdict": verdict(found, quiet)}
    content |= {"calm": quiet, "load": found}
    write_text(given.output, json.dumps(content, indent=1) + "\n")
    given.output.with_suffix(".log").unlink()
    print(json.dumps(content["verdict"], indent=1))


if __name__ == "__main__":
    main()
