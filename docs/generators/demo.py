"""The README's table: `carpool demo --output docs/results`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from generators import Block, load, rows

HEADS = (
    "policy", ">union", ">bytes, of stock", ">pairs", ">displaced mass", ">KL, nats/token", ">top-1 agreement",
    ">perplexity ratio",
)  # fmt: skip


def blocks() -> list[Block]:
    content = load("carpool-demo.json")
    return [] if content is None else [Block("README.md", "demo table", table(content["results"]))]


def table(results: Iterable[dict[str, Any]]) -> str:
    """Markdown rows of an evaluation's results, as they are in its JSON."""
    return rows(HEADS, map(_cells, results))


def _cells(row: dict[str, Any]) -> list[str]:
    stock = row["policy"] == "stock"
    kl, share = row["kl"], row["bytes_share"]["value"]
    return [
        f"`{row['policy']}`" if not stock else "stock",
        f"{row['union']['value']:.1f}",
        f"{share:.0%}",
        f"{row['pairs']:.2f}",
        f"{row['displaced_mass']['value']:.1%}",
        "0" if stock else f"{kl['value']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}]",
        f"{row['top1_agreement']['value']:.1%}",
        f"{row['perplexity_ratio']['value']:.3f}",
    ]
