"""Runs the experiments of `leaderboard/experiments/`: policies over a grid of settings, batch sizes, domains and seeds.

    carpool calibrate --text TRAIN.jsonl --energy --surrogates 16 -o stats.safetensors
    python leaderboard/run.py                                           # the reference model, embedded held-out text
    python leaderboard/run.py --model MODEL --stats stats.safetensors --text FILE.jsonl --output FOLDER frontier

A cell is one batch size and one domain (or all of them mixed); no two of its batches share a document. Cells are
written as soon as they are measured; a second run does what is missing. Sums by batch are kept, so that `compare.py`
can leave batches out.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from carpool.artefacts.files import sha256_file, write_text
from carpool.artefacts.shipped import shipped_with
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.texts import Document, load_texts
from carpool.cli.common import embedded_texts, load, model_facts
from carpool.evaluate.intervals import FEWEST
from carpool.evaluate.layout import Layout
from carpool.evaluate.measure import measure
from carpool.evaluate.measured import Measured
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.sequences import Sequences, draw
from carpool.evaluate.study import describe
from carpool.hosts.transformers import find_layers, identity
from carpool.plans.grammar import Plan, parse
from carpool.routing.batch import Grouping

HERE = Path(__file__).parent
DEFAULT = ("frontier", "domains", "ablation")  # `checkpoints` is for other models
MIXED = "all"
LONGEST = 4000  # characters of a document that are tokenized; a batch takes few windows of each


def read(name: str) -> dict[str, Any]:
    """An experiment; what it does not set itself it takes from the one that it names under `like`, but for batches."""
    own = tomllib.loads((HERE / "experiments" / f"{name}.toml").read_text())
    if "like" in own:
        other = read(own["like"])
        own = {key: value for key, value in other.items() if not key.startswith("batches")} | own
    return own


def plans_at(experiment: dict[str, Any], batch: int) -> list[tuple[str, Plan]]:
    """Label and plan of every setting at a batch size; `{}` in a policy stands for the budgets of that size."""
    found = []
    for series in experiment["series"]:
        for text in series["policies"]:
            values = experiment["budgets"][str(batch)] if "{}" in text else [None]
            found += [(series["label"], parse(text.replace("{}", str(value)))) for value in values]
    return found


def cells(experiment: dict[str, Any], domains: list[str]) -> Iterator[tuple[int, str, int]]:
    """Batch size, domain and number of batches of every cell."""
    for key, texts in (("batches", [MIXED]), ("batches_by_domain", domains)):
        for batch, count in experiment.get(key, {}).items():
            for domain in texts:
                yield int(batch), domain, count


def sequences_of(documents: list[Document], tokenizer: Any, layout: Layout, batches: int, seed: int) -> Sequences:
    """The sequences of a cell."""
    count = layout.batch_size * batches
    return draw(documents, tokenizer, count=count, batches=batches, length=layout.positions, seed=seed)


def training(model: str | None) -> dict[str, Any]:
    """Tokens and weights of a model that the recipe trained; nothing of another one."""
    folder = Path(model or "")
    if model is None or not (folder / "training.json").exists():
        return {}
    weights = sha256_file(folder / "model.safetensors")
    return {"trained_tokens": json.loads((folder / "training.json").read_text())["tokens"], "weights_sha256": weights}


def explained(stats: Statistics) -> dict[str, float]:
    """Share of the experts' output energy that their surrogates explain, on tokens kept out of the fit, by layer."""
    found = {}
    for index, tensors in stats.layers.items():
        if "surrogate_energy" in tensors:
            energy_E = tensors["surrogate_energy"] * tensors["coverage"]
            left = (energy_E * tensors["surrogate_unexplained"]).sum() / energy_E.sum()
            found[str(index)] = round(1 - float(left), 4)
    return found


def sums(label: str, one: Measured) -> dict[str, Any]:
    """What is kept of a setting: sums by batch, all layers together."""
    return {
        "label": label,
        "policy": one.name,
        "bytes": one.layers["bytes"].sum(1).round(4).tolist(),
        "union": one.layers["union"].sum(1).tolist(),
        "pairs": one.layers["pairs"].sum(1).tolist(),
        "kl": one.kl_M.round(6).tolist(),
        "agree": one.agree_M.tolist(),
        "nll": one.nll_MD.sum(1).round(5).tolist(),
        "tokens": one.tokens_M.tolist(),
        "changed_rows": one.changed_rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments", nargs="*", help=f"names in leaderboard/experiments; default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--model", help="default: the reference model")
    parser.add_argument("--text", type=Path, action="append", help="default: the reference model's held-out text")
    parser.add_argument("--stats", type=Path, help="default: the reference model's")
    parser.add_argument("--reduced", action="store_true", help="only batch 16, domains mixed")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    given = parser.parse_args()
    model, tokenizer, stats = load(given.model, given.stats)
    used = given.stats or shipped_with(identity(find_layers(model)))
    paths = given.text or embedded_texts()
    documents = [replace(document, text=document.text[:LONGEST]) for document in load_texts(paths)]
    facts = {
        "model": model_facts(model, given.model) | training(given.model),
        "texts": text_facts(paths),
        "stats": None if used is None else sha256_file(used),
        "explained": {} if stats is None else explained(stats),
    }
    for name in given.experiments or DEFAULT:
        experiment = read(name)
        if given.reduced:
            experiment |= {"batches": {"16": experiment.get("batches", {}).get("16", FEWEST)}, "batches_by_domain": {}}
        facts |= {"settings": experiment}
        run(experiment, given.output / f"{name}.json", facts, (model, tokenizer, stats), documents)


def run(
    experiment: dict[str, Any],
    output: Path,
    facts: dict[str, Any],
    loaded: Any,
    documents: list[Document],
) -> None:
    """Measure what is missing of an experiment, cell by cell."""
    model, tokenizer, stats = loaded
    done = json.loads(output.read_text()) if output.exists() else {}
    if {key: done.get(key) for key in facts} != facts:
        done = {"kind": "carpool leaderboard", "name": output.stem, **facts, "cells": []}
    known = {(cell["batch"], cell["domain"]) for cell in done["cells"]}
    domains = sorted({document.domain for document in documents})
    for batch, domain, count in cells(experiment, domains):
        if (batch, domain) in known:
            continue
        layout = Layout(batch, experiment["sequence"], experiment["prefill"], Grouping.parse("batch"))
        own = [document for document in documents if domain in (MIXED, document.domain)]
        sequences = sequences_of(own, tokenizer, layout, count, experiment["seed"])
        labelled = plans_at(experiment, batch)
        plans = [plan for _, plan in labelled]
        found = measure(model, describe(model), plans, sequences, layout, count, stats=stats, allow_unchanged=True)
        rows = [
            sums(label, one) for label, one in zip(["stock", *(label for label, _ in labelled)], found, strict=True)
        ]
        facts_of = {"batch": batch, "domain": domain, "seed": experiment["seed"], "layout": asdict(layout)}
        done["cells"].append({**facts_of, **provenance(), "rows": rows})
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, dump(done))
        print(f"{output.stem}: batch {batch}, {domain}: {len(rows)} rows", flush=True)


def dump(content: dict[str, Any]) -> str:
    """JSON with a line a row."""
    head = json.dumps({key: value for key, value in content.items() if key != "cells"}, indent=1).removesuffix("\n}")
    parts = []
    for cell in content["cells"]:
        rows = ",\n   ".join(json.dumps(row, allow_nan=False) for row in cell["rows"])
        facts = json.dumps({key: value for key, value in cell.items() if key != "rows"})[:-1]
        parts.append(f'{facts}, "rows": [\n   {rows}\n  ]}}')
    return f'{head},\n "cells": [\n  ' + ",\n  ".join(parts) + "\n ]\n}\n"


if __name__ == "__main__":
    main()
