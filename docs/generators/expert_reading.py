"""The tables of docs/reading.md.

python benchmarks/expert_reading.py --output docs/results/expert-reading.json
python benchmarks/vllm_planes.py --output docs/results/vllm-planes.json
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/reading.md"


def blocks() -> list[Block]:
    found = []
    if (content := load("expert-reading.json")) is not None:
        found.append(Block(PAGE, "reading layer", layer(content)))
    if (content := load("vllm-planes.json")) is not None:
        found.append(Block(PAGE, "reading vllm", engine(content)))
    return found


def layer(content: dict[str, Any]) -> str:
    """Times of a layer's experts, and shares of the streaming rate."""
    machine = content["machine"]
    head = (
        f"One {machine['cpu']} with {machine['cores']} cores and {content['instructions'].upper()}, "
        f"{machine['date']}, seed {content['seed']}, medians of {content['rounds']} rounds. Milliseconds for the "
        "routed experts of one layer, in brackets the share of a streaming read of the same minutes that their "
        "bytes amount to.\n"
    )
    parts = [head]
    for geometry in dict.fromkeys(cell["geometry"] for cell in content["cells"]):
        mine = [cell for cell in content["cells"] if cell["geometry"] == geometry]
        states = list(mine[0]["states"])
        lines = [
            [str(cell["threads"]), str(cell["batch"])]
            + [f"{cell['distinct_experts']:.0f}", f"{cell['bf16_ideal_ms']:.1f}"]
            + [_cell(cell["states"].get(state)) for state in states]
            for cell in mine
        ]
        columns = [">threads", ">rows", ">experts", ">bf16 ideal", *(f">{state}" for state in states)]
        parts.append(f"\n**{geometry}**\n\n" + rows(columns, lines))
    return "".join(parts)


def _cell(state: dict[str, Any] | None) -> str:
    return "–" if state is None else f"{state['ms']:.2f} ({state['of_stream']:.0%})"


def engine(content: dict[str, Any]) -> str:
    """Decode steps of vLLM, and a prompt."""
    machine, cells = content["machine"], content["cells"]
    head = (
        f"{content['geometry']}, {content['layers']} layers with random weights, vLLM "
        f"{machine['versions']['vllm']} on the same processor ({machine['date']}, seed {content['seed']}, medians of "
        f"{content['rounds']} interleaved rounds of {content['tokens']} tokens). Milliseconds a step, in brackets the "
        "speed-up over stock and the one that bytes allow.\n\n"
    )
    states = list(cells[0]["step_ms"])
    lines = [
        [state, f"{cells[0]['step_ms'][state]['bits']:.2f}"]
        + [
            f"{found['median']:.1f} ({found['speed_up']:.2f} of {found['bound']:.2f})"
            for found in (cell["step_ms"][state] for cell in cells)
        ]
        for state in states
    ]
    table = rows(["experts", ">bits", *(f">batch {cell['batch']}" for cell in cells)], lines)
    prompt = content["prompt"]
    if not prompt:
        return head + table
    tail = (
        f"\nA prompt of {prompt['tokens']:,} tokens to its first token: stock {prompt['stock']:.2f} s, planes "
        f"{prompt['planes']:.2f} s ({prompt['stock'] / prompt['planes']:.2f} of stock's speed).\n"
    )
    return head + table + tail
