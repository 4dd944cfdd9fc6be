"""The table of other published methods in docs/bytes.md.

python benchmarks/published_bytes.py measure FOLDER --text heldout/*.jsonl -o docs/results/published-bytes.json
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from typing import Any

from generators import Block, load, rows, with_interval

PAGE = "docs/bytes.md"
OURS = "depth"


def blocks() -> list[Block]:
    content, depth = load("published-bytes.json"), load("expert-bytes.json")
    if content is None or depth is None:
        return []
    return [Block(PAGE, "bytes published", table(content, depth))]


def table(content: dict[str, Any], depth: dict[str, Any]) -> str:
    """Every setting, beside what `depth` loses at its bytes."""
    lines = []
    for batch, cell in sorted(content["cells"].items(), key=lambda one: int(one[0])):
        curve = sorted((one["bytes"]["value"], one["kl"]["value"]) for one in depth["cells"][batch]["settings"]
                       if one["method"] == OURS)  # fmt: skip
        for one in cell:
            if one["method"] == OURS:
                continue
            ours = at(curve, one["bytes"]["value"])
            lines.append([batch, one["method"], f"`{one['policy']}`", f"{one['bytes']['value']:.1%}",
                          f"{one['pairs']:.2f}", with_interval(one["kl"], 5),
                          "–" if ours is None else f"{ours:.5f}"])  # fmt: skip
    heads = [">batch", "method", "policy", ">bytes", ">pairs", ">KL", ">KL of `depth` at these bytes"]
    return rows(heads, lines)


def at(curve: list[tuple[float, float]], share: float) -> float | None:
    """The KL of a curve at a share of bytes, linear in its logarithm; None beyond its ends."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= share <= x1:
            return exp(log(y0) + (log(y1) - log(y0)) * (share - x0) / (x1 - x0))
    return None
