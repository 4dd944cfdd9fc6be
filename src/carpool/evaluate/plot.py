"""The picture of a comparison: what every method costs over the experts that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carpool.artefacts.files import atomic_path
from carpool.evaluate.findings import HALF, best_at
from carpool.evaluate.intervals import FEWEST
from carpool.evaluate.series import Curve

# distinct for colour-blind readers too; methods take them in the order they are listed
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4EAB", "#8C564B", "#4C9A2A", "#B2182B",
    "#0B3C5D", "#A6761D", "#F781BF", "#66A61E",
)  # fmt: skip
INK, MUTED, PALE = "#1f2328", "#6e7781", "#d8dee4"
LABEL_GAP = 0.042  # least distance of two labels, as a share of the axis' height


def plot(curves: Sequence[Curve], path: Path, subtitle: str) -> None:
    """Write a PNG: KL (log scale) over the union, one colour a method, controls grey, stock as a line.

    Args:
        curves: what to draw.
        path: the PNG to write.
        subtitle: model, batch and text in one line.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    style = {"font.family": "sans-serif", "font.size": 11, "text.color": INK, "axes.edgecolor": PALE}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(10.5, 6.6), dpi=160)
        figure.subplots_adjust(left=0.085, right=0.775, top=0.84, bottom=0.115)
        stock = curves[0].stock.union.value
        colours = iter(COLOURS * len(curves))
        drawn = [(curve, MUTED if curve.series.control else next(colours)) for curve in curves]
        for curve, colour in drawn:
            _draw(axes, curve, colour, stock)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set_xlim(right=1.03)
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.6, high)  # room for the mark of stock
        axes.plot(
            1.0, 0.0, transform=axes.get_xaxis_transform(), clip_on=False, marker="D", markersize=9, color=INK, zorder=4
        )
        axes.annotate(
            f"stock: {stock:.1f} experts, KL 0",
            xy=(1.0, 0.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-10, 8),
            textcoords="offset points",
            ha="right",
            va="bottom",
        )
        axes.set_xlabel(f"bytes read in a layer and step, share of stock's {stock:.1f} experts", labelpad=8)
        axes.set_ylabel("KL(stock ‖ policy), nats per decoded token", labelpad=8)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=MUTED, pad=9)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        _label(axes, drawn)
        figure.text(0.03, 0.945, headline(curves), fontsize=14.5, fontweight="bold", ha="left", va="center")
        figure.text(0.03, 0.895, subtitle, fontsize=10.5, color=MUTED, ha="left", va="center")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)


def headline(curves: Sequence[Curve]) -> str:
    """The finding in one line."""
    best = best_at(curves, HALF)
    if best is None or best.stock.measured.batches < FEWEST:
        return "What sharing experts saves and costs"
    cost = 100 * (np.exp(best.log_ratio_at(HALF)) - 1)
    return f"Reading half as much changes perplexity by {cost:+.1f} % with {best.series.label}"


def _draw(axes: Any, curve: Curve, colour: str, stock: float) -> None:
    shares, kls = curve.share_I, np.exp(curve.log_kl_I)
    ends = np.array([(r.kl.low or r.kl.value, r.kl.high or r.kl.value) for r in curve.results]).T
    axes.errorbar(
        shares, kls, yerr=np.abs(ends - kls), color=colour, linewidth=1.6 if curve.series.control else 2.2,
        linestyle=(0, (4, 2)) if curve.series.control else "-", marker="o", markersize=5.5, markeredgecolor="white",
        markeredgewidth=0.8, elinewidth=1, capsize=0, zorder=2 if curve.series.control else 3,
    )  # fmt: skip


def _label(axes: Any, drawn: Sequence[tuple[Curve, str]]) -> None:
    """Names in the right margin at the height of each curve's last point, pushed apart, with a thin line to it."""
    to_axes = axes.transAxes.inverted()
    ends = []
    for curve, colour in drawn:
        point = (curve.share_I[-1], float(np.exp(curve.log_kl_I[-1])))
        ends.append((to_axes.transform(axes.transData.transform(point))[1], point, curve, colour))
    ends.sort(key=lambda end: end[0])
    heights = spread([height for height, *_ in ends], LABEL_GAP)
    for height, (_, point, curve, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            curve.series.label, xy=point, xycoords="data", xytext=(1.025, height), textcoords="axes fraction",
            color=colour, fontsize=11, fontweight="normal" if curve.series.control else "bold", va="center",
            annotation_clip=False, arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkB": 4, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as need be so that neighbours are at least `gap` apart, within [0, 1]."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.0))
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
