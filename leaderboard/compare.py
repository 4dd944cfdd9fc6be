"""Compares methods at equal bytes read, from the sums that `run.py` kept.

At each share of stock's bytes a method's log KL is interpolated between its settings; intervals are Student's t over
whole batches, the same ones for every method (`carpool.evaluate.intervals`). A method without settings on both sides of
a share has no value there; with fewer batches than an interval needs there is no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carpool.evaluate.equal_bytes import Points
from carpool.evaluate.intervals import Array, interval

OURS = "ours"
FEW = "too few batches"
Ratio = tuple[float, float | None, float | None]
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Cell:
    """A batch size, a domain and a share of stock's bytes.

    Attributes:
        kl: by method, nats per token; None where a method does not reach.
        best: the best published method. ratio: our KL over its, with its interval; None where either is missing.
        over: by method and control, the method's KL over the control's with its interval, where both reach.
    """

    batch: int
    domain: str
    share: float
    kl: dict[str, float | None]
    best: str | None
    ratio: Ratio | None
    over: dict[str, dict[str, Ratio]]

    @property
    def verdict(self) -> str:
        """`win`, `tie`, `loss` by the interval; `FEW` where there is none, `n/a` where a method does not reach."""
        if self.ratio is None:
            return "n/a"
        _, low, high = self.ratio
        if low is None or high is None:
            return FEW
        return "win" if high < 1 else "loss" if low > 1 else "tie"

    def beaten_by(self, method: str) -> list[str]:
        """Controls whose KL is below a method's, by the interval."""
        return [name for name, (_, low, _) in self.over.get(method, {}).items() if low is not None and low > 1]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def pooled(content: dict[str, Any], batch: int, domain: str) -> dict[str, list[dict[str, Array]]]:
    """Sums by batch of every setting, by label. Batches of several seeds hold the same documents: they count as one."""
    seeds = [cell for cell in content["cells"] if (cell["batch"], cell["domain"]) == (batch, domain)]
    found: dict[str, list[dict[str, Array]]] = {}
    for same in zip(*(cell["rows"] for cell in seeds), strict=True):
        names = ("bytes", "union", "pairs", "kl", "nll", "tokens", "agree")
        joined = {name: np.concatenate([np.array(row[name], dtype=float) for row in same]) for name in names}
        joined = joined if len(same) == 1 else {name: sums_M.sum(keepdims=True) for name, sums_M in joined.items()}
        facts: dict[str, Any] = {"policy": same[0]["policy"], "changed_rows": sum(row["changed_rows"] for row in same)}
        found.setdefault(same[0]["label"], []).append(joined | facts)
    return found


def curves(content: dict[str, Any], batch: int, domain: str) -> dict[str, list[dict[str, Array]]]:
    """Stock and every method's settings, but for those that changed no row: they are stock, and no point of a curve."""
    rows = pooled(content, batch, domain)
    acting = {label: [one for one in own if one["changed_rows"] or label == "stock"] for label, own in rows.items()}
    return {label: own for label, own in acting.items() if own}


def points(settings: Iterable[dict[str, Array]], stock: dict[str, Array]) -> Points:
    """The settings of a method at the bytes that they read."""
    return Points.of([(one["bytes"], one["kl"], one["tokens"]) for one in settings], stock["bytes"])


def versus(one: Points, other: Points, share: float) -> Ratio:
    """KL of one method over another's at a share, with its interval if there are batches enough for one."""
    log_ratio_K = one.at(share) - other.at(share)
    low, high = interval(log_ratio_K)
    value = float(np.exp(log_ratio_K[0]))
    return (value, None, None) if low is None or high is None else (value, float(np.exp(low)), float(np.exp(high)))


def variants_table(content: dict[str, Any], batch: int, shares: tuple[float, ...]) -> str:
    """Markdown: the KL of every series over ours at equal bytes; `n/a` where one of them does not reach."""
    rows = curves(content, batch, "all")
    (stock,) = rows.pop("stock")
    lines = [
        "| | " + " | ".join(f"{share:.0%} of the bytes" for share in shares) + " |",
        "|---" + "|--:" * len(shares) + "|",
    ]
    found = {label: points(own, stock) for label, own in rows.items()}
    for label, own in found.items():
        parts = []
        for share in shares:
            both = own.holds(share) and found[OURS].holds(share)
            parts.append(shown(versus(own, found[OURS], share)) if both else "n/a")
        lines.append(f"| {label} | " + " | ".join(parts if label != OURS else ["1"] * len(shares)) + " |")
    return "\n".join(lines) + "\n"


def cells(content: dict[str, Any]) -> list[Cell]:
    """Every batch size, domain and share of an experiment."""
    controls = [series["label"] for series in content["settings"]["series"] if series.get("control")]
    found = []
    for batch, domain in dict.fromkeys((cell["batch"], cell["domain"]) for cell in content["cells"]):
        rows = curves(content, batch, domain)
        (stock,) = rows.pop("stock")
        methods = {label: points(own, stock) for label, own in rows.items()}
        for share in SHARES:
            kl = {
                label: float(np.exp(own.at(share)[0])) if own.holds(share) else None for label, own in methods.items()
            }
            published = {
                label: value for label, value in kl.items() if value is not None and label not in (OURS, *controls)
            }
            best = min(published, key=lambda label: published[label], default=None)
            ratio = None
            if best is not None and kl.get(OURS) is not None:
                ratio = versus(methods[OURS], methods[best], share)
            reached = {label: own for label, own in methods.items() if kl[label] is not None}
            over = {
                label: {name: versus(own, reached[name], share) for name in controls if name in reached}
                for label, own in reached.items()
                if label not in controls
            }
            found.append(Cell(batch, domain, share, kl, best, ratio, over))
    return found


def shown(ratio: Ratio) -> str:
    value, low, high = ratio
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def summary(found: list[Cell]) -> str:
    """Markdown: verdicts and ratios by batch size and text, all of them in the last line."""
    lines = [
        f"| batch | text | cells | n/a | {FEW} | win | tie | loss | lower KL | half the KL | ratio, geometric mean |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups = dict.fromkeys((cell.batch, cell.domain) for cell in found)
    for group in [*groups, None]:
        own = [cell for cell in found if group in (None, (cell.batch, cell.domain))]
        ratios = [cell.ratio[0] for cell in own if cell.ratio is not None]
        verdicts = [cell.verdict for cell in own]
        counts = [len(own), *(verdicts.count(verdict) for verdict in ("n/a", FEW, "win", "tie", "loss"))]
        if not ratios:
            shares = ["n/a"] * 3
        else:
            below = [sum(ratio < limit for ratio in ratios) / len(ratios) for limit in (1, 0.5)]
            shares = [*(f"{share:.0%}" for share in below), f"{np.exp(np.mean(np.log(ratios))):.2f}"]
        named = ["**all**", ""] if group is None else [str(group[0]), group[1]]
        lines.append("| " + " | ".join([*named, *map(str, counts), *shares]) + " |")
    return "\n".join(lines) + "\n"


def controls_table(found: list[Cell]) -> str:
    """Markdown: each method's KL over every control's at equal bytes."""
    methods = list(dict.fromkeys(name for cell in found for name in cell.kl if any(name in one.over for one in found)))
    controls = list(dict.fromkeys(name for cell in found for own in cell.over.values() for name in own))
    lines = ["| method | " + " | ".join(f"over {name}" for name in controls) + " |", "|---" * (1 + len(controls)) + "|"]
    for method in methods:
        parts = []
        for control in controls:
            ratios = [cell.over[method][control] for cell in found if control in cell.over.get(method, {})]
            lost = sum(control in cell.beaten_by(method) for cell in found)
            mean = "n/a" if not ratios else f"{np.exp(np.mean(np.log([value for value, *_ in ratios]))):.2f}"
            few = bool(ratios) and all(low is None for _, low, _ in ratios)
            verdict = FEW if few else f"**loses in {lost}**" if lost else "loses in none"
            parts.append(f"{mean} ({len(ratios)} cells, {verdict})" if ratios else mean)
        lines.append(f"| {method} | " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def table(found: list[Cell]) -> str:
    """Markdown: our KL beside the best published one at equal bytes."""
    lines = [
        "| batch | text | bytes, of stock | KL, ours | KL, best published | ratio | |",
        "|--:|---|--:|--:|--:|--:|---|",
    ]
    for cell in found:
        ours, best = cell.kl.get(OURS), None if cell.best is None else cell.kl[cell.best]
        parts = [
            str(cell.batch), cell.domain, f"{cell.share:.0%}",
            "n/a" if ours is None else f"{ours:.4f}",
            "n/a" if best is None else f"{best:.4f} ({cell.best})",
            "n/a" if cell.ratio is None else shown(cell.ratio),
            cell.verdict,
        ]  # fmt: skip
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def settings_table(content: dict[str, Any], batch: int, domain: str = "all") -> str:
    """Markdown: every setting of an experiment as it was measured."""
    rows = pooled(content, batch, domain)
    (stock,) = rows.pop("stock")
    lines = [
        "| | setting | experts read | bytes, of stock | pairs a token | KL, nats/token | perplexity ratio |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    steps = stock["tokens"].sum() / batch * content["model"]["layers"]
    for label, settings in rows.items():
        for one in settings:
            shares = f"{one['union'].sum() / steps:.1f} | {one['bytes'].sum() / stock['bytes'].sum():.0%}"
            shares += f" | {one['pairs'].sum() / steps / batch:.1f}"
            kl, nll = one["kl"].sum() / one["tokens"].sum(), (one["nll"] - stock["nll"]).sum() / one["tokens"].sum()
            lines.append(f"| {label} | `{one['policy']}` | {shares} | {kl:.5f} | {np.exp(nll):.4f} |")
    return "\n".join(lines) + "\n"


def page(content: dict[str, Any]) -> str:
    """Markdown: all tables of an experiment; settings by themselves only where domains are mixed."""
    parts = []
    if any(series["label"] == OURS for series in content["settings"]["series"]):
        found = cells(content)
        parts += [summary(found), table(found), controls_table(found)]
    mixed = dict.fromkeys(cell["batch"] for cell in content["cells"] if cell["domain"] == "all")
    return "\n".join([*parts, *(settings_table(content, batch) for batch in mixed)])


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        print(page(load(Path(name))))
