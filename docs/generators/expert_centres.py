"""The table of shared centres in docs/bytes.md.

python benchmarks/expert_centres.py --text heldout/*.jsonl -o docs/results/expert-centres.json
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/bytes.md"
NAMES = {
    "none": "nothing",
    "mean": "one mean",
    "barycentre": "ResMoE's barycentre",
    "groups": "a mean for each of 4 groups",
}


def blocks() -> list[Block]:
    content = load("expert-centres.json")
    return [] if content is None else [Block(PAGE, "bytes of centres", table(content))]


def table(content: dict[str, Any]) -> str:
    """KL at equal size by what experts share, a column a size."""
    sizes = sorted({row["bytes"] for row in content["rows"]})
    lines = [
        [NAMES[how], *(f"{row['kl']:.3f}" for size in sizes for row in content["rows"]
                       if row["centre"] == how and row["bytes"] == size)]
        for how in dict.fromkeys(row["centre"] for row in content["rows"])
    ]  # fmt: skip
    given = content["arguments"]
    said = f"\n{given['tokens']:,} held-out tokens in windows of {given['window']}, one run, no intervals.\n"
    return rows(["shared beside rests of low rank", *(f">KL at {size:.1%} of 16 bits" for size in sizes)], lines) + said
