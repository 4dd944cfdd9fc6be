"""A figure of a report as HTML: plotly draws data and axes; names, choices and widths are the page's own, so that they
fit any screen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from carpool.evaluate.plot import INK, PALE

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
Change = list[Any]  # arguments of plotly's `update`: of traces, of the layout, and which traces


@dataclass(frozen=True)
class Drawing:
    """A figure and what a reader may change about it.

    Attributes:
        figure: plotly's.
        menus: name of a choice, then what each of its options changes; the first one is what is drawn, unless `chosen`
            names another.
        chosen: option of a menu that is drawn.
        narrow, wide: layout of plotly on screens too narrow for the figure as it is, and on others; the same keys.
        narrow_height: pixels there; None is the figure's own height, or less where that is no less readable.
    """

    figure: Any
    menus: Mapping[str, Mapping[str, Change]] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    narrow: Mapping[str, Any] = field(default_factory=dict)
    wide: Mapping[str, Any] = field(default_factory=dict)
    narrow_height: int | None = None

    def html(self) -> str:
        """For the page, whose script draws it when it is first seen."""
        spec = {
            **self.figure.to_plotly_json(),
            "menus": [list(options.values()) for options in self.menus.values()],
            "narrow": self.narrow,
            "wide": self.wide,
            "narrow_height": self.narrow_height,
        }
        return (
            f"<div class='figure'><div class='menus'>{''.join(map(self._menu, self.menus))}</div>"
            f"<div class='plot'></div><div class='legend'></div>{as_data(spec)}</div>"
        )

    def _menu(self, name: str) -> str:
        options = self.menus[name]
        chosen = self.chosen.get(name, next(iter(options)))
        made = "".join(f"<option{' selected' if one == chosen else ''}>{escape(one)}</option>" for one in options)
        return f"<label>{escape(name)} <select>{made}</select></label>"


def as_data(content: Any) -> str:
    """JSON for a script of the page, beside it in the document."""
    text = json.dumps(content, default=_listed, allow_nan=False)
    return f"<script type='application/json'>{text.replace('<', chr(92) + 'u003c')}</script>"


def _listed(value: Any) -> Any:
    return value.to_plotly_json() if hasattr(value, "to_plotly_json") else list(value)


def figure(height: int = 400) -> Any:
    """An empty figure in the report's style."""
    import plotly.graph_objects as go

    made = go.Figure()
    style(made, height)
    return made


def style(figure: Any, height: int) -> None:
    """Fonts, colours and grid of the report."""
    figure.update_layout(
        height=height, template="plotly_white", showlegend=False, font={"family": FONT, "color": INK, "size": 13},
        margin={"l": 64, "r": 14, "t": 14, "b": 60}, hoverlabel={"bgcolor": "white", "font": {"family": FONT}},
    )  # fmt: skip
    away = {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}  # labels of both axes meet at no corner
    figure.update_xaxes(gridcolor=PALE, zeroline=False, **away)
    figure.update_yaxes(gridcolor=PALE, zeroline=False, **away)
