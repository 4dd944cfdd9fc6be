"""Metrics of generations whose sums are known, and how tables show results where there is little room."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from synthetic_sums import measured

from carpool.cli.block_table import show_blocks
from carpool.cli.evaluation_table import show_results
from carpool.diffusion import Decoding
from carpool.evaluate.decoded import metrics
from carpool.evaluate.generations import FIELDS, QUARTERS, Generated
from carpool.evaluate.metrics import results

STOCK = {
    "union": 80, "layer_forwards": 20, "judge_nll": 48, "judged": 24, "same": 24, "tokens": 24, "rows": 40,
}  # fmt: skip
PLAN = {
    "union": 30, "group_union": 14, "groups": 10, "natural_union": 70, "pairs": 90, "displaced": 12, "rows": 60,
    "layer_forwards": 12, "commit_union": 6, "layer_commits": 4, "forwards": 6, "accepted": 24, "request_forwards": 16,
    "same": 18, "before": 9, "tokens": 24, "equal": 1, "requests": 4, "judge_nll": 26, "judged": 12, "repeated": 3,
    "grams": 15, "followed_same": 20, "followed": 25,
}  # fmt: skip


def generated(sums: dict[str, float], batches: int = 2) -> Generated:
    """Batches that differ in size alone."""
    sizes_M = np.arange(1.0, batches + 1)
    by_masked = np.zeros((QUARTERS + 1, 2))
    by_masked[0], by_masked[-1] = (6, 4), (8, 2)
    return Generated(None, 2, {name: sums.get(name, 0) * sizes_M for name in FIELDS}, by_masked, [])


def test_every_metric_of_a_generation_is_its_sum_over_what_it_is_of() -> None:
    stock, found = metrics([generated(STOCK), generated(PLAN)])
    assert found.union.value == pytest.approx(30 / 12)
    assert found.union_share.value == pytest.approx((30 / 12) / (80 / 20)), "a forward against one of stock's"
    assert found.union_of_group.value == pytest.approx(1.4)
    assert found.union_with_commits == pytest.approx(36 / 16)
    assert found.natural_union == pytest.approx(70 / 12)
    assert found.pairs == pytest.approx(1.5)
    assert found.displaced_mass.value == pytest.approx(0.2)
    assert found.tokens_per_forward.value == pytest.approx(1.5)
    assert found.forwards == pytest.approx(9), "6 of one batch and 12 of the other"
    assert found.agreement.value == pytest.approx(0.75)
    assert found.agreed_prefix.value == pytest.approx(9 / 24)
    assert found.equal == pytest.approx(0.25)
    assert found.followed_agreement is not None
    assert found.followed_agreement.value == pytest.approx(0.8)
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(np.exp(26 / 12))
    assert found.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(np.exp(26 / 12 - 48 / 24)), "a token of the text, judged alike"
    assert found.repeated == pytest.approx(0.2)
    assert found.union_by_masked == [1.5, None, None, None, 4.0]
    assert stock.followed_agreement is None
    assert stock.perplexity_ratio is not None
    assert stock.perplexity_ratio.value == pytest.approx(1.0)


def test_without_a_judge_there_is_no_perplexity() -> None:
    silent = {name: value for name, value in PLAN.items() if not name.startswith("judge")}
    _, found = metrics([generated(STOCK), generated(silent)])
    assert (found.perplexity, found.perplexity_ratio) == (None, None)


def shown(show: Callable[[Console, Any], None], found: Any, width: int) -> tuple[str, list[str]]:
    """What a terminal shows, and the words of the table's last line."""
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    show(console, [found])
    text = console.export_text()
    return text, next(line for line in text.splitlines() if line.startswith("xshare")).split()


def test_narrow_tables_leave_out_details_and_nothing_else() -> None:
    found = results([measured(), measured("xshare(budget=2)", 0.5, 0.03, 0.02, coreset=2.0, pairs=7.0, displaced=1.2)])
    (wide, all_words), (narrow, words) = (shown(show_results, found, width) for width in (140, 80))
    assert words == ["xshare(budget=2)", "4.0", "50%", "1.75", "30.0%", "0.0300", "75.0%", "1.0202"]
    assert set(all_words) - set(words) == {"2.0", "7.54", f"{found[1].kl.low:.4f}–{found[1].kl.high:.4f}", "–"}
    assert wide.count("95 %:") == 2
    assert "95 %:" not in narrow
    assert "batch 4, grouped by batch, 12 batches" in narrow


def test_narrow_tables_of_block_diffusion_leave_out_details_and_nothing_else() -> None:
    made = results([measured(), measured("xshare(budget=2)", 0.5, 0.03, 0.02)])
    settings = SimpleNamespace(decoding=Decoding(4, 63, threshold=0.5), grouping="request")
    rows: list[Any] = [
        SimpleNamespace(settings=settings, name=one.measured.name, plan=one.measured.plan, denoised=one, decoded=two)
        for one, two in zip(made, metrics([generated(STOCK, 12), generated(PLAN, 12)]), strict=True)
    ]
    wide, narrow = (shown(show_blocks, rows, width) for width in (170, 130))
    cells = ["2.5", "62%", "1.50", "20.0%", "1.50", "75.0%", "80.0%", "1.181", "0.0300", "75.0%", "1.020"]
    assert narrow[1] == ["xshare(budget=2)", *cells]
    assert set(wide[1]) - set(narrow[1]) == {"–", f"{made[1].kl.low:.4f}–{made[1].kl.high:.4f}"}
    assert (wide[0].count("95 %:"), narrow[0].count("95 %:")) == (2, 0)
