"""The figures of a report, as plotly figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from typing import Any

from carpool.evaluate.plot import COLOURS, MUTED, PALE
from carpool.report.drawing import Change, Drawing, figure
from carpool.report.load import Evaluation, Row

LEAST_KL = 1e-6  # nats; stock's zero has no place on a logarithmic axis
DASHES = ("solid", "dash", "dot", "dashdot")
AXES = {  # label: metric, title, format
    "bytes read": ("bytes_share", "bytes read, of stock's", ".0%"),
    "experts read, share": ("union_share", "experts read, of stock's", ".0%"),
    "experts read": ("union", "distinct experts read", ".1f"),
    "pairs": ("pairs", "experts computed a token", ".1f"),
}
COSTS = {
    "KL": ("kl", "KL(stock ‖ policy), nats a token", ""),
    "perplexity": ("perplexity_ratio", "perplexity over stock's", ""),
    "displaced mass": ("displaced_mass", "displaced mass", ".0%"),
}


def frontier(evaluations: Sequence[Evaluation], batch: int) -> Drawing:
    """Cost over experts read at one batch size; menus change both axes."""
    import plotly.graph_objects as go

    made = figure(height=480)
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
    made.update_xaxes(title=AXES["bytes read"][1], tickformat=AXES["bytes read"][2], tickangle=0)
    values, texts = _ticks([kl for _, rows, _, _ in lines for kl in _shown(rows, "kl")])
    made.update_yaxes(title=COSTS["KL"][1], type="log", tickmode="array", tickvals=values, ticktext=texts)
    across: dict[str, Change] = {
        label: [
            {"x": [[row.value(name) for row in rows] for _, rows, _, _ in lines]},
            {"xaxis.title.text": title, "xaxis.tickformat": form},
        ]
        for label, (name, title, form) in AXES.items()
    }
    down: dict[str, Change] = {
        label: [
            {
                "y": [_shown(rows, name) for _, rows, _, _ in lines],
                "error_y": [_bars(rows, name) for _, rows, _, _ in lines],
            },
            {
                "yaxis.title.text": title,
                "yaxis.type": "log" if name == "kl" else "linear",
                "yaxis.tickmode": "array" if name == "kl" else "auto",
                "yaxis.tickformat": form,
            },
        ]
        for label, (name, title, form) in COSTS.items()
    }
    return Drawing(made, {"cost": down, "over": across})


def layers(evaluation: Evaluation, batch: int) -> Drawing:
    """Union of every layer, stock as bars and policies as lines."""
    import plotly.graph_objects as go

    shown = representatives(evaluation, batch)
    made = figure()
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
    return Drawing(made)


def representatives(evaluation: Evaluation, batch: int) -> list[tuple[Row, str]]:
    """One setting of every method, the one closest to half of stock's bytes, with its colour."""
    return [(middle(rows), colour) for _, rows, colour, _ in _lines([evaluation], batch)]


def representative(evaluation: Evaluation, batch: int) -> list[str]:
    """The policies that sections with one setting of every method show."""
    return [row.policy for row, _ in representatives(evaluation, batch)]


def dash_of(row: Row) -> str:
    """Controls are dotted."""
    return "dot" if row.control else "solid"


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
