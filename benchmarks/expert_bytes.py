"""Bytes of experts read against what they lose: sharing, quantisation, and experts read as deep as their batch needs.

    python benchmarks/expert_bytes.py make FOLDER --text train/*.jsonl       # about 20 minutes: every quantiser's file
    python benchmarks/expert_bytes.py measure FOLDER --text heldout/*.jsonl --output docs/results/expert-bytes.json

`--model` takes another model than the reference model, in a FOLDER and a file of results of its own. `--files`,
`--methods` and `--plans` choose some: of batch 64 those are measured that come within twice the best one's bytes at
batch 16, at settings near the KL asked for, the controls, and a row of each paper. Results are kept in FOLDER, so that
several calls may share the work; `--kept` measures nothing and writes what all of them found.

Everything is measured on the same batches of held-out text, and each method's curve of log KL over bytes is read where
it crosses 0.02, 0.01, 0.003 and 0.001 nats. Of the alternatives the best one at every KL is taken after the fact, on
the very text that decides, which favours them. Rows of prompts keep the experts as the model holds them, in all methods
alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from expert_methods import BITS, CONTROLS, GROUPS, NESTED, OURS, SHIPPED, Method, methods, only, uniform

from carpool.artefacts.files import atomic_path, sha256_file, write_text
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.texts import load_texts
from carpool.calibrate.compress import lost
from carpool.cli.common import load, model_facts, progress
from carpool.evaluate.equal_bytes import Points
from carpool.evaluate.intervals import Array, interval
from carpool.evaluate.metrics import Result
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.study import Settings, sequences_for, study
from carpool.experts.stored import StoredExperts
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

TARGETS = (0.02, 0.01, 0.003, 0.001)  # nats a token
BATCHES = 10


def make(folder: Path, model: str | None, texts: list[Path], tokens: int, only: str) -> None:
    """Every file of experts, by the command that users have; those that are there stay."""
    wanted = {NESTED: ["--method", "energy", "--group", "64", "--depths", ",".join(map(str, BITS))]}
    for group in GROUPS:
        for bits in BITS:
            wanted[uniform(bits, group)] = ["--method", "gptq", "--group", str(group), "--depths", str(bits)]
    folder.mkdir(parents=True, exist_ok=True)
    named = [part for path in texts for part in ("--text", str(path))]
    for name, options in wanted.items():
        output = folder / f"{name}.safetensors"
        if not output.exists() and re.search(only, name):
            carpool = str(Path(sys.executable).with_name("carpool"))
            command = [
                carpool,
                "compress",
                *([model] if model else []),
                *named,
                "--tokens",
                str(tokens),
                *options,
                "-o",
                str(output),
            ]
            subprocess.run(command, check=True)


def measure(
    loaded: tuple[Any, Any, Any],
    folder: Path,
    texts: list[Path],
    batch: int,
    sequence: int,
    chosen: list[Method],
    done: Any,
) -> list[tuple[str, str, Result]]:
    """Name of the method, file and result of every setting; stock first."""
    model, tokenizer, shipped = loaded
    by_file: dict[str, list[tuple[str, str]]] = {}
    for method in chosen:
        for file, plan in method.settings:
            by_file.setdefault(file, []).append((method.name, plan))
    found: list[tuple[str, str, Result]] = []
    sequences = None
    for file, plans in by_file.items():
        places = {plan: kept(folder, texts, batch, sequence, file, plan) for plan in ("stock", *(p for _, p in plans))}
        missing = tuple(parse(plan) for _, plan in plans if not places[plan].exists())
        done(batch * BATCHES * sequence * (1 + len(plans) - len(missing) if missing else 1 + len(plans)))
        if missing:
            settings = Settings(
                plans=missing, grouping=Grouping.parse("batch"), batch_sizes=(batch,), sequence=sequence,
                batches=BATCHES, seed=0, allow_unchanged=True,
            )  # fmt: skip
            sequences = sequences or sequences_for(settings, load_texts(texts), tokenizer)
            stats = shipped if file == SHIPPED else Statistics.load(folder / f"{file}.safetensors")
            (results,) = study(model, settings, sequences, stats=stats, advance=done)
            named = ["stock", *(plan for _, plan in plans if not places[plan].exists())]
            for plan, result in zip(named, results, strict=True):
                places[plan].parent.mkdir(exist_ok=True)
                with atomic_path(places[plan]) as temporary:
                    temporary.write_bytes(pickle.dumps(result))
        if not found:
            found.append(("stock", "", pickle.loads(places["stock"].read_bytes())))
        found += [(name, file, pickle.loads(places[plan].read_bytes())) for name, plan in plans]
    return found


def kept(folder: Path, texts: list[Path], batch: int, sequence: int, file: str, plan: str) -> Path:
    """Where the result of a plan is, so that an interrupted run goes on, and several may share the work."""
    depends = [[sha256_file(text) for text in texts], batch, sequence, BATCHES, file, plan]
    return folder / "measured" / f"{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.pickle"


def measured(folder: Path, texts: list[Path], batch: int, sequence: int, file: str, plan: str) -> bool:
    return kept(folder, texts, batch, sequence, file, plan).exists()


def points(results: list[Result], stock: Result) -> Points:
    sums = [(one.measured.layers["bytes"].sum(1), one.measured.kl_M, one.measured.tokens_M) for one in results]
    return Points.of(sums, stock.measured.layers["bytes"].sum(1))


def bytes_at(curve: Points, kl: float) -> Array | None:
    """Share of stock's bytes at which a curve crosses a KL, linear in log KL, in every sample; None if it does not."""
    log_kl_KI, share_KI = np.minimum.accumulate(curve.log_kl_KI, axis=1), curve.share_KI
    target = np.log(kl)
    if not (log_kl_KI[0, -1] <= target <= log_kl_KI[0, 0]):
        return None
    found = [
        float(np.interp(-target, -log_kl_I, share_I)) for log_kl_I, share_I in zip(log_kl_KI, share_KI, strict=True)
    ]
    return np.array(found)


def least(curve: Points, kl: float) -> Array | None:
    """Share of stock's bytes of a curve's shallowest setting, in every sample, if that loses less than a KL already."""
    return np.asarray(curve.share_KI[:, 0]) if curve.log_kl_KI[0, 0] < np.log(kl) else None


def compare(found: list[tuple[str, str, Result]]) -> list[dict[str, Any]]:
    """For every KL: bytes that each method needs, the best alternative's, and ours over it with its interval. A method
    whose shallowest setting loses less already needs at most that one's bytes."""
    stock = found[0][2]
    curves = {name: points([r for one, _, r in found if one == name], stock) for name, _, _ in found[1:]}
    rows: list[dict[str, Any]] = []
    for kl in TARGETS:
        needed = {name: at for name, curve in curves.items() if (at := bytes_at(curve, kl)) is not None}
        at_most = {name: at for name, curve in curves.items() if (at := least(curve, kl)) is not None}
        others = {name: at for name, at in (at_most | needed).items()
                  if not name.startswith(OURS) and name not in CONTROLS}  # fmt: skip
        row: dict[str, Any] = {
            "kl": kl, "bytes": {name: float(at[0]) for name, at in needed.items()},
            "at_most": {name: float(at[0]) for name, at in at_most.items()},
        }  # fmt: skip
        if OURS in needed and others:
            best = min(others, key=lambda name: others[name][0])
            log_K = np.log(needed[OURS]) - np.log(others[best])
            low, high = interval(log_K)
            row |= {"best_alternative": best, "ratio": float(np.exp(log_K[0]))}
            row |= {
                "low": None if low is None else float(np.exp(low)),
                "high": None if high is None else float(np.exp(high)),
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="folder or hub name; default: the reference model")
    parser.add_argument("--files", default=".*", help="pattern of the files to make; default: all")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=60_000, help="of the calibration")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--alone", action="store_true", help="a cell for each text alone, named after it; one --batch")
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--methods", default=".*", help="pattern of the methods' names; default: all")
    parser.add_argument("--plans", default=".*", help="pattern of the settings' plans; default: all")
    parser.add_argument("--kept", action="store_true", help="only the settings that earlier calls have measured")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder, options.model, options.text, options.tokens, options.files)
        return
    if options.output is None:
        parser.error("--output is missing")
    if options.alone and len(options.batch) > 1:
        parser.error("--alone takes one --batch")
    content = json.loads(options.output.read_text()) if options.output.exists() else {}
    cells: dict[str, Any] = content.get("cells", {})
    wanted = [
        only(method, lambda _, plan: bool(re.search(options.plans, plan)))
        for method in methods()
        if re.search(options.methods, method.name)
    ]
    loaded = load(options.model, None)
    files = sorted(options.folder.glob("*.safetensors"))
    wanted_cells = [(str(batch), batch, options.text) for batch in options.batch]
    if options.alone:
        wanted_cells = [(text.stem, options.batch[0], [text]) for text in options.text]
    for cell, batch, texts in wanted_cells:
        chosen = [method for method in wanted if method.settings]
        if options.kept:
            known = partial(measured, options.folder, texts, batch, options.sequence)
            chosen = [one for method in chosen if (one := only(method, known)).settings]
        plans = sum(len(method.settings) for method in chosen) + len({file for m in chosen for file, _ in m.settings})
        with progress(f"batch {batch}, {cell}", batch * BATCHES * options.sequence * plans) as advance:
            found = measure(loaded, options.folder, texts, batch, options.sequence, chosen, advance)
        cells[cell] = {
            "batch": batch,
            "stock_union": found[0][2].union.value,
            "sequence": options.sequence,
            "batches": BATCHES,
            "settings": [
                {"method": name, "file": file, "policy": result.measured.name, "bytes": asdict(result.bytes_share),
                 "union": asdict(result.union_share), "kl": asdict(result.kl)}
                for name, file, result in found[1:]
            ],
            "needed": compare(found),
        }  # fmt: skip
        content = {
            **provenance(), "texts": text_facts(options.text),
            "model": model_facts(loaded[0], options.model) | trained(options.model),
            "arguments": {"batches": BATCHES, "seed": 0, "tokens": options.tokens},
            "stored": {path.stem: stored(path) for path in files},
            "lost": {path.stem: lost_by_depth(path) for path in files},
            "cells": dict(sorted(cells.items(), key=lambda one: int(one[0]) if one[0].isdigit() else 0)),
        }  # fmt: skip
        write_text(options.output, json.dumps(content, indent=1) + "\n")
        for row in cells[cell]["needed"]:
            print(cell, {key: value for key, value in row.items() if key != "bytes"}, row["bytes"].get(OURS))


def trained(model: str | None) -> dict[str, Any]:
    """On how many tokens, where a recipe of ours has trained it."""
    noted = Path(model or "") / "training.json"
    return {"trained_on": json.loads(noted.read_text())["tokens"]} if model and noted.exists() else {}


def lost_by_depth(path: Path) -> dict[int, float]:
    """Share of the experts' output energy that a file's depths lose, the mean of the layers."""
    layers = list(Statistics.load(path).layers.values())
    lost_LD = np.array([lost(tensors).tolist() for tensors in layers])
    return dict(zip(StoredExperts.depths_in(layers[0]), lost_LD.mean(0).tolist(), strict=True))


def stored(path: Path) -> float:
    """Bytes that a file stores for an expert over those in 16 bits."""
    return StoredExperts.of(next(iter(Statistics.load(path).layers.values()))).share_stored


if __name__ == "__main__":
    main()
