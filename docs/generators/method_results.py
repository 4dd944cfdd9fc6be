"""Tables of `docs/methods.md` that look at one question each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from generators import Block, load, rows, with_interval

PAGE = "docs/methods.md"


def blocks() -> list[Block]:
    makers = (
        ("experts per token", "experts-per-token.json", experts_per_token),
        ("domain pruning", "domain-pruning.json", domain_pruning),
        ("expert parallel recorded", "expert-parallel-recorded.json", expert_parallel),
        ("expert parallel simulated", "expert-parallel-simulated.json", expert_parallel),
        ("naee regret", "naee-regret.json", naee_regret),
        ("base weight", "base-weight.json", base_weight),
    )
    found = [(name, load(file), maker) for name, file, maker in makers]
    return [Block(PAGE, name, maker(content)) for name, content, maker in found if content is not None]


def experts_per_token(content: dict[str, Any]) -> str:
    """Pairs and union over stock's, by batch size."""
    results = content["results"]
    stock = {row["batch"]: row for row in results if row["policy"] == "stock"}
    names = list(dict.fromkeys(row["policy"] for row in results if row["policy"] != "stock"))
    found = {(row["policy"], row["batch"]): row for row in results}
    heads = ["policy", *(f">{what}, batch {batch}" for batch in stock for what in ("pairs", "union")), ">KL"]
    lines = []
    for name in names:
        cells = [f"`{name}`"]
        for batch in stock:
            row = found[name, batch]
            cells += [f"{row['pairs'] / stock[batch]['pairs']:.0%}", f"{row['union_share']['value']:.0%}"]
        lines.append([*cells, f"{found[name, max(stock)]['kl']['value']:.3f}"])
    facts = ", ".join(f"{row['union']['value']:.1f} at batch {batch}" for batch, row in stock.items())
    tokens = ", ".join(f"{row['decoded_tokens']:,}" for row in stock.values())
    said = f"Stock reads {facts} of {content['model']['experts']} experts. KL at batch {max(stock)}, nats a token;"
    return f"{rows(heads, lines)}\n{said} {tokens} decoded tokens.\n"


def domain_pruning(content: dict[str, Any]) -> str:
    """Perplexity over stock's: rows made from, columns evaluated on; in-domain cells bold."""
    results, settings = content["results"], content["settings"]
    columns = list(content["stock_perplexity"])
    heads = ["ranking", "made from", *(f">{column}" for column in columns)]
    lines = []
    for criterion in ("easy_ep", "frequency", "random"):
        own = [row for row in results if row["criterion"] == criterion]
        for row in sorted(own, key=lambda row: (row["made_from"] != "all", row["made_from"])):
            made = f"seed {row['made_from']}" if criterion == "random" else row["made_from"]
            cells = []
            for column in columns:
                shown = f"{row['perplexity_ratio'][column]['value']:.3f}"
                cells.append(f"**{shown}**" if column == row["made_from"] else shown)
            lines.append([{"easy_ep": "EASY-EP"}.get(criterion, criterion), made, *cells])
    experts = content["model"]["experts"]
    return (
        f"{rows(heads, lines)}\nPerplexity over stock's with {settings['kept']} of {experts} experts kept "
        f"({settings['fill']}); lists from {settings['tokens']:,} tokens of all domains together, evaluated on "
        f"{settings['sequences']} held-out sequences of {settings['sequence']} tokens; seed {settings['seed']}.\n"
    )


def expert_parallel(content: dict[str, Any]) -> str:
    """Experts on the busiest device, layers averaged, with and without a warm-up."""
    results = content["results"]

    def mean(devices: int, policy: str, name: str) -> float:
        return fmean(row[name] for row in results if (row["devices"], row["policy"]) == (devices, policy))

    lines = []
    for devices in sorted({row["devices"] for row in results}):
        for share in sorted({row["policy"].split("(")[1].split(",")[0] for row in results}, reverse=True):
            first, *_ = policies = [f"xshare_expert_parallel({share}, warmup={warmup})" for warmup in (1, 0)]
            before = mean(devices, first, "peak_stock")
            cells = [str(devices), f"{float(share):.0%}", f"{before:.1f}"]
            for policy in policies:
                after = mean(devices, policy, "peak")
                cells += [f"{after:.1f} ({before / after:.1f}x)", f"{mean(devices, policy, 'displaced_mass'):.0%}"]
            lines.append(cells)
    heads = (
        "devices",
        "of a device's experts",
        ">stock",
        ">warm-up 1",
        ">displaced mass",
        ">no warm-up",
        ">displaced mass",
    )
    where = content.get("model", {}).get("name", "simulated routing")
    said = f"{where}: {content['experts']} experts, {content['top_k']} a token, batch {content['batch']}, "
    return f"{rows(heads, lines)}\n{said}{content['steps']} steps, seed {content['seed']}.\n"


def naee_regret(content: dict[str, Any]) -> str:
    """Regret of every ranking, by kind of layer."""
    names = ("easy_ep", "gate", "frequency", "any")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in content["results"]:
        kinds.setdefault(row["layer"].split()[0], []).append(row)
    lines = [
        [
            f"{len(own)} {kind}",
            f"{own[0]['kept']} of {own[0]['experts']}",
            *(_mean_and_range(own, name) for name in names),
        ]
        for kind, own in kinds.items()
    ]
    heads = ("layers", "kept", ">EASY-EP", ">gate sum", ">frequency", ">a random set")
    return f"{rows(heads, lines)}\nMean regret over layers, and its range.\n"


def _mean_and_range(own: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in own]
    return f"{fmean(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def base_weight(content: dict[str, Any]) -> str:
    lines = [
        [f"`{row['policy']}`", row["weight"], f"{row['union']:.1f}",
         with_interval(row["kl"], 4),
         f"{row['perplexity_ratio']['value']:.3f}"]
        for row in content["results"]
    ]  # fmt: skip
    heads = ("policy", "weight, renormalisation", ">union", ">KL, nats/token", ">perplexity ratio")
    kl = {(row["policy"], row["weight"]): row["kl"]["value"] for row in content["results"]}
    ratios = [f"{kl[name, 'after'] / value:.2f}" for (name, weight), value in kl.items() if weight == "before"]
    return f"{rows(heads, lines)}\nKL after over KL before, in this order: {', '.join(ratios)}.\n"
