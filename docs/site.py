"""Makes a site of the documentation, for mkdocs: pages of the repository outside of docs/ become pages of the site, and
files that pages link to become files of it."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/*/README.md"))
OUTSIDE = ("README.md", "CONTRIBUTING.md", *RECIPES)
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?(?:\s+\"[^\"]*\")?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/, and what pages link to there."""
    from mkdocs.structure.files import File

    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    wanted = {link for page in (*pages, *OUTSIDE) for link in _links(page)} | set(OUTSIDE)
    for place in sorted(wanted):
        uri = _uri(place)
        if files.get_file_from_path(uri) is None and (ROOT / place).is_file():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead where their targets are on the site."""
    here = _place(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        target = _target(here, found[2])
        if target is None:
            return found[0]
        return found[1] + posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri) or ".") + found[3]

    return LINK.sub(moved, markdown)


def _links(page: str) -> set[str]:
    """What a page links to in the repository."""
    targets = (_target(page, found[2]) for found in LINK.finditer((ROOT / page).read_text(encoding="utf-8")))
    return {target for target in targets if target is not None}


def _target(page: str, link: str) -> str | None:
    """A link's target as a path in the repository; of a folder, what describes it. None for other sites."""
    if ":" in link:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return f"{target}/README.md" if (ROOT / target).is_dir() else target


def _uri(place: str) -> str:
    """Where a file of the repository stands on the site."""
    return "index.md" if place == "README.md" else place.removeprefix("docs/")


def _place(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    if uri == "index.md":
        return "README.md"
    return uri if uri in OUTSIDE else f"docs/{uri}"
