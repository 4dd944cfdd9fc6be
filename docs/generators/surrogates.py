"""Surrogates: the leaderboard's results, `python leaderboard/run.py`."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

from generators import ROOT, Block, rows

PAGE = "docs/surrogates.md"


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


def blocks() -> list[Block]:
    compare = comparison()
    made = trials(compare.load(ROOT / "leaderboard/results/design/trials.json"))
    for name in ("ablation", "frontier"):
        held_out = ROOT / f"leaderboard/results/{name}.json"
        design = ROOT / f"leaderboard/results/design/{name}.json"
        path = held_out if held_out.exists() else design
        if not path.exists():
            continue
        content = compare.load(path)
        kind = "Held-out text" if path == held_out else "Train text (the run that decided the design)"
        facts = f"{kind}; texts: {', '.join(text['name'] for text in content['texts'])}.\n\n"
        table = compare.settings_table(content, 16) if name == "ablation" else compare.table(compare.cells(content))
        made.append(Block(PAGE, name, facts + table))
    return made
