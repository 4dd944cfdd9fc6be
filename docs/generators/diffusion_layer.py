"""Layer times in docs/diffusion.md: `python benchmarks/diffusion_layer.py --output ...diffusion-layer.json`."""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows, with_interval

NAMES = {"llada2.0-mini": "LLaDA2.0-mini", "sdar-30b-a3b": "SDAR-30B-A3B"}
HEADS = (
    "layer of", "experts", "state", ">experts read", ">layer, ms", ">router and policy, ms", ">speed over stock",
    ">over random sets", ">over the same ids",
)  # fmt: skip


def blocks() -> list[Block]:
    content = load("diffusion-layer.json")
    return [] if content is None else [Block("docs/diffusion.md", "diffusion layer", page(content))]


def page(content: dict[str, Any]) -> str:
    """What was measured, policies against stock and their ideals, and time by experts read."""
    cells = list(content["cells"].values())
    return f"{said(content, cells)}\n\n{policies(cells)}\n{unions(cells)}"


def said(content: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    machine, one = content["machine"], cells[0]
    geometries = {cell["geometry"]: cell for cell in cells}
    read = "; ".join(
        f"{NAMES.get(name, name)}: {cell['experts']} experts, {cell['top_k']} a row, {cell['expert_mb']:.1f} MB each; "
        f"stock reads {cell['natural_union']:.0f} here and {cell['published_union']:.0f} in {cell['published_in']}"
        for name, cell in geometries.items()
    )
    return (
        f"One MoE layer with random weights and the sizes of the model, a block of {one['rows']} rows, {one['dtype']}, "
        f"{one['threads']} threads. {read}. {machine['cpu']}, last-level cache {machine['last_level_cache']}, torch "
        f"{machine['versions']['torch']}, {machine['date']}; {one['rounds']} rounds of every state in turn, seed "
        f"{one['seed']}; ratios are medians over rounds with 95 % intervals. Random sets: the ideal, sets of the same "
        "size and no policy running. Same ids: those of the policy, and none running."
    )


def policies(cells: list[dict[str, Any]]) -> str:
    lines = []
    for cell in cells:
        start = [NAMES.get(cell["geometry"], cell["geometry"]), cell["implementation"]]
        if cell["failed"]:
            lines.append([*start, cell["failed"], "", "", "", "", "", ""])
        for name, row in cell["states"].items():
            if "router_ms" in row:
                ratios = [_ratio(row, against) for against in ("stock", "ideal", "replayed")]
                shown = "stock" if name == "stock" else f"`{name}`"
                times = [f"{row['union']:.0f}", f"{row['layer_ms']:.1f}", f"{row['router_ms']:.2f}"]
                lines.append([*start, shown, *times, *ratios])
    return rows(HEADS, lines)


def unions(cells: list[dict[str, Any]]) -> str:
    """Time of the layer by the number of experts read, with as many pairs in every column."""
    counts = sorted({int(name.split(": ")[1]) for cell in cells for name in cell["states"] if name.startswith("union")})
    lines = []
    for cell in cells:
        found = [cell["states"].get(f"union: {count}") for count in counts]
        times = ["" if row is None else f"{row['layer_ms']:.1f}" for row in found]
        lines.append([NAMES.get(cell["geometry"], cell["geometry"]), cell["implementation"], *times])
    heads = ("ms by experts read", "experts", *(f">{count}" for count in counts))
    return rows(heads, lines)


def _ratio(row: dict[str, Any], against: str) -> str:
    value = row.get(f"speed_over_{against}")
    return "" if value is None else with_interval(value)
