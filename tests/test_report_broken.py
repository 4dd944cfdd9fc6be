"""Every number that a report reads is checked: a file that is broken anywhere is shown, or refused in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from report_files import ODD, blocks, broken, evaluation, interference, metric, places
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.cli.commands import app
from carpool.report.load import load
from carpool.report.page import page

FILES = {"evaluation": evaluation, "blocks": blocks, "interference": interference}


def shown(folder: Path, content: dict[str, Any]) -> str:
    """The page of one file, beside a whole evaluation where one is needed."""
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    paths = [path]
    if content.get("kind") == "carpool interference":
        paths.insert(0, folder / "whole.json")
        paths[0].write_text(json.dumps(evaluation()))
    return page(*load(paths))


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_shown(name: str, tmp_path: Path) -> None:
    assert "oea(k0=1)" in shown(tmp_path, FILES[name]())


def refused(folder: Path, content: dict[str, Any]) -> bool:
    """Whether a file is refused, in one sentence that names it."""
    try:
        shown(folder, content)
    except CarpoolError as error:
        message = str(error)
    else:
        return False
    assert "results.json" in message
    assert "\n" not in message
    return True


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly's own code takes time and cannot break."""
    import plotly.offline

    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "")


CASES = {name: [(at, change) for at in places(make()) for change in (*ODD, KeyError)] for name, make in FILES.items()}


@pytest.mark.usefixtures("without_libraries")
@pytest.mark.parametrize("name", FILES)
def test_what_is_broken_somewhere_is_one_sentence(name: str, tmp_path: Path) -> None:
    found = [refused(tmp_path, broken(FILES[name](), *case)) for case in random.Random(0).sample(CASES[name], 60)]
    assert 30 < sum(found) < 60


@pytest.mark.slow
@pytest.mark.usefixtures("without_libraries")
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_broken_is_one_sentence(name: str, tmp_path: Path) -> None:
    for case in CASES[name]:
        refused(tmp_path, broken(FILES[name](), *case))


@pytest.mark.parametrize(
    ("at", "change", "said"),
    [
        ((1, "kl", "value"), -0.5, "'value' of 'kl' of oea(k0=1) at batch 4 is -0.5, not a number from 0 on"),
        ((1, "kl"), None, "'kl' of oea(k0=1) at batch 4 is None, not a number from 0 on"),
        ((1, "kl"), KeyError, "lacks 'kl' of oea(k0=1) at batch 4"),
        ((1, "kl"), "0.1", "'kl' of oea(k0=1) at batch 4 is '0.1', not a number from 0 on"),
        ((2, "kl"), {**metric(0.1), "low": 0.2}, "not an interval that holds its value"),
        ((2, "kl"), {"value": 0.1, "low": 0.12, "high": 0.09}, "not an interval that holds its value"),
        ((2, "kl", "low"), None, "'kl' of topk(k=1) at batch 4 is None, not a number"),
        ((1, "displaced_mass", "value"), 1.5, "is 1.5, not a number from 0 to 1"),
        ((1, "union_by_layer"), [2.5], "'union_by_layer' of oea(k0=1) at batch 4 is [2.5], not a list of 2"),
        ((1, "details", "expert_use", "a"), [[5, 6, 7]], "is [[5, 6, 7]], not a list of 2"),
        ((1, "details", "expert_use", "a", 1), [5, 6], "layer 1 is [5, 6], not a list of 3"),
        ((1, "details", "expert_use", "a", 1, 2), -7, "is -7, not a number from 0 on"),
        ((1, "details", "expert_use", "a"), KeyError, "of a, b and 3 experts, as stock's"),
        ((1, "details", "displaced_histogram", 0), -1, "is -1, not a number from 0 on"),
        ((0, "batch"), 0, "'batch' of 'results' of the file is 0, not a whole number from 1 on"),
        ((1, "batch"), 8, "lacks results of stock at batch 8"),
        ((1, "policy"), "stock", "holds stock at batch 4 twice"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(at: tuple[Any, ...], change: Any, said: str, tmp_path: Path) -> None:
    path, out = tmp_path / "results.json", tmp_path / "report.html"
    path.write_text(json.dumps(broken(evaluation(), ("results", *at), change)))
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(out)])
    assert done.exit_code == 2, done.output
    assert said in done.output.replace("\n", " ")
    assert not out.exists()


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_is_refused(word: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(broken(evaluation(), ("results", 1, "kl"), "KL")).replace('"KL"', word))
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "report.html")])
    assert done.exit_code == 2, done.output
    assert "finite" in done.output


def test_stock_alone_is_no_result(tmp_path: Path) -> None:
    content = evaluation()
    with pytest.raises(CarpoolError, match="no results of a policy"):
        shown(tmp_path, content | {"results": content["results"][:1]})


def test_without_an_interval_none_is_printed(tmp_path: Path) -> None:
    bare = broken(evaluation(), ("results", 1, "kl"), {"value": 0.0213, "low": None, "high": None})
    html = shown(tmp_path, bare)
    assert "0.0213" in html
    assert "0.0213–0.0213" not in html
    assert "(0.0213" not in html


def test_few_batches_are_said_to_be_few(tmp_path: Path) -> None:
    few = {**evaluation(), "findings": None}
    assert "Bars are 95 %" in shown(tmp_path, few)
    for row in few["results"]:
        for found in row.values():
            if isinstance(found, dict) and "low" in found:
                found["low"] = found["high"] = None
    html = shown(tmp_path, few)
    assert "from too few batches to say how sure it is" in html
    assert "Too few batches were decoded for intervals" in html
    assert "Bars are 95 %" not in html
