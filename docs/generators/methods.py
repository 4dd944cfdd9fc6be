"""`docs/methods.md`: what each method does, claims, and measures here."""

from __future__ import annotations

import inspect
import math
import re
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from carpool.policies import policies
from generators import Block, load, rows, with_interval

PAGE = "docs/methods.md"
Row = dict[str, Any]
HEADS = ("setting", ">bytes, of stock", ">pairs", ">displaced mass", ">KL, nats/token", ">perplexity ratio")


def blocks() -> list[Block]:
    demo = load("carpool-demo.json")
    texts = tomllib.loads((Path(__file__).parent / "methods.toml").read_text())["method"]
    told = {entry["policy"] for entry in texts}
    # a policy without a text of its own is introduced by its docstring
    texts += [{"policy": name, "title": name, "idea": _about(name)} for name in policies() if name not in told]
    return [Block(PAGE, "methods", "\n".join(_section(entry, demo["results"] if demo else []) for entry in texts))]


def _about(name: str) -> str:
    return (inspect.getdoc(policies()[name]) or "").split("\n\n")[0]


def _section(entry: Row, results: Sequence[Row]) -> str:
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
    own = [row for row in results if row["policy"].split("(")[0] == policy.name]
    said = [entry["measured"]] if "measured" in entry else []
    said += [_against_controls(own, results)] if own and policy.name not in ("topk", "random") else []
    if own or said:
        parts.append(f"**Here.** {' '.join(said) or 'On the reference model at batch 16:'}\n")
    if own:
        parts.append(rows(HEADS, map(_cells, own)))
    return "\n".join(parts)


def _reading(docstring: str) -> str:
    """The docstring's paragraphs that begin with `Reading of the paper:`, without these words."""
    found = [" ".join(part.split()) for part in docstring.split("\n\n") if part.startswith("Reading of the paper:")]
    said = " ".join(part.removeprefix("Reading of the paper:").strip() for part in found)
    return said[:1].upper() + said[1:]


def _cells(row: Row) -> list[str]:
    kl = row["kl"]
    return [
        f"`{row['policy']}`",
        f"{row['bytes_share']['value']:.0%}",
        f"{row['pairs']:.2f}",
        f"{row['displaced_mass']['value']:.1%}",
        with_interval(kl, 4),
        f"{row['perplexity_ratio']['value']:.3f}",
    ]


def _against_controls(own: Sequence[Row], results: Sequence[Row]) -> str:
    """KL over each control's at equal bytes, between settings of the control linear in log KL."""
    said = []
    for name, label in (("topk", "fewer experts per token"), ("random", "a random coreset")):
        curve = sorted(
            (row["bytes_share"]["value"], math.log(row["kl"]["value"]))
            for row in results
            if row["policy"].startswith(f"{name}(") and "warmup=0" not in row["policy"]
        )
        ratios = []
        for row in own:
            reference = _interpolate(curve, row["bytes_share"]["value"])
            if reference is not None:
                ratios.append(row["kl"]["value"] / math.exp(reference))
        if ratios:
            low, high = min(ratios), max(ratios)
            span = f"{low:.2f}" if len(ratios) == 1 else f"{low:.2f} to {high:.2f}"
            worse = " (**it loses**)" if low > 1 else " (it loses at some settings)" if high > 1 else ""
            said.append(f"{span} times that of {label}{worse}")
    return f"KL at equal bytes is {', and '.join(said)}." if said else ""


def _interpolate(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    for (x0, y0), (x1, y1) in pairwise(curve):
        # the first and last settings of a control stand for what is a hair outside of them
        if x0 - 0.02 <= at <= x1 + 0.02:
            return y0 + (y1 - y0) * min(1.0, max(0.0, (at - x0) / (x1 - x0)))
    return None
