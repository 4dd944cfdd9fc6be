"""Methods at half of the bytes, in docs/methods.md: `carpool demo --output docs/results`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from generators import Block, load, rows, with_interval

HALF = 0.5  # of the bytes that stock reads: the setting of each method nearest to it is shown
HEADS = ("policy", ">bytes, of stock", ">pairs", ">KL, nats/token", ">top-1 agreement", ">perplexity ratio")


def blocks() -> list[Block]:
    content = load("carpool-demo.json")
    return [] if content is None else [Block("docs/methods.md", "demo table", table(nearest(content)))]


def nearest(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Stock, and of every method the setting that reads closest to half of what stock reads."""
    by_policy = {row["policy"]: row for row in content["results"]}
    chosen = [
        min((by_policy[policy] for policy in one["policies"]), key=lambda row: abs(row["bytes_share"]["value"] - HALF))
        for one in content["series"]
    ]
    return [by_policy["stock"], *chosen]


def table(results: Iterable[dict[str, Any]]) -> str:
    """Markdown rows of an evaluation's results, as they are in its JSON."""
    return rows(HEADS, map(_cells, results))


def _cells(row: dict[str, Any]) -> list[str]:
    stock = row["policy"] == "stock"
    kl, share = row["kl"], row["bytes_share"]["value"]
    return [
        f"`{row['policy']}`" if not stock else "stock",
        f"{share:.0%}",
        f"{row['pairs']:.2f}",
        "0" if stock else with_interval(kl, 4),
        f"{row['top1_agreement']['value']:.1%}",
        f"{row['perplexity_ratio']['value']:.3f}",
    ]
