"""What a plan did, in a few lines: for `print` in a shell, and as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

from carpool.plans.counters import LayerReport

UNITS = ("B", "kB", "MB", "GB", "TB")


class Report(list[LayerReport]):
    """Totals of the layers; a list that prints itself as a table, a line a layer."""

    def __str__(self) -> str:
        heads = ("layer", "steps", "rows", "changed", "experts read", "natively", "displaced")
        lines = [heads, *(_cells(row) for row in self)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
        return "\n".join(
            "  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:]))).rstrip() for line in lines
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@dataclass(frozen=True)
class Summary:
    """Means over layers and steps, prompts included.

    Attributes:
        plan, group: what ran, and which rows shared.
        layers, proved: MoE layers, and those whose own counters grew.
        steps, rows, sharing, changed: engine steps; rows, those that may share, and those routed otherwise than
            natively; mean over the layers that ran.
        read, natively: distinct experts read in a layer and step, and what the same rows would have read.
        bytes_read, bytes_natively: of a step through all layers, surrogates included; None where sizes are unknown.
        displaced: share of a sharing row's native weight that was not computed, mean. overflow: experts that a floor
            added in a layer and step.
    """

    plan: str
    group: str
    layers: int
    proved: int
    steps: float
    rows: float
    sharing: float
    changed: float
    read: float
    natively: float
    bytes_read: float | None
    bytes_natively: float | None
    displaced: float
    overflow: float

    @classmethod
    def of(
        cls,
        plan: str,
        group: str,
        report: Sequence[LayerReport],
        sizes: Sequence[tuple[float, float]],
        whole: Sequence[float] | None = None,
    ) -> Summary:
        """From a run's report.

        Args:
            sizes: of every layer, bytes of an expert and of a surrogate; empty where they are unknown.
            whole: of every layer, what it has read in whole experts, where some were read with fewer bits; default: the
                union.
        """
        steps, rows = sum(row.steps for row in report), sum(row.rows for row in report)
        sharing = rows - sum(row.rows_exempt for row in report)
        ran = max(sum(row.calls > 0 for row in report), 1)
        sums = {name: sum(getattr(row, name) for row in report) for name in ("union", "natural_union", "rows_changed")}
        per_layer = max(steps, 1)
        now = natively = None
        if sizes:
            read = sum(
                experts * expert + row.surrogates * surrogate
                for row, experts, (expert, surrogate) in zip(
                    report, whole or [row.union for row in report], sizes, strict=True
                )
            )
            stock = sum(row.natural_union * expert for row, (expert, _) in zip(report, sizes, strict=True))
            now, natively = read * ran / per_layer, stock * ran / per_layer
        return cls(
            plan, group, len(report), sum(row.calls > 0 for row in report), steps / ran, rows / ran, sharing / ran,
            sums["rows_changed"] / ran, sums["union"] / per_layer, sums["natural_union"] / per_layer, now, natively,
            sum(row.displaced_mass for row in report) / max(sharing, 1),
            sum(row.floor_overflow for row in report) / per_layer,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What is shown, a head and a text each."""
        if not self.proved:
            return [("nothing ran yet", f"{self.layers} MoE layers wait for a forward of the model inside the block")]
        found = [("experts read", f"{self.read:.1f} of {self.natively:.1f} natively in a layer and step{self._left}")]
        if self.bytes_read is not None and self.bytes_natively:
            share = f" ({self.bytes_read / self.bytes_natively:.0%})"
            found.append(("bytes read", f"{_size(self.bytes_read)} of {_size(self.bytes_natively)} a step{share}"))
        changed = f" ({self.changed / self.sharing:.0%})" if self.sharing else ""
        kept = f", {self.rows - self.sharing:,.0f} more kept their native routing" if self.sharing < self.rows else ""
        found.append(("rows changed", f"{self.changed:,.0f} of {self.sharing:,.0f} that share{changed}{kept}"))
        found.append(("displaced mass", f"{self.displaced:.1%} of a sharing row's native weight, mean"))
        if self.overflow:
            found.append(("added by the floor", f"{self.overflow:.1f} experts in a layer and step"))
        proof = f"counters grew in {self.proved} of {self.layers} layers, over {self.steps:,.0f} steps"
        return [*found, ("proof", proof)]

    @property
    def _left(self) -> str:
        return f" ({self.read / self.natively:.0%})" if self.natively else ""

    def __str__(self) -> str:
        width = max(len(head) for head, _ in self.lines)
        body = "\n".join(f"  {head.ljust(width)}  {text}" for head, text in self.lines)
        return f"{self.plan}, grouped by {self.group}\n{body}"

    def _repr_html_(self) -> str:
        """The same with a bar of what is read; colours of the page, dark or light."""
        share = self.read / self.natively if self.natively else 1.0
        if self.bytes_read is not None and self.bytes_natively:
            share = self.bytes_read / self.bytes_natively
        bar = (
            f'<div role="img" aria-label="reads {share:.0%} of stock" style="max-width:24em;height:.6em;margin:.4em 0;'
            'border-radius:.3em;background:rgba(128,128,128,.3)"><div style="height:100%;border-radius:.3em;'
            f'background:#2a9d8f;width:{100 * min(share, 1):.1f}%"></div></div>'
        )
        cell = 'style="text-align:left;padding:.1em 1em .1em 0"'
        head_cell = cell.replace("left;", "left;white-space:nowrap;")
        rows = "".join(
            f"<tr><th {head_cell}>{escape(head)}</th><td {cell}>{escape(text)}</td></tr>" for head, text in self.lines
        )
        title = f"<strong><code>{escape(self.plan)}</code></strong>, grouped by {escape(self.group)}"
        return f'<div class="carpool-run">{title}{bar if self.proved else ""}<table>{rows}</table></div>'


def _cells(row: LayerReport) -> tuple[str, ...]:
    steps, sharing = max(row.steps, 1), row.rows - row.rows_exempt
    return (
        row.layer, f"{row.steps:,}", f"{row.rows:,}", f"{row.rows_changed:,}", f"{row.union / steps:.1f}",
        f"{row.natural_union / steps:.1f}", f"{row.displaced_mass / max(sharing, 1):.1%}",
    )  # fmt: skip


def _size(count: float) -> str:
    place = 0
    while count >= 1000 and place < len(UNITS) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.3g} {UNITS[place]}"
