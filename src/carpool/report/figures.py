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

    shown = _representatives(evaluation, batch)
    made = figure(height=_height(len(shown) + 1))
    stock = evaluation.stock(batch)
    names = [str(layer) for layer in range(len(stock.data["union_by_layer"]))]
    made.add_trace(
        go.Bar(name="stock", x=names, y=stock.data["union_by_layer"], marker={"color": PALE}, hovertemplate="%{y:.1f}")
    )
    for row, colour in shown:
        made.add_trace(
            go.Scatter(
                name=row.policy, x=names, y=row.data["union_by_layer"], mode="lines+markers", hovertemplate="%{y:.1f}",
                line={"color": colour, "width": 2, "dash": _dash(row)}, marker={"size": 7},
            )
        )  # fmt: skip
    made.update_xaxes(title="MoE layer", type="category")
    made.update_yaxes(title="distinct experts read in a step", rangemode="tozero")
    return made


def expert_use(evaluation: Evaluation, batch: int) -> Any | None:
    """Which experts each domain reads, before and after; None if the file does not say."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = [row for row in evaluation.at(batch) if row.data.get("details") and row.policy != "stock"]
    stock = evaluation.stock(batch)
    if not rows or not stock.data.get("details"):
        return None
    before, names = _use(stock)
    chosen = _middle(rows)
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
    _style(figure, height=max(330, 130 + 17 * len(names)))
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

    shown = [(row, colour) for row, colour in _representatives(evaluation, batch) if row.data.get("details")]
    if not shown:
        return None
    made = figure(height=_height(len(shown)))
    for row, colour in shown:
        counts = row.data["details"]["displaced_histogram"]
        total, width = max(sum(counts), 1), 1 / len(counts)
        made.add_trace(
            go.Scatter(
                name=row.policy, x=[(index + 0.5) * width for index in range(len(counts))],
                y=[count / total if count else None for count in counts], mode="lines",
                line={"shape": "hvh", "color": colour, "width": 2, "dash": _dash(row)},
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


def _representatives(evaluation: Evaluation, batch: int) -> list[tuple[Row, str]]:
    """One setting of every method, the one closest to half of stock's union, with its colour."""
    return [(_middle(rows), colour) for _, rows, colour, _ in _lines([evaluation], batch)]


def representative(evaluation: Evaluation, batch: int) -> list[str]:
    """The policies that sections with one setting of every method show."""
    return [row.policy for row, _ in _representatives(evaluation, batch)]


def _dash(row: Row) -> str:
    return "dot" if row.control else "solid"


def _height(entries: int) -> int:
    """Of a figure whose legend has so many entries, which would scroll in a lower one."""
    return max(400, 120 + 19 * entries)


def _ticks(values: Sequence[float]) -> tuple[list[float], list[str]]:
    """1, 2 and 5 of every decade that holds one of the values, written in full; decades alone where they are many."""
    low, high = (floor(log10(end)) for end in (min(values), max(values)))
    ticks = [digit * 10.0**power for power in range(low, high + 2) for digit in ((1, 2, 5) if high - low < 4 else (1,))]
    return ticks, [f"{tick:.10f}".rstrip("0").rstrip(".") for tick in ticks]


def _middle(rows: Sequence[Row]) -> Row:
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
    _style(made, height)
    return made


def _style(figure: Any, height: int) -> None:
    figure.update_layout(
        height=height, template="plotly_white", font={"family": FONT, "color": INK, "size": 13},
        margin={"l": 70, "r": 20, "t": 30, "b": 60}, hoverlabel={"bgcolor": "white", "font": {"family": FONT}},
        legend={"font": {"size": 12}},
    )  # fmt: skip
    figure.update_xaxes(gridcolor=PALE, zeroline=False)
    figure.update_yaxes(gridcolor=PALE, zeroline=False)
