"""The README's first figure.

    carpool evaluate --policy "xshare(budget=16)" --policy "xshare(budget=24)" --policy "oea(k0=2)" \\
        --batch 1,2,4,8,16,32,64 --tokens 6144 --allow-unchanged --json docs/results/batches.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from generators import RESULTS, Block, load


def blocks() -> list[Block]:
    return []


def draw() -> None:
    content = load("batches.json")
    if content is not None:
        draw_problem(content, RESULTS / "batches.png")


def draw_problem(content: dict[str, Any], path: Path) -> None:
    """Experts read per layer against the batch size: what batching does, and what sharing makes of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    experts, top_k = content["model"]["experts"], content["model"]["top_k"]
    series: dict[str, list[tuple[int, float]]] = {}
    for row in content["results"]:
        series.setdefault(row["policy"], []).append((row["batch"], row["union"]["value"]))
    batches = sorted({batch for points in series.values() for batch, _ in points})
    figure, axes = plt.subplots(figsize=(8.6, 4.4), dpi=150)
    law = [experts * (1 - (1 - top_k / experts) ** batch) for batch in batches]
    axes.plot(batches, law, color="#b8bcc4", linestyle=":", linewidth=1.6)
    axes.annotate("independent draws", (batches[2], law[2]), (-6, 8), textcoords="offset points", ha="right",
                  color="#8a8f99", fontsize=9)  # fmt: skip
    colours = iter(("#0f7b6c", "#2f9e8f", "#d9822b", "#7b5ea7"))
    label_y = -1e9
    for name, points in sorted(series.items(), key=lambda item: max(item[1])[1]):
        x, y = zip(*sorted(points), strict=True)
        stock = name == "stock"
        colour = "#23262d" if stock else next(colours)
        axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=2.6 if stock else 2)
        label_y = max(y[-1], label_y + 0.055 * experts)  # labels of curves that end together stand apart
        axes.annotate(name, (x[-1], label_y), (8, -3), textcoords="offset points", color=colour, fontsize=10,
                      fontweight="bold" if stock else "normal", annotation_clip=False)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(0, experts * 1.04)
    axes.set_xlabel("sequences decoded together")
    axes.set_ylabel(f"experts read per layer and step, of {experts}")
    one, many = (dict(series["stock"])[batch] for batch in (batches[0], batches[-1]))
    title = f"Batching wakes the experts: {one:.0f} read for one token, {many:.0f} for {batches[-1]}"
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.text(0, 1.03, "measured on the reference model, held-out text; shared: tokens of a batch use a common set",
              transform=axes.transAxes, fontsize=9.5, color="#5b616b")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8ec")
    axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path)
