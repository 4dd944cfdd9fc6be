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
from carpool.report import details, figures
from carpool.report.load import BLOCKS, Evaluation, Interference
from carpool.report.neighbours import neighbours
from carpool.report.neighbours import table as neighbours_table
from carpool.report.tables import comparison, decoded, measurements, worst

QWEN3_30B = (9.44, 48)  # MB of an expert in bf16, MoE layers
DECODED = (
    "Prompts decoded block by block under every policy. Experts: distinct ones read in a layer and denoising forward; "
    "tokens a forward: accepted for a request; agreement: positions that hold stock's token, and the same with each "
    "block decoded after stock's text; perplexity: of the generated text under an autoregressive model, over stock's."
)
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
    unsure = "" if best.interval("kl") else " That is from too few batches to say how sure it is."
    return (
        f"{best.policy} reads {best.value('bytes_share'):.0%} of what stock reads at batch {batch}, at "
        f"a KL of {best.value('kl'):.4f} nats a token and perplexity {cost:+.1f} %.{unsure}"
    )


def _facts(evaluation: Evaluation) -> str:
    model, facts = evaluation.facts.get("model", {}), evaluation.facts
    counted = "masked" if facts["kind"] == BLOCKS else "decoded"
    tokens = max(int(row.data.get(f"{counted}_tokens", 0)) for row in evaluation.rows)
    counts = [int(row.data["batches"]) for row in evaluation.rows if "batches" in row.data]
    items = [
        ("model", f"{model.get('name', '?')} ({model.get('architecture', '?')})"),
        ("experts", f"{model.get('experts', '?')} in each of {model.get('layers', '?')} layers, "
                    f"{model.get('top_k', '?')} a token"),
        (f"{counted} tokens", f"{tokens:,} a batch size"),
        ("batches", " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "?"),
        ("texts", ", ".join(text["name"] for text in facts.get("texts", [])) or "?"),
        ("seed", facts.get("seed", "?")),
    ]  # fmt: skip
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in items)


def _comparison(evaluations: Sequence[Evaluation]) -> list[str]:
    if len(evaluations) < 2:
        return []
    table = comparison(evaluations)
    note = "" if table else "No policy was measured at the same batch size in all files."
    return [_section("Side by side", note, table)]


def _frontiers(evaluations: Sequence[Evaluation]) -> list[str]:
    batches = sorted({batch for one in evaluations for batch in one.batches})
    panes = []
    for batch in batches:
        here = [one for one in evaluations if batch in one.batches]
        if any(row.method != "stock" for one in here for row in one.at(batch)):
            panes.append((f"batch {batch}", _draw(figures.frontier(here, batch))))
    sure = any(row.interval("kl") for one in evaluations for row in one.rows if row.method != "stock")
    bars = "Bars are 95 % intervals over batches" if sure else "Too few batches were decoded for intervals"
    note = (
        f"Further left reads fewer experts, lower stays closer to the model. {bars}; "
        "dotted grey lines are controls that every method has to beat. Click a name to hide it, twice to see it alone."
    )
    if evaluations[0].facts["kind"] == BLOCKS:
        note = f"On masked tokens of held-out text, denoised block by block. {note}"
    # the headline speaks of the first file
    opened = [name for name, _ in panes].index(f"batch {_shown_first(evaluations[0])}")
    return [_section("What it saves and what it costs", note, _tabs(panes, opened))]


def _shown_first(evaluation: Evaluation) -> int:
    """The batch size with the most settings; of several, the largest."""
    return max(evaluation.batches, key=lambda batch: (len(evaluation.at(batch)), batch))


def _first(evaluation: Evaluation) -> list[str]:
    chosen = "One setting of every method, the one closest to half of what stock reads."
    opened = evaluation.batches.index(_shown_first(evaluation))
    made = [_calculator_section(evaluation)]
    if evaluation.facts["kind"] == BLOCKS:
        panes = [(f"batch {batch}", decoded(evaluation.at(batch))) for batch in evaluation.batches]
        made.insert(0, _section("What is decoded", DECODED, _tabs(panes, opened)))
    for title, note, draw in (
        ("Layer by layer", chosen, figures.layers),
        ("Who uses which expert", "Share of a domain's tokens that read an expert, before and after. Choose a policy "
         "above the right picture.", details.expert_use),
        ("How unevenly tokens lose", "Displaced mass: the share of a token's native routing weight that is not "
         f"computed. A floor cuts the tail off. {chosen}", details.displaced),
    ):  # fmt: skip
        panes = [(f"batch {b}", drawn) for b in evaluation.batches if (drawn := _draw(draw(evaluation, b)))]
        if panes:
            extra = _worst(evaluation) if draw is details.displaced else ""
            made.append(_section(title, note, _tabs(panes, min(opened, len(panes) - 1)) + extra))
    panes = [(f"batch {batch}", measurements(evaluation.at(batch))) for batch in evaluation.batches]
    made.append(_section("All results", "Click a heading to sort by it.", _tabs(panes, opened)))
    return made


def _worst(evaluation: Evaluation) -> str:
    panes = [
        (f"{row.policy}, batch {row.batch}", table)
        for row in evaluation.rows
        if row.policy != "stock" and (table := worst(row))
    ]
    batch = _shown_first(evaluation)
    first = f"{figures.representative(evaluation, batch)[0]}, batch {batch}"
    opened = next((place for place, (name, _) in enumerate(panes) if name == first), 0)
    return f"<h3>Tokens that lose most</h3>{_chooser(panes, opened)}" if panes else ""


def _calculator_section(evaluation: Evaluation) -> str:
    options = "".join(f"<option>{batch}</option>" for batch in evaluation.batches)
    form = (
        f'<form id="calculator"><label>batch <select name="batch">{options}</select></label>'
        '<label>one expert <input name="megabytes" type="number" min="0.01" step="any"> MB</label>'
        '<label>MoE layers <input name="layers" type="number" min="1" step="1"></label>'
        '<label>read beside them a step <input name="other" type="number" min="0" step="any"> GB</label>'
        '<label>bandwidth <input name="bandwidth" type="number" min="1" step="any"> GB/s</label>'
        '<label><input name="all" type="checkbox"> all settings</label></form>'
        '<div class="scroll"><table id="steps"></table></div>'
    )
    note = (
        "A decoding step takes at least the time to read its weights. This is that time from what was read here, "
        "for the sizes that you enter: a bound, not a measurement. Shown are the settings that no other one beats in "
        "both bytes and KL."
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
        "batch": _shown_first(evaluation),
    }


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


def _tabs(panes: Sequence[tuple[str, str]], opened: int) -> str:
    if len(panes) == 1:
        return panes[0][1]
    buttons = "".join(f'<button type="button">{escape(name)}</button>' for name, _ in panes)
    bodies = "".join(f"<div>{body}</div>" for _, body in panes)
    return f'<div class="tabs" data-opened="{opened}"><nav>{buttons}</nav>{bodies}</div>'


def _chooser(panes: Sequence[tuple[str, str]], opened: int) -> str:
    options = "".join(
        f"<option{' selected' if place == opened else ''}>{escape(name)}</option>"
        for place, (name, _) in enumerate(panes)
    )
    bodies = "".join(f"<div>{body}</div>" for _, body in panes)
    return f'<div class="chooser"><select>{options}</select>{bodies}</div>'


def _section(title: str, note: str, body: str) -> str:
    said = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{said}{body}</section>"
