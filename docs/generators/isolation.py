"""The tables of docs/isolation.md.

carpool evaluate --interference --co-batches 8 -p "xshare(budget=16)" ... --json docs/results/interference.json
python benchmarks/attack.py --output docs/results/attack.json
python benchmarks/inflation.py --output docs/results/inflation.json
python benchmarks/membership.py --output docs/results/membership.json
python benchmarks/soak.py --minutes 10 --output docs/results/soak.json
CARPOOL_FUZZ_REPORT=docs/results/fuzz.json python -m pytest tests/test_fuzz.py -m slow
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/isolation.md"
FULL = "xshare(budget=1.0)"


def blocks() -> list[Block]:
    made = []
    for name, table in TABLES.items():
        content = load(f"{name}.json")
        if content is not None:
            made.append(Block(PAGE, name, table(content)))
    return made


def interference(content: dict[str, Any]) -> str:
    first = content["results"][0]
    lines = []
    for row in content["results"]:
        both = [row["kl"], row["kl_between_co_batches"]]
        kls = [
            f"{value:.2g}" for one in both for value in (one["mean"], one["quantiles"]["p99"], one["quantiles"]["p100"])
        ]
        shares = [row["flipped_greedy"], row["unstable_greedy"], row["worst_displaced_mass"]]
        lines.append([_code(row["policy"]), *kls, *(f"{share:.1%}" for share in shares)])
    heads = [
        "policy",
        ">KL mean",
        ">p99",
        ">worst",
        ">between mean",
        ">p99",
        ">worst",
        ">flipped",
        ">unstable",
        ">displaced",
    ]
    beside, tokens = first["co_batches"], first["tokens"] * first["co_batches"]
    head = f"{first['sequences']} sequences at batch {first['batch']}, each beside {beside} sets of neighbours, "
    return f"{head}{tokens:,} tokens a policy.\n\n" + rows(heads, lines)


def attack(content: dict[str, Any]) -> str:
    lines = []
    for row in content["results"]:
        bound = "none" if row["floor"] is None else f"{row['floor']:g}"
        worst = max(row["displaced_worst"], row["token_displaced_worst"])
        cells = [f"{row['displaced_random_mean']:.3f}", f"{row['displaced_random_max']:.3f}", f"{worst:.4f}"]
        cells += [f"{row['kl_random_mean']:.4f}", f"{row['kl_random_max']:.3f}", f"{row['kl_worst']:.3f}"]
        cells += [f"{row['loss_random_mean']:+.3f}", f"{row['loss_random_max']:+.2f}", f"{row['loss_worst']:+.2f}"]
        lines.append([_code(row["policy"]), bound, *cells, f"{row['victims_flipped']:.0%}"])
    heads = [
        "policy", ">floor (bound)", ">displaced, random mean", ">random max", ">worst found", ">KL, random mean",
        ">random max", ">worst found", ">loss change, random mean", ">random max", ">worst found", ">victims flipped",
    ]  # fmt: skip
    given, held = content["arguments"], all(row["held"] for row in content["results"])
    head = (
        f"{given['attackers']} attackers beside one victim; tokens: {given['victims']} victims, each attacked "
        f"{2 * given['restarts']} times, {content['results'][0]['co_batches']:,} co-batches a line; routing: "
        f"{content['routing']['victims']} victims in each of {content['model']['layers']} layers, "
        f"{content['results'][0]['routed']:,} co-batches a line. The bound held in {'all' if held else 'NOT ALL'} of "
        "them.\n\n"
    )
    return head + rows(heads, lines)


def inflation(content: dict[str, Any]) -> str:
    lines = []
    for row in content["results"]:
        cells = [
            f"{row['natural']:.1f}",
            f"{row['union']:.1f}",
            f"{row['union'] / row['natural']:.0%}",
            f"{row['excess']:+d}",
        ]
        lines.append([_code(row["policy"]), row["attack"], *cells, f"{row['displaced']:.1%}"])
    heads = [
        "policy",
        "attackers",
        ">natural union",
        ">union",
        ">share",
        ">most beyond natural",
        ">users' displaced mass",
    ]
    given = content["arguments"]
    users, attackers = given["batch"] - given["attackers"], given["attackers"]
    head = f"{users} users and {attackers} attackers a step, {content['experts']} experts.\n\n"
    ties = [
        [
            _code(row["policy"]),
            row["rows"],
            row["logits"],
            f"{row['decided_by_ties']:.1%}",
            f"{row['changed_by_order']:.1%}",
        ]
        for row in content["ties"]
    ]
    tie_heads = ["policy", "attackers", "logits", ">coresets decided by the tie rule", ">changed by the order of rows"]
    return head + rows(heads, lines) + "\n" + rows(tie_heads, ties)


def membership(content: dict[str, Any]) -> str:
    lines = [
        [_code(row["policy"]), row["group"], str(row["batch"]), f"{row['spread']:.2g}", f"{row['domain_auc']:.2f}",
         f"{row['experts_auc']:.2f}", f"{row['experts_auc_best_tenth']:.2f}"]
        for row in content["results"]
    ]  # fmt: skip
    heads = ["policy", "group", ">rows", ">spread of a log-probability", ">AUC: domain", ">AUC: experts", ">best tenth"]
    given = content["arguments"]
    head = f"{given['steps']} batches, domains {' and '.join(given['domains'])}, {given['decoded']} decoded tokens.\n\n"
    return head + rows(heads, lines)


def soak(content: dict[str, Any]) -> str:
    load_, verdict, calm = content["load"], content["verdict"], content["calm"]
    before, after = verdict["megabytes_after_warm_up"], verdict["megabytes_at_the_end"]
    rising, refusals = _yes(verdict["counters_never_fall"]), _yes(verdict["refusals_counted"])
    lines = [
        ["minutes, clients, places in the batch", "{minutes:g}, {clients}, {batch}".format(**content["arguments"])],
        ["requests answered, tokens", f"{load_['requests']:,}, {load_['tokens']:,}"],
        ["clients that hung up", str(load_["disconnects"])],
        ["changes of policy, of these refused as they should be", f"{load_['changes']}, {load_['refused']}"],
        ["scrapes of the metrics", str(len(load_["samples"]))],
        ["errors, unexpected answers", f"{load_['errors']}, {load_['unexpected_answers']}"],
        ["memory after warm-up, at the end", f"{before:,.0f} MB, {after:,.0f} MB ({verdict['growth']:+.2%})"],
        ["counters never fall; refusals counted", f"{rising}; {refusals}"],
        ["decoded rows counted in the calm phase", f"{calm['decoded_rows_counted']:,.0f}"],
        ["decoded rows asked for in it", f"{calm['decoded_rows_expected']:,}"],
        ["requests still running at the end", f"{calm['running_at_the_end']:.0f}"],
    ]
    return rows(["what", ">result"], lines)


def fuzz(content: dict[str, Any]) -> str:
    lines = [[name.replace("_", " "), *(f"{row[key]:,}" for key in ("inputs", "refused", "read"))]
             for name, row in content["targets"].items()]  # fmt: skip
    total = sum(row["inputs"] for row in content["targets"].values())
    given = content["arguments"]
    head = f"{given['seconds'] / 60:g} minutes on one core, seed {given['seed']}, {total:,} inputs, none of which did "
    return (
        head
        + "anything else than be read or refused in one line.\n\n"
        + rows(["what was fed", ">inputs", ">refused", ">read"], lines)
    )


def overhead(content: dict[str, Any]) -> str:
    """What a policy costs by itself: one that takes nothing away against stock, and all others against the same ids
    without a policy."""
    found = [cell["states"] for cell in content["cells"].values() if not cell["failed"]]
    idle = [states[FULL]["throughput_over_stock"] for states in found if FULL in states]
    replayed = [row["throughput_over_replayed"] for states in found for row in states.values()
                if "throughput_over_replayed" in row]  # fmt: skip

    def span(ratios: list[dict[str, float]]) -> str:
        values = [one["value"] for one in ratios]
        low = min(one["low"] for one in ratios)
        return f"{min(values):.2f} to {max(values):.2f} (95 % intervals reach down to {low:.2f})"

    return (
        f"Measured on vLLM's CPU build with random weights ([decode table](vllm.md)), {len(idle)} configurations of "
        f"model, threads and batch: a policy that takes nothing away (`{FULL}`) decodes at {span(idle)} times stock's "
        f"speed, and policies that do at {span(replayed)} times the speed of the same experts without a policy.\n"
    )


def _code(policy: str) -> str:
    return policy if policy == "stock" else f"`{policy.replace('|', chr(92) + '|')}`"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


TABLES = {
    "interference": interference, "attack": attack, "inflation": inflation, "membership": membership, "soak": soak,
    "fuzz": fuzz, "vllm-decode": overhead,
}  # fmt: skip
