"""`carpool evaluate --interference` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lockstep_tools import NumberTokenizer, opening, small_model, write_texts
from typer.testing import CliRunner

from carpool import CarpoolError, parse
from carpool.cli.commands import app
from carpool.evaluate.interference import EDGES, Spread, interference
from carpool.evaluate.layout import Layout
from carpool.evaluate.sequences import Sequences
from carpool.evaluate.study import describe
from carpool.routing.batch import Grouping

POLICIES = ("xshare(budget=3)", "xshare(budget=3) | floor(0.2)", "topk(k=1)", "xshare(budget=8)")
SMALL = ["--batch", "4", "--batches", "2", "--sequence", "9", "--prefill", "3", "--co-batches", "3"]


def measured(
    rows: int = 4, count: int = 8, deals: int = 4, group: str = "batch", policies: tuple[str, ...] = POLICIES
) -> Any:
    model = small_model()
    ids_ST = torch.randint(2, 64, (count, 10), generator=torch.Generator().manual_seed(1))
    sequences = Sequences(ids_ST, torch.zeros(count, dtype=torch.int64), ("text",))
    layout = Layout(rows, 9, 3, Grouping.parse(group))
    return interference(model, describe(model), [parse(text) for text in policies], sequences, layout, deals)


def test_neighbours_matter_under_group_policies_alone() -> None:
    stock, shared, floored, token, identity = measured()
    for quiet in (stock, token, identity):
        assert quiet.between.quantiles_Q[-1] < 1e-6
        assert quiet.unstable == quiet.sequences_unstable == 0
    assert stock.loss.quantiles_Q[-1] < 1e-6
    assert stock.flipped == stock.displaced == 0
    assert shared.between.quantiles_Q[-1] > 1e-4
    assert shared.unstable > 0
    assert shared.displaced > 0.2 >= floored.displaced > 0
    assert floored.loss.mean < shared.loss.mean
    assert shared.worst_kl == shared.loss.quantiles_Q[-1] > shared.worst_best_kl >= 0
    assert len(shared.worst_context) <= 9
    assert token.flipped > 0


def test_grouped_by_request_nobody_matters() -> None:
    _, shared = measured(group="request", policies=("oea(k0=1)",))
    assert shared.loss.mean > 1e-6
    assert shared.between.quantiles_Q[-1] < 1e-6
    assert shared.unstable == 0


@pytest.mark.parametrize(("rows", "count", "deals"), [(1, 8, 4), (4, 4, 4), (4, 6, 4), (4, 8, 1)])
def test_neighbours_must_be_able_to_change(rows: int, count: int, deals: int) -> None:
    with pytest.raises(CarpoolError, match="2 batches or more"):
        measured(rows, count, deals)


def test_a_spread_counts_every_value() -> None:
    values = torch.tensor([0.0, 1e-9, 2e-8, 0.5, 3.0, 1e3])
    spread = Spread.of(values)
    assert sum(spread.histogram) == 6
    assert len(spread.histogram) == len(EDGES) + 1
    assert spread.histogram[0] == 2
    assert spread.histogram[-1] == 1
    assert spread.quantiles_Q[-1] == 1e3


def test_the_command_writes_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = write_texts(tmp_path), tmp_path / "out.json"
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(small_model(), NumberTokenizer()))
    monkeypatch.setattr("carpool.cli.evaluate.embedded_texts", lambda: paths)
    arguments = ["evaluate", "--interference", "-p", POLICIES[0], "-p", POLICIES[1], *SMALL, "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "beside 3 sets of neighbours" in done.output
    content = json.loads(out.read_text())
    assert content["kind"] == "carpool interference"
    assert [row["policy"] for row in content["results"]] == ["stock", *POLICIES[:2]]
    row = content["results"][1]
    assert sum(row["kl"]["histogram"]) == row["tokens"] * row["co_batches"] == 8 * 6 * 3
    assert set(row["kl"]["quantiles"]) == {"p50", "p90", "p99", "p99.9", "p100"}
    assert row["worst_token"]["text"].split()


def test_the_report_shows_what_the_command_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, files, page = write_texts(tmp_path), [tmp_path / "costs.json", tmp_path / "beside.json"], tmp_path / "x.html"
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(small_model(), NumberTokenizer()))
    monkeypatch.setattr("carpool.cli.evaluate.embedded_texts", lambda: paths)
    for kind, file in (([], files[0]), (["--interference"], files[1])):
        settings = SMALL if kind else SMALL[:-2]
        done = CliRunner().invoke(app, ["evaluate", *kind, "-p", POLICIES[1], *settings, "--json", str(file)])
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["report", *map(str, files), "-o", str(page)])
    assert done.exit_code == 0, done.output
    shown = page.read_text().split("What neighbours change")[1]
    row = json.loads(files[1].read_text())["results"][1]
    for value in (row["kl"]["quantiles"]["p99"], row["kl_between_co_batches"]["quantiles"]["p100"]):
        assert f"<td>{value:.3g}</td>" in shown
    assert row["worst_token"]["text"] in shown


@pytest.mark.parametrize("arguments", [["--batch", "1"], ["--batch", "2,4"], ["--co-batches", "1"]])
def test_the_command_refuses(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["evaluate", "--interference", "-p", POLICIES[0], *arguments])
    assert done.exit_code == 2
    assert "give 2 or more" in done.stderr or "one batch size" in done.stderr
