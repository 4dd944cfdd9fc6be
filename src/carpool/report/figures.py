"""The figures of a report, as plotly figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from typing import Any

from carpool.evaluate.plot import COLOURS, INK, MUTED, PALE
from carpool.report.load import Evaluation, Row

LEAST_KL = 1e-6  # nats; stock's zero has no place on a logarithmic axis
DASHES = ("solid", "dash", "dot", "dashdot")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
AXES = {
    "bytes_share": ("bytes read (experts and surrogates), share of stock's", ".0%"),
    "union_share": ("distinct experts read, share of stock's", ".0%"),
    "union": ("distinct experts read in a layer and step", ".1f"),
    "pairs": ("experts computed for a token in a layer", ".1f"),
}
COSTS = {
    "kl": "KL(stock ‖ policy), nats per decoded token",
    "perplexity_ratio": "perplexity over stock's",
    "displaced_mass": "displaced mass",
}


def frontier(evaluations: Sequence[Evaluation], batch: int) -> Any:
    """Cost over experts read at one batch size; buttons change both axes."""
    import plotly.graph_objects as go

    made = figure(height=560)
    lines = _lines(evaluations, batch)
    for name, rows, colour, dash in lines:
        made.add_trace(
            go.Scatter(
                name=name, mode="lines+markers", x=[row.value("bytes_share") for row in rows],
                y=_shown(rows, "kl"), error_y=_bars(rows, "kl"), text=[_hover(row) for row in rows],
                hovertemplate="%{text}<extra></extra>", line={"color": colour, "dash": dash, "width": 2.2},
                marker={"size": 7, "line": {"color": "white", "width": 1}},
            )
        )  # fmt: skip
    made.update_xaxes(title=AXES["bytes_share"][0], tickformat=AXES["bytes_share"][1], tickangle=0)
    values, texts = _ticks([kl for _, rows, _, _ in lines for kl in _shown(rows, "kl")])
    made.update_yaxes(title=COSTS["kl"], type="log", tickmode="array", tickvals=values, ticktext=texts)
    across = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"x": [[row.value(name) for row in rows] for _, rows, _, _ in lines]},
                {"xaxis.title.text": AXES[name][0], "xaxis.tickformat": AXES[name][1]},
            ],
        }
        for label, name in (
            ("bytes read", "bytes_share"),
            ("experts read, share", "union_share"),
            ("experts read", "union"),
            ("pairs", "pairs"),
        )
    ]
    down = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"y": [_shown(rows, name) for _, rows, _, _ in lines],
                 "error_y": [_bars(rows, name) for _, rows, _, _ in lines]},
                {"yaxis.title.text": COSTS[name], "yaxis.type": "log" if name == "kl" else "linear",
                 "yaxis.tickmode": "array" if name == "kl" else "auto",
                 "yaxis.tickformat": ".0%" if name == "displaced_mass" else ""},
            ],
        }
        for label, name in (("KL", "kl"), ("perplexity", "perplexity_ratio"), ("displaced", "displaced_mass"))
    ]  # fmt: skip
    _buttons(made, (across, 0.0, "left"), (down, 1.0, "right"))
    return made


def layers(evaluation: Evaluation, batch: int) -> Any:
    """Union of every layer, stock as bars and policies as lines."""
    import plotly.graph_objects as go

    shown = representatives(evaluation, batch)
    made = figure(height=height_for(len(shown) + 1))
    stock = evaluation.stock(batch)
    names = [str(layer) for layer in range(len(stock.data["union_by_layer"]))]
    made.add_trace(
        go.Bar(name="stock", x=names, y=stock.data["union_by_layer"], marker={"color": PALE}, hovertemplate="%{y:.1f}")
    )
    for row, colour in shown:
        made.add_trace(
            go.Scatter(
                name=row.policy, x=names, y=row.data["union_by_layer"], mode="lines+markers", hovertemplate="%{y:.1f}",
                line={"color": colour, "width": 2, "dash": dash_of(row)}, marker={"size": 7},
            )
        )  # fmt: skip
    made.update_xaxes(title="MoE layer", type="category")
    made.update_yaxes(title="distinct experts read in a step", rangemode="tozero")
    return made


def representatives(evaluation: Evaluation, batch: int) -> list[tuple[Row, str]]:
    """One setting of every method, the one closest to half of stock's bytes, with its colour."""
    return [(middle(rows), colour) for _, rows, colour, _ in _lines([evaluation], batch)]


def representative(evaluation: Evaluation, batch: int) -> list[str]:
    """The policies that sections with one setting of every method show."""
    return [row.policy for row, _ in representatives(evaluation, batch)]


def dash_of(row: Row) -> str:
    """Controls are dotted."""
    return "dot" if row.control else "solid"


def height_for(entries: int) -> int:
    """Of a figure whose legend has so many entries, which would scroll in a lower one."""
    return max(400, 120 + 19 * entries)


def _ticks(values: Sequence[float]) -> tuple[list[float], list[str]]:
    """1, 2 and 5 of every decade that holds one of the values, written in full; decades alone where they are many."""
    low, high = (floor(log10(end)) for end in (min(values), max(values)))
    ticks = [digit * 10.0**power for power in range(low, high + 2) for digit in ((1, 2, 5) if high - low < 4 else (1,))]
    return ticks, [f"{tick:.10f}".rstrip("0").rstrip(".") for tick in ticks]


def middle(rows: Sequence[Row]) -> Row:
    """The setting that reads closest to half of stock's bytes."""
    return min(rows, key=lambda row: abs(row.value("bytes_share") - 0.5))


def _lines(evaluations: Sequence[Evaluation], batch: int) -> list[tuple[str, list[Row], str, str]]:
    """Name, settings from the smallest union on, colour and dash of every method of every file."""
    methods: dict[str, str] = {}
    colours = iter(COLOURS * 20)
    made = []
    for number, evaluation in enumerate(evaluations):
        series: dict[str, list[Row]] = {}
        for row in evaluation.at(batch):
            if row.method != "stock":
                series.setdefault(row.method, []).append(row)
        for method, rows in series.items():
            if method not in methods:
                methods[method] = MUTED if rows[0].control else next(colours)
            name = method if len(evaluations) == 1 else f"{method} · {evaluation.label}"
            dash = "dot" if rows[0].control else DASHES[number % len(DASHES)]
            made.append((name, sorted(rows, key=lambda row: row.value("bytes_share")), methods[method], dash))
    return made


def _shown(rows: Sequence[Row], name: str) -> list[float]:
    return [max(row.value(name), LEAST_KL) if name == "kl" else row.value(name) for row in rows]


def _bars(rows: Sequence[Row], name: str) -> dict[str, Any]:
    ends = [(row.value(name), *(row.interval(name) or 2 * (row.value(name),))) for row in rows]
    return {
        "type": "data", "symmetric": False, "thickness": 1, "width": 0,
        "array": [high - value for value, _, high in ends], "arrayminus": [value - low for value, low, _ in ends],
    }  # fmt: skip


def _hover(row: Row) -> str:
    ends = row.interval("kl")
    sure = "" if ends is None else f" ({ends[0]:.4f}–{ends[1]:.4f})"
    return (
        f"<b>{row.policy}</b><br>{row.value('union'):.1f} experts ({row.value('union_share'):.0%} of stock), "
        f"{row.value('bytes_share'):.0%} of its bytes<br>"
        f"KL {row.value('kl'):.4f}{sure}<br>perplexity × {row.value('perplexity_ratio'):.4f}<br>"
        f"displaced mass {row.value('displaced_mass'):.1%}, {row.value('pairs'):.2f} experts a token"
    )


def _buttons(figure: Any, *groups: tuple[list[dict[str, Any]], float, str]) -> None:
    figure.update_layout(
        margin={"t": 80},
        updatemenus=[
            {"type": "buttons", "direction": "right", "buttons": buttons, "x": x, "xanchor": anchor, "y": 1.02,
             "yanchor": "bottom", "bgcolor": "white", "bordercolor": PALE, "font": {"size": 12}}
            for buttons, x, anchor in groups
        ],
    )  # fmt: skip


def figure(height: int) -> Any:
    """An empty figure in the report's style."""
    import plotly.graph_objects as go

    made = go.Figure()
    style(made, height)
    return made


def style(figure: Any, height: int) -> None:
    """Fonts, colours and grid of the report."""
    figure.update_layout(
        height=height, template="plotly_white", font={"family": FONT, "color": INK, "size": 13},
        margin={"l": 70, "r": 20, "t": 30, "b": 60}, hoverlabel={"bgcolor": "white", "font": {"family": FONT}},
        legend={"font": {"size": 12}},
    )  # fmt: skip
    figure.update_xaxes(gridcolor=PALE, zeroline=False)
    figure.update_yaxes(gridcolor=PALE, zeroline=False)
