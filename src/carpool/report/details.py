"""Figures of what a file of results says in detail: who uses which expert, and how unevenly tokens lose."""

from __future__ import annotations

from typing import Any

from carpool.evaluate.plot import PALE
from carpool.report.figures import dash_of, figure, height_for, middle, representatives, style
from carpool.report.load import Evaluation, Row


def expert_use(evaluation: Evaluation, batch: int) -> Any | None:
    """Which experts each domain reads, before and after; None if the file does not say."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = [row for row in evaluation.at(batch) if row.data.get("details") and row.policy != "stock"]
    stock = evaluation.stock(batch)
    if not rows or not stock.data.get("details"):
        return None
    before, names = _use(stock)
    chosen = middle(rows)
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=("stock", chosen.policy))
    top = max(max(line) for row in (stock, *rows) for line in _use(row)[0])
    for column, matrix in ((1, before), (2, _use(chosen)[0])):
        figure.add_trace(
            go.Heatmap(
                z=matrix, y=names, colorscale="Blues", zmin=0, zmax=top, showscale=column == 2,
                colorbar={"title": {"text": "tokens"}, "tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
                hovertemplate="%{y}<br>expert %{x}: %{z:.1%} of the tokens<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    style(figure, height=max(330, 130 + 17 * len(names)))
    figure.update_yaxes(autorange="reversed", showgrid=False, dtick=1)
    figure.update_xaxes(title="expert", showgrid=False)
    menu = [
        {
            "label": row.policy,
            "method": "update",
            "args": [{"z": [_use(row)[0]]}, {"annotations[1].text": row.policy}, [1]],
        }
        for row in rows
    ]
    figure.update_layout(
        margin={"t": 95},
        updatemenus=[
            {"buttons": menu, "active": rows.index(chosen), "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom",
             "pad": {"b": 32}, "bgcolor": "white", "bordercolor": PALE, "font": {"size": 12}}
        ],
    )  # fmt: skip
    return figure


def displaced(evaluation: Evaluation, batch: int) -> Any | None:
    """How many (token, layer) pairs lose how much of their native weight; None if the file does not say."""
    import plotly.graph_objects as go

    shown = [(row, colour) for row, colour in representatives(evaluation, batch) if row.data.get("details")]
    if not shown:
        return None
    made = figure(height=height_for(len(shown)))
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
    made.update_xaxes(title="displaced mass of a token in a layer", tickformat=".0%", range=[0, 1])
    made.update_yaxes(title="share of (token, layer) pairs", type="log", tickformat=".2~%", dtick=1)
    return made


def _use(row: Row) -> tuple[list[list[float]], list[str]]:
    """Share of a domain's tokens that read an expert, a line a (layer, domain), and the lines' names."""
    use = row.data["details"]["expert_use"]
    count = len(next(iter(use.values())))
    tokens = {domain: max(sum(layers[0]) / max(row.value("pairs"), 1e-9), 1) for domain, layers in use.items()}
    lines = [[n / tokens[domain] for n in use[domain][layer]] for layer in range(count) for domain in use]
    return lines, [f"{domain} · layer {layer}" for layer in range(count) for domain in use]
