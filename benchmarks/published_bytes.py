"""More published ways to read fewer bytes of experts, on the axis and the batches of `expert_bytes.py`.

    python benchmarks/published_bytes.py make FOLDER --text train/*.jsonl
    python benchmarks/published_bytes.py measure FOLDER --text heldout/*.jsonl -o docs/results/published-bytes.json

A row is one setting. What was measured before stays in the output, rows that are measured again are replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from carpool.artefacts.files import write_text
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.texts import load_texts
from carpool.cli.common import load, model_facts, progress
from carpool.evaluate.metrics import Result
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.study import Settings, sequences_for, study
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

PLANES, SCORES, CONSTANTS = "nested-64", "scores", "constants"
GIVEN, OWN = "nested-64-given", "nested-64-own"  # from so many tokens of the domains' text, and of the model's own
SAMPLED = "own.jsonl"
OURS = "depth"
BATCHES, SEQUENCE, SEED = 10, 64, 0  # as expert_bytes.py
TOKENS = {PLANES: 60_000, SCORES: 20_000, CONSTANTS: 8_000, GIVEN: 8_000, OWN: 8_000, "own": 8_000}
ENERGY = ["compress", "--method", "energy", "--group", "64", "--depths", "2,3,4,5,6"]


@dataclass(frozen=True)
class Row:
    """One setting: the method's name, the files whose statistics it reads together, its plan."""

    method: str
    files: tuple[str, ...]
    policy: str


def rows() -> list[Row]:
    planes, both = (PLANES,), (PLANES, SCORES)

    def each(method: str, files: tuple[str, ...], *policies: str) -> Iterator[Row]:
        return (Row(method, files, policy) for policy in policies)

    pruned = [f"allow_list(size={size}{{}}) | bits(4)" for size in (56, 48, 32)]
    return [
        *each(OURS, planes, "depth(bytes=0.19)"),  # as in expert_bytes.py: the check that both measure alike
        *each("ODP", planes, *(f"odp() | bits({bits})" for bits in (3, 4, 5))),
        *each("ODP, no token protected", planes, *(f"odp(protect=0) | bits({bits})" for bits in (3, 4, 5))),
        *each("ODP, a tenth of each rank", planes, *(f"odp(quantile=0.1) | bits({bits})" for bits in (3, 4))),
        *each("MC: plan and ODP", planes, *(f"odp(bits={bits})" for bits in (2.5, 3.0, 4.0))),
        *each("MC#'s plan", planes, *(f"bit_plan(bits={bits}, importance='sum')" for bits in (2.5, 3.0, 4.0))),
        *each("REAP on 4 bits", both, *(one.format(", score='reap'") for one in pruned)),
        *each("EASY-EP on 4 bits", both, *(one.format("") for one in pruned)),
        *each("uniform, given text", (GIVEN,), *(f"topk(k=8) | bits({bits})" for bits in (2, 3, 4))),
        *each("uniform, own text", (OWN,), *(f"topk(k=8) | bits({bits})" for bits in (2, 3, 4))),
        *each("constants (MoNE)", (CONSTANTS,), *(f"surrogate(budget={budget})" for budget in (20, 30, 40))),
        *each("other experts in their place", (CONSTANTS,), *(f"surrogate(budget={b}, least=2)" for b in (20, 30, 40))),
    ]


def make(folder: Path, texts: list[Path]) -> None:
    """Every file, by the commands that users have; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    given = [part for path in texts for part in ("--text", str(path))]
    sampled = ["--text", str(folder / SAMPLED)]
    wanted = {
        f"{PLANES}.safetensors": [*ENERGY, *given],
        f"{SCORES}.safetensors": ["calibrate", "--energy", *given],
        f"{CONSTANTS}.safetensors": ["calibrate", "--surrogates", "0", *given],
        SAMPLED: ["sample-text", *given],
        f"{GIVEN}.safetensors": [*ENERGY, *given],
        f"{OWN}.safetensors": [*ENERGY, *sampled],
    }
    carpool = str(Path(sys.executable).with_name("carpool"))
    for name, command in wanted.items():
        if not (folder / name).exists():
            tokens = str(TOKENS[Path(name).stem])
            subprocess.run([carpool, *command, "--tokens", tokens, "-o", str(folder / name)], check=True)


def together(folder: Path, files: tuple[str, ...]) -> Statistics:
    """The statistics of several files of one model as one file's."""
    found = [Statistics.load(folder / f"{name}.safetensors") for name in files]
    first = found[0]
    if {one.fingerprint for one in found} != {first.fingerprint}:
        raise SystemExit(f"{', '.join(files)} are of different models")
    layers = {
        index: {name: tensor for one in reversed(found) for name, tensor in one.layers[index].items()}
        for index in first.layers
    }
    return replace(first, layers=layers)


def measure(loaded: tuple[Any, Any, Any], folder: Path, texts: list[Path], batch: int, chosen: list[Row]) -> list[Any]:
    """Every row with its result."""
    model, tokenizer, _ = loaded
    found: list[tuple[Row, Result]] = []
    sequences = None
    for files in dict.fromkeys(row.files for row in chosen):
        mine = [row for row in chosen if row.files == files]
        settings = Settings(
            plans=tuple(parse(row.policy) for row in mine), grouping=Grouping.parse("batch"), batch_sizes=(batch,),
            sequence=SEQUENCE, batches=BATCHES, seed=SEED, allow_unchanged=True,
        )  # fmt: skip
        sequences = sequences or sequences_for(settings, load_texts(texts), tokenizer)
        with progress(" ".join(files), batch * BATCHES * SEQUENCE * (len(mine) + 1)) as advance:
            (results,) = study(model, settings, sequences, stats=together(folder, files), advance=advance)
        found += zip(mine, results[1:], strict=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--methods", default=".*", help="pattern of the methods' names; default: all")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder, options.text)
        return
    if options.output is None:
        parser.error("--output is missing")
    chosen = [row for row in rows() if re.search(options.methods, row.method)]
    content = json.loads(options.output.read_text()) if options.output.exists() else {"cells": {}}
    cells: dict[str, list[Any]] = content["cells"]
    order = {(row.method, row.policy): place for place, row in enumerate(rows())}
    loaded = load(None, None)
    for batch in options.batch:
        known = {key: one for one in cells.get(str(batch), []) if (key := (one["method"], one["policy"])) in order}
        for row, result in measure(loaded, options.folder, options.text, batch, chosen):
            known[row.method, row.policy] = {
                "method": row.method, "policy": row.policy, "bytes": asdict(result.bytes_share),
                "union": asdict(result.union_share), "pairs": result.pairs, "kl": asdict(result.kl),
            }  # fmt: skip
        cells[str(batch)] = [known[key] for key in sorted(known, key=lambda key: order[key])]
        content = {
            **provenance(), "model": model_facts(loaded[0], None), "texts": text_facts(options.text),
            "arguments": {"sequence": SEQUENCE, "batches": BATCHES, "seed": SEED, "tokens": TOKENS},
            "cells": cells,
        }  # fmt: skip
        write_text(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
