"""A tuned policy file in vLLM: what it reads and how fast it decodes, beside vLLM without the plugin's configuration.

    carpool tune --text TRAIN.jsonl --batch 16 --max-kl 0.02 -o policy.json
    python benchmarks/tuned_serve.py policy.json --output docs/results/tuned-serve.json   # about five minutes
    python benchmarks/tuned_serve.py policy.json --quick --output /tmp/quick.json          # proves that it runs

Two engines in one process load the same model, one with `{"carpool": {"file": "policy.json"}}` and one without. In each
round both decode the same held-out prompts greedily, one after the other in random order; the steps that follow the
prompts are timed. What stock reads is counted in a decoding of its own that is not timed. Speeds and their ratio are
medians over rounds, intervals order statistics. The reference model's weights fit into a processor's caches, so its
ratio says what sharing costs there and nothing about what it saves. Rounds that the output already holds are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from engines import machine, set_environment
from vllm_rounds import paired

from carpool.artefacts.files import sha256_file, write_text
from carpool.artefacts.texts import load_texts
from carpool.cli.common import embedded_texts, open_model
from carpool.errors import CarpoolError
from carpool.evaluate.sequences import draw
from carpool.plans.policy_file import PolicyFile

SEED = 0
STATES = ("stock", "tuned")


def main() -> None:
    options = arguments()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # read when torch is loaded
        given = {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | given)
    from carpool_demo import MODEL

    policy = PolicyFile.load(options.file)
    about = {
        "policy": str(policy.plan), "layers": {str(index): given for index, given in policy.layers.items()},
        "policy_sha256": sha256_file(options.file), "tuned_for": policy.curve[0] if policy.curve else None,
        "model": "reference model", "weights_sha256": sha256_file(Path(MODEL) / "model.safetensors"),
        "batch": options.batch, "prompt": options.prompt, "new_tokens": options.tokens, "threads": options.threads,
        "dtype": "float32", "seed": SEED,
    }  # fmt: skip
    content = json.loads(options.output.read_text()) if options.output.exists() else {}
    if {name: content.get(name) for name in about} != json.loads(json.dumps(about)):
        content = about | {"rounds": []}
    tokenizer = open_model(None).tokenizer
    rows = draw(
        load_texts(embedded_texts()), tokenizer, count=options.batch * options.rounds, length=options.prompt, seed=SEED
    ).ids_ST[:, : options.prompt]
    engines = {"stock": start(MODEL, options, None), "tuned": start(MODEL, options, options.file)}
    warm = rows[: options.batch].tolist()
    for llm in engines.values():
        decode(llm, warm, 4)
    for number in range(len(content["rounds"]), options.rounds):
        prompts = rows[number * options.batch :][: options.batch].tolist()
        content["rounds"].append(measure(engines, prompts, options.tokens, random.Random(f"{SEED} {number}")))
        content |= {"machine": machine(), "summary": summary(content["rounds"], options)}
        write_text(options.output, json.dumps(content, indent=1) + "\n")
        print(f"round {number + 1} of {options.rounds}", flush=True)
    print(json.dumps(content["summary"], indent=1))


def start(model: Any, options: argparse.Namespace, file: Path | None) -> Any:
    set_environment()
    from vllm import LLM

    configured = {} if file is None else {"carpool": {"file": str(file), "isolation": "batch"}}
    return LLM(
        str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, seed=SEED, block_size=32,
        kv_cache_memory_bytes=1 << 27, max_model_len=512, max_num_seqs=options.batch, enable_prefix_caching=False,
        max_num_batched_tokens=max(512, options.batch * options.prompt), additional_config=configured,
    )  # fmt: skip


def decode(llm: Any, prompts: list[list[int]], tokens: int, ready: Callable[[], Any] = lambda: None) -> float:
    """Seconds of the steps after the prompts, `tokens - 1` of them; `ready` is called before them."""
    from vllm import SamplingParams

    engine, given = llm.llm_engine, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    for number, ids in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": ids}, given)
    found = engine.step()
    if len(found) != len(prompts):
        raise RuntimeError("the prompts do not fit into one step; give the engine more tokens a step")
    ready()
    begin = time.perf_counter()
    for _ in range(tokens - 1):
        found = engine.step()
    seconds = time.perf_counter() - begin
    if len(found) != len(prompts) or not all(one.finished for one in found):
        raise RuntimeError("the requests did not decode in step")
    return seconds


def measure(engines: dict[str, Any], prompts: list[list[int]], tokens: int, order: random.Random) -> dict[str, Any]:
    """One round: what both states read, and how long they take."""
    seconds: dict[str, float] = {}
    for name in order.sample(STATES, len(STATES)):
        ready = report if name == "tuned" else lambda llm: None
        seconds[name] = decode(engines[name], prompts, tokens, lambda: ready(engines[name]))  # noqa: B023
    read = report(engines["tuned"])
    if not read["rows_changed"]:
        raise CarpoolError("the policy file changed no row; nothing is shared here")
    return {"seconds": seconds, "tuned": read, "stock_union": natural(engines["stock"], prompts, tokens)}


def report(llm: Any) -> dict[str, float]:
    """Sums over layers of the plugin's counters since the last call, and bytes."""
    [found] = llm.collective_rpc("carpool_report", kwargs={"reset": True})
    names = ("steps", "rows", "rows_changed", "natural_union", "union", "surrogates", "surrogate_pairs")
    made = {name: float(sum(layer[name] for layer in found["layers"])) for name in names}
    made["bytes"] = float(
        sum(one["union"] * one["expert_bytes"] + one["surrogates"] * one["surrogate_bytes"] for one in found["layers"])
    )
    return made | {"expert_bytes": float(found["layers"][0]["expert_bytes"])}


def natural(llm: Any, prompts: list[list[int]], tokens: int) -> float:
    """Mean number of distinct experts of a layer and step of an engine without the plugin."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    routers = [module.router for module in model.modules() if isinstance(module, MoERunner)]
    counts: list[int] = []

    def capture() -> None:
        for router in routers:
            router.set_capture_fn(lambda ids_NK: counts.append(len(ids_NK.unique())))

    try:
        decode(llm, prompts, tokens, capture)
    finally:
        for router in routers:
            router.set_capture_fn(None)
    if len(counts) != len(routers) * (tokens - 1):
        raise RuntimeError("a router of this engine was not asked in every step")
    return sum(counts) / len(counts)


def summary(rounds: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Reading by layer and step, tokens a second, and their ratio."""
    total = {name: sum(one["tuned"][name] for one in rounds) for name in rounds[0]["tuned"]}
    seconds = {name: np.array([one["seconds"][name] for one in rounds]) for name in STATES}
    tokens = np.full(len(rounds), float(options.batch * (options.tokens - 1)))
    stock = sum(one["stock_union"] for one in rounds) / len(rounds)
    expert = rounds[0]["tuned"]["expert_bytes"]
    return {
        "stock": {"union": stock, "tokens_per_second": asdict(paired(tokens, seconds["stock"]))},
        "tuned": {
            "union": total["union"] / total["steps"],
            "natural_union": total["natural_union"] / total["steps"],
            "surrogates": total["surrogates"] / total["steps"],
            "bytes_of_stock": total["bytes"] / total["steps"] / (stock * expert),
            "rows_changed": total["rows_changed"] / total["rows"],
            "tokens_per_second": asdict(paired(tokens, seconds["tuned"])),
        },
        "throughput_over_stock": asdict(paired(seconds["stock"], seconds["tuned"])),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="policy file for the reference model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two short rounds; their speeds mean nothing")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = 6, 2
    return options


if __name__ == "__main__":
    main()
