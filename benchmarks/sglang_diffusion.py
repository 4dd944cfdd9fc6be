"""DES in SGLang and in `carpool.diffusion`, on the same model and prompts: `docs/results/sglang-diffusion.json`.

    make .venv/sglang-ready
    PYTHONPATH=.venv/sglang .venv/bin/python benchmarks/sglang_diffusion.py        # about ten minutes

The block-diffusion model of `carpool-demo`, which SGLang runs as the architecture that it is (SDAR-MoE) once it is told
its mask token. One request at a time: T is the distinct experts that a layer reads in a pass over one block.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import sglang_models as tiny
import torch

from carpool import share
from carpool.artefacts.files import write_text
from carpool.diffusion import Decoding, Session, TeamCold, generate
from carpool_demo import TEXTS, diffusion_model_path

RESULTS = ROOT / "docs/results/sglang-diffusion.json"
THRESHOLD, PROMPT = 0.9, 32
NATIVE = "des_seq(k0=8)"
POLICIES = (
    (NATIVE, None), ("des_seq(k0=3)", None), ("des_vote(beta=0.6)", None), ("des_seq(k0=2)", None),
    ("des_vote(beta=0.4)", None), (NATIVE, TeamCold()),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=16, help="prompts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = Path(diffusion_model_path())
    config = json.loads((folder / "config.json").read_text())
    block, mask = config["block_size"], config["mask_token_id"]
    prompts = prompts_of(folder, options.texts)
    cells = []
    for voters in (None, TeamCold()):
        chosen = [policy for policy, mine in POLICIES if mine == voters]
        in_sglang = served(folder, chosen, voters, prompts, block, mask)
        for policy, theirs in zip(chosen, in_sglang, strict=True):
            ours = here(folder, policy, voters, prompts, block, mask)
            same = sum(one == other for one, other in zip(theirs.pop("tokens"), ours.pop("tokens"), strict=True))
            cells.append({"policy": policy, "voters": "all" if voters is None else "TEAM's", "sglang": theirs,
                          "carpool.diffusion": ours, "same_tokens": same})  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
    about = {
        "command": "python benchmarks/sglang_diffusion.py",
        "sglang": version("sglang"),
        "torch": torch.__version__,
    }
    content = about | {"texts": len(prompts), "prompt": PROMPT, "block": block, "threshold": THRESHOLD, "cells": cells}
    write_text(options.output, json.dumps(content, indent=1) + "\n")


def prompts_of(folder: Path, count: int) -> list[list[int]]:
    """The first tokens of texts, of every file in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = [path.read_text().splitlines() for path in sorted(Path(TEXTS).glob("*.jsonl"))]
    found = []
    for place in range(len(files[0])):
        for lines in files:
            tokens = tokenizer(json.loads(lines[place])["text"])["input_ids"][:PROMPT] if place < len(lines) else []
            found += [tokens] if len(tokens) == PROMPT else []
    return found[:count]


def served(
    folder: Path, policies: list[str], voters: TeamCold | None, prompts: list[list[int]], block: int, mask: int
) -> list[dict[str, Any]]:
    """By SGLang, a policy after the other."""
    os.environ["CARPOOL_MASK"] = str(mask)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as settings:
        settings.write(f"threshold: {THRESHOLD}\nblock_size: {block}\n")
        settings.flush()
        carpool = {"policy": policies[0]}
        if voters is not None:
            carpool["voters"] = f"team_cold(confidence={voters.confidence}, near={voters.near}, surest={voters.surest})"
        override = json.dumps({"architectures": ["SDARMoeForCausalLM"], "carpool": carpool})
        running = tiny.engine(
            folder, dllm_algorithm="LowConfidence", dllm_algorithm_config=settings.name, max_running_requests=1,
            json_model_override_args=override,
        )  # fmt: skip
        found = []
        for policy in policies:
            running.flush_cache()
            running.collective_rpc("carpool_set", policy=policy)
            running.collective_rpc("carpool_report", reset=True)
            tokens = [tiny.greedy(running, [prompt], block)[0] for prompt in prompts]
            layers = tiny.report(running)["layers"]
            found.append({"tokens": tokens, **figures(layers, len(prompts) * block)})
        running.shutdown()
    return found


def figures(layers: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    forwards = layers[0]["calls"]
    return {
        "T": sum(layer["union"] for layer in layers) / sum(layer["calls"] for layer in layers),
        "natural_T": sum(layer["natural_union"] for layer in layers) / sum(layer["calls"] for layer in layers),
        "forwards": forwards, "tokens_per_forward": tokens / forwards,
    }  # fmt: skip


def here(
    folder: Path, policy: str, voters: TeamCold | None, prompts: list[list[int]], block: int, mask: int
) -> dict[str, Any]:
    """By `carpool.diffusion`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decoding = Decoding(block=block, mask_token=mask, threshold=THRESHOLD, max_new=block)
    tokens, unions, forwards = [], [], 0

    def observe(place: int, batch: Any, outcome: Any) -> None:
        if not batch.exempt_N.all():
            chosen = outcome.routing.ids_NK[outcome.routing.weights_NK != 0]
            unions.append(len(chosen.unique()))

    for prompt in prompts:
        given = [torch.tensor(prompt)]
        with share(model, f"{policy} | min_batch(2) | short_circuit", group="request", observe=observe) as run:
            made = generate(Session(model, given, block, run=run), given, decoding, voters=voters)
        tokens.append(made.blocks[0].flatten()[:block].tolist())
        forwards += len(made.forwards)
    return {"tokens": tokens, "T": sum(unions) / len(unions), "forwards": forwards,
            "tokens_per_forward": len(prompts) * block / forwards}  # fmt: skip


if __name__ == "__main__":
    main()
