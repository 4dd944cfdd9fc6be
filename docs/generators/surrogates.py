"""Surrogates and the leaderboard: `python leaderboard/run.py`."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from generators import ROOT, Block, rows

PAGE, CELLS = "docs/surrogates.md", "docs/leaderboard.md"
RESULTS = ROOT / "leaderboard/results"
MODELS = {"Reference model": RESULTS, "Second model": RESULTS / "second"}
RUNS = {  # by the first part of a folder's name
    "reference": "64 experts of width 64, rank 16 (the reference model)",
    "second": "64 experts of width 64, rank 16 (the second model)",
    "wide": "16 experts of width 256, rank 64",
    "wide16": "16 experts of width 256, rank 16",
    "clustered": "32 experts of 48 clustered neurons each, rank 16 (SmolLM2-135M)",
}
REFERENCE, LARGE = (256, 64), (2048, 768)  # hidden size and expert width: both models here, and Qwen3-30B-A3B
SHOWN = (0.3, 0.5, 0.7)  # shares of stock's bytes where few can be shown
REACHED = (0.4, 0.6, 0.8)  # shares that the settings of the checkpoints reach


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
    low, high = min(content["explained"].values()), max(content["explained"].values())
    explained = f"surrogates explain {low:.0%} to {high:.0%} of a layer's output energy"
    return f"**{title}** ({model['architecture']}{trained}); {explained}; held-out text: {texts}.\n\n"


def repriced(content: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same results, had a surrogate cost `factor` times its bytes."""
    cells = []
    for cell in content["cells"]:
        made = [
            row | {"bytes": [u + (b - u) * factor for u, b in zip(row["union"], row["bytes"], strict=True)]}
            for row in cell["rows"]
        ]
        cells.append(cell | {"rows": made})
    return content | {"cells": cells}


def surrogate_bytes(hidden: int, width: int, rank: int = 16) -> float:
    """Of a surrogate in int8 over those of an expert in two-byte numbers."""
    return (2 * rank + 1) * (hidden + 4) / (3 * hidden * width * 2)


def measured(compare: ModuleType) -> list[tuple[str, dict[str, Any]]]:
    """Title and content of every comparison there is, domains mixed before one at a time."""
    paths = [(title, folder / f"{name}.json") for title, folder in MODELS.items() for name in ("frontier", "domains")]
    return [(title, compare.load(path)) for title, path in paths if path.exists()]


def goal(compare: ModuleType) -> Block:
    """What the method was to reach, and what it reached; `n/a` cells aside."""
    own, large = (surrogate_bytes(*width) for width in (REFERENCE, LARGE))
    heads = [
        "", ">cells", ">n/a", ">lowest KL", ">significantly lower", ">significantly higher",
        f">half the KL (a surrogate costs {own:.1%} of an expert)", f">half, did it cost {large:.1%}",
        ">ratio of KL, geometric mean",
    ]  # fmt: skip
    lines = [["*the goal*", "", "", "90%", "", "none", "all", "", ""]]
    for title, content in measured(compare):
        every = compare.cells(content)
        ratios, cheap = (
            [cell.ratio[0] for cell in cells if cell.ratio is not None]
            for cells in (every, compare.cells(repriced(content, large / own)))
        )
        verdicts = [cell.verdict for cell in every if cell.verdict not in ("n/a", compare.FEW)]
        judged = [f"{verdicts.count(one) / len(verdicts):.0%}" if verdicts else compare.FEW for one in ("win", "loss")]
        texts = "domains mixed" if content["name"] == "frontier" else "one domain at a time"
        line = [f"{title}, {texts}", str(len(every)), str(len(every) - len(ratios))]
        line += [f"{sum(ratio < 1 for ratio in ratios) / len(ratios):.0%}", *judged]
        line.append(f"{sum(ratio <= 0.5 for ratio in ratios) / len(ratios):.0%}")
        line.append(f"{sum(ratio <= 0.5 for ratio in cheap) / len(cheap):.0%}")
        lines.append([*line, f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}"])
    return Block(PAGE, "goal", rows(heads, lines))


def frontier(compare: ModuleType) -> list[Block]:
    """The comparison on both models: in short, and every cell."""
    short, every = [], []
    for title in MODELS:
        contents = [content for own, content in measured(compare) if own == title]
        if not contents:
            continue
        found = [cell for content in contents for cell in compare.cells(content)]
        head = described(title, contents[0])
        short.append(head + compare.summary(found))
        every += [f"## {title}\n", head + compare.table(found), "Against controls:\n", compare.controls_table(found)]
        every += ["Every setting, as measured at batch 16, domains mixed:\n", compare.settings_table(contents[0], 16)]
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


def checkpoints(compare: ModuleType) -> list[Block]:
    """How linear experts are, and what that is worth, along training."""
    heads = [
        "model", ">training tokens", ">loss, nats/token", ">energy explained",
        *(f">KL, ours, at {share:.0%}" for share in REACHED),
        *(f">over the best published, at {share:.0%}" for share in REACHED), ">at 60%, surrogates not charged",
    ]  # fmt: skip
    lines = []
    for path in (RESULTS / "checkpoints").glob("*/*.json"):
        content = compare.load(path)
        cells, free = ({cell.share: cell for cell in compare.cells(repriced(content, cost))} for cost in (1, 0))
        (stock,) = compare.pooled(content, 16, "all")["stock"]
        explained = sorted(content["explained"].values())
        shown = [cells[share] for share in REACHED]
        ratios = [cell.ratio for cell in (*shown, free[0.6])]
        tokens = content["model"].get("trained_tokens")  # clustered neurons never were experts in training
        line = [
            RUNS[path.parent.name.split("-")[0]],
            "–" if tokens is None else f"{tokens / 1e6:.1f} M",
            f"{stock['nll'].sum() / stock['tokens'].sum():.2f}",
            f"{explained[0]:.0%} to {explained[-1]:.0%}",
            *("n/a" if cell.kl["ours"] is None else f"{cell.kl['ours']:.4f}" for cell in shown),
            *("n/a" if ratio is None else compare.shown(ratio) for ratio in ratios),
        ]
        lines.append(((tokens is None, line[0], tokens or 0, path.parent.name), line))
    return [Block(PAGE, "checkpoints", rows(heads, [line for _, line in sorted(lines)]))] if lines else []


def blocks() -> list[Block]:
    compare = comparison()
    made = trials(compare.load(RESULTS / "design/trials.json")) + frontier(compare)
    return [*made, goal(compare), ablation(compare), *checkpoints(compare)]
