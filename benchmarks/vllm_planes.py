"""vLLM on a checkpoint in planes beside vLLM on bf16 weights: decoding and prompts, two engines in one process.

    python benchmarks/vllm_planes.py --output docs/results/vllm-planes.json
    python benchmarks/vllm_planes.py --quick     # a rehearsal with a tiny model

Random weights with the layers of a real model, a few of them; both engines compile it, as is their default. In every
round all states decode in turn: stock, the planes as deep as they are stored, and the planes read at fewer bits by a
policy (`depth(price=0, levels=[0, d])`).
Decode time is that of a generation less that of its first token; medians over rounds. `bound` is the speed-up over
stock that the bytes of a whole step allow, attention and head included. Bits include scales.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from engines import GEOMETRIES, Geometry, as_json, machine, read_bandwidth, set_environment, start
from random_planes import write_checkpoint

DEPTHS, GROUP, SEED = (2, 3, 4, 6), 64, 0
STOCK, WHOLE = "stock bf16", f"depth {DEPTHS[-1]}, no policy"
PROMPT = 8


def planes_engine(folder: Path, options: dict[str, Any], depth: int = DEPTHS[-1], dtype: str = "bfloat16") -> Any:
    """An `LLM` on the checkpoint, with a policy that can be changed; `depth` is the deepest stored."""
    set_environment()
    from vllm import LLM

    policy = f"depth(price=0, levels=[0, {depth}])"
    return LLM(
        str(folder), skip_tokenizer_init=True, dtype=dtype, seed=0, block_size=32,
        kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False,
        additional_config={"carpool": {"policy": policy, "isolation": "batch"}}, **options,
    )  # fmt: skip


def took(llm: Any, prompts: list[dict[str, Any]], tokens: int) -> float:
    """Seconds of a greedy generation."""
    from vllm import SamplingParams

    how = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, how, use_tqdm=False)
    return time.perf_counter() - begin


class Chosen:
    """Seconds spent on choosing experts and depths, from the engine's own routing to what a layer's experts get."""

    def __init__(self) -> None:
        from carpool.hosts.vllm import router

        self.seconds, self._routed = 0.0, router.routed
        router.routed = self

    def __call__(self, *given: Any) -> Any:
        begin = time.perf_counter()
        found = self._routed(*given)
        self.seconds += time.perf_counter() - begin
        return found


def bytes_beside_experts(folder: Path) -> float:
    """What a step reads beside experts, from the configuration: the engine's own lists lack what it packs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from carpool.hosts.transformers.layers import weight_bytes

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return weight_bytes(model)[1]


def measure(engines: dict[str, Any], geometry: Geometry, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """One batch size: every state in turn, round by round."""
    import torch

    generator = torch.Generator().manual_seed(SEED + batch)
    ids = torch.randint(3, 8000, (batch, PROMPT), generator=generator).tolist()
    prompts = [{"prompt_token_ids": one} for one in ids]
    planes = engines["planes"]
    states = {STOCK: None, WHOLE: {"enabled": False}} | {
        f"depth {depth}": {"policy": f"depth(price=0, levels=[0, {depth}])", "enabled": True, "compile": True}
        for depth in DEPTHS
    }
    seconds: dict[str, list[float]] = {state: [] for state in states}
    chosen: dict[str, list[float]] = {state: [] for state in states}
    union = 0.0
    for turn in range(given.rounds + 1):
        for state, change in states.items():
            llm = engines["stock"] if change is None else planes
            if change is not None:
                planes.collective_rpc("carpool_set", kwargs=change)
                planes.collective_rpc("carpool_report", kwargs={"reset": True})
            engines["chosen"].seconds = 0.0
            first = took(llm, prompts, 1)
            prompt, engines["chosen"].seconds = engines["chosen"].seconds, 0.0
            whole = took(llm, prompts, 1 + given.tokens)
            if turn:
                seconds[state].append((whole - first) / given.tokens)
                chosen[state].append((engines["chosen"].seconds - prompt) / given.tokens)
        [report] = planes.collective_rpc("carpool_report", kwargs={"reset": True})
        rows = report["layers"]
        union = sum(row["union"] for row in rows) / max(1, sum(row["steps"] for row in rows))
    return {"batch": batch, "distinct_experts": union, "step_ms": {
        state: {"median": 1e3 * statistics.median(times),
                "quartiles": [1e3 * value for value in statistics.quantiles(times, n=4)[::2]],
                "choosing": 1e3 * statistics.median(chosen[state])}
        for state, times in seconds.items()
    }}  # fmt: skip


def with_bounds(cell: dict[str, Any], geometry: Geometry, layers: int, other: float, rate: float) -> dict[str, Any]:
    """The cell with what bytes allow: `other` bytes of a step beside experts; `rate` GB/s of a streaming read."""
    whole = cell["distinct_experts"] * layers * 3 * geometry.hidden * geometry.intermediate
    stock = cell["step_ms"][STOCK]["median"]
    for state, found in cell["step_ms"].items():
        bits = 16.0 if state == STOCK else int(state.split()[1].rstrip(",")) + 16 / GROUP
        read = other + whole * bits / 8
        found |= {
            "bits": bits, "speed_up": stock / found["median"], "bound": (other + whole * 2) / read,
            "of_stream": read / 1e6 / found["median"] / rate,
        }  # fmt: skip
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--geometry", choices=[name for name in GEOMETRIES if name != "gpt-oss-20b"], default="qwen3-30b-a3b"
    )
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt that is timed alone")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.geometry, given.batches, given.rounds, given.tokens, given.prompt = "tiny", [1, 4], 2, 4, 64
    geometry = GEOMETRIES[given.geometry]
    layers = given.layers or geometry.layers
    folder = Path(tempfile.mkdtemp(prefix="carpool-planes-"))
    limits = {"max_model_len": given.prompt + 64, "max_num_batched_tokens": max(given.prompt, 64), "max_num_seqs": 64}
    engines = {
        "planes": planes_engine(write_checkpoint(geometry, layers, folder, DEPTHS, GROUP, SEED), limits),
        "stock": start(geometry, layers, "bfloat16", enforce_eager=False, **limits),
        "chosen": Chosen(),
    }
    other = bytes_beside_experts(folder)
    rate = read_bandwidth(0.25 if given.quick else 1.0)
    content: dict[str, Any] = {
        "machine": machine(), "geometry": given.geometry, "layers": layers,
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)),
        "seed": SEED, "rounds": given.rounds, "tokens": given.tokens, "other_bytes": other, "stream_gb_s": rate,
        "load_before": os.getloadavg()[0], "cells": [], "prompt": {},
    }  # fmt: skip
    for batch in given.batches:
        cell = with_bounds(measure(engines, geometry, batch, given), geometry, layers, other, rate)
        content["cells"].append(cell)
        print(
            batch,
            {
                k: (round(v["median"], 2), round(v["speed_up"], 2), round(v["bound"], 2))
                for k, v in cell["step_ms"].items()
            },
        )
        if given.output:
            given.output.write_text(as_json(content))
    import torch

    ids = torch.randint(3, 8000, (given.prompt,), generator=torch.Generator().manual_seed(SEED)).tolist()
    times: dict[str, list[float]] = {name: [] for name in ("planes", "stock")}
    for turn in range(4):
        for name in times:
            one = took(engines[name], [{"prompt_token_ids": ids}], 1)
            if turn:
                times[name].append(one)
    content["prompt"] = {"tokens": given.prompt} | {name: statistics.median(each) for name, each in times.items()}
    print(content["prompt"])
    if given.output:
        given.output.write_text(as_json(content))


if __name__ == "__main__":
    main()
