"""The tables of a report, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from carpool.report.load import Evaluation, Row

MEASUREMENTS = (
    "policy", "experts", "of stock", "bytes, of stock", "pairs", "displaced", "expected loss", "KL", "95 %", "top-1",
    "perplexity ratio", "95 %",
)  # fmt: skip
DECODED = (
    "policy", "experts", "of stock", "tokens a forward", "95 %", "agreement", "95 %", "by block", "perplexity ratio",
)  # fmt: skip


def policy(name: str) -> str:
    """The cell of a policy's name, which a narrow screen may break before what is in brackets."""
    return f"<td class='policy'>{escape(name).replace('(', '(<wbr>')}</td>"


def measurements(rows: Sequence[Row]) -> str:
    """Every metric of every policy at one batch size."""
    return table(
        MEASUREMENTS,
        (
            (row, (
                f"{row.value('union'):.1f}", f"{row.value('union_share'):.0%}", f"{row.value('bytes_share'):.0%}",
                f"{row.value('pairs'):.2f}", f"{row.value('displaced_mass'):.1%}",
                _perhaps(row, "expected_loss", ".1%"), f"{row.value('kl'):.4f}", interval(row.interval("kl")),
                f"{row.value('top1_agreement'):.1%}",
                f"{row.value('perplexity_ratio'):.4f}", interval(row.interval("perplexity_ratio")),
            ))
            for row in rows
        ),
    )  # fmt: skip


def decoded(rows: Sequence[Row]) -> str:
    """What block diffusion decodes under every policy at one batch size."""

    return table(
        DECODED,
        (
            (row, (
                f"{made.value('union'):.1f}", f"{made.value('union_share'):.0%}",
                f"{made.value('tokens_per_forward'):.2f}", interval(made.interval("tokens_per_forward")),
                f"{made.value('agreement'):.1%}", interval(made.interval("agreement")),
                _perhaps(made, "followed_agreement", ".1%"), _perhaps(made, "perplexity_ratio", ".3f"),
            ))
            for row in rows
            for made in (row.decoded,)
        ),
    )  # fmt: skip


def worst(row: Row) -> str:
    """The tokens of a policy that lose most; empty if the file does not say."""
    found = (row.data.get("details") or {}).get("worst_rows", [])
    lines = "".join(
        f"<tr><td>{one['displaced_mass']:.0%}</td><td>{one['kl']:.3f}</td><td>{escape(one['domain'])}</td>"
        f"<td class='text'>{escape(one['text'] or '–')}</td></tr>"
        for one in found
    )
    head = "<tr><th>displaced</th><th>KL</th><th>domain</th><th class='text'>… up to this token</th></tr>"
    return f"<div class='scroll'><table>{head}{lines}</table></div>" if found else ""


def comparison(evaluations: Sequence[Evaluation]) -> str:
    """The same policy at the same batch size in several files; empty where there is none."""
    found = [{(row.policy, row.batch): row for row in one.rows} for one in evaluations]
    common = [key for key in found[0] if all(key in other for other in found[1:]) and key[0] != "stock"]
    if not common:
        return ""
    head = "".join(f"<th colspan=3>{escape(one.label)}</th>" for one in evaluations)
    names = "<th>bytes, of stock</th><th>KL</th><th>95 %</th>" * len(evaluations)
    body = "".join(
        f"<tr>{policy(name)}<td>{batch}</td>"
        + "".join(
            f"<td>{row.value('bytes_share'):.0%}</td><td>{row.value('kl'):.4f}</td><td>{interval(row.interval('kl'))}</td>"
            for row in (rows[name, batch] for rows in found)
        )
        + "</tr>"
        for name, batch in common
    )
    made = f"<table><thead><tr><th rowspan=2>policy</th><th rowspan=2>batch</th>{head}</tr><tr>{names}</tr></thead>"
    return f"<div class='scroll'>{made}<tbody>{body}</tbody></table></div>"


def table(heads: Sequence[str], lines: Iterable[tuple[Row, Sequence[str]]]) -> str:
    """A line a policy, controls dim, which a click on a heading sorts."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        f"<tr{' class=control' if row.control else ''}>{policy(row.policy)}"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for row, cells in lines
    )
    return f"<div class='scroll'><table class='sorts'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def interval(ends: tuple[float, float] | None) -> str:
    """Its ends, or a dash where there is none."""
    return "–" if ends is None or ends[0] == ends[1] else f"{ends[0]:.4f}–{ends[1]:.4f}"


def _perhaps(row: Row, name: str, form: str) -> str:
    return "–" if row.data.get(name) is None else f"{row.value(name):{form}}"
