"""The documentation as a site: every page has its place, links have a form that can be right, the build is strict."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [
    (page.name, *found)
    for page in PAGES
    for found in re.findall(r"\[([^\]]*)\]\((\w+:[^)\s]*)", page.read_text(encoding="utf-8"))
]


def places(nav: Any) -> list[str]:
    """Pages in an order of navigation."""
    if isinstance(nav, str):
        return [nav]
    inside = nav.values() if isinstance(nav, dict) else nav
    return [place for one in inside for place in places(one)]


def test_every_page_has_its_place() -> None:
    yaml = pytest.importorskip("yaml")
    found = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(found) == len(set(found))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(found)
    for place in set(found) - {"index.md"}:
        assert (ROOT / "docs" / place).exists() or (ROOT / place).exists(), place


@pytest.mark.parametrize(("page", "text", "url"), LINKS)
def test_links_to_elsewhere_have_a_form(page: str, text: str, url: str) -> None:
    assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#-]*)?", url), f"{page}: {url}"
    paper = re.fullmatch(r"https://arxiv\.org/abs/(.*)", url)
    if paper:
        assert re.fullmatch(r"\d{4}\.\d{5}", paper[1]), f"{page}: {url}"
        assert not re.search(r"\d{4}\.\d{5}", text) or paper[1] in text, f"{page} says {text} of {url}"


def test_the_readme_takes_two_screens() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 130
    assert len(re.findall(r"^\|[-:|]+\|$", readme, re.M)) == 1, "one table"
    assert readme.count("![") == 1, "one picture"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs-material, an extra, is not installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    search = json.loads((tmp_path / "search/search_index.json").read_text())
    assert any("isolation" in one["text"] for one in search["docs"])
    pages = list(tmp_path.rglob("*.html"))
    for page in pages:  # nothing is fetched from elsewhere
        fetched = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"?(https?:[^\" >]*)", page.read_text())
        assert not fetched, (page, fetched)
    promises = (tmp_path / "promises/index.html").read_text()
    test = re.search(r'href="?\.\./(tests/test_bound\.py)', promises)
    assert test is not None
    assert (tmp_path / test[1]).exists()
    assert "<table>" in (tmp_path / "index.html").read_text()
