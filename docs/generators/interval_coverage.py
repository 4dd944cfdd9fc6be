"""How often intervals hold the truth.

python benchmarks/interval_coverage.py --output docs/results/interval-coverage.json
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows


def blocks() -> list[Block]:
    content = load("interval-coverage.json")
    return [] if content is None else [Block("docs/leaderboard.md", "interval coverage", table(content))]


def table(content: dict[str, Any]) -> str:
    """A line a statistic and scatter, a column a number of batches: the intervals that are shown and the old ones."""
    counts = sorted({row["batches"] for row in content["rows"]})
    found = {(row["statistic"], row["scatter"], row["batches"]): row for row in content["rows"]}
    lines = []
    for statistic, scatter in dict.fromkeys((row["statistic"], row["scatter"]) for row in content["rows"]):
        cells = []
        for count in counts:
            row = found[statistic, scatter, count]
            shown = "–" if row["shown"] is None else f"{100 * row['shown']:.0f}"
            cells.append(f"{shown} ({100 * row['bootstrap']:.0f})")
        lines.append([statistic, scatter, *cells])
    heads = ("statistic", "scatter of batches", *(f">{count} batches" for count in counts))
    settings = content["settings"]
    said = (
        f"Of 100 intervals called {100 * settings['level']:.0f} %, how many hold the truth, and in brackets how many "
        f"of the percentile bootstrap's do; {settings['repeats']:,} intervals a cell."
    )
    return f"{said}\n\n{rows(heads, lines)}"
