"""Which models the SGLang plugin shares, measured on a CPU: `docs/results/sglang-coverage.json`.

    make .venv/sglang-ready
    OMP_NUM_THREADS=1 PYTHONPATH=.venv/sglang .venv/bin/python benchmarks/sglang_coverage.py --only olmoe

Tiny models with random weights in float32. Each runs under a budget, with a budget of all experts and switched off,
whose tokens are compared with those of transformers. Block diffusion models are denoised under DES, a block a group,
and compared with `carpool.diffusion`. SGLang is imported once, and its processes are forked, which saves most of the
time: about ten minutes for all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import sglang_models as tiny
import torch
import vllm_models

from carpool.artefacts.files import write_text

RESULTS = ROOT / "docs/results/sglang-coverage.json"
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24]]
COUNT, LIMIT = 12, 600  # tokens of a request; seconds of a family
DIFFUSION = {"sdar_moe": 4, "llada2_moe": 32}  # and their blocks
SURE = 0.95  # SGLang's threshold
SAYS = "carpool: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="families to measure; keep the other rows")
    parser.add_argument("--missing", action="store_true", help="families that have no row yet")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    families = options.only or [*vllm_models.FAMILIES, *DIFFUSION]
    if options.missing and options.output.exists():
        known = {row["family"] for row in json.loads(options.output.read_text())["rows"]}
        families = [family for family in families if family not in known]
    del tiny.ENVIRONMENT["SGLANG_DISABLED_MODEL_ARCHS"]
    tiny.fork()
    for family in families:
        keep(options.output, family, separate(family))


def separate(family: str) -> dict[str, Any]:
    """A family in a process of its own, which SGLang may end in any way."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            os.setsid()
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            print("ROW", json.dumps(measure(family)), flush=True)
            os._exit(0)
        try:
            in_time = ended(child)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        said.seek(0)
        lines = said.read().splitlines()
    if not in_time:
        return {"result": "failed", "says": f"no answer within {LIMIT} s"}
    found = [line for line in lines if line.startswith("ROW ")]
    if found:
        row: dict[str, Any] = json.loads(found[0].removeprefix("ROW "))
        return row
    refused = [line.split(SAYS, 1)[1] for line in lines if SAYS in line]
    if refused:
        return {"result": "refused", "says": refused[0]}
    errors = [line.strip() for line in lines if "Error" in line]
    return {"result": "not run by SGLang", "says": (errors or lines or ["nothing"])[-1][:300]}


def ended(child: int) -> bool:
    """Whether a process ends within the limit."""
    for _ in range(LIMIT):
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(1)
    return False


def measure(family: str) -> dict[str, Any]:
    size = vllm_models.BUDGET
    with tempfile.TemporaryDirectory() as folder:
        if family in DIFFUSION:
            model, native = diffusion_model(family, Path(folder))
            given = {"policy": f"des_vote(size={size})"}
            changes = {"dllm_algorithm": "LowConfidence", "max_running_requests": 1}
            everything = f"des_vote(size={vllm_models.EXPERTS})"
        else:
            model, native = decoding_model(family, Path(folder))
            given, changes = {"policy": vllm_models.POLICY, "isolation": "batch"}, {}
            everything = f"xshare(budget={vllm_models.EXPERTS})"
        running = tiny.engine(model, given, **changes)
        shared = tiny.greedy(running, PROMPTS, COUNT)
        layers = tiny.report(running)["layers"]
        running.collective_rpc("carpool_set", enabled=False)
        running.flush_cache()
        off = tiny.greedy(running, PROMPTS, COUNT)
        running.collective_rpc("carpool_set", enabled=True, policy=everything)
        running.flush_cache()
        whole = tiny.greedy(running, PROMPTS, COUNT)
        running.shutdown()
    row: dict[str, Any] = {
        name: sum(layer[name] for layer in layers) for name in ("rows_changed", "union", "natural_union")
    }
    calls = [layer["calls"] for layer in layers]
    row |= {
        "steps": max(calls), "within_budget": row["union"] <= vllm_models.BUDGET * sum(calls),
        "tokens_differ": shared != off, "off_as_transformers": off == native, "all_experts_identical": whole == off,
    }  # fmt: skip
    works = row["rows_changed"] and row["within_budget"] and row["tokens_differ"] and row["all_experts_identical"]
    if not row["rows_changed"] and row["union"] == row["natural_union"] and row["all_experts_identical"]:
        return row | {"result": "nothing to share", "says": "this tiny model's own routing stays within the budget"}
    return row | {"result": "shared" if works else "failed"}


def decoding_model(family: str, folder: Path) -> tuple[Path, tiny.Tokens]:
    """A model, and what it says in transformers."""
    from transformers import AutoModelForCausalLM

    model = vllm_models.write_model(family, folder)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    native = []
    for prompt in PROMPTS:
        made = loaded.generate(torch.tensor([prompt]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        native.append(made[0, len(prompt) :].tolist())
    return model, native


def diffusion_model(family: str, folder: Path) -> tuple[Path, tiny.Tokens]:
    """The same of a model that is denoised."""
    from transformers import AutoModelForCausalLM

    from carpool.diffusion import Decoding, Session, generate

    model = {"sdar_moe": tiny.write_sdar, "llada2_moe": tiny.write_llada2}[family](folder)
    twin = model / "twin" if (model / "twin").exists() else model
    loaded = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    block = DIFFUSION[family]
    decoding = Decoding(block=block, mask_token=tiny.MASK, threshold=SURE, max_new=COUNT)
    native = []
    for prompt in PROMPTS:
        given = [torch.tensor(prompt)]
        native.append(generate(Session(loaded, given, block), given, decoding).tokens[0].tolist())
    return model, native


def keep(path: Path, family: str, row: dict[str, Any]) -> None:
    """Add or replace a family's row."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [one for one in rows if one["family"] != family]
    rows.append({"family": family, "sglang": version("sglang")} | row)
    content = {"command": "python benchmarks/sglang_coverage.py", "torch": torch.__version__,
               "budget": vllm_models.BUDGET, "rows": rows}  # fmt: skip
    write_text(path, json.dumps(content, indent=1) + os.linesep)
    print(family, row["result"], row.get("says", ""), flush=True)


if __name__ == "__main__":
    main()
