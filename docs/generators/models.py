"""The tables of docs/models.md.

python benchmarks/models_recruit.py WORK CORPUS --output docs/results/models-recruit.json
python benchmarks/models_modes.py WORK --output docs/results/models-modes.json
python benchmarks/models_fusion.py WORK CORPUS --experts prose python math --output docs/results/models-fusion.json
python benchmarks/models_graphs.py WORK --output docs/results/models-graphs.json
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/models.md"


def blocks() -> list[Block]:
    names = ("recruit", "fusion", "modes", "graphs")
    recruit, fusion, modes, graphs = (load(f"models-{name}.json") for name in names)
    made = []
    if recruit is not None:
        made += [Block(PAGE, "recruiting", recruiting(recruit)), Block(PAGE, "cascades", cascades(recruit))]
    if fusion is not None:
        made.append(Block(PAGE, "fusion", fused(fusion)))
    if modes is not None:
        made.append(Block(PAGE, "modes", by_mode(modes)))
    if graphs is not None:
        made.append(Block(PAGE, "graphs", on_graphs(graphs)))
    return made


def by_mode(content: dict[str, Any]) -> str:
    lines = []
    for one in content["rows"]:
        budget = f"{one['budget']:g}" if "budget" in one else ""
        if "refused" in one:
            why = "no better than chance" if "random" in one["refused"] else "too little to ask slowly at all"
            lines.append([one["selector"], budget, f"refused: {why}", *[""] * 6])
            continue
        spent = f"{one['slow_tokens']:.2f} ± {one['slow_tokens_half_width']:.2f}" if budget else ""
        lines.append([
            one["selector"], budget, spent, f"{one['tokens']:.2f}", f"{one['right']:.1%} ± {one['half_width']:.1%}",
            f"{one['random']:.1%}", f"{one['oracle']:.1%}", f"{one['slow_of_long_easy']:.0%}",
            f"{one['slow_of_short_hard']:.0%}",
        ])  # fmt: skip
    heads = [
        "selector", ">budget of slow tokens", ">spent", ">tokens in all", ">right", ">random, equal tokens",
        ">oracle, equal tokens", ">slow: long easy", ">slow: short hard",
    ]  # fmt: skip
    head = (
        f"{content['items']} sums, calibrated on {content['calibrated_on']} others; tokens are means over all items, ± "
        "is a 95 % interval over items.\n\n"
    )
    return head + rows(heads, lines)


def recruiting(content: dict[str, Any]) -> str:
    lines = []
    for one in content["rows"]:
        rule = one["rule"] if one["rule"] in ("kNN", "oracle", "the item's domain") else f"`{one['rule']}`"
        lines.append([
            rule, str(one["recruits"]), f"{one['right']:.1%} ± {one['half_width']:.1%}",
            f"{one['gain']:+.1%} ± {one['gain_half_width']:.1%}", str(one["experts_used"]), str(one["loads_grouped"]),
            f"{one['bytes_grouped'] / 1e6:.0f}", str(one["loads_one_by_one"]), f"{one['bytes_one_by_one'] / 1e6:.0f}",
        ])  # fmt: skip
    heads = [
        "rule", ">experts an item", ">right", ">above the best single one", ">models used", ">loads, grouped", ">MB",
        ">loads, item by item", ">MB",
    ]  # fmt: skip
    head = (
        f"{content['items']} items ({content['what']}, chance {content['chance']:.0%}), profiles of "
        f"{content['profile_items']} items from other documents with {content['skills']} skills; ± is a 95 % interval "
        f"over items. The best single expert is `{content['best']}`.\n\n"
    )
    return head + rows(heads, lines)


def cascades(content: dict[str, Any]) -> str:
    ends, *found = content["cascade"]
    lines = []
    for one in found:
        names = " + ".join(one["signals"])
        if "refused" in one:
            lines.append([names, f"{one['share_asked_for']:.0%}", "refused: no better than chance", "", "", ""])
            continue
        lines.append([
            names, f"{one['share_asked_for']:.0%}", f"{one['passed_on']:.0%}",
            f"{one['right']:.1%} ± {one['half_width']:.1%}", f"{one['random']:.1%}", f"{one['oracle']:.1%}",
        ])  # fmt: skip
    heads = ["signal", ">share to pass on", ">passed on", ">right", ">random, equal cost", ">oracle, equal cost"]
    weak, strong = ends["weak"], ends["strong"]
    head = (
        f"The base alone: {weak['right']:.1%} ± {weak['half_width']:.1%}; the expert that `top1` names, always: "
        f"{strong['right']:.1%} ± {strong['half_width']:.1%}.\n\n"
    )
    return head + rows(heads, lines)


def fused(content: dict[str, Any]) -> str:
    sides = [content[name] for name in ("one domain", "spliced")]
    lines = []
    for one, other in zip(*(side["rows"] for side in sides), strict=True):
        name, *plan = one["row"].split(", ", 1)
        cost = [""] * 3
        if "switches_a_token" in one:
            cost = [f"{one[name]:.2f}" for name in ("switches_a_token", "late_tokens_a_token", "experts_a_step")]
        lines.append([
            name + "".join(f", `{text}`" for text in plan),
            *(text for side in (one, other) for text in (
                f"{side['accuracy']:.1%}", f"{side['against_router_alone']:+.1%} ± {side['against_half_width']:.1%}",
                f"{side['nats']:.3f}",
            )),
            *cost,
        ])  # fmt: skip
    heads = ["row", ">accuracy", ">above the router alone", ">nats a token", ">spliced: accuracy",
             ">above the router alone", ">nats a token", ">switches a token", ">late tokens a token",
             ">experts a step"]  # fmt: skip
    head = (
        f"{sides[0]['windows']} windows of {content['length']} tokens each; nats at each row's best temperature. Two "
        f"experts' best tokens differ at {sides[0]['informative']:.0%} of the positions. Costs are of windows of one "
        f"domain, {content['texts_a_step']} texts a step; late tokens are read by an expert because others were chosen "
        "when they came.\n\n"
    )
    counts = ("tokens", "switches", "late_tokens", "prompt_tokens")
    written = []
    for one in content["written"]:
        a_step = [f"{one['models_a_step']:.2f}", f"{one['bytes_a_step'] / 1e6:.1f}"]
        written.append([f"`{one['plan']}`", f"{one['switch_cost']:g}", *(str(one[name]) for name in counts), *a_step])
    heads_written = [
        "plan", ">cost of a switch", ">tokens", ">switches", ">late tokens", ">tokens of prompts", ">models a step",
        ">MB a step",
    ]  # fmt: skip
    told = f"\nWriting with `carpool.fuse`, {content['texts_a_step']} texts, greedily:\n\n"
    return head + rows(heads, lines) + told + rows(heads_written, written)


LABELS = {"mlp": "MLP", "gcn": "GCN", "sage": "SAGE", "skip": "GCN + MLP, added", "gcn needs": "GCN on needs alone"}


def on_graphs(content: dict[str, Any]) -> str:
    graph = content["graph"]
    lines = []
    for one in content["rows"]:
        parts = [
            f"{one[name]:.1%}" if name in one else "" for name in ("weak", "strong", "drawn", "mixed", "confidence")
        ]
        gain = f"{one['above_gcn']:+.1%} ± {one['above_gcn_half_width']:.1%}"
        right = f"{one['right']:.1%} ± {one['half_width']:.1%}"
        lines.append([LABELS.get(one["method"], one["method"]), right, gain, *parts])
    heads = ["method", ">right", ">above GCN", ">its MLP", ">its GCN", ">drawn", ">mixed", ">mean confidence"]
    head = (
        f"{graph['nodes']:,} packages of {graph['of']:,}, {graph['edges']:,} edges, {graph['classes']} sections, "
        f"homophily {graph['homophily']:.2f}, the largest degree {graph['largest_degree']:,}; {content['splits']} "
        f"splits, {content['settings']} settings for each method; ± is a 95 % interval over nodes.\n\n"
    )
    reading = []
    for one in content["draws"]:
        reading.append([one["method"], "drawn", *[""] * 3, *_read(one["read"])])
    for one in content["curves"]:
        share = f"{one['share']:.0%}"
        if "refused" in one:
            why = "no better than chance" if "random" in one["refused"] else "one of the two alone would do"
            reading.append([one["method"], share, f"refused: {why}", *[""] * (2 + len(_read(None)))])
            continue
        gain = f"{one['above_random']:+.1%} ± {one['above_random_half_width']:.1%}"
        told_right = (f"{one['right']:.1%}", gain, f"{one['oracle']:.1%}")
        reading.append([one["method"], share, *told_right, *_read(one["read"])])
    heads_read = ["method", ">passed on", ">right", ">above random, equal share", ">oracle, equal share",
                  ">read for 1 node", ">for 16", ">for 256"]  # fmt: skip
    told = (
        "\nNodes read for a batch, by what passes the gate and, after the stroke, if the GCN is asked about all of it "
        "(one split; the gate is calibrated on other nodes than these):\n\n"
    )
    return head + rows(heads, lines) + told + rows(heads_read, reading)


def _read(read: dict[str, dict[str, float]] | None) -> list[str]:
    if read is None:
        return ["", "", ""]
    return [f"{one['read']:,.0f} / {one['always']:,.0f}" for one in read.values()]
