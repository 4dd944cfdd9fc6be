"""The tables of docs/diffusion.md.

python benchmarks/diffusion.py --cells FOLDER --output docs/results/diffusion.json
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from generators import Block, load, rows, with_interval

PAGE = "docs/diffusion.md"
SHOWN = ("topk(k=4)", "des_seq(k0=2)", "des_vote(beta=0.3)", "xshare(budget=19)")


def blocks() -> list[Block]:
    content = load("diffusion.json")
    if content is None:
        return []
    makers = {
        "diffusion main": main_table,
        "diffusion equal experts": equal_experts,
        "diffusion settings": settings,
        "diffusion masked": by_masked,
    }
    return [Block(PAGE, name, maker(content)) for name, maker in makers.items()]


def main_cell(content: dict[str, Any]) -> dict[str, Any]:
    """The cell in the paper's setting."""
    return content["cells"][0]


def main_table(content: dict[str, Any]) -> str:
    """In DES's form: T, then what stands in for accuracy, method by method."""
    cell = main_cell(content)
    stock = _decoding(cell["results"][0], "union_of_group")
    lines = []
    for row in cell["results"]:
        made = row["decoding"]
        lines.append([
            _name(row["policy"]), f"{_decoding(row, 'union_of_group'):.1f}",
            f"{_decoding(row, 'union_of_group') / stock:.0%}",
            f"{made['tokens_per_forward']['value']:.2f}", _share(made["agreement"]),
            with_interval(row["kl"], 4), f"{row['top1_agreement']['value']:.1%}",
            with_interval(row["perplexity_ratio"], 3),
            _ratio(made["perplexity_ratio"]), f"{made['repeated']:.0%}",
        ])  # fmt: skip
    heads = (
        "method", ">T", ">of vanilla", ">tokens a forward", ">agreement", ">KL", ">top-1",
        ">denoising perplexity", ">generated perplexity", ">repeated",
    )  # fmt: skip
    vanilla, made, given = cell["results"][0], cell["results"][0]["decoding"], content["arguments"]
    model, how = content["model"], cell["cell"]
    said = (
        f"{model['experts']} experts, {model['top_k']} a token, {model['layers']} layers; blocks of {how['block']}, "
        f"threshold {how['threshold']:g}, a coreset for each request. {made['requests']} prompts of {given['prompt']} "
        f"tokens, {given['new']} decoded after each; {vanilla['masked_tokens']:,} masked tokens in {given['texts']} "
        f"held-out texts; seed {content['seed']}. Perplexities are over vanilla's: "
        f"{vanilla['perplexity']['value']:.1f} denoising, {made['perplexity']['value']:.0f} generated."
    )
    return f"{said}\n\n{rows(heads, lines)}"


def equal_experts(content: dict[str, Any]) -> str:
    """Every method against DES-Seq at the same T, on the line between the settings of DES-Seq around it."""
    found = main_cell(content)["results"]
    seq = [row for row in found if row["policy"].startswith("des_seq(")]
    losses = sorted((row["union"]["value"], row["kl"]["value"]) for row in seq if row["kl"]["value"] > 0)
    agreements = sorted((_decoding(row, "union_of_group"), _decoding(row, "agreement")) for row in seq)
    lines = []
    for row in found:
        if row["policy"].split("(")[0] not in ("des_vote", "xshare", "topk", "random"):
            continue
        kl, agreed = row["kl"]["value"], _decoding(row, "agreement")
        experts = _decoding(row, "union_of_group")
        there, same = between(losses, row["union"]["value"], log=True), between(agreements, experts)
        if there is None or same is None:
            continue
        lines.append([
            _name(row["policy"]), f"{row['union']['value']:.1f}", f"{kl:.4f}", f"{there:.4f}", f"{kl / there:.2f}",
            f"{experts:.1f}", f"{agreed:.1%}", f"{same:.1%}", f"{100 * (agreed - same):+.1f}",
        ])  # fmt: skip
    heads = (
        "method", ">T, held-out text", ">KL", ">KL of DES-Seq at that T", ">ratio", ">T, decoding",
        ">agreement", ">of DES-Seq at that T", ">points",
    )  # fmt: skip
    return rows(heads, lines)


def between(curve: list[tuple[float, float]], experts: float, *, log: bool = False) -> float | None:
    """A curve at so many experts, on the line (or its logarithm's) between its points; None outside them."""
    for (low, first), (high, second) in pairwise(curve):
        if low <= experts <= high:
            part = (experts - low) / (high - low) if high > low else 0.0
            if log:
                return math.exp((1 - part) * math.log(first) + part * math.log(second))
            return (1 - part) * first + part * second
    return None


def settings(content: dict[str, Any]) -> str:
    """What varies around the paper's setting: block size, grouping, threshold, sharing where the cache is written."""
    lines = []
    for measured in content["cells"]:
        cell = measured["cell"]
        for row in measured["results"]:
            if row["policy"] != "stock" and row["policy"] not in SHOWN:
                continue
            made = row["decoding"]
            lines.append([
                str(cell["block"]), cell["group"] + (", writing too" if cell["share_commits"] else ""),
                f"{cell['threshold']:g}", _name(row["policy"]), f"{made['union_of_group']['value']:.1f}",
                f"{made['union']['value']:.1f}", f"{made['tokens_per_forward']['value']:.2f}",
                _share(made["agreement"]), _ratio(made["perplexity_ratio"]), f"{row['kl']['value']:.4f}",
            ])  # fmt: skip
    heads = (
        "block", "group", "threshold", "method", ">T of a group", ">T of the batch", ">tokens a forward",
        ">agreement", ">generated perplexity", ">KL",
    )  # fmt: skip
    return rows(heads, lines)


def by_masked(content: dict[str, Any]) -> str:
    """T and KL by how much of a block is still masked."""
    lines = []
    for row in main_cell(content)["results"]:
        if row["policy"] != "stock" and row["policy"] not in SHOWN:
            continue
        unions = ["–" if value is None else f"{value:.1f}" for value in row["decoding"]["union_by_masked"]]
        kls = [f"{one['kl']:.3f}" for one in row["by_masked_ratio"].values()]
        lines.append([_name(row["policy"]), *unions[::-1], *kls])
    kl_heads = [f">KL, {float(ratio):.0%} masked" for ratio in main_cell(content)["results"][0]["by_masked_ratio"]]
    spans = ("all masked", "75–100 %", "50–75 %", "25–50 %", "under 25 %")
    heads = ["method", *(f">T, {span}" for span in spans), *kl_heads]
    return rows(heads, lines)


def _decoding(row: dict[str, Any], name: str) -> float:
    return row["decoding"][name]["value"]


def _name(policy: str) -> str:
    return "vanilla" if policy == "stock" else f"`{policy}`"


def _share(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['value']:.0%}"


def _ratio(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['value']:.2f}"
