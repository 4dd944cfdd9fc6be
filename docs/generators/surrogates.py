"""Surrogates and the leaderboard: `python leaderboard/run.py`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from generators import ROOT, Block, rows

PAGE, CELLS = "docs/surrogates.md", "docs/leaderboard.md"
RESULTS = ROOT / "leaderboard/results"
MODELS = {"Reference model": RESULTS, "Second model": RESULTS / "second"}
RUNS = {"reference": "Reference model", "second": "Second model"}
REFERENCE, LARGE = (256, 64), (2048, 768)  # hidden size and expert width: both models here, and Qwen3-30B-A3B
SHOWN = (0.3, 0.5, 0.7)  # shares of stock's bytes where few can be shown


def comparison() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leaderboard_compare", ROOT / "leaderboard/compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def trials(content: dict[str, Any]) -> list[Block]:
    """What decided the design."""
    heads = ("", ">bytes, in experts", ">KL, nats/token")
    tried = [[row["label"], f"{row['bytes']:.1f}", f"{row['kl']:.4f}"] for row in content["rows"]]
    explained = content["explained"]
    layers = [[layer, *(f"{share:.2f}" for share in shares)] for layer, shares in explained["by_layer"].items()]
    return [
        Block(PAGE, "trials", rows(heads, tried)),
        Block(PAGE, "explained", rows(("layer", *(f">rank {rank}" for rank in explained["ranks"])), layers)),
    ]


def described(title: str, content: dict[str, Any]) -> str:
    model, texts = content["model"], ", ".join(Path(text["name"]).stem for text in content["texts"])
    trained = f", {model['trained_tokens'] / 1e6:.1f} M training tokens" if "trained_tokens" in model else ""
    return f"**{title}** ({model['architecture']}{trained}); held-out text: {texts}.\n\n"


def repriced(content: dict[str, Any]) -> dict[str, Any]:
    """The same results, had a surrogate cost the share of an expert that it costs in a large model."""
    own, large = (surrogate_bytes(*width) for width in (REFERENCE, LARGE))
    cells = []
    for cell in content["cells"]:
        made = [
            row | {"bytes": [u + (b - u) * large / own for u, b in zip(row["union"], row["bytes"], strict=True)]}
            for row in cell["rows"]
        ]
        cells.append(cell | {"rows": made})
    return content | {"cells": cells}


def surrogate_bytes(hidden: int, width: int, rank: int = 16) -> float:
    """Of a surrogate in int8 over those of an expert in two-byte numbers."""
    return (2 * rank + 1) * (hidden + 4) / (3 * hidden * width * 2)


def frontier(compare: ModuleType) -> list[Block]:
    """The comparison on both models: in short, and every cell."""
    short, every = [], []
    for title, folder in MODELS.items():
        paths = [folder / f"{name}.json" for name in ("frontier", "domains")]
        contents = [compare.load(path) for path in paths if path.exists()]
        if not contents:
            continue
        found = [cell for content in contents for cell in compare.cells(content)]
        head = described(title, contents[0])
        short.append(head + compare.summary(found))
        cheap = [cell for content in contents for cell in compare.cells(repriced(content))]
        shares = [f"{surrogate_bytes(*width):.1%}" for width in (LARGE, REFERENCE)]
        price = f"{shares[0]} of an expert, as with Qwen3-30B's widths, not {shares[1]}"
        short.append(f"The same KL, had a surrogate cost {price}:\n\n" + compare.summary(cheap))
        settings = compare.settings_table(contents[0], 16)
        controls = compare.controls_table(found)
        every += [f"## {title}\n", head + compare.table(found), "Against controls:\n", controls]
        every += ["Every setting, as measured at batch 16, domains mixed:\n", settings]
    return [Block(PAGE, "frontier", "\n".join(short)), Block(CELLS, "cells", "\n".join(every))]


def ablation(compare: ModuleType) -> Block:
    """Ours with an ingredient changed: its KL over the full method's at equal bytes."""
    parts = []
    for title, folder in MODELS.items():
        if (folder / "ablation.json").exists():
            content = compare.load(folder / "ablation.json")
            parts.append(described(title, content) + compare.variants_table(content, 16, SHOWN))
    if not parts:
        design = compare.load(RESULTS / "design/ablation.json")
        parts.append("Train text (the run that decided the design).\n\n" + compare.variants_table(design, 16, SHOWN))
    return Block(PAGE, "ablation", "\n".join(parts))


def checkpoints(compare: ModuleType) -> Block:
    """How linear experts are, and what that is worth, along training."""
    heads = [
        "model", ">training tokens", ">loss, nats/token", ">energy explained",
        *(f">KL, ours, at {share:.0%}" for share in SHOWN), *(f">over the best published, at {s:.0%}" for s in SHOWN),
    ]  # fmt: skip
    lines = []
    for path in (RESULTS / "checkpoints").glob("*/checkpoints.json"):
        content = compare.load(path)
        cells = {cell.share: cell for cell in compare.cells(content)}
        (stock,) = compare.pooled(content, 16, "all")["stock"]
        explained = sorted(content["explained"].values())
        shown = [cells[share] for share in SHOWN]
        tokens = content["model"]["trained_tokens"]
        line = [
            RUNS[path.parent.name.split("-")[0]],
            f"{tokens / 1e6:.1f} M",
            f"{stock['nll'].sum() / stock['tokens'].sum():.2f}",
            f"{explained[0]:.0%} to {explained[-1]:.0%}",
            *("n/a" if cell.kl["ours"] is None else f"{cell.kl['ours']:.4f}" for cell in shown),
            *("n/a" if cell.ratio is None else compare.shown(cell.ratio) for cell in shown),
        ]
        lines.append(((line[0], tokens, path.parent.name), line))
    made = rows(heads, [line for _, line in sorted(lines)]) if lines else two_runs(compare)
    return Block(PAGE, "checkpoints", made)


def two_runs(compare: ModuleType) -> str:
    """The reference model as the design saw it, and as it is."""
    design, now = (compare.load(folder / "ablation.json") for folder in (RESULTS / "design", RESULTS))
    tried = compare.load(RESULTS / "design/trials.json")["explained"]
    rank = tried["ranks"].index(16)
    trained = json.loads((ROOT / "demo/src/carpool_demo/card.json").read_text())["training"]["tokens"]
    runs = (
        ("8.5 M", "train", [shares[rank] for shares in tried["by_layer"].values()], design),
        (f"{trained / 1e6:.1f} M", "held-out", list(now["explained"].values()), now),
    )
    lines = []
    for tokens, text, explained, content in runs:
        table = compare.variants_table(content, 16, (0.5,)).splitlines()
        (found,) = [line for line in table if "| backfill only |" in line]
        lines.append([tokens, text, *(f"{share:.0%}" for share in explained), found.split("|")[2].strip()])
    layers = [f">layer {index}" for index in range(len(runs[0][2]))]
    heads = [">training tokens", "text", *layers, ">KL without surrogates over ours, at 50%"]
    return rows(heads, lines)


def blocks() -> list[Block]:
    compare = comparison()
    made = trials(compare.load(RESULTS / "design/trials.json")) + frontier(compare)
    return [*made, ablation(compare), checkpoints(compare)]
