"""The picture of a trace: load, drift, consistency and what caches would hit, as one HTML file without a network."""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError
from carpool.evaluate.plot import COLOURS, MUTED
from carpool.offloading.summary import Summary

RULES = {"belady": "dot", "lru": "solid", "pinned": "dash"}


def trace_page(found: Summary, title: str, top_k: int) -> str:
    """HTML of a summary.

    Raises:
        CarpoolError: plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise CarpoolError("a picture needs plotly: pip install 'carpool[report]'") from None
    from carpool.report.drawing import style

    made = make_subplots(
        rows=2, cols=2, vertical_spacing=0.14, horizontal_spacing=0.09,
        subplot_titles=(
            "load: share of a layer's uses, experts by use", "drift: later half against earlier half",
            "consistency: SRP over the window", "hit rate over the cache, experts a layer",
        ),
    )  # fmt: skip
    _load(made, found)
    _drift(made, found)
    _consistency(made, found)
    _caches(made, found, top_k)
    style(made, 820)
    made.update_layout(title=title, showlegend=True, margin={"t": 90}, legend={"y": 0.36, "yanchor": "top"})
    page: str = made.to_html(include_plotlyjs=True, full_html=True)
    return page


def _load(made: Any, found: Summary) -> None:
    for layer, load_E in enumerate(found.load_LE):
        values = load_E.sort(descending=True).values.tolist()
        name = f"layer {layer}"
        colour = COLOURS[layer % len(COLOURS)]
        made.add_scatter(y=values, name=name, line_color=colour, showlegend=False, row=1, col=1)
    made.update_yaxes(tickformat=".1%", rangemode="tozero", row=1, col=1)
    even = 1 / found.load_LE.shape[1]
    made.add_hline(y=even, line={"color": MUTED, "dash": "dot"}, annotation_text="even", row=1, col=1)


def _drift(made: Any, found: Summary) -> None:
    made.add_bar(y=found.drift_L.tolist(), marker_color=COLOURS[0], showlegend=False, row=1, col=2)
    line = {"color": MUTED, "dash": "dot"}
    made.add_hline(y=found.chance, line=line, annotation_text="by chance", row=1, col=2)
    made.update_xaxes(title="layer", row=1, col=2)


def _consistency(made: Any, found: Summary) -> None:
    windows = list(found.srp)
    for layer in range(len(found.load_LE)):
        values = [found.srp[window].layers[layer] for window in windows]
        made.add_scatter(
            x=windows, y=values, name=f"layer {layer}", line={"color": COLOURS[layer % len(COLOURS)], "width": 1},
            showlegend=False, row=2, col=1,
        )  # fmt: skip
    whole = [found.srp[window].value for window in windows]
    made.add_scatter(x=windows, y=whole, name="model", line_color="black", showlegend=False, row=2, col=1)
    made.update_xaxes(type="log", title="tokens", tickvals=windows, row=2, col=1)
    made.update_yaxes(tickformat=".0%", row=2, col=1)


def _caches(made: Any, found: Summary, top_k: int) -> None:
    batches = list(dict.fromkeys(batch for _, batch in found.curves))
    for (rule, batch), rates in found.curves.items():
        colour = COLOURS[batches.index(batch) % len(COLOURS)]
        made.add_scatter(
            x=list(range(1, len(rates) + 1)), y=rates.tolist(), name=f"{rule}, batch {batch}",
            line={"color": colour, "dash": RULES[rule]}, row=2, col=2,
        )  # fmt: skip
    made.update_yaxes(tickformat=".0%", row=2, col=2)
    made.add_vline(x=top_k, line={"color": MUTED, "dash": "dot"}, annotation_text="a token's", row=2, col=2)
