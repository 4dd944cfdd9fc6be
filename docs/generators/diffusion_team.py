"""TEAM's decoding in docs/diffusion.md: `python benchmarks/diffusion_team.py --output ...diffusion-team.json`."""

from __future__ import annotations

from typing import Any

from carpool.evaluate.intervals import FEWEST
from generators import Block, load, rows, with_interval

HEADS = (
    "threshold", "method", ">APF", ">TPF", ">APT", ">of vanilla", ">rows a forward", ">agreement",
    ">perplexity over vanilla's",
)  # fmt: skip


def blocks() -> list[Block]:
    content = load("diffusion-team.json")
    return [] if content is None else [Block("docs/diffusion.md", "diffusion team", table(content))]


def table(content: dict[str, Any]) -> str:
    """Every configuration against vanilla decoding of the same prompts."""
    lines = []
    batches = content["prompts"] // content["batch"]
    enough = batches >= FEWEST
    for setting in content["settings"]:
        vanilla = setting["rows"][0]
        for row in setting["rows"]:
            lines.append([
                f"{setting['threshold']:g}", "vanilla" if row is vanilla else _name(row), f"{row['apf']:.1f}",
                f"{row['tpf']:.2f}", f"{row['apt']:.2f}", f"{row['apt'] / vanilla['apt']:.0%}",
                f"{row['rows_per_forward']:.0f}", _share(row["agreement"]),
                _ratio(row["perplexity_ratio"], enough),
            ])  # fmt: skip
    model, one = content["model"], content["settings"][0]
    said = (
        f"{model['experts']} experts, {model['top_k']} a token, {model['layers']} layers; blocks of "
        f"{one['block_size']}, {content['prompts']} prompts of {content['prompt_tokens']} tokens, "
        f"{content['new_tokens']} decoded after each, seed {content['seed']}. The authors' measures, of one request: "
        "APF, distinct experts a layer and forward; TPF, tokens accepted a forward; APT, their ratio. Forwards that "
        "write finished blocks are not counted. A branch is a row of its own. Agreement is with vanilla's text; "
        "perplexity is of the generated text under the reference model, "
        + ("with 95 % intervals over batches." if enough else f"{batches} batches, too few for intervals.")
    )
    return f"{said}\n\n{rows(HEADS, lines)}"


def _name(row: dict[str, Any]) -> str:
    return f"`{row['name']}`" if row["name"] == row["policy"] else row["name"]


def _share(value: dict[str, Any]) -> str:
    return f"{value['value']:.0%}"


def _ratio(value: dict[str, Any] | None, enough: bool) -> str:
    if value is None:
        return ""
    return with_interval(value if enough else value | {"low": None, "high": None})
