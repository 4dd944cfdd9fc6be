"""The tables of docs/offload.md that no speed is in.

python benchmarks/offload.py routing|quality --output docs/results/offload.json
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/offload.md"
PARTS = (0.25, 0.5)


def blocks() -> list[Block]:
    content = load("offload.json")
    if content is None:
        return []
    found = []
    if models := content.get("routing"):
        found += [
            Block(PAGE, "offload consistency", consistency(models)), Block(PAGE, "offload caches", caches(models)),
            Block(PAGE, "offload sharing", sharing(models)), Block(PAGE, "offload fetching", fetching(models)),
        ]  # fmt: skip
    if "quality" in content:
        found.append(Block(PAGE, "offload quality", quality(content["quality"])))
    return found


def percent(found: dict[str, Any], value: str = "hit_rate") -> str:
    """With its interval, if there were two or more to draw from."""
    low, high = found["low"], found["high"]
    return f"{100 * found[value]:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if low < high else "")


def consistency(models: dict[str, Any]) -> str:
    """SRP and SCH, as their authors print them."""
    windows = list(next(iter(models.values()))["summary"]["srp"])
    sizes = list(next(iter(models.values()))["summary"]["sch"])
    lines = []
    for name, found in models.items():
        summary = found["summary"]
        srp = [percent(summary["srp"][window], "value") for window in windows]
        sch = [percent(summary["sch"][size], "value") for size in sizes]
        lines.append([f"{name}, {found['requests']} requests, {found['tokens']:,} tokens", *srp, *sch])
    lines.append(["OLMoE-1B-7B, published (arXiv 2505.16056)", "64.7", "50.9", "45.5", "42.6", *["–"] * len(sizes)])
    heads = [f">SRP {window}" for window in windows] + [f">SCH {float(size):g}K" for size in sizes]
    return rows(["model", *heads], lines)


def caches(models: dict[str, Any]) -> str:
    parts = []
    for name, found in models.items():
        if not (made := found["caches"]):
            continue
        batches = sorted({row["batch"] for row in made})
        lines = []
        for rule, scope in dict.fromkeys((row["rule"], row["scope"]) for row in made):
            mine = {(row["batch"], row["share"]): row for row in made if (row["rule"], row["scope"]) == (rule, scope)}
            lines.append([f"`{rule}`", scope, *(percent(mine[batch, part]) for batch in batches for part in PARTS)])
        heads = [f">batch {batch}, {100 * part:.0f} %" for batch in batches for part in PARTS]
        parts.append(
            f"**{name}**, memory for a quarter and for half of the experts\n\n"
            + rows(["rule", "memory of a", *heads], lines)
        )
    return "\n".join(parts)


def sharing(models: dict[str, Any]) -> str:
    lines = []
    for name, found in models.items():
        if not found["caches"]:
            continue
        batch = max(row["batch"] for row in found["caches"])
        plain = [row for row in found["caches"] if row["batch"] == batch]
        for policy, kl, made in [("none", 0.0, plain), *((s["policy"], s["kl"], s["caches"]) for s in found["shared"])]:
            of = {row["share"]: row for row in made if (row["rule"], row["scope"]) == ("lru", "layer")}
            row = [name, f"`{policy}`" if kl else policy, f"{kl:.4f}", f"{of[PARTS[0]]['union']:.1f}"]
            for part in PARTS:
                row += [percent(of[part]), f"{of[part]['experts_read']:.1f}"]
            lines.append(row)
    heads = [head for part in PARTS for head in (f">hits, {100 * part:.0f} %", ">experts read a step")]
    return rows(["model", "policy", ">KL", ">union", *heads], lines)


def fetching(models: dict[str, Any]) -> str:
    lines = []
    for name, found in models.items():
        base = found["fetching"]["rows"]["none"]["seconds"]
        for way, row in found["fetching"]["rows"].items():
            right = "–" if way == "none" else f"{100 * row['precision']:.1f}"
            lines.append(
                [name, way, f"{base / row['seconds']:.3f}", f"{100 * row['stalled']:.1f}", right, f"{row['read']:.1f}"]
            )
    note = "; ".join(f"{100 * found['fetching']['gates_right']:.1f} % on the {name}" for name, found in models.items())
    made = rows(["model", "fetched ahead", ">speed-up", ">stalled, %", ">needed, %", ">experts read a token"], lines)
    return made + f"\nOf the experts that a layer uses, the gates foretell {note}.\n"


def quality(found: dict[str, Any]) -> str:
    """Loss and bytes of every way of reading misses."""
    lines = []
    for row in found["rows"]:
        kl = "0" if row["kl"] == 0 else f"{row['kl']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        lines.append([
            str(row["batch"]), f"{100 * row['memory']:.0f} %", f"`{row['on_miss']}`", kl, f"{row['over_exact']:.2f}",
            f"{100 * row['hit_rate']:.1f}",
        ])  # fmt: skip
    head = (
        f"The reference model, experts rounded into planes of {', '.join(map(str, found['depths']))} bits, "
        f"{found['requests']} sequences of {found['tokens']} tokens, LRU. KL in nats a token against all in memory.\n\n"
    )
    return head + rows(["batch", "memory", "on_miss", ">KL", ">bytes over exact", ">hits, %"], lines)
