"""Which models the SGLang plugin shares, measured on a CPU: `docs/results/sglang-coverage.json`.

    make .venv/sglang-ready
    PYTHONPATH=.venv/sglang .venv/bin/python benchmarks/sglang_coverage.py --only olmoe

Tiny models with random weights in float32. Each runs under a budget, with a budget of all experts and switched off,
whose tokens are compared with those of transformers; a few minutes a family.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
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
SAYS = "carpool: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="families to measure; keep the other rows")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one family, in this process
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.alone:
        print("ROW", json.dumps(measure(options.alone)), flush=True)
        return
    for family in options.only or vllm_models.FAMILIES:
        keep(options.output, family, separate(family))


def separate(family: str) -> dict[str, Any]:
    """A family in a process of its own, which SGLang may end in any way."""
    command = [sys.executable, str(Path(__file__)), "--alone", family]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"result": "failed", "says": f"no answer within {LIMIT} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if found:
        row: dict[str, Any] = json.loads(found[0].removeprefix("ROW "))
        return row
    said = (done.stdout + done.stderr).splitlines()
    refused = [line.split(SAYS, 1)[1] for line in said if SAYS in line]
    if refused:
        return {"result": "refused", "says": refused[0]}
    errors = [line.strip() for line in said if "Error" in line]
    return {"result": "not run by SGLang", "says": (errors or said or ["nothing"])[-1][:300]}


def measure(family: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = vllm_models.write_model(family, Path(folder))
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        native = []
        for prompt in PROMPTS:
            made = loaded.generate(torch.tensor([prompt]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
            native.append(made[0, len(prompt) :].tolist())
        running = tiny.engine(model, {"policy": vllm_models.POLICY, "isolation": "batch"})
        shared = tiny.greedy(running, PROMPTS, COUNT)
        layers = tiny.report(running)["layers"]
        running.collective_rpc("carpool_set", enabled=False)
        off = tiny.greedy(running, PROMPTS, COUNT)
        running.collective_rpc("carpool_set", enabled=True, policy=f"xshare(budget={vllm_models.EXPERTS})")
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
    return row | {"result": "shared" if works else "failed"}


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
