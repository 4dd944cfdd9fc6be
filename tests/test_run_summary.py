"""What `share` takes and refuses, and how a run shows itself: in a shell, in a notebook, to a program."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

import carpool
from carpool import CarpoolError, PolicyFile, parse
from carpool.plans.counters import LayerReport
from carpool.plans.summary import Report, Summary

VOID = ("br", "img", "hr", "meta")
ROWS = LayerReport("model.layers.0.mlp", 4, 4, 100, 20, 60, 0, 200, 120, 96, 800, 0, 0, 4, 0, 12.0, 12.0)


def two_layers(**changes: Any) -> list[LayerReport]:
    from dataclasses import replace

    return [replace(ROWS, **changes), replace(ROWS, layer="model.layers.1.mlp", **changes)]


class Checked(HTMLParser):
    """Tags that are opened are closed, in order; collects the text and the styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.styles += [value or "" for name, value in attrs if name == "style"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_summary_holds_means_over_layers_and_steps() -> None:
    made = Summary.of("oea(k0=1) | floor(0.5)", "batch", two_layers(), [(1000.0, 0.0)] * 2)
    assert (made.layers, made.proved, made.steps, made.rows, made.sharing, made.changed) == (2, 2, 4, 100, 80, 60)
    assert (made.read, made.natively) == (30, 50)
    assert (made.bytes_read, made.bytes_natively) == (60_000, 100_000), "of a step through both layers"
    assert made.displaced == pytest.approx(0.15), "of the rows that may share"
    assert made.overflow == 1
    assert str(made).splitlines() == [
        "oea(k0=1) | floor(0.5), grouped by batch",
        "  experts read        30.0 of 50.0 natively in a layer and step (60%)",
        "  bytes read          60 kB of 100 kB a step (60%)",
        "  rows changed        60 of 80 that share (75%), 20 more kept their native routing",
        "  displaced mass      15.0% of a sharing row's native weight, mean",
        "  added by the floor  1.0 experts in a layer and step",
        "  proof               counters grew in 2 of 2 layers, over 4 steps",
    ]


def test_surrogates_are_bytes_too() -> None:
    made = Summary.of("surrogate(budget=8)", "batch", two_layers(surrogates=80), [(1000.0, 100.0)] * 2)
    assert (made.read, made.bytes_read) == (30, 64_000)


def test_before_anything_ran_it_says_so() -> None:
    zero = dict.fromkeys(("calls", "steps", "rows", "rows_exempt", "rows_changed", "natural_union", "union"), 0)
    made = Summary.of("oea(k0=1)", "batch", two_layers(**zero, displaced_mass=0.0), [(1.0, 0.0)] * 2)
    assert "nothing ran yet" in str(made)
    assert "width:" not in made._repr_html_().replace("max-width:", "")
    Checked(made._repr_html_())


def test_in_a_notebook_it_is_a_small_table_with_a_bar() -> None:
    made = Summary.of("<b>oea</b>", "batch", two_layers(), [(1000.0, 0.0)] * 2)
    page = Checked(made._repr_html_())
    assert "<b>oea</b>" in "".join(page.text), "a policy's name is text"
    assert "60 of 80 that share (75%), 20 more kept their native routing" in page.text
    assert any("width:60.0%" in style for style in page.styles)
    assert all("color:" not in style.replace("background", "") for style in page.styles), "text has the page's colour"


def test_a_report_prints_as_a_table() -> None:
    shown = str(Report(two_layers())).splitlines()
    assert shown[0].split() == ["layer", "steps", "rows", "changed", "experts", "read", "natively", "displaced"]
    assert shown[1].split() == ["model.layers.0.mlp", "4", "100", "60", "30.0", "50.0", "15.0%"]
    assert Report(two_layers()) == two_layers(), "it is still a list"
    Checked(Report(two_layers())._repr_html_())


def test_a_run_shows_itself() -> None:
    model = tiny_model("qwen3_moe")
    ids = torch.arange(24).view(4, 6) + 3
    with torch.inference_mode(), carpool.share(model, "oea(k0=1)", exempt_prefill=False) as run:
        assert "nothing ran yet" in str(run)
        model(ids, use_cache=False)
    said = run.summary()
    assert said.changed == run.changed_rows() / 2 > 0
    assert said.read < said.natively
    assert said.proved == said.layers == 2
    sizes = 3 * 32 * 16 * 2  # hidden 32, intermediate 16, two bytes at most
    assert said.bytes_natively == pytest.approx(said.natively * sizes * 2)
    assert str(run) == str(said)
    assert run._repr_html_() == said._repr_html_()
    assert "model.layers.1.mlp" in str(run.report())


@pytest.mark.parametrize("form", ["text", "name", "path", "policy", "plan", "file"])
def test_a_plan_may_be_a_text_a_file_or_an_object(form: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    PolicyFile(parse("oea(k0=1)")).save(file)
    plan: Any = {
        "text": "oea(k0=1)", "name": str(file), "path": file, "policy": parse("oea(k0=1)").policy,
        "plan": parse("oea(k0=1)"), "file": PolicyFile.load(file),
    }[form]  # fmt: skip
    model = tiny_model("qwen3_moe")
    with torch.inference_mode(), carpool.share(model, plan, exempt_prefill=False) as run:
        model(torch.arange(24).view(4, 6) + 3, use_cache=False)
    assert run.changed_rows() > 0
    assert str(run).startswith("mine.json: oea(k0=1)" if form in ("name", "path", "file") else "oea(k0=1)")


@pytest.mark.parametrize(
    ("plan", "group", "message"),
    [
        ("nonsense(3)", "batch", "unknown policy or guard 'nonsense'"),
        ("oea(k0=1)", "planet", "unknown grouping"),
        ("xshare(budget=100)", "batch", "asks for 100 of 8 experts"),
        ("none.json", "batch", "cannot read the policy file none.json"),
        (Path("none"), "batch", "cannot read the policy file none"),
        (7, "batch", "a policy is a text such as"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(plan: Any, group: str, message: str) -> None:
    with pytest.raises(CarpoolError, match=message):
        carpool.share(tiny_model("qwen3_moe"), plan, group=group)


def test_errors_name_exported_things_only() -> None:
    """Words with a call or a module path in messages exist; `attach` is none of them."""
    import ast

    for file in Path(carpool.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CarpoolError":
                said = "".join(
                    one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)
                )
                assert not re.search(r"\battach\(", said), f"{file.name}: {said}"
                for name in re.findall(r"carpool\.([a-z_]+)\(", said):
                    assert name in carpool.__all__, f"{file.name}: {said}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="draws a notebook's cell in a browser")
@pytest.mark.parametrize("ground", ["white", "#111"])
def test_a_browser_draws_it(tmp_path: Path, ground: str) -> None:
    made = Summary.of("xshare(budget=12) | floor(0.5)", "batch", two_layers(), [(1000.0, 0.0)] * 2)
    text = "black" if ground == "white" else "white"
    page = tmp_path / "run.html"
    page.write_text(f'<body style="background:{ground};color:{text};font:14px sans-serif">{made._repr_html_()}')
    picture = tmp_path / "run.png"
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=700,260",
        f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    import matplotlib.image

    drawn = matplotlib.image.imread(picture)[..., :3]
    bar = (abs(drawn - [0.165, 0.616, 0.561]) < 0.02).all(-1)
    assert bar.any(), "the bar is there"
    widths = bar.sum(1)
    assert 150 < widths.max() < 260, "60 % of 24 em"
