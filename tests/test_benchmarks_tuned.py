"""`benchmarks/tuned.py`: tuned files on the batches of a grid, on a tiny model; and what the page says of them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lockstep_tools import NumberTokenizer, small_model, write_texts
from test_benchmarks_vllm import script

from carpool import parse
from carpool.artefacts.texts import load_texts
from carpool.cli.common import model_facts
from carpool.errors import CarpoolError
from carpool.evaluate.intervals import Estimate
from carpool.evaluate.layout import Layout
from carpool.evaluate.measure import measure
from carpool.evaluate.results import text_facts
from carpool.evaluate.sequences import draw
from carpool.evaluate.study import describe
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Grouping

ROOT = Path(__file__).parent.parent
HEAD = {"target": {"max_kl": 0.2}, "batch": 4, "group": "batch", "sequence": 9, "prefill": 3}


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Path, Path]:
    """The script, a grid of two settings that it compares with, and a tuned file."""
    tuned, model, paths = script("tuned", monkeypatch), small_model(), write_texts(tmp_path)
    monkeypatch.setattr(tuned, "load", lambda *given: (model, NumberTokenizer(), None))
    monkeypatch.setattr(tuned, "embedded_texts", lambda: paths)
    layout = Layout(4, 9, 3, Grouping.parse("batch"))
    sequences = draw(load_texts(paths), NumberTokenizer(), count=8, batches=2, length=9, seed=5)
    found = measure(model, describe(model), [parse("xshare(3)"), parse("xshare(6)")], sequences, layout, 2)
    rows = [tuned.sums(label, one) for label, one in zip(("stock", "xshare", "xshare"), found, strict=True)]
    grid = {
        "model": model_facts(model, None), "texts": text_facts(paths), "settings": {"sequence": 9, "prefill": 3},
        "cells": [{"batch": 4, "domain": "all", "seed": 5, "layout": asdict(layout), "rows": rows}],
    }  # fmt: skip
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    point = {"text": "unseen", "policy": "xshare(budget=3)", "layers": {"1": {"budget": 6}}, "kl": 0.1}
    made = PolicyFile(parse("xshare(3)"), {1: {"budget": 6}}, {}, None, (HEAD, point))
    made.save(tmp_path / "policy.json")
    return tuned, tmp_path / "grid.json", tmp_path / "policy.json"


def run(tuned: ModuleType, monkeypatch: pytest.MonkeyPatch, grid: Path, policy: Path) -> Any:
    out = grid.with_name("out.json")
    monkeypatch.setattr(sys, "argv", ["tuned.py", str(policy), "--grid", str(grid), "--output", str(out)])
    tuned.main()
    return json.loads(out.read_text())


def test_the_same_batches(benchmark: tuple[ModuleType, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, grid, policy = benchmark
    content = run(tuned, monkeypatch, grid, policy)
    (cell,), (known,) = content["cells"], json.loads(grid.read_text())["cells"]
    assert cell["rows"][0] == known["rows"][0]
    mine = cell["rows"][1]
    # between its two budgets in what it reads, as each is one layer's
    assert sum(known["rows"][1]["union"]) < sum(mine["union"]) < sum(known["rows"][2]["union"])
    assert content["files"][0]["claimed"]["kl"] == 0.1
    assert content["files"][0]["target"] == {"max_kl": 0.2}
    changed = json.loads(grid.read_text())
    changed["cells"][0]["rows"][0]["union"][0] += 1
    grid.write_text(json.dumps(changed))
    with pytest.raises(CarpoolError, match="the batches differ"):
        run(tuned, monkeypatch, grid, policy)


def test_other_files_are_refused(benchmark: tuple[ModuleType, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, grid, policy = benchmark
    for head, message in (
        (HEAD | {"sequence": 10}, "was not tuned for the grid's batches"),
        (HEAD | {"batch": 8}, r"no cell for batch \[8\]"),
    ):
        PolicyFile(parse("xshare(3)"), {}, {}, None, (head,)).save(policy)
        with pytest.raises(CarpoolError, match=message):
            run(tuned, monkeypatch, grid, policy)


def test_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from generators.tuned import interpolated, rival

    def setting(kl: float, read: float) -> dict[str, Any]:
        return {"kl": Estimate(kl), "bytes": Estimate(read), "perplexity": Estimate(1 + kl), "policy": f"{kl}"}

    own, settings = setting(0.02, 0.5), [setting(0.01, 0.7), setting(0.019, 0.6), setting(0.1, 0.3), setting(0.3, 0.2)]
    assert rival({"max_kl": 0.02}, own, settings) == settings[1]
    assert rival({"max_perplexity_ratio": 1.015}, own, settings) == settings[0]
    assert rival({"max_kl": 0.001}, own, settings) is None
    assert rival({"bytes": 0.4}, own, settings) == settings[2]
    # halfway between the logarithms of two settings, and nothing beyond the ends
    between = interpolated((0.019 * 0.1) ** 0.5, [settings, [setting(0.5, 0.1)]])
    assert between == pytest.approx(0.45)
    assert interpolated(0.001, [settings]) is None
