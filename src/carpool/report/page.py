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
from carpool.report import sections
from carpool.report.bandwidth import bandwidth_section, sizes_of
from carpool.report.depth import depth_section
from carpool.report.layout import section
from carpool.report.load import BLOCKS, Evaluation, Interference
from carpool.report.neighbours import neighbours
from carpool.report.neighbours import table as neighbours_table

PARTS = {True: "Block diffusion", False: "Decoding step by step"}
FEW = 3  # batch sizes that the header names one by one


def page(
    evaluations: Sequence[Evaluation],
    interferences: Sequence[Interference] = (),
    *,
    like: Diagnosis | None = None,
    bandwidth: float = 1000.0,
    extra: Sequence[str] = (),
) -> str:
    """The whole report.

    Args:
        evaluations: what to show; of either way of decoding the first one is shown in full, others beside it.
        interferences: what neighbours change, a section each.
        like: the model whose sizes the section on bandwidth begins with; None is the evaluated model where the results
            say them, else Qwen3-30B-A3B in bf16.
        bandwidth: memory bandwidth to begin with, GB/s.
        extra: sections to show after the others.

    Raises:
        CarpoolError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise CarpoolError("a report needs plotly: pip install 'carpool[report]'") from None
    first = evaluations[0]
    kinds = dict.fromkeys(one.facts["kind"] for one in evaluations)
    parts = [
        part
        for kind in kinds
        for part in _part([one for one in evaluations if one.facts["kind"] == kind], like, bandwidth, len(kinds) > 1)
    ]
    parts += [*(_neighbours(one) for one in interferences), *extra]
    parts.append(_provenance([*evaluations, *interferences]))
    return Template(_asset("page.html")).substitute(
        title=escape(f"Carpool report: {', '.join(one.label for one in evaluations)}"),
        style=_asset("page.css"),
        plotly=get_plotlyjs(),
        headline=escape(_headline(first)),
        facts=_facts(first) if len(kinds) == 1 else "",
        sections="\n".join(parts),
        script="\n".join((_asset("figures.js"), _asset("page.js"))),
    )


def _asset(name: str) -> str:
    return files("carpool.report").joinpath(name).read_text(encoding="utf-8")


def _part(evaluations: Sequence[Evaluation], like: Diagnosis | None, bandwidth: float, named: bool) -> list[str]:
    """All sections of one way of decoding; under a heading where there are two."""
    first = evaluations[0]
    blocks = first.facts["kind"] == BLOCKS
    heading = f"<h1 class='part'>{PARTS[blocks]}</h1><dl>{_facts(first)}</dl>" if named else ""
    made = [
        heading,
        sections.frontiers(evaluations),
        sections.decoding(first) if blocks else "",
        depth_section(first, sizes_of(first, like), sections.shown_first(first)),
        bandwidth_section(first, like, bandwidth, sections.shown_first(first)),
        *sections.layers_and_tokens(first),
        sections.results(first),
        sections.side_by_side(evaluations),
    ]
    return [one for one in made if one]


def _headline(evaluation: Evaluation) -> str:
    said = evaluation.facts.get("findings")
    if said:
        return str(said[0])
    batch = sections.shown_first(evaluation)
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
    items = [
        ("model", f"{model.get('name', '?')} ({model.get('architecture', '?')})"),
        ("experts", f"{model.get('experts', '?')} in each of {model.get('layers', '?')} layers, "
                    f"{model.get('top_k', '?')} a token"),
        (f"{counted} tokens", _by_batch(evaluation, f"{counted}_tokens")),
        ("batches", _by_batch(evaluation, "batches")),
        ("texts", ", ".join(text["name"] for text in facts.get("texts", [])) or "?"),
        ("seed", facts.get("seed", "?")),
    ]  # fmt: skip
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in items)


def _by_batch(evaluation: Evaluation, name: str) -> str:
    """A count at every batch size: one number where they are the same, a range where they are many."""
    found = {batch: evaluation.stock(batch).data.get(name) for batch in evaluation.batches}
    counts = [int(count) for count in found.values() if count is not None]
    if len(counts) < len(found):
        return "?"
    if len(set(counts)) == 1:
        return f"{counts[0]:,}" + (" at every batch size" if len(counts) > 1 else "")
    if len(counts) > FEW:
        return f"{min(counts):,} to {max(counts):,} a batch size"
    return ", ".join(f"{count:,} at batch {batch}" for batch, count in found.items())


def _neighbours(found: Interference) -> str:
    note = (
        "The same sequences beside other neighbours. KL: stock against policy; between: one set of neighbours against "
        "the next; flipped: tokens whose likeliest next token is not stock's; unstable: whose likeliest next token "
        "depends on the neighbours; displaced: the largest share of a token's native weight that is not computed."
    )
    return section("What neighbours change", note, neighbours(found).html() + neighbours_table(found))


def _provenance(found: Sequence[Evaluation | Interference]) -> str:
    blocks = "".join(f"<h3>{escape(one.label)}</h3><pre>{_json(one.facts)}</pre>" for one in found)
    return f"<section><details><summary>Where the numbers come from</summary>{blocks}</details></section>"


def _json(facts: dict[str, Any]) -> str:
    return escape(json.dumps(facts, indent=1))
