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

CONTROLS = ("random", "best", "oracle", "kNN", "the item's domain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    folder = parser.parse_args().results
    content, modes = (json.loads((folder / f"models-{name}.json").read_text()) for name in ("recruit", "modes"))
    style = {"font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.edgecolor": PALE}
    with mpl.rc_context(style):
        figure, (left, right, third) = plt.subplots(1, 3, figsize=(14, 4.6), dpi=150)
        rows = sorted(content["rows"], key=lambda one: one["right"])
        for place, one in enumerate(rows):
            colour = MUTED if one["rule"] in CONTROLS else COLOURS[0]
            left.errorbar(one["right"], place, xerr=one["half_width"], fmt="o", color=colour, elinewidth=0.8)
        several = {1: "", 3: ", 3 experts"}
        labels = [f"{one['rule']}{several[one['recruits']]}: {one['loads_grouped']}" for one in rows]
        left.set_yticks(range(len(rows)), labels, fontsize=7)
        left.axvline(content["chance"], color=PALE)
        left.set(xlabel="right (line: chance); after each rule: models loaded", title="who answers what")
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
        ends = {one["selector"]: (one["tokens"], one["right"]) for one in modes["rows"] if "budget" not in one}
        for colour, name in zip(COLOURS, dict.fromkeys(one["selector"] for one in modes["rows"]), strict=False):
            found = [
                one for one in modes["rows"] if one["selector"] == name and "budget" in one and "refused" not in one
            ]
            if found:
                points = [(one["tokens"], one["right"], one["half_width"]) for one in found]
                tokens, rights, halves = zip(*points, strict=True)
                third.errorbar(tokens, rights, yerr=halves, fmt="o-", color=colour, label=name, linewidth=1)
        third.plot(*zip(*ends.values(), strict=True), "--", color=MUTED, label="random")
        best = sorted({(one["tokens"], one["oracle"]) for one in modes["rows"] if "refused" not in one})
        third.plot(*zip(*best, strict=True), ":", color=MUTED, label="oracle")
        third.set(xlabel="tokens an item", ylabel="right", title="when a slow answer is asked for")
        third.legend(fontsize=7, frameon=False)
        figure.tight_layout()
        with atomic_path(folder / "models.png") as path:
            figure.savefig(path, format="png")


if __name__ == "__main__":
    main()
