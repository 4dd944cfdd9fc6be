"""Puts a report together: one HTML file without any link to a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from carpool.doctor import Diagnosis
from carpool.errors import CarpoolError
from carpool.report import figures
from carpool.report.load import Evaluation, Interference, Row
from carpool.report.neighbours import neighbours
from carpool.report.neighbours import table as neighbours_table

QWEN3_30B = (9.44, 48)  # MB of an expert in bf16, MoE layers
CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}


def page(
    evaluations: Sequence[Evaluation],
    interferences: Sequence[Interference] = (),
    *,
    like: Diagnosis | None = None,
    bandwidth: float = 1000.0,
) -> str:
    """The whole report.

    Args:
        evaluations: what to show; the first one is shown in full, others beside it.
        interferences: what neighbours change, a section each.
        like: the model whose sizes the section on bandwidth begins with; None is Qwen3-30B-A3B in bf16.
        bandwidth: memory bandwidth to begin with, GB/s.

    Raises:
        CarpoolError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise CarpoolError("a report needs plotly: pip install 'carpool[report]'") from None
    first = evaluations[0]
    sections = [*_frontiers(evaluations), *_first(first), *_comparison(evaluations)]
    sections += [_neighbours(one) for one in interferences]
    sections.append(_provenance([*evaluations, *interferences]))
    return Template(_asset("page.html")).substitute(
        title=escape(f"Carpool report: {', '.join(one.label for one in evaluations)}"),
        style=_asset("page.css"),
        plotly=get_plotlyjs(),
        headline=escape(_headline(first)),
        facts=_facts(first),
        sections="\n".join(sections),
        script=_asset("page.js"),
        data=json.dumps(_calculator(first, like, bandwidth)).replace("<", "\\u003c"),
    )


def _asset(name: str) -> str:
    return files("carpool.report").joinpath(name).read_text(encoding="utf-8")


def _headline(evaluation: Evaluation) -> str:
    said = evaluation.facts.get("findings")
    if said:
        return str(said[0])
    batch = evaluation.batches[-1]
    rows = [row for row in evaluation.at(batch) if not row.control]
    if not rows:
        return f"{len(evaluation.rows)} results at batch {', '.join(map(str, evaluation.batches))}"
    best = min(rows, key=lambda row: (abs(row.value("bytes_share") - 0.5) > 0.15, row.value("kl")))
    cost = 100 * (best.value("perplexity_ratio") - 1)
    return (
        f"{best.policy} reads {best.value('bytes_share'):.0%} of what stock reads at batch {batch}, at "
        f"a KL of {best.value('kl'):.4f} nats a token and perplexity {cost:+.1f} %."
    )


def _facts(evaluation: Evaluation) -> str:
    model, facts = evaluation.facts.get("model", {}), evaluation.facts
    tokens = max(int(row.data.get("decoded_tokens", 0)) for row in evaluation.rows)
    items = [
        ("model", f"{model.get('name', '?')} ({model.get('architecture', '?')})"),
        ("experts", f"{model.get('experts', '?')} in each of {model.get('layers', '?')} layers, "
                    f"{model.get('top_k', '?')} a token"),
        ("decoded tokens", f"{tokens:,} a batch size"),
        ("texts", ", ".join(text["name"] for text in facts.get("texts", [])) or "?"),
        ("seed", facts.get("seed", "?")),
    ]  # fmt: skip
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in items)


def _frontiers(evaluations: Sequence[Evaluation]) -> list[str]:
    batches = sorted({batch for one in evaluations for batch in one.batches})
    panes = []
    for batch in batches:
        here = [one for one in evaluations if batch in one.batches]
        if any(row.method != "stock" for one in here for row in one.at(batch)):
            panes.append((f"batch {batch}", _draw(figures.frontier(here, batch))))
    note = (
        "Further left reads fewer experts, lower stays closer to the model. Bars are 95 % intervals over batches; "
        "dotted grey lines are controls that every method has to beat. Click a name to hide it, twice to see it alone."
    )
    return [_section("What it saves and what it costs", note, _tabs(panes))]


def _first(evaluation: Evaluation) -> list[str]:
    made = [_calculator_section(evaluation)]
    for title, note, draw in (
        ("Layer by layer", "One setting of every method, the one closest to half of stock's union.", figures.layers),
        ("Who uses which expert", "Share of a domain's tokens that read an expert, before and after. Choose a policy "
         "above the right picture.", figures.expert_use),
        ("How unevenly tokens lose", "Displaced mass: the share of a token's native routing weight that is not "
         "computed. A floor cuts the tail off.", figures.displaced),
    ):  # fmt: skip
        panes = [(f"batch {b}", drawn) for b in evaluation.batches if (drawn := _draw(draw(evaluation, b)))]
        if panes:
            extra = _worst(evaluation) if draw is figures.displaced else ""
            made.append(_section(title, note, _tabs(panes) + extra))
    made.append(
        _section("All results", "", _tabs([(f"batch {b}", _table(evaluation.at(b))) for b in evaluation.batches]))
    )
    return made


def _calculator_section(evaluation: Evaluation) -> str:
    options = "".join(f"<option>{batch}</option>" for batch in evaluation.batches)
    form = (
        f'<form id="calculator"><label>batch <select name="batch">{options}</select></label>'
        '<label>one expert <input name="megabytes" type="number" min="0.01" step="any"> MB</label>'
        '<label>MoE layers <input name="layers" type="number" min="1" step="1"></label>'
        '<label>read beside them a step <input name="other" type="number" min="0" step="any"> GB</label>'
        '<label>bandwidth <input name="bandwidth" type="number" min="1" step="any"> GB/s</label></form>'
        '<table id="steps"></table>'
    )
    note = (
        "A decoding step takes at least the time to read its weights. This is that time from what was read here, "
        "for the sizes that you enter: a bound, not a measurement."
    )
    return _section("At your batch and bandwidth", note, form)


def _calculator(evaluation: Evaluation, like: Diagnosis | None, bandwidth: float) -> dict[str, Any]:
    stock = {batch: evaluation.stock(batch).value("union") for batch in evaluation.batches}
    rows = [
        {"batch": row.batch, "policy": row.policy, "control": row.control, "kl": row.value("kl"),
         "union": row.value("bytes_share") * stock[row.batch]}
        for row in evaluation.rows
    ]  # fmt: skip
    return {
        "rows": rows,
        "megabytes": QWEN3_30B[0] if like is None else like.expert_bytes / 1e6,
        "layers": QWEN3_30B[1] if like is None else like.moe_layers,
        "bandwidth": bandwidth,
    }


def _worst(evaluation: Evaluation) -> str:
    made = []
    for row in evaluation.rows:
        worst = (row.data.get("details") or {}).get("worst_rows", [])
        if row.policy == "stock" or not worst:
            continue
        lines = "".join(
            f"<tr><td>{one['displaced_mass']:.0%}</td><td>{one['kl']:.3f}</td><td>{escape(one['domain'])}</td>"
            f"<td class='text'>{escape(one['text'] or '–')}</td></tr>"
            for one in worst
        )
        head = "<tr><th>displaced</th><th>KL</th><th>domain</th><th class='text'>… up to this token</th></tr>"
        made.append(
            f"<details><summary>{escape(row.policy)}, batch {row.batch}</summary><table>{head}{lines}</table></details>"
        )
    return f"<h3>Tokens that lose most</h3>{''.join(made)}" if made else ""


def _table(rows: Sequence[Row]) -> str:
    columns = (
        "policy",
        "union",
        "of stock",
        "bytes",
        "pairs",
        "displaced",
        "KL",
        "95 %",
        "top-1",
        "ppl ratio",
        "95 %",
    )
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        f"<tr{' class=control' if row.control else ''}><td>{escape(row.policy)}</td><td>{row.value('union'):.1f}</td>"
        f"<td>{row.value('union_share'):.0%}</td><td>{row.value('bytes_share'):.0%}</td>"
        f"<td>{row.value('pairs'):.2f}</td><td>{row.value('displaced_mass'):.1%}</td>"
        f"<td>{row.value('kl'):.4f}</td><td>{_interval(row, 'kl')}</td><td>{row.value('top1_agreement'):.1%}</td>"
        f"<td>{row.value('perplexity_ratio'):.4f}</td><td>{_interval(row, 'perplexity_ratio')}</td></tr>"
        for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _interval(row: Row, name: str) -> str:
    low, high = row.ends(name)
    return "–" if low == high else f"{low:.4f}–{high:.4f}"


def _comparison(evaluations: Sequence[Evaluation]) -> list[str]:
    """The same policy at the same batch size in several files."""
    if len(evaluations) < 2:
        return []
    found = [{(row.policy, row.batch): row for row in one.rows} for one in evaluations]
    common = [key for key in found[0] if all(key in other for other in found[1:]) and key[0] != "stock"]
    if not common:
        return [_section("Side by side", "No policy was measured at the same batch size in all files.", "")]
    head = "".join(f"<th colspan=2>{escape(one.label)}</th>" for one in evaluations)
    names = "<th>of stock</th><th>KL</th>" * len(evaluations)
    body = "".join(
        f"<tr><td>{escape(policy)}</td><td>{batch}</td>"
        + "".join(
            f"<td>{rows[policy, batch].value('bytes_share'):.0%}</td><td>{rows[policy, batch].value('kl'):.4f}</td>"
            for rows in found
        )
        + "</tr>"
        for policy, batch in common
    )
    table = f"<table><thead><tr><th rowspan=2>policy</th><th rowspan=2>batch</th>{head}</tr><tr>{names}</tr></thead>"
    return [_section("Side by side", "", f"<div class='scroll'>{table}<tbody>{body}</tbody></table></div>")]


def _neighbours(found: Interference) -> str:
    note = (
        "The same sequences beside other neighbours. KL: stock against policy; between: one set of neighbours against "
        "the next; flipped: tokens whose likeliest next token is not stock's; unstable: whose likeliest next token "
        "depends on the neighbours; displaced: the largest share of a token's native weight that is not computed."
    )
    return _section("What neighbours change", note, _draw(neighbours(found)) + neighbours_table(found))


def _provenance(evaluations: Sequence[Evaluation | Interference]) -> str:
    blocks = "".join(
        f"<h3>{escape(one.label)}</h3><pre>{escape(json.dumps(one.facts, indent=1))}</pre>" for one in evaluations
    )
    return f"<section><details><summary>Where the numbers come from</summary>{blocks}</details></section>"


def _draw(figure: Any) -> str:
    if figure is None:
        return ""
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG))


def _tabs(panes: Sequence[tuple[str, str]]) -> str:
    if len(panes) == 1:
        return panes[0][1]
    buttons = "".join(f'<button type="button">{escape(name)}</button>' for name, _ in panes)
    return f'<div class="tabs"><nav>{buttons}</nav>{"".join(f"<div>{body}</div>" for _, body in panes)}</div>'


def _section(title: str, note: str, body: str) -> str:
    said = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{said}{body}</section>"
