"""`docs/methods.md`: what each method does, claims, and measures here."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

from carpool.policies import policies
from generators import Block, load, rows, with_interval

PAGE = "docs/methods.md"
Row = dict[str, Any]
HEADS = ("setting", ">bytes, of stock", ">pairs", ">displaced mass", ">KL, nats/token", ">perplexity ratio")
CONTROLS = {
    "random coreset, best kept": "a random coreset that keeps each token's best expert",
    "random coreset": "a random one that does not",
}
LOSS = ">expected loss"  # beside the displaced mass, of what leaves pairs to surrogates


def blocks() -> list[Block]:
    demo = load("carpool-demo.json")
    texts = tomllib.loads((Path(__file__).parent / "methods.toml").read_text())["method"]
    told = {entry["policy"] for entry in texts}
    # a policy without a text of its own is introduced by its docstring
    texts += [{"policy": name, "title": name, "idea": _about(name)} for name in policies() if name not in told]
    return [Block(PAGE, "methods", "\n".join(_section(entry, demo or {"results": []}) for entry in texts))]


def _about(name: str) -> str:
    return (inspect.getdoc(policies()[name]) or "").split("\n\n")[0]


def _section(entry: Row, demo: Row) -> str:
    policy = policies()[entry["policy"]]
    number = re.search(r"(\d{4}\.\d{5})", policy.paper)
    source = f" · [arXiv {number[1]}](https://arxiv.org/abs/{number[1]})" if number else ""
    parts = [
        f"### {entry['title']}\n",
        f"`{policy.name}`, a {policy.kind} policy{source}\n",
        entry["idea"].strip() + "\n",
    ]
    reading = _reading(inspect.getdoc(policy) or "")
    if reading:
        parts.append(f"**Reading.** {reading}\n")
    if "claim" in entry:
        parts.append(f"**Published.** {' '.join(entry['claim'].split())}\n")
    own = [row for row in demo["results"] if row["policy"].split("(")[0] == policy.name]
    said = [entry["measured"]] if "measured" in entry else []
    against = _against_controls(policy.name, demo)
    said += [against] if against else []
    if own or said:
        parts.append(f"**Here.** {' '.join(said) or 'On the reference model at batch 16:'}\n")
    if own:
        foreseen = any(row["surrogates"] for row in own) and all("expected_loss" in row for row in own)
        heads = [*HEADS[:4], LOSS, *HEADS[4:]] if foreseen else HEADS
        parts.append(rows(heads, (_cells(row, foreseen) for row in own)))
    return "\n".join(parts)


def _reading(docstring: str) -> str:
    """The docstring's paragraphs that begin with `Reading of the paper:`, without these words."""
    found = [" ".join(part.split()) for part in docstring.split("\n\n") if part.startswith("Reading of the paper:")]
    said = " ".join(part.removeprefix("Reading of the paper:").strip() for part in found)
    return said[:1].upper() + said[1:]


def _cells(row: Row, foreseen: bool) -> list[str]:
    kl = row["kl"]
    return [
        f"`{row['policy']}`",
        f"{row['bytes_share']['value']:.0%}",
        f"{row['pairs']:.2f}",
        f"{row['displaced_mass']['value']:.1%}",
        *([f"{row['expected_loss']['value']:.1%}"] if foreseen else []),
        with_interval(kl, 4),
        f"{row['perplexity_ratio']['value']:.3f}",
    ]


def _against_controls(name: str, demo: Row) -> str:
    """KL over each control's at equal bytes; a method loses where the interval is above 1."""
    said = []
    found = [one for one in demo.get("over_controls", []) if one["policy"].split("(")[0] == name]
    for control in dict.fromkeys(one["control"] for one in found):
        ratios = [one["ratio"] for one in found if one["control"] == control]
        low, high = (pick(one["value"] for one in ratios) for pick in (min, max))
        span = f"{low:.2f}" if len(ratios) == 1 else f"{low:.2f} to {high:.2f}"
        lost = [one["low"] is not None and one["low"] > 1 for one in ratios]
        worse = " (**it loses**)" if all(lost) else " (it loses at some settings)" if any(lost) else ""
        said.append(f"{span} times that of {CONTROLS.get(control, control)}{worse}")
    listed = " and ".join(filter(None, (", ".join(said[:-1]), *said[-1:])))
    return f"KL at equal bytes is {listed}." if said else ""
