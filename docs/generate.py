"""Make anew what the documentation takes from code and committed results (`docs/generators/`, one file a subject).

carpool demo --output docs/results
python docs/generate.py
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from generators import ROOT, Block


def with_block(page: str, block: Block) -> str:
    """The page with what stands between `<!-- name: ... -->` and `<!-- end -->` made anew."""
    pattern = re.compile(rf"(<!-- {block.name}: [^>]* -->\n).*?(<!-- end -->)", re.S)
    made, count = pattern.subn(lambda found: f"{found[1]}\n{block.content}\n{found[2]}", page)
    if count != 1:
        raise SystemExit(f"{block.page} has {count} places for the block {block.name!r}, not one")
    return made


def generators() -> list[ModuleType]:
    paths = sorted((HERE / "generators").glob("[!_]*.py"))
    return [importlib.import_module(f"generators.{path.stem}") for path in paths]


def blocks() -> list[Block]:
    return [block for module in generators() for block in module.blocks()]


def main() -> None:
    for block in blocks():
        page = ROOT / block.page
        page.write_text(with_block(page.read_text(), block))
    for module in generators():
        if hasattr(module, "draw"):
            module.draw()


if __name__ == "__main__":
    main()
