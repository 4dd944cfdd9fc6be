"""Which models the SGLang plugin shares: `python benchmarks/sglang_coverage.py`."""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

HEADS = ("family", "result", ">experts read", ">natively", "switched off, the tokens of transformers", "what is said")


def blocks() -> list[Block]:
    content = load("sglang-coverage.json")
    if content is None:
        return []
    versions = ", ".join(sorted({row["sglang"] for row in content["rows"]}))
    about = (
        f"Measured on SGLang {versions}, torch {content['torch']}, on a CPU, with tiny models of random weights in "
        f"float32. *Shared*: rows changed, every step within a budget of {content['budget']} of 32 experts, and with a "
        "budget of all experts the same tokens as switched off. *Not run*: SGLang itself ends, with or without the "
        "plugin, mostly because its code for that family asks for kernels of a GPU."
    )
    return [Block("docs/sglang.md", "coverage", f"{about}\n\n{rows(HEADS, map(_line, content['rows']))}")]


def _line(row: dict[str, Any]) -> list[str]:
    if "steps" not in row:
        return [f"`{row['family']}`", row["result"], "", "", "", row["says"]]
    same = "yes" if row["off_as_transformers"] else "no"
    return [f"`{row['family']}`", row["result"], str(row["union"]), str(row["natural_union"]), same, ""]
