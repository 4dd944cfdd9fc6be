"""The documentation holds what the code holds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from carpool.policies import policies

ROOT = Path(__file__).parent.parent


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_the_code_and_the_committed_results():
    made = generator()
    found = made.blocks()
    assert {"modules", "demo table"} <= {block.name for block in found}
    for block in found:
        page = (ROOT / block.page).read_text()
        assert page == made.with_block(page, block), f"run python docs/generate.py ({block.page}, {block.name})"


def test_a_page_lists_every_policy():
    rows = set(re.findall(r"^\| `(\w+)\(", (ROOT / "docs/policies.md").read_text(), re.M))
    assert rows == set(policies())


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_promise_names_tests_that_exist():
    promises = (ROOT / "docs/promises.md").read_text().partition("What is *not* promised")[0].split("\n- ")[1:]
    assert len(promises) >= 7
    for promise in promises:
        named = re.findall(r'\(\.\./(tests/\w+\.py) "(\w+)"\)', promise)
        assert named, f"no test is named behind {promise[:40]!r}"
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"


@pytest.mark.slow
def test_the_readmes_example_runs_as_it_is(capsys):
    pytest.importorskip("carpool_demo", reason="the reference model is an extra")
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    exec(example, {})
    changed = re.search(r"rows changed +([\d,]+) of", capsys.readouterr().out)
    assert changed is not None
    assert int(changed[1].replace(",", "")) > 0
