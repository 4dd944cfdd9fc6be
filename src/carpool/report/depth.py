"""How deep experts are read: the part of a report about policies that leave out bits."""

from __future__ import annotations

from html import escape

from carpool.report.bandwidth import Sizes
from carpool.report.layout import section, tabs
from carpool.report.load import Evaluation, Row
from carpool.report.tables import interval, table

WHOLE = 16.0  # bits of a weight that is read in full; stock's bytes are counted so
ROUNDING = 0.01  # bits
HEADS = (
    "policy", "bytes, of stock", "95 %", "experts", "bits of each", "MB a layer and step", "KL", "95 %",
    "whole experts take",
)  # fmt: skip


def bits(row: Row) -> float:
    """Bits of a weight that are read, mean over the experts that are; above 16 where surrogates are read, too."""
    experts = row.value("union_share")
    return WHOLE * row.value("bytes_share") / experts if experts else WHOLE


def is_shallow(row: Row) -> bool:
    """Whether a policy reads experts in part."""
    return bits(row) < WHOLE - ROUNDING


def depth_section(evaluation: Evaluation, sizes: Sizes, opened: int) -> str:
    """A table a batch size; empty where every policy reads experts in full.

    Args:
        sizes: of an expert in 16 bits, and whose they are.
    """
    batches = [batch for batch in evaluation.batches if any(map(is_shallow, evaluation.at(batch)))]
    if not batches:
        return ""
    note = (
        "Policies that read a part of an expert's bits. Bytes: over what stock reads in 16 bits, scales included; bits "
        "of each: mean over the experts that a layer and step reads; whole experts take: the fewest bytes with which "
        "another policy here that reads experts in full, controls excepted, loses no more, – where none does. "
        f"<strong>MB are at the sizes of {escape(sizes.whose)}.</strong>"
    )
    panes = [(f"batch {batch}", _table(evaluation, batch, sizes)) for batch in batches]
    return section("How deep experts are read", note, tabs(panes, batches.index(opened) if opened in batches else 0))


def _table(evaluation: Evaluation, batch: int, sizes: Sizes) -> str:
    rows = evaluation.at(batch)
    stock = evaluation.stock(batch)
    shallow = sorted(filter(is_shallow, rows), key=lambda row: row.value("bytes_share"))
    megabytes = stock.value("union") * sizes.expert / 1e6
    lines = []
    for row in shallow:
        whole = [
            one.value("bytes_share")
            for one in rows
            if not one.control and not is_shallow(one) and one.value("kl") <= row.value("kl")
        ]
        cells = (
            f"{row.value('bytes_share'):.1%}", _shares(row.interval("bytes_share")), f"{row.value('union'):.1f}",
            f"{bits(row):.2f}", f"{row.value('bytes_share') * megabytes:.3g}", f"{row.value('kl'):.4f}",
            interval(row.interval("kl")), f"{min(whole):.1%}" if whole else "–",
        )  # fmt: skip
        lines.append((row, cells))
    lines.append((stock, ("100%", "–", f"{stock.value('union'):.1f}", "16", f"{megabytes:.3g}", "0", "–", "")))
    return table(HEADS, lines)


def _shares(ends: tuple[float, float] | None) -> str:
    return "–" if ends is None or ends[0] == ends[1] else f"{ends[0]:.1%}–{ends[1]:.1%}"
