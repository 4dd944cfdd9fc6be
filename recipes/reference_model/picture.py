"""The card's picture: which domains each expert serves, and how much a layer's experts tell of the domain."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def order_experts(served_DE: np.ndarray) -> np.ndarray:
    """Experts grouped by the domain they serve most, the most specialised of each group first."""
    favourite_E = served_DE.argmax(0)
    return np.lexsort((-served_DE.max(0), favourite_E))


def draw(card: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    domains = list(card["domains"])
    information = card["mutual_information"]
    share_LDE = np.array(information["share_of_domain"])
    # P(domain | expert), domains equally likely
    served_LDE = share_LDE / share_LDE.sum(1, keepdims=True)
    layers = len(served_LDE)
    top = float(np.ceil(served_LDE.max() * 10) / 10)

    figure = plt.figure(figsize=(12, 1.5 * layers + 1.1), layout="constrained")
    grid = figure.add_gridspec(layers, 2, width_ratios=[3, 1], wspace=0.04, hspace=0.06)
    panels = []
    for layer, served_DE in enumerate(served_LDE):
        panel = figure.add_subplot(grid[layer, 0])
        order = order_experts(served_DE)
        image = panel.imshow(served_DE[:, order], cmap="magma_r", vmin=0, vmax=top, aspect="auto")
        panel.set_yticks(range(len(domains)), domains, fontsize=8)
        panel.set_xticks([])
        panel.set_ylabel(f"layer {layer}", fontsize=10)
        for border in np.flatnonzero(np.diff(served_DE.argmax(0)[order])):
            panel.axvline(border + 0.5, color="white", linewidth=1.5)
        panel.tick_params(length=0)
        panels.append(panel)
    panels[0].set_title("Which domains an expert serves", loc="left", fontsize=12, weight="bold")
    panels[0].set_title(
        f"{share_LDE.shape[-1]} experts a layer, grouped by the domain they serve most", loc="right", fontsize=9
    )
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=45, pad=0.01)
    bar.set_label(f"share of the expert's tokens (an expert without preference: {1 / len(domains):.2f})", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)

    side = figure.add_subplot(grid[:, 1])
    bits = np.array(information["bits"])
    side.barh(range(layers), bits, color=plt.get_cmap("magma_r")(0.62), height=0.5)
    for layer, value in enumerate(bits):
        side.text(value + bits.max() * 0.03, layer, f"{value:.2f}", va="center", fontsize=10)
    side.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)], fontsize=9)
    side.invert_yaxis()
    side.set_xlim(0, bits.max() * 1.22)
    side.set_xlabel(
        f"bits, of {information['bits_possible']:.2f} possible\n(shuffled labels, subtracted: at most "
        f"{max(information['bits_shuffled_mean']):.3f})",
        fontsize=9,
    )
    side.set_title("What it tells of the domain", loc="left", fontsize=12, weight="bold")
    side.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(path.stem + ".tmp.png")
    # no date or version inside: the same card gives the same bytes
    figure.savefig(temporary, dpi=130, metadata={"Software": None})
    plt.close(figure)
    temporary.replace(path)
