"""What neighbours change: the part of a report about interference."""

from __future__ import annotations

from html import escape
from itertools import accumulate

from carpool.evaluate.plot import COLOURS, MUTED
from carpool.report.drawing import Drawing, figure
from carpool.report.load import Interference, method_of
from carpool.report.tables import policy

COLUMNS = ("policy", "KL mean", "p99", "worst", "between mean", "p99", "worst", "flipped", "unstable", "displaced")


def neighbours(found: Interference) -> Drawing:
    """Share of tokens whose prediction moves by more than so much when the neighbours change."""
    import plotly.graph_objects as go

    made = figure()
    colours = iter(COLOURS * 20)
    for row in found.rows:
        counts = row["kl_between_co_batches"]["histogram"]
        total = sum(counts)
        if row["policy"] == "stock" or not total:
            continue
        above = [1 - below / total for below in accumulate(counts)][:-1]
        control = method_of(row["policy"])[1]
        made.add_trace(
            go.Scatter(
                name=row["policy"], mode="lines", x=found.facts["histogram_edges"],
                y=[share or None for share in above],
                line={"color": MUTED if control else next(colours), "width": 2, "dash": "dot" if control else "solid"},
                hovertemplate="%{y:.2%} of the tokens move by more than %{x:.2g} nats",
            )
        )  # fmt: skip
    few = len(found.facts["histogram_edges"]) <= 10  # two a decade
    made.update_xaxes(title="KL between neighbours, nats", type="log", dtick=1 if few else 2, exponentformat="power")
    made.update_yaxes(title="share of tokens above", tickformat=".0%", rangemode="tozero")
    return Drawing(made)


def table(found: Interference) -> str:
    """Every policy's numbers, and the token that neighbours moved most."""
    head = "".join(f"<th>{name}</th>" for name in (*COLUMNS, "the token moved most, … up to it"))
    lines = []
    for row in found.rows:
        cells = [
            f"{number:.3g}"
            for name in ("kl", "kl_between_co_batches")
            for number in (row[name]["mean"], row[name]["quantiles"]["p99"], row[name]["quantiles"]["p100"])
        ]
        cells += [f"{row[name]:.1%}" for name in ("flipped_greedy", "unstable_greedy", "worst_displaced_mass")]
        text = escape(str((row["worst_token"] or {}).get("text") or "–"))
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr>{policy(row['policy'])}{numbers}<td class='text'>{text}</td></tr>")
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
