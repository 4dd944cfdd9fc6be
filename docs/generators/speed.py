"""Speed: `python benchmarks/vllm_decode.py`, `benchmarks/speculative.py` and `benchmarks/vllm_serve.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from generators import ROOT, Block, load, rows, with_interval

MODEL = "demo/src/carpool_demo/model/model.safetensors"
NAMES = {"qwen3-30b-a3b": "Qwen3-30B-A3B", "olmoe-1b-7b": "OLMoE-1B-7B", "gpt-oss-20b": "gpt-oss-20b"}
FULL = "xshare(budget=1.0)"
BEST_KEPT_SINCE = "2026-11-29"  # by `random`, unless it is told `warmup=0`
ALL_HEADS = (
    "threads", "batch", "policy", ">experts read a layer and step", ">tokens/s", ">of stock", ">of random sets",
    ">of the same ids", ">GB of experts a step", ">of read bandwidth",
)  # fmt: skip
README_BATCH = 16
SURROGATE_HEADS = (
    *ALL_HEADS[:4], ">surrogates read", *ALL_HEADS[4:6], ">of `xshare`, same budget", *ALL_HEADS[6:8],
    ">GB of both a step", ">of read bandwidth",
)  # fmt: skip


def blocks() -> list[Block]:
    made: list[Block] = []
    decode = load("vllm-decode.json")
    if decode is not None:
        made.append(Block("README.md", "speed", readme(decode)))
        made.append(Block("docs/vllm.md", "decode table", everything(decode)))
    each = load("vllm-decode-methods.json")
    if each is not None:
        made.append(Block("docs/vllm.md", "methods decode table", methods(each)))
    foreseen = load("vllm-decode-surrogates.json")
    if foreseen is not None:
        made.append(Block("docs/vllm.md", "surrogates decode table", surrogates(foreseen)))
    speculative = load("speculative.json")
    if speculative is not None:
        made.append(Block("docs/vllm.md", "speculative table", speculation(speculative)))
    serve = load("vllm-serve.json")
    if serve is not None:
        made.append(Block("docs/vllm.md", "serve table", server(serve)))
    return made


def cells(content: dict[str, Any]) -> list[dict[str, Any]]:
    """In the order of models, threads and batches; those whose checks failed have no states."""
    return sorted(content["cells"].values(), key=lambda cell: (cell["geometry"], cell["threads"], cell["batch"]))


def where(content: dict[str, Any], cell: dict[str, Any]) -> str:
    """What was measured, on what."""
    machine = content["machine"]
    versions = machine["versions"]
    name = NAMES.get(cell["geometry"], cell["geometry"])
    experts = f"{cell['experts']} experts, {cell['top_k']} a token, {cell['expert_mb']:.1f} MB each"
    alike = [one for one in cells(content) if one["geometry"] == cell["geometry"]]
    rounds = _range(one["rounds"] for one in alike)
    steps = _range(one["steps_per_block"] for one in alike)
    turns = f"{rounds} rounds of {steps} step{'s' * (steps != '1')} of every state in turn in one eager engine"
    return (
        f"Random weights with the layers of {name} ({experts}), {cell['layers']} layers, {cell['dtype']}; "
        f"{machine['cpu']}, {machine['cores']} cores, last-level cache {machine['last_level_cache']}; "
        f"vLLM {versions['vllm']}, torch {versions['torch']}, {machine['date']}; {turns}, seed {cell['seed']}; "
        "ratios are medians over rounds with 95 % intervals."
    )


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def states(cell: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stock and policies; the ideals are columns."""
    return ((name, row) for name, row in cell["states"].items() if not name.startswith(("ideal", "replayed")))


def readme(content: dict[str, Any]) -> str:
    """One geometry at one batch size and the number of threads that is best for stock, in words."""
    found = [cell for cell in cells(content) if cell["geometry"] == "qwen3-30b-a3b" and cell["compiled"]]
    found = [cell for cell in found if cell["batch"] == README_BATCH]
    if not found:
        return "No cell passed its checks.\n"
    cell = max(found, key=_stock_speed)
    stock = cell["states"]["stock"]["union"]
    said = [
        f"{_name(name)} reads {row['union']:.0f} of {stock:.0f} experts and decodes {_ratio(row, 'stock')} times as "
        f"many tokens a second as stock, {_ratio(row, 'ideal')} times as many as random sets of that size"
        for name, row in states(cell)
        if name not in ("stock", "off", FULL)
    ]
    lines = "".join(f"- {one}\n" for one in said)
    return (
        f"In vLLM's CPU build, with the layers of Qwen3-30B-A3B and random weights, batch {cell['batch']}, "
        f"{cell['threads']} threads (medians with 95 % intervals; random sets stand for the ideal, without any policy; "
        f"[all cells, and what it costs where it saves nothing](docs/vllm.md#performance)):\n\n{lines}"
    )


def _stock_speed(cell: dict[str, Any]) -> float:
    return float(cell["states"]["stock"]["tokens_per_second"])


def everything(content: dict[str, Any]) -> str:
    parts = []
    for geometry in sorted({cell["geometry"] for cell in cells(content)}):
        found = [cell for cell in cells(content) if cell["geometry"] == geometry]
        lines = [
            [*_place(cell), _name(name), f"{row['union']:.1f}", f"{row['tokens_per_second']:.1f}",
             _ratio(row, "stock"), _ratio(row, "ideal"), _ratio(row, "replayed"), f"{row['expert_gb_per_step']:.2f}",
             f"{row['share_of_read_bandwidth']:.0%}"]
            for cell in found
            for name, row in states(cell)
        ]  # fmt: skip
        failed = [f"\n{' '.join(_place(cell))}: no speeds, {cell['failed']}.\n" for cell in found if cell["failed"]]
        parts.append(f"{where(content, found[0])}\n\n{rows(ALL_HEADS, lines)}{''.join(failed)}")
    return "\n".join(parts)


def methods(content: dict[str, Any]) -> str:
    """A line a policy; the numbers of threads side by side."""
    found = [cell for cell in cells(content) if not cell["failed"]]
    if not found:
        return "No cell passed its checks.\n"
    heads = ["policy", ">experts read a layer and step"]
    for cell in found:
        threads = f"{cell['threads']} thread{'s' * (cell['threads'] > 1)}"
        heads += [f">{threads}: tokens/s", ">of stock", ">of random sets", ">of the same ids"]
    named = [dict(states(cell)) for cell in found]
    lines = [
        [_name(name), f"{named[0][name]['union']:.1f}"]
        + [text for one in named for text in _speeds(one.get(name))]
        for name in named[0]
    ]  # fmt: skip
    numbers = "Statistics are random numbers: they show speed only."
    idle = ", ".join(f"`{text}`" for text in found[0]["idle"])
    return f"{where(content, found[0])} {numbers}\n\n{rows(heads, lines)}{_renamed(content, named[0])}" + (
        f"\nWithout effect on these weights, and so not timed: {idle}.\n" if idle else ""
    )


def _renamed(content: dict[str, Any], names: Iterable[str]) -> str:
    """What a control that has changed since is called today."""
    old = [name for name in names if name.startswith("random(") and "warmup" not in name]
    if not old or content["machine"]["date"] >= BEST_KEPT_SINCE:
        return ""
    now = " and ".join(f"`{name}` is today's `{name[:-1]}, warmup=0)`" for name in old)
    return f"\n{now}: when this was measured no token's best expert was kept.\n"


def _speeds(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return [""] * 4
    return [f"{row['tokens_per_second']:.1f}", *(_ratio(row, other) for other in ("stock", "ideal", "replayed"))]


def surrogates(content: dict[str, Any]) -> str:
    """Cells with random maps in place of fitted ones."""
    found = cells(content)
    lines = [
        [*_place(cell), _name(name), f"{row['union']:.1f}", f"{row['surrogates'] or 0:.1f}",
         f"{row['tokens_per_second']:.1f}", _ratio(row, "stock"), _ratio(row, "backfill"), _ratio(row, "ideal"),
         _ratio(row, "replayed"), f"{row['expert_gb_per_step']:.2f}", f"{row['share_of_read_bandwidth']:.0%}"]
        for cell in found
        for name, row in states(cell)
    ]  # fmt: skip
    failed = [f"\n{' '.join(_place(cell))}: no speeds, {cell['failed']}.\n" for cell in found if cell["failed"]]
    maps = f"Surrogates are random maps of rank {found[0]['surrogates']['rank']} in int8: they show speed only."
    return f"{where(content, found[0])} {maps}\n\n{rows(SURROGATE_HEADS, lines)}{''.join(failed)}"


def speculation(content: dict[str, Any]) -> str:
    heads = (
        "drafts",
        "policy",
        ">tokens accepted a step",
        ">experts a layer and step",
        ">natively",
        ">of stock's speed",
    )
    lines = []
    for draft, found in content["speculation"].items():
        for name, row in found["states"].items():
            if name != FULL:
                lines.append(
                    [
                        draft, _name(name), f"{row['acceptance_length']:.2f}", f"{row['union']:.1f}",
                        f"{row['natural_union']:.1f}", _ratio(row, "stock"),
                    ]
                )  # fmt: skip
    shown = [row["throughput_over_stock"] for one in content["speculation"].values() for row in one["states"].values()]
    intervals = "with 95 % intervals" if any(one["low"] is not None for one in shown) else "too few for intervals"
    same = hashlib.sha256((ROOT / MODEL).read_bytes()).hexdigest() == content["model_sha256"]
    model = "The reference model" if same else "An earlier version of the reference model"
    about = (
        f"{model}, {content['batch']} requests, {content['prompt_tokens']} prompt and "
        f"{content['new_tokens']} new tokens each, {content['draft_tokens']} draft tokens, greedy. "
        f"Speeds are medians over {content['rounds']} rounds, {intervals}; these weights fit into the caches, "
        f"so they show what a policy costs and nothing of what it saves. {_machine(content)}."
    )
    return f"{about}\n\n{rows(heads, lines)}"


def server(content: dict[str, Any]) -> str:
    summary = content["summary"]
    if "failed" in summary:
        return f"No speeds: {summary['failed']}.\n"
    heads = ("server", ">output tokens/s", ">mean time to first token, ms", ">mean time per output token, ms")
    lines = [
        [name if name == "stock" else f"`{content['policy']}`",
         *(_each(content, name, value) for value in ("output_throughput", "mean_ttft_ms", "mean_tpot_ms"))]
        for name in ("stock", "shared")
    ]  # fmt: skip
    about = (
        f"{NAMES.get(content['geometry'], content['geometry'])} geometry, {content['layers']} layers, "
        f"{content['dtype']}, {content['concurrency']} requests at a time, {content['threads']} thread(s), "
        f"{'eager engines' if content.get('eager') else 'models compiled by vLLM'}, "
        f"each run of {summary['stock']['completed']} requests on a server of its own. "
        f"{_machine(content)}."
    )
    return f"{about}\n\n{rows(heads, lines)}"


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    return f"{machine['cpu']}, vLLM {machine['versions']['vllm']}, {machine['date']}"


def _each(content: dict[str, Any], state: str, value: str) -> str:
    """What every run of a state gave."""
    found = [run["result"][value] for run in content["runs"] if run["state"] == state]
    return ", ".join(f"{one:.1f}" if one < 100 else f"{one:.0f}" for one in found)


def _place(cell: dict[str, Any]) -> list[str]:
    return [str(cell["threads"]), f"{cell['batch']}{'' if cell['compiled'] else ', routing not compiled'}"]


def _name(name: str) -> str:
    named = {"stock": "stock", "off": "plugin switched off", FULL: f"`{FULL}` (all experts)"}
    return named.get(name, f"`{name}`")


def _ratio(row: dict[str, Any], other: str) -> str:
    found = row.get(f"throughput_over_{other}")
    return "" if found is None else with_interval(found)
