"""DES and its controls on block diffusion, in DES's own form: experts read, tokens a forward, agreement, quality.

    python benchmarks/diffusion.py --cells FOLDER --output docs/results/diffusion.json
    python benchmarks/diffusion.py --cells FOLDER --reverse         # beside it on another core, from the last cell on
    python docs/generate.py

A cell is one block size, grouping and threshold, with all its policies. Cells are written as soon as they
are measured; a second run measures what is missing, and writes `--output` once nothing is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carpool.artefacts.files import write_text
from carpool.artefacts.texts import load_texts
from carpool.cli.block_diffusion import diffusion_model
from carpool.cli.common import embedded_texts, load, model_facts
from carpool.diffusion import Decoding
from carpool.evaluate.block_study import BlockSettings, as_dict, combined, prompts_of
from carpool.evaluate.denoising import Denoised, denoise
from carpool.evaluate.generations import decode
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.sequences import draw
from carpool.evaluate.study import describe
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

PROMPT, NEW = 32, 32
TEXTS = 48  # sequences of held-out text that are denoised in each cell
BATCH = 8  # requests that are decoded together; grouped by request, each of them is decoded as if it were alone
# with 64 experts, 8 a token: a beta below 0.125 keeps fewer than 8 experts and is refused
FULL = (
    *(f"topk(k={k})" for k in (1, 2, 4, 6)),
    *(f"des_seq(k0={k})" for k in (1, 2, 3, 4, 5, 6, 7, 8)),
    *(f"des_vote(beta={beta})" for beta in (0.125, 0.15, 0.2, 0.3, 0.4, 0.6)),
    *(f"xshare(budget={budget})" for budget in (19, 25, 38)),
    *(f"random(budget={budget}, warmup={warmup})" for warmup in (1, 0) for budget in (19, 38)),
)
SHORT = (
    "topk(k=4)", "des_seq(k0=2)", "des_seq(k0=3)", "des_vote(beta=0.3)", "des_vote(beta=0.6)", "xshare(budget=19)",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One block size, grouping and threshold.

    Attributes:
        policies: measured after stock.
        share_commits: the forwards that write the cache run under the policy, too.
    """

    block: int
    group: str
    threshold: float
    policies: tuple[str, ...]
    share_commits: bool = False

    @property
    def name(self) -> str:
        shared = "-shared-commits" if self.share_commits else ""
        return f"block{self.block}-{self.group}-{self.threshold:g}{shared}"


def cells() -> Iterator[Cell]:
    """The cell in the paper's setting first, then what varies around it."""
    yield Cell(32, "request", 0.9, FULL)
    yield Cell(32, "request", 0.5, SHORT)
    yield Cell(16, "request", 0.9, ("des_seq(k0=2)", "des_vote(beta=0.3)"), share_commits=True)
    for block in (32, 16, 8):
        for group in ("request", "batch"):
            for threshold in (0.9, 0.95):
                if (block, group, threshold) != (32, "request", 0.9):
                    yield Cell(block, group, threshold, SHORT)


def main() -> None:
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a block diffusion model; default: the demo's")
    parser.add_argument("--judge", help="an autoregressive model with its tokens; default: the reference model")
    parser.add_argument("--cells", type=Path, required=True, help="folder for what is measured, cell by cell")
    parser.add_argument("--reverse", action="store_true", help="start with the last cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.cells.mkdir(parents=True, exist_ok=True)

    source = diffusion_model(options.model)
    model, tokenizer, _ = load(source, None)
    judge, _, _ = load(options.judge, None)
    documents = load_texts(embedded_texts())
    facts = {"model": model_facts(model, source), "judge": model_facts(judge, options.judge), "seed": options.seed}
    sequences = draw(documents, tokenizer, count=TEXTS, batches=TEXTS, length=PROMPT + NEW, seed=options.seed)
    moe = describe(model)
    denoised: dict[tuple[Any, ...], list[Denoised]] = {}
    order = list(cells())[:: -1 if options.reverse else 1]
    with Progress() as bar:
        task = bar.add_task("cells", total=sum(1 + len(cell.policies) for cell in order))
        for cell in order:
            path = path_of(options.cells, cell, facts)
            if path.exists():  # from an earlier run, or the process beside this one
                bar.advance(task, 1 + len(cell.policies))
                continue
            began = time.monotonic()
            plans = tuple(map(parse, cell.policies))
            decoding = Decoding.of(model, block=cell.block, threshold=cell.threshold, max_new=NEW, end_tokens=())
            rows_of = 1 if cell.group == "request" else BATCH  # a request of its own group needs no neighbours
            settings = BlockSettings(
                plans, Grouping.parse(cell.group), (rows_of,), decoding, prompt=PROMPT, seed=options.seed,
                share_commits=cell.share_commits, allow_unchanged=True,
            )  # fmt: skip
            (layout,), batches = settings.layouts(), TEXTS // rows_of
            key = (cell.block, cell.group, cell.policies)
            if key not in denoised:
                denoised[key] = denoise(
                    model, moe, plans, sequences, layout, batches, decoding.mask_token, seed=options.seed,
                    allow_unchanged=True,
                )  # fmt: skip
            generated = decode(
                model, moe, plans, prompts_of(sequences, BATCH, PROMPT), decoding, BATCH, group=settings.grouping,
                share_commits=cell.share_commits, judge=judge,
                advance=lambda done: bar.advance(task, done / BATCH),
            )  # fmt: skip
            rows = [as_dict(result) for result in combined(denoised[key], generated, settings)]
            content = {"cell": cell.__dict__, "seconds": round(time.monotonic() - began), "results": rows}
            write_text(path, json.dumps(content, allow_nan=False) + "\n")
    paths = [path_of(options.cells, cell, facts) for cell in cells()]
    lacking = [path for path in paths if not path.exists()]
    print(f"{len(lacking)} of {len(paths)} cells are missing")
    if options.output is not None and not lacking:
        write(options.output, [json.loads(path.read_text()) for path in paths], facts)


def path_of(folder: Path, cell: Cell, facts: dict[str, Any]) -> Path:
    return folder / f"{facts['model']['fingerprint'][:8]}-{facts['seed']}-{cell.name}.json"


def write(path: Path, measured: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    head = json.dumps(
        {
            **provenance(),
            **facts,
            "texts": text_facts(embedded_texts()),
            "arguments": {"prompt": PROMPT, "new": NEW, "texts": TEXTS, "batch": BATCH},
        },
        indent=1,
    ).removesuffix("\n}")
    rows = ",\n  ".join(json.dumps(cell, allow_nan=False) for cell in measured)
    write_text(path, f'{head},\n "cells": [\n  {rows}\n ]\n}}\n')  # a line a cell


if __name__ == "__main__":
    main()
