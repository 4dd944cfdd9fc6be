"""The picture of docs/models.md, from the committed results.

python benchmarks/models_picture.py docs/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from carpool.artefacts.files import atomic_path
from carpool.evaluate.plot import COLOURS, INK, MUTED, PALE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    folder = parser.parse_args().results
    content = json.loads((folder / "models-recruit.json").read_text())
    style = {"font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.edgecolor": PALE}
    with mpl.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), dpi=150)
        for one in content["rows"]:
            colour = MUTED if one["rule"] in ("random", "best", "oracle", "kNN", "the item's domain") else COLOURS[0]
            at = one["loads_grouped"], one["right"]
            left.errorbar(*at, yerr=one["half_width"], fmt="o", color=colour, elinewidth=0.6)
            label = one["rule"] if one["recruits"] == 1 else f"{one['rule']}, {one['recruits']} experts"
            left.annotate(label, at, xytext=(5, 3), textcoords="offset points", fontsize=7)
        left.set(xlabel="models loaded for the batch", ylabel="right", title="who answers what")
        ends, *found = content["cascade"]
        lines = {" + ".join(one["signals"]): [] for one in found}
        for one in found:
            if "refused" not in one:
                lines[" + ".join(one["signals"])].append((one["passed_on"], one["right"]))
        for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
            if points:
                right.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=name, linewidth=1)
        right.plot([0, 1], [ends["weak"]["right"], ends["strong"]["right"]], "--", color=MUTED, label="random")
        oracle = sorted({(one["passed_on"], one["oracle"]) for one in found if "refused" not in one})
        if oracle:
            right.plot(*zip(*oracle, strict=True), ":", color=MUTED, label="oracle")
        right.set(xlabel="share passed on to the strong expert", ylabel="right", title="when a weak answer stands")
        right.legend(fontsize=7, frameon=False)
        figure.tight_layout()
        with atomic_path(folder / "models.png") as path:
            figure.savefig(path, format="png")


if __name__ == "__main__":
    main()
