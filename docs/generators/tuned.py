"""What `carpool tune` finds: `python benchmarks/tuned.py` and `python benchmarks/tuned_serve.py`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from carpool.evaluate.intervals import estimate
from generators import Block, load, rows, with_interval
from generators.surrogates import RESULTS, comparison

PAGE = "docs/tune.md"
HEADS = (
    "tuned for", "chosen", ">KL, nats/token", ">perplexity ratio", ">experts, of stock", ">bytes, of stock",
    "best of the grid", ">its KL", ">its experts", ">its bytes", ">bytes between settings",
)  # fmt: skip


def blocks() -> list[Block]:
    makers = (("tuned", "tuned.json", table), ("tuned serve", "tuned-serve.json", served))
    found = [(name, load(file), maker) for name, file, maker in makers]
    return [Block(PAGE, name, maker(content)) for name, content, maker in found if content is not None]


def served(content: dict[str, Any]) -> str:
    """vLLM with the file and without."""
    summary, machine = content["summary"], content["machine"]
    stock, tuned = summary["stock"], summary["tuned"]
    lines = [
        ["stock", f"{stock['union']:.1f}", "", "100%", with_interval(stock["tokens_per_second"], 0), "1"],
        ["tuned file", f"{tuned['union']:.1f}", f"{tuned['surrogates']:.1f}", f"{tuned['bytes_of_stock']:.0%}",
         with_interval(tuned["tokens_per_second"], 0), with_interval(summary["throughput_over_stock"], 2)],
    ]  # fmt: skip
    heads = ("", ">experts read a layer and step", ">surrogates", ">bytes, of stock", ">tokens/s", ">of stock")
    size = f"{content['prompt']} prompt and {content['new_tokens']} new tokens"
    return (
        f"`{content['policy']}`; batch {content['batch']}, {size}, {len(content['rounds'])} rounds, "
        f"{content['threads']} thread(s), {content['dtype']}; {machine['cpu']}; vLLM {machine['versions']['vllm']}, "
        f"{machine['date']}.\n\n{rows(heads, lines)}"
    )


def table(content: dict[str, Any]) -> str:
    """A line a file: what it keeps and reads, and the setting of the grid that keeps as much and reads least."""
    compare = comparison()
    grid = compare.load(RESULTS / "frontier.json")
    batch = content["cells"][0]["batch"]
    curves = compare.curves(grid, batch, "all")
    (stock,) = curves.pop("stock")
    settings = [(label, measured(one, stock)) for label, own in curves.items() for one in own]
    files = compare.pooled(content, batch, "all")
    (beside,) = files["stock"]
    lines = []
    for about in content["files"]:
        (sums,) = files[about["file"]]
        own = measured(sums, beside)
        target = {"bytes" if name == "union" else name: value for name, value in about["target"].items()}  # as it was
        best = rival(target, own, [one for _, one in settings])
        between = interpolated(own["kl"].value, [[one for name, one in settings if name == label] for label in curves])
        chosen = f"`{about['policy']}`"
        if about["layers"]:
            values = [value for settings in about["layers"].values() for value in settings.values()]
            chosen += f", {len(values)} layers with {min(values)} to {max(values)}"
        lines.append(
            [
                said(target), chosen, with_interval(asdict(own["kl"]), 4),
                with_interval(asdict(own["perplexity"]), 3),
                f"{own['union'].value:.1%}", f"{own['bytes'].value:.1%}",
                *(
                    ["none", "", "", ""] if best is None else
                    [f"`{best['policy']}`", f"{best['kl'].value:.4f}", f"{best['union'].value:.1%}",
                     f"{best['bytes'].value:.1%}"]
                ),
                "n/a" if between is None else f"{between:.1%}",
            ]
        )  # fmt: skip
    same = beside["union"].sum() == stock["union"].sum()
    notes = [] if same else ["The files were measured on other batches of that text than the grid's settings."]
    if any(about["layers"] for about in content["files"]):
        notes.append(f"Made on {content['created'][:10]}, when `tune` still gave single layers numbers of their own.")
    return rows(HEADS, lines) + (f"\n{' '.join(notes)}\n" if notes else "")


def measured(sums: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Metrics with intervals of a setting's sums by batch."""
    return {
        "policy": sums["policy"],
        "kl": estimate(sums["kl"], sums["tokens"], "log"),
        "perplexity": estimate(sums["nll"] - stock["nll"], sums["tokens"], "exp"),
        "union": estimate(sums["union"], stock["union"]),
        "bytes": estimate(sums["bytes"], stock["union"]),
    }


def rival(target: dict[str, float], own: dict[str, Any], settings: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The setting that keeps the target at the fewest bytes; where bytes are the target, the one of least KL within
    the file's own."""
    if "bytes" in target:
        near = [one for one in settings if one["bytes"].value <= max(own["bytes"].value, target["bytes"])]
        return min(near, key=lambda one: one["kl"].value, default=None)
    name = "kl" if "max_kl" in target else "perplexity"
    (most,) = target.values()
    good = [one for one in settings if one[name].value <= most]
    return min(good, key=lambda one: one["bytes"].value, default=None)


def interpolated(kl: float, methods: list[list[dict[str, Any]]]) -> float | None:
    """The fewest bytes at which any method has this KL, log KL being linear between its settings."""
    found = []
    for settings in methods:
        own = sorted(settings, key=lambda one: one["kl"].value)
        if len(own) > 1 and own[0]["kl"].value <= kl <= own[-1]["kl"].value:
            logs = np.log([one["kl"].value for one in own])
            found.append(float(np.interp(np.log(kl), logs, [one["bytes"].value for one in own])))
    return min(found, default=None)


def said(target: dict[str, float]) -> str:
    ((name, value),) = target.items()
    return f"`--{name.replace('_', '-')} {value:g}`"
