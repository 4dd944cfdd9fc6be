"""Figures of what a file of results says in detail: who uses which expert, and how unevenly tokens lose."""

from __future__ import annotations

from typing import Any

from carpool.report.drawing import Change, Drawing, figure, style
from carpool.report.figures import dash_of, middle, representatives
from carpool.report.load import Evaluation, Row


def expert_use(evaluation: Evaluation, batch: int) -> Drawing | None:
    """Which experts each domain reads, before and after; None if the file does not say."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = [row for row in evaluation.at(batch) if row.data.get("details") and row.policy != "stock"]
    stock = evaluation.stock(batch)
    if not rows or not stock.data.get("details"):
        return None
    chosen = middle(rows)
    tokens = _tokens(stock)
    names = [
        f"layer {layer} · {domain}" for layer in range(len(next(iter(_counts(stock).values())))) for domain in tokens
    ]
    made = make_subplots(cols=2, shared_yaxes=True, subplot_titles=("stock", chosen.policy))
    shares = {row.policy: _use(row, tokens) for row in (stock, *rows)}
    for column, row in ((1, stock), (2, chosen)):
        made.add_trace(
            go.Heatmap(
                z=shares[row.policy], y=names, coloraxis="coloraxis",
                hovertemplate="%{y}<br>expert %{x}: %{z:.1%} of the tokens<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    tall = max(200, 17 * len(names))  # pixels of a picture
    style(made, tall + sum(AROUND.values()))
    made.update_yaxes(autorange="reversed", showgrid=False, dtick=1)
    made.update_xaxes(showgrid=False)
    made.update_layout(
        xaxis2_title="expert",
        margin={**AROUND, "l": 24 + 7 * max(map(len, names))},
        coloraxis={
            "colorscale": "Blues", "cmin": 0, "cmax": max(max(line) for share in shares.values() for line in share),
            "colorbar": {
                "tickformat": ".0%", "nticks": 5, "tickangle": 0, "thickness": 10, "outlinewidth": 0,
                "orientation": "h", "y": 0, "yanchor": "top", "len": 0.9, "ypad": 44,
            },
        },
    )  # fmt: skip
    menu: dict[str, Change] = {
        row.policy: [{"z": [shares[row.policy]]}, {"annotations[1].text": row.policy}, [1]] for row in rows
    }
    narrow = 2 * tall + GAP
    return Drawing(
        made, {"policy": menu}, {"policy": chosen.policy}, below(tall / narrow), BESIDE, narrow + sum(AROUND.values())
    )


AROUND = {"t": 34, "b": 100}  # pixels
GAP = 64  # between two pictures, one below the other
BESIDE: dict[str, Any] = {
    "xaxis.domain": [0, 0.485], "xaxis2.domain": [0.515, 1], "yaxis.domain": [0, 1], "yaxis2.domain": [0, 1],
    "yaxis2.showticklabels": False, "xaxis.title.text": "expert",
    "annotations[0].x": 0.2425, "annotations[0].y": 1, "annotations[1].x": 0.7575, "annotations[1].y": 1,
}  # fmt: skip


def below(share: float) -> dict[str, Any]:
    """One below the other, each a share of the height."""
    return {
        "xaxis.domain": [0, 1], "xaxis2.domain": [0, 1], "yaxis.domain": [1 - share, 1], "yaxis2.domain": [0, share],
        "yaxis2.showticklabels": True, "xaxis.title.text": "",
        "annotations[0].x": 0.5, "annotations[0].y": 1, "annotations[1].x": 0.5, "annotations[1].y": share,
    }  # fmt: skip


def displaced(evaluation: Evaluation, batch: int) -> Drawing | None:
    """How many (token, layer) pairs lose how much of their native weight; None if the file does not say."""
    import plotly.graph_objects as go

    shown = [(row, colour) for row, colour in representatives(evaluation, batch) if row.data.get("details")]
    if not shown:
        return None
    made = figure()
    for row, colour in shown:
        counts = row.data["details"]["displaced_histogram"]
        total, width = max(sum(counts), 1), 1 / len(counts)
        made.add_trace(
            go.Scatter(
                name=row.policy, x=[(index + 0.5) * width for index in range(len(counts))],
                y=[count / total if count else None for count in counts], mode="lines",
                line={"shape": "hvh", "color": colour, "width": 2, "dash": dash_of(row)},
                hovertemplate="%{x:.0%}: %{y:.2%}",
            )
        )  # fmt: skip
    made.update_xaxes(title="displaced mass", tickformat=".0%", range=[0, 1])
    decades = [10.0**-power for power in range(7)]
    made.update_yaxes(
        title="share of (token, layer) pairs", type="log", tickmode="array", tickvals=decades,
        ticktext=[f"{100 * decade:.4f}".rstrip("0").rstrip(".") + "%" for decade in decades],
    )  # fmt: skip
    return Drawing(made)


def _counts(row: Row) -> dict[str, list[list[float]]]:
    """Tokens that read an expert, by domain and layer."""
    counts: dict[str, list[list[float]]] = row.data["details"]["expert_use"]
    return counts


def _tokens(stock: Row) -> dict[str, float]:
    """How many tokens each domain has: natively each of them reads as many experts in every layer."""
    return {
        domain: max(sum(layers[0]) / max(stock.value("pairs"), 1e-9), 1) for domain, layers in _counts(stock).items()
    }


def _use(row: Row, tokens: dict[str, float]) -> list[list[float]]:
    """Share of a domain's tokens that read an expert, a line a (layer, domain)."""
    use = _counts(row)
    layers = range(len(next(iter(use.values()))))
    return [[count / tokens[domain] for count in use[domain][layer]] for layer in layers for domain in tokens]
