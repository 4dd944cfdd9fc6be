"""Which models the vLLM plugin shares: `python benchmarks/vllm_coverage.py`."""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/vllm.md"
FORMATS = {"bfloat16": "bf16", "float32": "fp32"}
SIMPLE = "one worker"
WORDS = {"not run by vLLM": "vLLM does not run it"}


def blocks() -> list[Block]:
    content = load("vllm-coverage.json")
    if content is None:
        return []
    found: list[dict[str, Any]] = content["rows"]
    plain = [row for row in found if row["parallel"] == SIMPLE and row["storage"] in FORMATS]
    other = [row for row in found if row not in plain]
    about = (
        f"Measured on vLLM {content['vllm']}, torch {content['torch']}, with tiny models of random weights. *Shared*: "
        f"rows changed, every step within a budget of {content['budget']} of 32 experts, and, switched off as well as "
        "with a budget of all experts, the same tokens and log-probabilities as without the plugin. *Native to "
        "rounding*: the same tokens, and log-probabilities that differ by less than 1e-5."
    )
    return [
        Block(PAGE, "coverage of families", f"{about}\n\n{families(plain)}\n{notes(plain)}"),
        Block(PAGE, "coverage of formats", others(other)),
    ]


def families(found: list[dict[str, Any]]) -> str:
    """A line a family, a column a number format."""
    lines = []
    for name in dict.fromkeys(row["family"] for row in found):
        mine = {row["storage"]: row for row in found if row["family"] == name}
        router = next((row["router"] for row in mine.values() if "router" in row), "")
        lines.append(
            [f"`{name}`", router, *(_cell(mine[storage]) if storage in mine else "not measured" for storage in FORMATS)]
        )
    return rows(("family", "router", *FORMATS.values()), lines)


def notes(found: list[dict[str, Any]]) -> str:
    """Why, once a family and cause."""
    said = dict.fromkeys((row["family"], row["result"], row["says"]) for row in found if "says" in row)
    return "".join(f"- `{family}`, {WORDS.get(result, result)}: {_inline(says)}\n" for family, result, says in said)


def others(found: list[dict[str, Any]]) -> str:
    """A line each: number formats of quantised weights, workers, ways to run the engine."""
    lines = [
        [f"`{row['family']}`", row["storage"], row["parallel"], _cell(row), _inline(row.get("says", ""))]
        for row in found
    ]
    return rows(("family", "weights", "run by", "result", "because"), lines)


def _cell(row: dict[str, Any]) -> str:
    alone = row["result"] == "refused" and row["without"] != "runs"
    return f"{WORDS.get(row['result'], row['result'])}{'; vLLM does not run it either' if alone else ''}"


def _inline(text: str) -> str:
    return f"“{text.replace('|', '/').replace('<', '').replace('>', '')}”" if text else ""
