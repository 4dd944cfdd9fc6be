"""The report in a real browser: on screens of any width nothing lies over anything else, and nothing is cut off."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import FAULTS, WIDTHS, chromium, needs_browser, opened
from report_files import blocks, evaluation, interference

from carpool.report.load import load
from carpool.report.page import page

pytestmark = [pytest.mark.slow, needs_browser]
LONG = "surrogate(budget=20) | protect([3, 7, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]) | min_batch(2) | floor(0.3)"


def bulky(content: dict[str, Any]) -> dict[str, Any]:
    """Two batch sizes, many methods, and long names of all that has a name."""
    made = copy.deepcopy(content)
    rows = made["results"]
    for name in (LONG, *(f"somebodys_own_{n}(rather_long_parameter={n})" for n in range(12))):
        rows.append(copy.deepcopy(rows[-1]) | {"policy": name})
        if "union_share" in rows[-1]:
            rows[-1]["bytes_share"] = {"value": 1 / len(rows), "low": None, "high": None}
    if "batch" in rows[0]:
        rows += [row | {"batch": 16} for row in copy.deepcopy(rows)]
        for row in rows[len(rows) // 2 :]:
            row.update({name: 7 for name in ("decoded_tokens", "masked_tokens") if name in row})
        made["texts"] = [{"name": f"a_text_of_somebody_{n}_with_a_long_name.jsonl", "sha256": "0"} for n in range(6)]
        made["findings"] = [f"{LONG.replace(' ', '')} is what a heading may have to hold"]
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ways of decoding, two files of one, and interference."""
    folder = tmp_path_factory.mktemp("report")
    other = bulky(evaluation()) | {"seed": 1}
    contents = {"results": bulky(evaluation()), "other_seed": other, "blocks": bulky(blocks()),
                "neighbours": bulky(interference())}  # fmt: skip
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    made = folder / "report.html"
    made.write_text(page(*load([folder / f"{name}.json" for name in contents])))
    return made


def test_nothing_overlaps_or_sticks_out_at_any_width(file: Path, tmp_path: Path) -> None:
    with chromium() as browser:
        for width in WIDTHS:
            with opened(browser, file, width) as shown:
                for batch in range(2):  # what tabs hide is looked at too
                    for tabs in shown.query_selector_all(".tabs"):
                        tabs.query_selector_all(":scope > nav > button")[batch].click()
                    assert shown.evaluate(FAULTS) == [], (width, batch)
                shown.screenshot(path=tmp_path / f"{width}.png", full_page=True)
                assert (tmp_path / f"{width}.png").stat().st_size > 50_000


def test_a_window_that_changes_its_width_is_followed(file: Path) -> None:
    with chromium() as browser, opened(browser, file, 1600) as shown:
        for width in (380, 1024):
            shown.set_viewport_size({"width": width, "height": 900})
            shown.wait_for_timeout(300)
            assert shown.evaluate(FAULTS) == [], width


def test_the_faults_are_found() -> None:
    """A page in which everything is wrong."""
    wrong = """
      <section style='width: 2000px; height: 60px'><h2>a</h2><div class='figure'>
        <div class='plot' style='width: 90px'><svg class='main-svg'><text x='-40' y='20'>cut off here</text>
        <text x='0' y='20'>one over</text><text x='3' y='20'>another</text></svg></div></div></section>
      <section style='margin-top: -30px'><h2>b</h2></section>"""
    with chromium() as browser:
        shown = browser.new_page(viewport={"width": 400, "height": 400})
        shown.set_content(wrong)
        found = " / ".join(shown.evaluate(FAULTS))
    for fault in ("wide", "sticks out of a", "cut off", "text. one over lies over text. another", "SECTION. b"):
        assert fault in found, fault


def test_what_a_reader_may_change(file: Path) -> None:
    with chromium() as browser, opened(browser, file, 1024) as shown:
        figure = shown.query_selector(".figure:has(.js-plotly-plot)")
        title = "() => document.querySelector('.js-plotly-plot').layout.yaxis.title.text"
        assert shown.evaluate(title).startswith("KL")
        figure.query_selector("select").select_option("displaced mass")
        assert shown.evaluate(title) == "displaced mass"
        visible = "() => document.querySelector('.js-plotly-plot').data.filter((one) => one.visible !== false).length"
        count = shown.evaluate(visible)
        names = figure.query_selector_all(".legend > button")
        assert len(names) == count > 10
        names[0].click()
        assert shown.evaluate(visible) == count - 1
        names[1].dblclick()
        assert shown.evaluate(visible) == 1
        names[1].dblclick()
        assert shown.evaluate(visible) == count
        form = shown.query_selector("form.bandwidth")
        rows = lambda: shown.query_selector("table.steps").inner_text()  # noqa: E731
        assert "stock" in rows()
        before = rows()
        form.query_selector("[name=bandwidth]").fill("500")
        assert rows() != before
        head = shown.query_selector("table.sorts th:visible")
        head.click()
        assert head.get_attribute("aria-sort") == "ascending"


def test_both_ways_of_decoding_and_their_neighbours_stand_on_one_page(file: Path) -> None:
    html = re.sub(r"<script.*?</script>", "", file.read_text(), flags=re.S)
    places = [html.index(title) for title in ("Decoding step by step", "Side by side", "Block diffusion",
                                              "What is decoded", "What neighbours change")]  # fmt: skip
    assert places == sorted(places)
    assert html.count("At your batch and bandwidth") == 2
