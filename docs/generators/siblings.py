"""The tables of docs/siblings.md.

python benchmarks/siblings.py --output docs/results/siblings.json
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from generators import Block, load, rows, with_interval

PAGE = "docs/siblings.md"


def blocks() -> list[Block]:
    content = load("siblings.json")
    if content is None:
        return []
    return [Block(PAGE, name, table(content)) for name, table in TABLES.items()]


def overlap(content: dict[str, Any]) -> str:
    """What native routing reads."""
    given = content["arguments"]
    kin, strangers = _by_number(content, "siblings", "stock"), _by_number(content, "strangers", "stock")
    windows = [
        f">siblings, steps {one['first'] + 1} to {one['last']}" for one in next(iter(kin.values()))["union_by_steps"]
    ]
    lines = [
        [
            str(n), with_interval(kin[n]["union"], 1), with_interval(strangers[n]["union"], 1),
            f"{kin[n]['union']['value'] / strangers[n]['union']['value']:.0%}",
            *(f"{one['value']:.1f}" for one in kin[n]["union_by_steps"]),
        ]
        for n in kin
    ]  # fmt: skip
    model, prompts = content["model"], next(iter(kin.values()))["batches"]
    head = (
        f"The reference model ({model['experts']} experts, {model['top_k']} a token), natively: distinct experts a "
        f"layer and step, 95 % intervals. Prompts of {given['prefill']} tokens, {given['decoded']} decoded tokens a "
        f"sequence, seed {given['seed']}; {prompts} prompts with their siblings, {given['batches']} batches of "
        "strangers.\n\n"
    )
    n = max(kin)
    first = kin[n]["union_by_steps"][0]
    shares = [union / strangers[n]["union"]["value"] for union in (kin[n]["union"]["value"], first["value"])]
    tail = (
        f"\nSo {n} siblings ask for {shares[0]:.0%} of the experts that {n} strangers ask for, and for {shares[1]:.0%} "
        f"in the first {first['last']} steps, when they have not grown apart.\n"
    )
    return head + rows([">sequences", ">siblings", ">strangers", ">of strangers'", *windows], lines) + tail


def cost(content: dict[str, Any]) -> str:
    """What policies read and cost among siblings and among strangers."""
    lines, found = [], dict[tuple[str, int], list[float]]()
    for row in content["results"]:
        if row["who"] == "siblings" and row["policy"] != "stock":
            n = row["sequences"]
            other = _by_number(content, "strangers", row["policy"])[n]
            lines.append([str(n), f"`{row['policy']}`", *_read(row), *_read(other), _over(row["kl"], other["kl"])])
            key = row["policy"].partition("(")[0], n
            found.setdefault(key, []).append(row["kl"]["value"] / other["kl"]["value"])
    heads = [
        ">sequences", "policy", ">siblings: experts", ">of stock", ">KL", ">strangers: experts", ">of stock", ">KL",
        ">KL, siblings' over strangers'",
    ]  # fmt: skip
    spans = {key: " to ".join(f"{end(ratios):.2f}" for end in (min, max)) for key, ratios in found.items()}
    few, many = min(n for _, n in found), max(n for _, n in found)
    control = [ratio for (name, _), ratios in found.items() if name == "topk" for ratio in ratios]
    tail = (
        f"\nUnder `topk`, by which nobody shares, siblings lose {min(control):.2f} to {max(control):.2f} times what "
        f"strangers lose: so much for how hard their texts are. Under `xshare` {few} siblings lose "
        f"{spans['xshare', few]} times what strangers lose, and {many} lose {spans['xshare', many]} times as much.\n"
    )
    return rows(heads, lines) + tail


def several(content: dict[str, Any]) -> str:
    """Several prompts in one step: what it costs to share by prompt only."""
    found = [row for row in content["results"] if row["who"] == "prompts"]
    lines = [
        ["none" if row["policy"] == "stock" else row["group"],
         row["policy"] if row["policy"] == "stock" else f"`{row['policy']}`", *_read(row)]
        for row in found
    ]  # fmt: skip
    size, batches = found[0]["sequences"], found[0]["batches"]
    head = f"{size} sequences a step: four samples of each of four prompts, {batches} batches.\n\n"
    by_prompt, by_batch = (
        [
            (row["union"]["value"], row["kl"]["value"])
            for row in found
            if row["group"] == group and "xshare" in row["policy"]
        ]
        for group in ("prompt", "batch")
    )
    read, log_kl = [union for union, _ in by_batch], [math.log(kl) for _, kl in by_batch]
    times = [kl / math.exp(np.interp(union, read, log_kl)) for union, kl in by_prompt if union <= max(read)]
    tail = (
        "\nFor the same bytes `xshare` by prompt loses "
        f"{' and '.join(f'{one:.1f}' for one in times)} times what `xshare` over the whole batch would lose "
        "(interpolated): the price of asking nobody.\n"
    )
    return head + rows(["shared by", "policy", ">experts", ">of stock", ">KL"], lines) + tail


def _read(row: dict[str, Any]) -> list[str]:
    kl = row["kl"]
    return [
        f"{row['union']['value']:.1f}",
        f"{row['bytes_share']['value']:.0%}",
        with_interval(kl, 4) if kl["value"] else "0",
    ]


def _over(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The ratio of two values whose intervals are symmetric on their logarithms. What they have in common (prompts)
    makes it surer than if they were independent, as is assumed."""
    ratio = {"value": one["value"] / other["value"], "low": None, "high": None}
    if one["low"] is not None and other["low"] is not None:
        half = math.hypot(*(math.log(x["high"] / x["low"]) / 2 for x in (one, other)))
        ratio |= {"low": ratio["value"] * math.exp(-half), "high": ratio["value"] * math.exp(half)}
    return with_interval(ratio)


def _by_number(content: dict[str, Any], who: str, policy: str) -> dict[int, dict[str, Any]]:
    return {row["sequences"]: row for row in content["results"] if (row["who"], row["policy"]) == (who, policy)}


TABLES = {"overlap": overlap, "cost": cost, "several": several}
