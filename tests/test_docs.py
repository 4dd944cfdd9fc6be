"""The documentation holds what the code holds."""

from __future__ import annotations

import re
from pathlib import Path

from carpool.policies import policies

ROOT = Path(__file__).parent.parent


def test_architecture_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"^\| `([\w/]+\.py)`", text, re.M))
    source = ROOT / "src/carpool"
    modules = {p.relative_to(source).as_posix() for p in source.rglob("*.py") if p.name not in ("__init__.py",)}
    assert named == modules


def test_readme_lists_every_policy():
    rows = set(re.findall(r"^\| `(\w+)\(", (ROOT / "README.md").read_text(), re.M))
    assert rows == set(policies())


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
