"""Which models the vLLM plugin shares: `python benchmarks/vllm_coverage.py`."""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/vllm.md"
FORMATS = {"bfloat16": "bf16", "float32": "fp32"}
SIMPLE = "one worker"
FULL = ("0.32.0", "V1")  # version and runner of the full tables
STAND_INS = (
    "*Routers only*: the same, but for the experts' arithmetic: vLLM has no kernel for these experts on the CPU of the "
    "measurement (those for CPUs ask for AMX), so a stand-in took the kernel's place. vLLM loaded the weights by their "
    "format and routed as ever, and what reached the stand-in were the experts that the counters say. The last column "
    "is what vLLM says without it."
)
WORDS = {"not run by vLLM": "vLLM does not run it"}


def blocks() -> list[Block]:
    content = load("vllm-coverage.json")
    if content is None:
        return []
    everywhere: list[dict[str, Any]] = content["rows"]
    found = [row for row in everywhere if (row["vllm"], row["runner"]) == FULL]
    plain = [row for row in found if row["parallel"] == SIMPLE and row["storage"] in FORMATS]
    other = [row for row in found if row not in plain]
    about = (
        f"Measured on vLLM {FULL[0]}, runner {FULL[1]}, torch {content['torch']}, with tiny models of random weights. "
        "*Shared*: "
        f"rows changed, every step within a budget of {content['budget']} of 32 experts, and, switched off as well as "
        "with a budget of all experts, the same tokens and log-probabilities as without the plugin. *Native to "
        "rounding*: the same tokens, and log-probabilities that differ by less than 1e-5."
    )
    return [
        Block(PAGE, "coverage of families", f"{about}\n\n{families(plain)}\n{notes(plain)}"),
        Block(PAGE, "coverage of formats", f"{STAND_INS}\n\n{others(other)}"),
        Block(PAGE, "coverage of runners", runners(everywhere)),
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


def runners(found: list[dict[str, Any]]) -> str:
    """A column a version and runner; a line each case that was measured in more than one."""
    places = sorted({(row["vllm"], row["runner"]) for row in found})
    cases = dict.fromkeys((row["family"], row["storage"], row["parallel"]) for row in found)
    lines = []
    for case in cases:
        mine = {
            (row["vllm"], row["runner"]): row
            for row in found
            if (row["family"], row["storage"], row["parallel"]) == case
        }
        if len(mine) > 1:
            cells = [_cell(mine[place]) if place in mine else "not measured" for place in places]
            lines.append([f"`{case[0]}`", FORMATS.get(case[1], case[1]), case[2], *cells])
    if not lines:
        return "Nothing of the table above was measured on another version or runner yet (`make coverage`)."
    return rows(("family", "weights", "run by", *(f"{version}, {runner}" for version, runner in places)), lines)


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
