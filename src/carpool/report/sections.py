"""The sections that show what evaluations of one way of decoding found."""

from __future__ import annotations

from collections.abc import Sequence

from carpool.report import details, figures
from carpool.report.layout import chooser, section, tabs
from carpool.report.load import BLOCKS, Evaluation
from carpool.report.tables import comparison, decoded, measurements, worst

DECODED = (
    "Prompts decoded block by block under every policy. Experts: distinct ones read in a layer and denoising forward; "
    "tokens a forward: accepted for a request; agreement: positions that hold stock's token, and the same with each "
    "block decoded after stock's text; perplexity: of the generated text under an autoregressive model, over stock's."
)
CHOSEN = "One setting of every method, the one closest to half of what stock reads."


def shown_first(evaluation: Evaluation) -> int:
    """The batch size with the most settings; of several, the largest."""
    return max(evaluation.batches, key=lambda batch: (len(evaluation.at(batch)), batch))


def frontiers(evaluations: Sequence[Evaluation]) -> str:
    """Cost over experts read, a figure a batch size."""
    panes = []
    for batch in sorted({batch for one in evaluations for batch in one.batches}):
        here = [one for one in evaluations if batch in one.batches]
        if any(row.method != "stock" for one in here for row in one.at(batch)):
            panes.append((f"batch {batch}", figures.frontier(here, batch).html()))
    sure = any(row.interval("kl") for one in evaluations for row in one.rows if row.method != "stock")
    bars = "Bars are 95 % intervals over batches" if sure else "Too few batches were decoded for intervals"
    note = (
        f"Further left reads fewer experts, lower stays closer to the model. {bars}; "
        "dotted grey lines are controls that every method has to beat. Click a name to hide it, twice to see it alone."
    )
    if evaluations[0].facts["kind"] == BLOCKS:
        note = f"On masked tokens of held-out text, denoised block by block. {note}"
    # the headline speaks of the first file
    opened = [name for name, _ in panes].index(f"batch {shown_first(evaluations[0])}")
    return section("What it saves and what it costs", note, tabs(panes, opened))


def decoding(evaluation: Evaluation) -> str:
    """What block diffusion decodes."""
    panes = [(f"batch {batch}", decoded(evaluation.at(batch))) for batch in evaluation.batches]
    return section("What is decoded", DECODED, tabs(panes, _opened(evaluation)))


def layers_and_tokens(evaluation: Evaluation) -> list[str]:
    """Where experts are read, and which tokens lose; of files that say it."""
    made = []
    for title, note, draw in (
        ("Layer by layer", CHOSEN, figures.layers),
        ("Who uses which expert", "Share of a domain's tokens that read an expert, in each layer, before and after.",
         details.expert_use),
        ("How unevenly tokens lose", "Displaced mass: the share of a token's native routing weight that is not "
         f"computed in a layer. A floor cuts the tail off. {CHOSEN}", details.displaced),
    ):  # fmt: skip
        panes = [
            (f"batch {b}", drawing.html()) for b in evaluation.batches if (drawing := draw(evaluation, b)) is not None
        ]
        if panes:
            extra = _worst(evaluation) if draw is details.displaced else ""
            made.append(section(title, note, tabs(panes, min(_opened(evaluation), len(panes) - 1)) + extra))
    return made


def results(evaluation: Evaluation) -> str:
    """Every metric."""
    panes = [(f"batch {batch}", measurements(evaluation.at(batch))) for batch in evaluation.batches]
    return section("All results", "Click a heading to sort by it.", tabs(panes, _opened(evaluation)))


def side_by_side(evaluations: Sequence[Evaluation]) -> str:
    """What several files have in common; empty for one."""
    if len(evaluations) < 2:
        return ""
    table = comparison(evaluations)
    note = "" if table else "No policy was measured at the same batch size in all files."
    return section("Side by side", note, table)


def _opened(evaluation: Evaluation) -> int:
    return evaluation.batches.index(shown_first(evaluation))


def _worst(evaluation: Evaluation) -> str:
    panes = [
        (f"{row.policy}, batch {row.batch}", table)
        for row in evaluation.rows
        if row.policy != "stock" and (table := worst(row))
    ]
    batch = shown_first(evaluation)
    first = f"{figures.representative(evaluation, batch)[0]}, batch {batch}"
    opened = next((place for place, (name, _) in enumerate(panes) if name == first), 0)
    return f"<h3>Tokens that lose most</h3>{chooser(panes, opened)}" if panes else ""
