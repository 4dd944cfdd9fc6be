"""The tables of docs/bytes.md.

python benchmarks/expert_bytes.py measure FOLDER --text heldout/*.jsonl --output docs/results/expert-bytes.json
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows, with_interval

PAGE = "docs/bytes.md"
OURS, PLAN = "depth", "MC's bit plan"
LEAST, MOST = 0.12, 0.45  # of stock's bytes; outside of these values stand without a verdict
GOAL = 0.85
SHOWN, LOSE = 0.003, 0.02  # KLs on the first page


def blocks() -> list[Block]:
    content = load("expert-bytes.json")
    if content is None:
        return []
    return [*(Block(PAGE, name, table(content)) for name, table in TABLES.items()),
            Block("README.md", "bytes in short", short(content))]  # fmt: skip


def short(content: dict[str, Any]) -> str:
    """What quantisation does on the same axis, for the first page."""
    row = next(one for one in content["cells"]["16"]["needed"] if one["kl"] == SHOWN)
    found = row["bytes"]
    sharing = min(one["bytes"]["value"] for one in content["cells"]["16"]["settings"]
                  if one["method"].endswith("16 bits") and one["kl"]["value"] <= LOSE)  # fmt: skip
    uniform = min(share for name, share in found.items() if name.startswith("uniform"))
    pair = _best(found, "HOBBIT")
    return (
        "**Sharing is not all that saves bytes.** On the same model at batch 16: of stock's bytes, the best sharing "
        f"rule on 16-bit experts needs {sharing:.0%} for a KL of {LOSE:g}. For a KL of {SHOWN:g} uniform quantisation "
        f"needs {uniform:.1%}, MC's bit plan {found[PLAN]:.1%}, HOBBIT's rule over the batch {pair:.1%}, and experts "
        f"that are read as deep as their batch needs {found[OURS]:.1%}: [bytes](docs/bytes.md), in transformers so far."
        "\n"
    )


def needed(content: dict[str, Any]) -> str:
    """Bytes that each method needs for a KL, and ours over the best other one's."""
    lines = []
    for batch, cell in content["cells"].items():
        for row in cell["needed"]:
            found = row["bytes"]
            uniform = [share for name, share in found.items() if name.startswith("uniform")]
            shown = [found.get(OURS), min(uniform, default=None), found.get(PLAN),
                     _best(found, "HOBBIT"), _best(found, "XShare")]  # fmt: skip
            over = "–" if shown[0] is None or shown[1] is None else f"{shown[0] / shown[1]:.2f}"
            ratio = "–"
            if "ratio" in row:
                ratio = with_interval({"value": row["ratio"], "low": row["low"], "high": row["high"]})
                ratio += f" ({row['best_alternative']})"
            lines.append(
                [batch, f"{row['kl']:g}", *("–" if one is None else f"{one:.1%}" for one in shown), over, ratio]
            )
    heads = [">batch", ">KL", ">`depth`", ">uniform, best group", ">MC", ">HOBBIT", ">XShare on the best bits",
             ">`depth` over uniform", ">`depth` over the best other"]  # fmt: skip
    return _basis(content) + rows(heads, lines) + _verdict(content)


def settings(content: dict[str, Any]) -> str:
    """Every setting at batch 16."""
    cell = content["cells"]["16"]
    lines = [
        [one["method"], f"`{one['policy']}`", f"{one['bytes']['value']:.1%}", f"{one['union']['value']:.0%}",
         with_interval(one["kl"], 5)]
        for one in sorted(cell["settings"], key=lambda one: (one["method"], one["bytes"]["value"]))
    ]  # fmt: skip
    return rows(["method", "policy", ">bytes", ">experts", ">KL"], lines)


def stored(content: dict[str, Any]) -> str:
    """What the files store."""
    lines = [[f"`{name}`", f"{share:.1%}", f"{16 * share:.2f}"] for name, share in content["stored"].items()]
    return rows(["file", ">of 16 bits", ">bits a weight"], lines)


def _basis(content: dict[str, Any]) -> str:
    given, model = content["arguments"], content["model"]
    return (
        f"Reference model ({model['experts']} experts, {model['top_k']} a token), {given['batches']} batches of "
        f"independent held-out documents a size, sequences of {given['sequence']} tokens of which 32 are prompt, seed "
        f"{given['seed']}. Bytes of experts that a step reads, scales included, over what stock reads in 16 bits; 95 % "
        "intervals of the ratio over batches. The best other method is picked at every KL on the same text.\n\n"
    )


def _verdict(content: dict[str, Any]) -> str:
    """How often the goal is met, where a verdict is given."""
    judged = [
        (batch, row)
        for batch, cell in content["cells"].items()
        for row in cell["needed"]
        if "ratio" in row and LEAST <= row["bytes"][OURS] <= MOST and batch != "1"
    ]
    met = [row for _, row in judged if row["ratio"] <= GOAL]
    over = [row for _, row in judged if row["high"] is not None and row["high"] >= 1.05]
    return (
        f"\nOf {len(judged)} cells with several sequences and between {LEAST:.0%} and {MOST:.0%} of the bytes, `depth` "
        f"needs at most {GOAL:.2f} of the best other method's bytes in {len(met)}; in {len(over)} the interval reaches "
        "1.05 or more.\n"
    )


def _best(found: dict[str, float], start: str) -> float | None:
    return min((share for name, share in found.items() if name.startswith(start)), default=None)


TABLES = {"bytes needed": needed, "bytes settings": settings, "bytes stored": stored}
