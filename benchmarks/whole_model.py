"""A whole model in planes in little memory: Qwen3-30B-A3B's geometry, random weights, in both hosts.

    python benchmarks/whole_model.py --folder /big/disk --output docs/results/whole-model.json
    python benchmarks/whole_model.py --quick --folder /tmp     # a rehearsal with a tiny model

Writes the model straight into planes (4.75 bits a weight of an expert with three depths in groups of 64; the rest in
bf16, vocabulary included), layer by layer, 19 GB of disk, and deletes it in the end. Each host loads it in a process of
its own and decodes greedily, every expert at the deepest depth and with `depth(bytes=0.2)`.
`peak_anonymous_gib` is the process's own memory, `peak_resident_gib` counts pages of the file, too, which the system
takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from engines import GEOMETRIES, as_json, machine, set_environment
from random_planes import PLANES_FILE, write_checkpoint

LAYERS, VOCABULARY, DEPTHS, GROUP, SEED = 48, 151_936, (2, 3, 4), 64, 0
PROMPT, BATCHES, TOKENS = 8, (1, 4), 12
POLICY = "depth(bytes=0.2)"
GIB = 1 << 30


def prompts(batch: int) -> list[list[int]]:
    import torch

    return torch.randint(3, 2000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()


@contextmanager
def peaks(found: dict[str, Any]) -> Iterator[None]:
    """The largest memory of this process while a block runs, looked at every 20 ms."""
    over, largest = threading.Event(), {"RssAnon": 0, "VmRSS": 0}

    def watch() -> None:
        while not over.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in largest:
                    largest[name] = max(largest[name], int(value.split()[0]) << 10)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found |= {"peak_anonymous_gib": largest["RssAnon"] / GIB, "peak_resident_gib": largest["VmRSS"] / GIB}


def cells(generate: Callable[[list[list[int]], int], list[list[int]]]) -> list[dict[str, Any]]:
    """Greedy tokens and tokens a second of every batch size; the time of a first token is taken off."""
    found = []
    for batch in BATCHES:
        given = prompts(batch)
        begin = time.perf_counter()
        generate(given, 1)
        first = time.perf_counter()
        made = generate(given, 1 + TOKENS)
        took = time.perf_counter() - first - (first - begin)
        found.append({"batch": batch, "tokens_s": batch * TOKENS / took, "step_ms": 1e3 * took / TOKENS, "ids": made})
    return found


def in_transformers(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """`from_pretrained`, then decoding as stored and under the policy."""
    import torch
    from transformers import AutoModelForCausalLM

    import carpool
    import carpool.hosts.transformers.quantizer  # makes planes known to from_pretrained

    model = AutoModelForCausalLM.from_pretrained(folder, variant="carpool", dtype=torch.bfloat16).eval()

    def generate(given: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(given)
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        return made[:, PROMPT:].tolist()

    yield "loaded", []
    yield "as stored", cells(generate)
    with carpool.share(model, POLICY):
        yield POLICY, cells(generate)


def in_vllm(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The engine in this process, its policy switched off and on."""
    set_environment()
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, seed=0, block_size=32,
        kv_cache_memory_bytes=GIB // 4, enable_prefix_caching=False, max_model_len=256, max_num_batched_tokens=256,
        max_num_seqs=8, additional_config={"carpool": {"policy": POLICY, "isolation": "batch"}},
    )  # fmt: skip

    def generate(given: list[list[int]], tokens: int) -> list[list[int]]:
        how = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
        found = llm.generate([{"prompt_token_ids": one} for one in given], how, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    yield "loaded", []
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    yield "as stored", cells(generate)
    llm.collective_rpc("carpool_set", kwargs={"enabled": True})
    yield POLICY, cells(generate)


HOSTS = {"transformers": in_transformers, "vllm": in_vllm}


def run_host(name: str, folder: Path) -> dict[str, Any]:
    """In this process: what a host took and made."""
    found: dict[str, Any] = {"host": name, "threads": int(os.environ.get("OMP_NUM_THREADS", 0))}
    found |= {"load_before": os.getloadavg()[0], "states": {}}
    begin = time.perf_counter()
    with peaks(found):
        for state, made in HOSTS[name](folder):
            if state == "loaded":
                found["load_s"] = time.perf_counter() - begin
            else:
                found["states"][state] = made
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where 19 GB fit; default: the system's")
    parser.add_argument("--made", type=Path, help="a model that an earlier run left with --keep")
    parser.add_argument("--keep", action="store_true", help="leave the model")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--quick", action="store_true", help="a tiny model; its speeds mean nothing")
    parser.add_argument("--in-process", choices=HOSTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.in_process:
        print(json.dumps(run_host(given.in_process, given.made)))
        return
    geometry = GEOMETRIES["tiny" if given.quick else "qwen3-30b-a3b"]
    layers, vocabulary = (2, 8192) if given.quick else (LAYERS, VOCABULARY)
    group = 32 if given.quick else GROUP
    folder = given.made or Path(tempfile.mkdtemp(prefix="carpool-whole-", dir=given.folder))
    try:
        begin = time.perf_counter()
        if given.made is None:
            write_checkpoint(geometry, layers, folder, DEPTHS, group, SEED, vocabulary)
        content: dict[str, Any] = {
            "machine": machine(), "geometry": "tiny" if given.quick else "qwen3-30b-a3b", "layers": layers,
            "vocabulary": vocabulary, "depths": DEPTHS, "group": group, "seed": SEED, "policy": POLICY,
            "written_s": None if given.made else time.perf_counter() - begin,
            "planes_gib": (folder / PLANES_FILE).stat().st_size / GIB,
            "bits_stored": DEPTHS[-1] + 16 * len(DEPTHS) / group,
            "weights_gib": sum(one.stat().st_size for one in folder.glob("*.safetensors")) / GIB, "hosts": [],
        }  # fmt: skip
        for host in given.hosts:
            command = [sys.executable, __file__, "--in-process", host, "--made", str(folder)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            content["hosts"].append(json.loads(answer.strip().splitlines()[-1]))
            print(json.dumps({k: v for k, v in content["hosts"][-1].items() if k != "states"}))
            if given.output:
                given.output.write_text(as_json(content))
    finally:
        if not given.keep and given.made is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(folder)


if __name__ == "__main__":
    main()
