"""Where experts live: devices by experts before and after a placement, the part of a report about placement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.trace import Trace
from carpool.placement.baselines import linear_like
from carpool.placement.demand import loads_LE
from carpool.placement.placement import Placement
from carpool.placement.placement_file import PlacementFile
from carpool.placement.score import require_fit, score
from carpool.report.details import AROUND, BESIDE, below
from carpool.report.drawing import Drawing, style
from carpool.report.layout import chooser, section

LINE = 26  # pixels of a device
LEFT = 110  # pixels of a device's name
GAP = 64  # pixels between two pictures, one below the other
MANY = 24  # slots of a device, above which numbers would not be readable
NOTE = (
    "Each line is a device, each field one of its experts (its number is written in it), the darker the more of the "
    "layer's tokens it computes; an expert with replicas shares its tokens evenly. Beside a device: its share of all "
    "tokens. On {tokens:,} tokens of the trace, {method} in place of experts in order: busiest device {before:.2f} to "
    "{after:.2f} times the mean; experts that it reads in a step {read:.2f} to {reads:.2f}."
)


def placement_section(file: PlacementFile, trace: Trace) -> str:
    """A picture for every layer.

    Raises:
        CarpoolError: the placement is of another model than the trace.
    """
    placement = file.placement
    require_fit(placement, trace)
    start = linear_like(placement)
    scores = [score(one, trace) for one in (start, placement)]
    note = NOTE.format(
        tokens=len(trace), method=placement.method, before=scores[0].peak_tokens, after=scores[1].peak_tokens,
        read=scores[0].peak_activated, reads=scores[1].peak_activated,
    )  # fmt: skip
    load_LE = loads_LE(trace)
    panes = [
        (f"layer {number}", _picture(start, placement, place, load_LE[place]).html())
        for place, number in enumerate(file.layers)
    ]
    return section("Where experts live", note, chooser(panes, 0))


def shares_DS(placement: Placement, layer: int, load_E: Tensor) -> Tensor:
    """Float64 `[D, S]`: share of a layer's tokens that each slot computes."""
    expert_DS = placement.expert_LDS[layer]
    slots_E = expert_DS.flatten().bincount(minlength=placement.num_experts)
    return (load_E.double() / slots_E / load_E.sum().clamp_min(1))[expert_DS]


def _picture(start: Placement, placement: Placement, layer: int, load_E: Tensor) -> Drawing:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    made = make_subplots(cols=2, subplot_titles=("in order", placement.method))
    shares = [shares_DS(one, layer, load_E) for one in (start, placement)]
    for column, (one, share_DS) in enumerate(zip((start, placement), shares, strict=True), 1):
        made.add_trace(
            go.Heatmap(
                z=share_DS.tolist(), y=[f"{name} · {share:.0%}" for name, share in enumerate(share_DS.sum(1).tolist())],
                text=one.expert_LDS[layer].tolist(), texttemplate="%{text}" if one.slots <= MANY else None,
                coloraxis="coloraxis", hovertemplate="device %{y}<br>expert %{text}: %{z:.1%} of tokens<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    tall = max(160, LINE * placement.devices)
    style(made, tall + sum(AROUND.values()))
    made.update_yaxes(autorange="reversed", showgrid=False, dtick=1)
    made.update_xaxes(showgrid=False, showticklabels=False)
    narrow = 2 * tall + GAP
    made.update_layout(
        margin={**AROUND, "l": LEFT},
        coloraxis={
            "colorscale": "Blues", "cmin": 0, "cmax": float(torch.stack([one.max() for one in shares]).max()),
            "showscale": False,
        },
    )  # fmt: skip
    wide: dict[str, Any] = {**BESIDE, "xaxis.title.text": "", "yaxis2.showticklabels": True, "xaxis2.domain": [0.6, 1],
                            "xaxis.domain": [0, 0.42], "annotations[0].x": 0.21, "annotations[1].x": 0.8}  # fmt: skip
    return Drawing(made, {}, {}, below(tall / narrow), wide, narrow + sum(AROUND.values()))
