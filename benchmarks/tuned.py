"""Tuned policy files on the leaderboard's held-out batches, where its grid of settings was measured.

    carpool tune --text TRAIN.jsonl --sequence 48 --prefill 16 --batch 16 --max-kl 0.02 -o tuned.json
    python benchmarks/tuned.py tuned.json --output docs/results/tuned.json

Does a file keep what it was tuned for on text that neither its search nor its verification saw, and does any setting of
the grid (`leaderboard/results/frontier.json`, domains mixed) keep as much and read less? The batches are drawn as the
leaderboard draws them; stock has to read what it read there. The files must have been tuned for one batch size of the
grid, with its length of sequences, and grouped by batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from carpool.artefacts.files import write_text
from carpool.artefacts.texts import load_texts
from carpool.cli.common import embedded_texts, load, model_facts
from carpool.errors import CarpoolError
from carpool.evaluate.layout import Layout
from carpool.evaluate.measure import measure
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.study import describe
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Grouping

LEADERBOARD = Path(__file__).parent.parent / "leaderboard"
sys.path.insert(0, str(LEADERBOARD))
from run import LONGEST, MIXED, dump, sequences_of, sums


def tuned(path: Path, settings: dict[str, Any]) -> PolicyFile:
    """A file of `carpool tune`.

    Raises:
        CarpoolError: another kind of policy file, or one that was tuned for other batches than the grid's.
    """
    loaded = PolicyFile.load(path)
    head = loaded.curve[0] if loaded.curve else {}
    wanted = {"group": "batch", "sequence": settings["sequence"], "prefill": settings["prefill"]}
    if not isinstance(head, dict) or {name: head.get(name) for name in wanted} != wanted:
        raise CarpoolError(f"{path} was not tuned for the grid's batches; make it with `carpool tune` and {wanted}")
    return loaded


def about(one: PolicyFile) -> dict[str, Any]:
    """What a file was tuned for, what it says, and what its search and verification measured."""
    head, *points = one.curve
    for point in points:
        if (point["text"], point["policy"]) == ("unseen", str(one.plan)):
            head = head | {"claimed": point}
    return {"file": one.name, "policy": str(one.plan), "layers": one.layers, **head}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="policy files of `carpool tune`")
    parser.add_argument("--model", help="default: the reference model")
    parser.add_argument("--grid", type=Path, default=LEADERBOARD / "results/frontier.json")
    parser.add_argument("--text", type=Path, action="append", help="default: the reference model's held-out text")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    grid = json.loads(options.grid.read_text())
    files = [tuned(path, grid["settings"]) for path in options.files]
    batches = {one.curve[0]["batch"] for one in files}
    cells = [cell for cell in grid["cells"] if cell["domain"] == MIXED and {cell["batch"]} == batches]
    if not cells:
        raise CarpoolError(f"{options.grid} has no cell for batch {sorted(batches)}: tune for one size of the grid")
    model, tokenizer, stats = load(options.model, None, files)
    facts, paths = model_facts(model, options.model), options.text or embedded_texts()
    if (grid["model"]["fingerprint"], grid["texts"]) != (facts["fingerprint"], text_facts(paths)):
        raise CarpoolError(f"{options.grid} was measured on another model or on other texts")
    documents = [replace(document, text=document.text[:LONGEST]) for document in load_texts(paths)]
    content: dict[str, Any] = {
        "kind": "carpool tuned", **provenance(), "model": facts, "texts": grid["texts"],
        "files": [about(one) for one in files], "cells": [],
    }  # fmt: skip
    for cell in cells:
        layout = Layout(**cell["layout"] | {"grouping": Grouping(**cell["layout"]["grouping"])})
        count = len(cell["rows"][0]["kl"])
        own = [document for document in documents if cell["domain"] in (MIXED, document.domain)]
        sequences = sequences_of(own, tokenizer, layout, count, cell["seed"])
        found = measure(model, describe(model), files, sequences, layout, count, stats=stats)
        rows = [sums(label, one) for label, one in zip(["stock", *(one.name for one in files)], found, strict=True)]
        if rows[0]["union"] != cell["rows"][0]["union"]:
            raise CarpoolError(f"stock does not read what it read in {options.grid}: the batches differ")
        content["cells"].append({name: cell[name] for name in ("batch", "domain", "seed", "layout")} | {"rows": rows})
        print(f"batch {cell['batch']}, seed {cell['seed']}: {len(files)} files", flush=True)
    write_text(options.output, dump(content))


if __name__ == "__main__":
    main()
