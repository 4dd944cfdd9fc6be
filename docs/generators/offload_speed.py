"""The tables of docs/offload.md on speed, and on sharing that knows what is in memory.

python benchmarks/offload.py speed|sharing --folder SCRATCH --output docs/results/offload.json
"""

from __future__ import annotations

from statistics import median
from typing import Any

from generators import Block, load, rows

PAGE = "docs/offload.md"


def blocks() -> list[Block]:
    content = load("offload.json") or {}
    found = []
    if "sharing" in content:
        found.append(Block(PAGE, "offload resident", resident(content["sharing"])))
        found.append(Block(PAGE, "offload outliers", outliers(content["sharing"])))
    if "speed" in content:
        found.append(Block(PAGE, "offload speed", speed(content["speed"])))
        if of_kinds(content["speed"], "mapped", "llama.cpp", "accelerate"):
            found.append(Block(PAGE, "offload limited", limited(content["speed"])))
    return found


def of_kinds(found: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    """Rows of all pieces that are called so, whatever their memory, by batch."""
    held = [row for piece, part in found["rows"].items() for row in part if piece.rsplit(" ", 1)[0] in kinds]
    return sorted(held, key=lambda row: (row["memory"], row["batch"]))


def name_of(row: dict[str, Any]) -> str:
    """What decoded."""
    if row["name"] != "carpool":
        ahead = row.get("read_ahead_kib")
        return str(row["name"]) + (f", reads {ahead} KiB ahead" if ahead and "told" not in row["name"] else "")
    name = f"`{row['rule']}` a {row['scope']}" + (", fetches ahead" if row["prefetch"] else "")
    return name + (", first reads" if row["first"] else "")


def busy(found: dict[str, Any]) -> str:
    """How far from alone these runs were."""
    loads = sorted(row["load"] for part in found["rows"].values() for row in part if "load" in row)
    return f" Load averages of this machine meanwhile: {loads[0]:.1f} to {loads[-1]:.1f}." if loads else ""


def percent(row: dict[str, Any], name: str) -> str:
    return "–" if row.get(name) is None else f"{100 * row[name]:.0f}"


def speed(found: dict[str, Any]) -> str:
    """Tokens a second, bytes, hits and waiting."""
    lines = [
        [
            f"{100 * row['memory']:.0f} %", str(row["batch"]), name_of(row), f"`{row['on_miss']}`",
            f"`{row['policy']}`" if row["policy"] else "", f"{row['tokens_per_s']:.2f}",
            f"{row['bytes_per_token'] / 1e6:.0f}", percent(row, "hit_rate"), percent(row, "waited"),
            percent(row, "while_reading"), f"{100 * row['read_per_s'] / row['direct_read_per_s']:.0f}",
        ]
        for row in of_kinds(found, "exact", "shared", "lossy", "rules", "resident")
    ]  # fmt: skip
    direct = sorted(row["direct_read_per_s"] for row in of_kinds(found, "exact", "shared", "lossy", "rules"))
    head = (
        f"{found['geometry']}, random weights, {found['all_experts_bytes'] / 1e9:.1f} GB of experts of "
        f"{found['depths'][-1]} bits. Experts are chosen as the reference model's layers chose theirs on its texts; "
        f"the routing that shares costs {found['policy_kl']:.4f} nats a token there. The direct rate is what "
        f"{found['threads']} threads read of blocks of an expert's size before and after each row, and nothing else "
        f"({direct[0] / 1e9:.1f} to {direct[-1] / 1e9:.1f} GB/s): beside it what was read while anything was asked for "
        "and not there, and what was read over all of the time. In `first reads` every checksum is compared."
        f"{busy(found)}\n\n"
    )
    heads = ["memory", "batch", "cache", "on_miss", "policy", ">tokens/s", ">MB a token", ">hits, %", ">waited, %"]
    return (
        head + rows([*heads, ">of the direct rate, while reading, %", ">all the time, %"], lines) + "\n" + gains(found)
    )


def gains(found: dict[str, Any]) -> str:
    """The table in three sentences."""
    exact = [row for row in of_kinds(found, "exact", "mapped") if row["name"] == "carpool" and not row["first"]]
    shares = sorted(row["while_reading"] for row in exact)
    plain = {
        (row["memory"], row["batch"]): row["tokens_per_s"]
        for row in exact if not row["prefetch"] and not row["within"]
    }  # fmt: skip
    lossy = {
        (row["memory"], row["batch"]): row["tokens_per_s"] / plain[row["memory"], row["batch"]]
        for row in of_kinds(found, "lossy") if row["on_miss"] == "depth(3)"
    }  # fmt: skip
    shared = {
        (row["memory"], row["on_miss"]): row["tokens_per_s"] / plain[row["memory"], row["batch"]]
        for row in of_kinds(found, "shared") if not row["first"]
    }  # fmt: skip

    def listed(part: float) -> str:
        return ", ".join(f"{value:.1f}" for (memory, _), value in lossy.items() if memory == part)

    parts = sorted({memory for memory, _ in lossy})
    said = "; ".join(f"{listed(part)} with {100 * part:.0f} %" for part in parts)
    both = "; ".join(
        f"{shared[part, 'exact']:.1f} with {100 * part:.0f} %, {shared[part, 'depth(3)']:.1f} with misses at 3 bits"
        for part in parts
    )
    return (
        f"Exact mode reads what it misses at {100 * median(shares):.0f} % of the direct rate (median of {len(shares)} "
        f"rows, {100 * shares[0]:.0f} to {100 * shares[-1]:.0f}). Misses at 3 bits decode so many times as fast, by "
        f"batch: {said} of the experts in memory. Sharing at batch 16: {both}.\n"
    )


def limited(found: dict[str, Any]) -> str:
    """Against others, all under the same limit of memory."""
    lines = [
        [
            f"{100 * row['memory']:.0f} %", str(row["batch"]),
            "`carpool.offload`, exact" + (", fetches ahead" if row.get("prefetch") else "")
            if row["name"] == "carpool" else name_of(row),
            f"{row['tokens_per_s']:.2f}", f"{row['bytes_per_token'] / 1e6:.0f}",
            f"{100 * row['read_per_s'] / row['direct_read_per_s']:.0f}",
        ]
        for row in of_kinds(found, "mapped", "llama.cpp", "accelerate")
    ]  # fmt: skip
    table = rows(["memory", "batch", "", ">tokens/s", ">MB a token", ">of the direct rate, %"], lines)
    said = []
    for part, batch in sorted({(row["memory"], row["batch"]) for row in of_kinds(found, "llama.cpp")}):
        mine = [row for row in of_kinds(found, "mapped", "llama.cpp") if (row["memory"], row["batch"]) == (part, batch)]
        own = max((row["tokens_per_s"] for row in mine if row["name"] == "carpool"), default=0)
        best = {kind: max((row["tokens_per_s"] for row in mine if row["name"].startswith(kind)), default=0)
                for kind in ("mmap", "llama.cpp")}  # fmt: skip
        if own and all(best.values()):
            said.append(
                f"{own / best['mmap']:.1f} and {own / best['llama.cpp']:.1f} (batch {batch}, {100 * part:.0f} %)"
            )
    return table + (
        f"\nExact mode over the best row of mapping the same planes, and over llama.cpp's best: {', '.join(said)}.\n"
    )


def resident(found: dict[str, Any]) -> str:
    """Sharing, blind and knowing."""
    lines = [
        [
            f"{100 * row['memory']:.0f} %", f"`{row['policy']}`" if row["policy"] else "none",
            "beside the budget" if row["free"] else "",
            "0" if abs(row["kl"]) < 1e-9 else f"{row['kl']:.4f} [{row['low']:.4f}, {row['high']:.4f}]",
            f"{row['experts_read']:.2f}", f"{100 * row['hit_rate']:.1f}",
        ]
        for row in found["rows"] if row["on_miss"] == "exact"
    ]  # fmt: skip
    return rows(["memory", "policy", "what is in memory", ">KL", ">experts read, layer and step", ">hits, %"], lines)


def outliers(found: dict[str, Any]) -> str:
    """Misses read shallow, with and without experts that stay."""
    lines = [
        [
            f"{100 * row['memory']:.0f} %", f"`{row['on_miss']}`", "yes" if row["pinned"] else "no",
            f"{row['kl']:.4f} [{row['low']:.4f}, {row['high']:.4f}]", f"{row['bytes_per_token'] / 1e6:.3f}",
        ]
        for row in found["rows"] if row["on_miss"] != "exact"
    ]  # fmt: skip
    return rows(["memory", "on_miss", "pinned", ">KL", ">MB a token"], lines)
