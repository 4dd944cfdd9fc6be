"""The tables of docs/bytes.md, and the README's of quantisation beside sharing.

python benchmarks/expert_bytes.py measure FOLDER --text heldout/*.jsonl --output docs/results/expert-bytes.json
(with --batch 16 --methods "up to" into expert-bytes-stored.json; of a second model into expert-bytes-second.json; with
--batch 16 --alone into expert-bytes-domains.json)
"""

from __future__ import annotations

import re
from itertools import pairwise
from math import log
from typing import Any

from generators import Block, load, rows, with_interval

PAGE = "docs/bytes.md"
OURS, PLAN = "depth", "MC's bit plan"
LEAST, MOST = 0.12, 0.45  # of stock's bytes; outside of these values stand without a verdict
GOAL = 0.85
BRIEF = (  # on the first page: what is shown of a method, and the setting
    ("XShare on 16-bit experts", "XShare on 16 bits", "budget=36"),
    ("surrogates beside 16-bit experts", "surrogates on 16 bits", "budget=30"),
    ("4 bits for all, GPTQ", "uniform, groups of 64", "bits(4)"),
    ("3 bits for all, GPTQ", "uniform, groups of 64", "bits(3)"),
    ("MC's plan of bits", "MC's bit plan", "bits=3.5"),
    ("random experts, 4 bits", "random on 4 bits", "budget=52"),
    ("XShare on 4-bit experts", "XShare on 4 bits", "budget=52"),
    ("HOBBIT's rule over the batch", "HOBBIT, nothing left out", "hobbit(high=4, low=3"),
    ("as deep as the batch needs", "depth", "bytes=0.22"),
    ("as deep as the batch needs", "depth", "bytes=0.25"),
)
SCALE_BITS = 16 / 64  # a weight, of a depth
KEPT_BITS = (3, 4, 5, 6)  # deepest ones that a file may store


def blocks() -> list[Block]:
    content = load("expert-bytes.json")
    if content is None:
        return []
    made = [*(Block(PAGE, name, table(content)) for name, table in TABLES.items()),
            Block("README.md", "bytes in short", short(content))]  # fmt: skip
    less, second, alone = (load(f"expert-bytes-{name}.json") for name in ("stored", "second", "domains"))
    if less is not None:
        made.append(Block(PAGE, "bytes at equal storage", at_equal_storage(content, less)))
    if second is not None:
        made.append(Block(PAGE, "bytes of the second model", needed(second)))
    if alone is not None:
        made.append(Block(PAGE, "bytes of domains alone", needed(alone, "text alone, batch 16")))
    return made


def short(content: dict[str, Any]) -> str:
    """Quantisation beside sharing on one axis, for the first page."""
    lines = []
    for name, method, setting in BRIEF:
        one = next(
            row for row in content["cells"]["16"]["settings"] if row["method"] == method and setting in row["policy"]
        )
        lines.append([name, f"`{one['policy']}`", f"{one['bytes']['value']:.0%}", with_interval(one["kl"], 4)])
    lines.sort(key=lambda line: -int(line[2].rstrip("%")))
    return rows(["experts", "policy", ">bytes, of stock", ">KL, nats/token"], lines)


def needed(content: dict[str, Any], cell_name: str = ">batch") -> str:
    """Bytes that each method needs for a KL, and ours over the best other one's."""
    lines = []
    for batch, cell in content["cells"].items():
        for row in cell["needed"]:
            bounds = {name: share for name, share in row.get("at_most", {}).items() if name != OURS}
            found = bounds | row["bytes"]
            shown = [found.get(OURS), _best(found, "uniform"), found.get(PLAN),
                     _best(found, "HOBBIT"), _best(found, "XShare")]  # fmt: skip
            at_most = set(bounds.values()) - set(row["bytes"].values())
            over = "–" if shown[0] is None or shown[1] is None else f"{shown[0] / shown[1]:.2f}"
            ratio = "–"
            if "ratio" in row:
                ratio = with_interval({"value": row["ratio"], "low": row["low"], "high": row["high"]})
                ratio += f" ({row['best_alternative']})"
            lines.append(
                [
                    batch,
                    f"{row['kl']:g}",
                    *("–" if one is None else "≤ " * (one in at_most) + f"{one:.1%}" for one in shown),
                    over,
                    ratio,
                ]
            )
    heads = [cell_name, ">KL", ">`depth`", ">uniform, best group", ">MC", ">HOBBIT", ">XShare on the best bits",
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


def at_equal_storage(content: dict[str, Any], less: dict[str, Any]) -> str:
    """Bytes read for a KL by what stores no more than a file of planes that ends at a number of bits."""
    cell, lines = content["cells"]["16"], []
    for deepest in KEPT_BITS:
        limit = (deepest + SCALE_BITS * (deepest - 1)) / 16
        source, name = (
            (cell, OURS) if deepest == max(KEPT_BITS) else (less["cells"]["16"], f"{OURS}, up to {deepest} bits")
        )
        curves: dict[str, list[tuple[float, float]]] = {}
        for one in cell["settings"]:
            if not one["method"].startswith((OURS, "random")) and _stored(one, content) <= limit:
                curves.setdefault(one["method"], []).append((one["bytes"]["value"], one["kl"]["value"]))
        for row in source["needed"]:
            mine = row["bytes"].get(name)
            found = {method: at for method, curve in curves.items() if (at := _crossing(curve, row["kl"])) is not None}
            if mine is None and not found:
                continue
            best = min(found, key=lambda method: found[method], default=None)
            lines.append([
                f"{limit:.1%}", f"2 to {deepest}", f"{row['kl']:g}", "–" if mine is None else f"{mine:.1%}",
                "–" if best is None else f"{found[best]:.1%} ({best})",
                "–" if mine is None or best is None else f"{mine / found[best]:.2f}",
            ])  # fmt: skip
    heads = [">stored, of 16 bits", "bits of `depth`", ">KL", ">`depth` reads", ">best other reads", ">ratio"]
    return rows(heads, lines)


def _stored(one: dict[str, Any], content: dict[str, Any]) -> float:
    """What a setting has to store over 16 bits: a plan of bits what it reads, HOBBIT its two depths, others a file."""
    if one["policy"].startswith("hobbit"):
        return (int(re.findall(r"high=(\d)", one["policy"])[0]) + 2 * SCALE_BITS) / 16
    if "bit_plan" in one["policy"]:
        return (float(re.findall(r"bits=([0-9.]+)", one["policy"])[0]) + SCALE_BITS) / 16
    return 1.0 if one["file"] == "shipped" else content["stored"][one["file"]]


def _crossing(curve: list[tuple[float, float]], kl: float) -> float | None:
    """Bytes at which a curve, linear in log KL, has a KL; None beyond its ends."""
    for (less, high), (more, low) in pairwise(sorted(curve)):
        if low <= kl <= high:
            return less + (more - less) * (log(high / kl) / log(high / low) if high > low else 0)
    return None


def _basis(content: dict[str, Any]) -> str:
    given, model = content["arguments"], content["model"]
    trained = f", trained on {model['trained_on'] / 1e6:.1f} M tokens" if "trained_on" in model else ""
    name = "Reference model" if model["name"] == "reference model" else f"{model['architecture']}{trained}"
    return (
        f"{name} ({model['experts']} experts, {model['top_k']} a token), {given['batches']} batches of "
        f"independent held-out documents a size, {_lengths(content['cells'])} of which 32 are prompt, seed "
        f"{given['seed']}. Bytes of experts that a step reads, scales included, over what stock reads in 16 bits; 95 % "
        "intervals of the ratio over batches. The best other method is picked at every KL on the same text.\n\n"
    )


def _lengths(cells: dict[str, Any]) -> str:
    """`sequences of 64 tokens (of 40 at batch 64)`."""
    common, *others = sorted({cell["sequence"] for cell in cells.values()}, reverse=True)
    said = [
        f"of {length} at batch {', '.join(batch for batch, cell in cells.items() if cell['sequence'] == length)}"
        for length in others
    ]
    return f"sequences of {common} tokens" + f" ({'; '.join(said)})" * bool(said)


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
