"""The tables of docs/offload.md.

python benchmarks/offload.py routing|quality|speed --output docs/results/offload.json
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
    for name, make in (("quality", quality), ("speed", speed)):
        if name in content:
            found.append(Block(PAGE, f"offload {name}", make(content[name])))
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


def speed(found: dict[str, Any]) -> str:
    """Tokens a second, bytes, hits and waiting."""
    lines = []
    for row in found["rows"]:
        hits = "–" if "hit_rate" not in row else f"{100 * row['hit_rate']:.1f}"
        waited = "–" if "waited" not in row else f"{100 * row['waited']:.0f}"
        name = "mmap" if row["name"] == "mmap" else f"`{row['rule']}` a {row['scope']}"
        name += ", fetches ahead" if row.get("prefetch") else ""
        lines.append([
            str(row["batch"]), f"{100 * row['memory']:.0f} %", name, f"`{row['on_miss']}`",
            f"`{row['policy']}`" if row["policy"] else "", f"{row['tokens_per_s']:.2f}",
            f"{row['bytes_per_token'] / 1e6:.0f}", hits, waited,
            f"{100 * row['read_per_s'] / found['direct_read_per_s']:.0f}",
        ])  # fmt: skip
    head = (
        f"{found['geometry']}, random weights, {found['all_experts_bytes'] / 1e9:.1f} GB of experts of "
        f"{found['depths'][-1]} bits; {found['threads']} reading threads alone read "
        f"{found['direct_read_per_s'] / 1e9:.2f} GB/s directly. Experts are chosen as "
        "the reference model's layers chose theirs on its texts. The routing that shares costs "
        f"{found['policy_kl']:.4f} nats a token there. `mmap`: the same kernels on mapped files, which the operating "
        "system reads as they are touched; the pages of experts that were used longest ago are given back, so that no "
        "more stay than elsewhere.\n\n"
    )
    columns = ["batch", "memory", "cache", "on_miss", "policy", ">tokens/s", ">MB a token", ">hits, %", ">waited, %"]
    return head + rows([*columns, ">of the direct rate, %"], lines)
