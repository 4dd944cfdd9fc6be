"""`vllm bench serve` against `vllm serve`, stock and shared, in turn.

    python benchmarks/vllm_serve.py --output docs/results/vllm-serve.json    # about nine minutes a repeat
    python benchmarks/vllm_serve.py --quick --output /tmp/quick.json
    python benchmarks/vllm_serve.py --model MODEL --planes planes/ --dtype bfloat16 --policy "depth(bytes=0.2)" \
        --output docs/results/vllm-serve-planes.json     # a model, and what `carpool compress -o planes/` made of it
    python benchmarks/vllm_serve.py --random-planes --dtype bfloat16 --policy "depth(bytes=0.2)" \
        --output docs/results/vllm-serve-random.json     # random planes beside the random weights

Random weights with the layer geometry of a real model are written once; then servers without and with the key
`carpool` start in turn, `--repeats` times each, with vLLM's defaults (it compiles the model), and vLLM's own client
measures them. Its results are kept as they are. With `--planes` a third server reads the planes as deep as they are
stored, and the policy's reads them, too. `peak_memory_bytes` is the largest that a server and its engine were resident.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from engines import GEOMETRIES, VOCABULARY, Geometry, machine, set_environment, write_config
from random_planes import write_checkpoint

from carpool.artefacts.files import write_text

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
KEPT = (
    "output_throughput",
    "request_throughput",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "p99_tpot_ms",
    "completed",
    "peak_memory_bytes",
)
STARTUP = 900  # seconds
DEPTHS, GROUP = (2, 3, 4, 6), 64  # of random planes


def write_model(geometry: Geometry, layers: int, folder: Path) -> Path:
    """A checkpoint of random weights with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(geometry, layers, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """One word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def bench(model: Path, options: argparse.Namespace, policy: str | None, name: str, folder: Path) -> dict[str, Any]:
    """Start a server, measure it, stop it; logs and results go to a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *VLLM, "serve", str(model), "--served-model-name", "bench", "--port", str(port),
        "--dtype", options.dtype, "--kv-cache-memory-bytes", str(1 << 29), "--max-model-len", "512",
        "--max-num-seqs", str(options.concurrency), "--block-size", "32", "--no-enable-prefix-caching",
    ]  # fmt: skip
    if options.eager:
        command.append("--enforce-eager")
    if policy is not None:
        command += ["--additional-config", json.dumps({"carpool": {"policy": policy, "isolation": "batch"}})]
    cores = "0" if options.threads == 1 else f"0-{options.threads - 1}"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    with (folder / f"{name}.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(port, server, folder / f"{name}.log")
            client(model, port, options, "warm-up", options.concurrency, folder)
            result = client(model, port, options, name, options.requests, folder)
            result |= {"carpool": metrics(port), "peak_memory_bytes": peak_memory(server.pid)}
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=120)
    return result


def peak_memory(process: int) -> int:
    """Bytes that a process and all below it were resident at most, each at its own time."""
    own = Path(f"/proc/{process}")
    lines = (own / "status").read_text().splitlines()
    held = sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    below = {int(one) for children in own.glob("task/*/children") for one in children.read_text().split()}
    return held + sum(map(peak_memory, below))


def client(
    model: Path, port: int, options: argparse.Namespace, name: str, requests: int, folder: Path
) -> dict[str, Any]:
    """vLLM's own client; what it writes."""
    command = [
        *VLLM, "bench", "serve", "--backend", "openai", "--port", str(port), "--model", "bench",
        "--tokenizer", str(model), "--dataset-name", "random", "--random-input-len", "16",
        "--random-output-len", str(options.tokens), "--num-prompts", str(requests), "--ignore-eos", "--seed", "0",
        "--max-concurrency", str(options.concurrency), "--save-result", "--result-dir", str(folder),
        "--result-filename", f"{name}.json", "--disable-tqdm",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    lists = [key for key, value in result.items() if isinstance(value, list)]  # of every request and token
    return {key: value for key, value in result.items() if key not in lists and key != "tokenizer_id"}


def metrics(port: int) -> dict[str, float]:
    """What the plugin says on /metrics, by name without labels; empty without it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name.partition("{")[0]: float(value) for name, value in (x.split() for x in lines if x.startswith("carpool_"))
    }


def wait_for(port: int, server: subprocess.Popen[Any], log: Path) -> None:
    for _ in range(STARTUP):
        if server.poll() is not None:
            raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise SystemExit("the server did not come up")


def main() -> None:
    options = arguments()
    set_environment()
    geometry = GEOMETRIES[options.geometry]
    about = {
        name: getattr(options, name)
        for name in ("geometry", "layers", "dtype", "policy", "concurrency", "threads", "eager")
    }
    if options.model is not None:
        about |= {"geometry": options.model.name, "layers": None}
    content: dict[str, Any] = {**about, "machine": machine(), "runs": []}
    with tempfile.TemporaryDirectory(prefix="carpool-serve-", dir=options.folder) as folder:
        work = Path(folder)
        model = options.model or write_model(geometry, options.layers, work)
        planes = options.planes
        if options.random_planes:
            (work / "planes").mkdir()
            planes = write_checkpoint(geometry, options.layers, work / "planes", DEPTHS, GROUP, 0)
            write_tokenizer(planes)
        states = [("stock", model, None), ("shared", planes or model, options.policy)]
        if planes is not None:
            states.insert(1, ("planes", planes, None))
        for repeat in range(options.repeats):
            for name, served, policy in states[:: 1 - 2 * (repeat % 2)]:  # who goes first changes
                result = bench(served, options, policy, f"{name}-{repeat}", work)
                failed = "" if result["completed"] == options.requests else "requests were lost"
                if policy is not None and not result["carpool"].get("carpool_rows_changed_total"):
                    failed = "the policy changed no row"
                content["runs"].append({"state": name, "repeat": repeat, "failed": failed, "result": result})
            content["summary"] = summary(content["runs"])
            write_text(options.output, json.dumps(content, indent=1) + "\n")  # an interrupted run keeps whole pairs
    print(json.dumps(content["summary"], indent=1))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats; nothing if a run failed."""
    if any(run["failed"] for run in runs):
        return {"failed": "; ".join(sorted({run["failed"] for run in runs if run["failed"]}))}
    made: dict[str, Any] = {
        state: {name: statistics.median(run["result"][name] for run in runs if run["state"] == state) for name in KEPT}
        for state in dict.fromkeys(run["state"] for run in runs)
    }
    if "shared" not in made or "stock" not in made:
        return made
    made["output_throughput_over_stock"] = made["shared"]["output_throughput"] / made["stock"]["output_throughput"]
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a checkpoint with a tokenizer, in place of random weights")
    parser.add_argument("--planes", type=Path, help="the same model's folder of `carpool compress`")
    parser.add_argument("--random-planes", action="store_true", help="random planes beside the random weights")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--policy", default="xshare(budget=32)")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="--enforce-eager, not vLLM's defaults")
    parser.add_argument("--folder", help="where the checkpoint is written, 1.2 GB a layer; default: the system's")
    parser.add_argument("--quick", action="store_true", help="a tiny model; its speeds mean nothing")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.quick:
        options.geometry, options.policy, options.concurrency, options.requests = "tiny", "xshare(budget=8)", 4, 8
        options.tokens, options.repeats = 8, 1
    return options


if __name__ == "__main__":
    main()
