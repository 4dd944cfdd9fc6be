"""The tables of docs/placement.md.

See benchmarks/placement.py, placement_cost.py and placement_quality.py for how docs/results/placement*.json are made.
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows, with_interval

PAGE = "docs/placement.md"


def blocks() -> list[Block]:
    made = []
    for file, tables in TABLES.items():
        content = load(file)
        if content is not None:
            made += [Block(PAGE, name, table(content)) for name, table in tables.items()]
    return made


def planners(content: dict[str, Any]) -> str:
    """Every planner on every trace."""
    parts = []
    for name, trace in content["traces"].items():
        facts = trace["facts"]
        lines = [
            [
                f"`{one['planner']}`", f"{one['later']['peak_tokens']:.2f}", f"{one['later']['peak_activated']:.2f}",
                f"{one['own']['peak_activated']:.2f}", f"{one['later']['fan_out']:.2f}",
                f"{one['later']['rows_sent']['deepep']:.2f}", f"{one['later']['node_rows']:.2f}",
                f"{one['later']['hops']:.0%}", str(one["moved"]),
            ]
            for one in trace["recorded"]["planners"]
        ]  # fmt: skip
        heads = ["planner", ">peak tokens / mean", ">peak experts", ">on its own window", ">devices a token",
                 ">rows sent", ">to other nodes", ">hops", ">experts moved"]  # fmt: skip
        parts.append(
            f"**{name}**: {trace['tokens']:,} tokens, {trace['steps']} decoding steps, {facts['num_experts']} experts, "
            f"{trace['top_k']} a token, {len(facts['layers'])} layers; domains {', '.join(facts['domains'])}.\n\n"
            + rows(heads, lines)
        )
    return "\n".join(parts)


def controls(content: dict[str, Any]) -> str:
    """What structure of the trace a planner lives on."""
    lines = []
    for name, trace in content["traces"].items():
        for kind in ("recorded", "shuffled", "independent"):
            found = {one["planner"]: one["later"] for one in trace[kind]["planners"]}
            lines.append([
                name, kind, *_pair(found, "fan-out", "fan_out", ".2f"), *_pair(found, "exflow", "hops", ".0%"),
                *_pair(found, "eplb", "peak_tokens", ".2f"),
            ])  # fmt: skip
    heads = ["trace", "", ">devices a token, in order", ">fan-out", ">hops, in order", ">exflow",
             ">peak tokens, in order", ">eplb"]  # fmt: skip
    return rows(heads, lines)


def _pair(found: dict[str, Any], planner: str, measure: str, form: str) -> tuple[str, str]:
    return f"{found['linear'][measure]:{form}}", f"{found[planner][measure]:{form}}"


def hops(content: dict[str, Any]) -> str:
    """ExFlow's claim."""
    lines = [
        [name, str(one["devices"]), f"{one['random_expectation']:.0%}", f"{one['linear']:.1%}", f"{one['exflow']:.1%}",
         f"{one['exflow'] / one['linear'] - 1:+.0%}", f"{one['exflow_on_its_own_window'] / one['linear'] - 1:+.0%}"]
        for name, trace in content["traces"].items()
        for one in trace["recorded"]["exflow"]
    ]  # fmt: skip
    return rows(["trace", ">devices", ">by chance", ">in order", ">exflow", ">change", ">on its own window"], lines)


def certificates(content: dict[str, Any]) -> str:
    """Descent beside the integer programme."""
    lines = [
        [str(one["layers"]), str(one["experts"]), str(one["devices"]), f"{one['descent']:.0f}", f"{one['best']:.0f}",
         f"{one['bound']:.0f}", one["status"]]
        for one in content["certificates"]
    ]  # fmt: skip
    return rows([">layers", ">experts", ">devices", ">hops by descent", ">best known", ">bound", "status"], lines)


def metro(content: dict[str, Any]) -> str:
    """Experts of the busiest device by rule."""
    lines = [
        [name, f"{1 + one['redundant'] / trace['facts']['num_experts']:.3f}", f"{one['hash']:.2f}",
         f"{one['order']:.2f}", f"{one['fewest']:.2f}", f"{one['fewest'] / one['hash'] - 1:+.0%}",
         f"{one['fewest_there']:.3f} / {one['optimum']:.3f}"]
        for name, trace in content["traces"].items()
        for one in trace["metro"]
    ]  # fmt: skip
    heads = ["trace", ">replication", ">by token hash", ">METRO", ">fewest replicas first", ">against hash",
             ">there / optimum"]  # fmt: skip
    return rows(heads, lines)


def sharing(content: dict[str, Any]) -> str:
    """Peak under XShare's caps."""
    lines = [
        [name, f"`{one['plan']}`", f"`{one['policy']}`", f"{one['natural_peak']:.2f}", f"{one['peak']:.2f}",
         f"{one['peak'] / one['natural_peak'] - 1:+.0%}", f"{one['natural_union']:.1f}", f"{one['union']:.1f}",
         f"{one['displaced']:.0%}"]
        for name, trace in content["traces"].items()
        for one in trace["sharing"]
    ]  # fmt: skip
    heads = ["trace", "placement", "policy", ">peak, native", ">shared", ">change", ">union, native", ">shared",
             ">displaced"]  # fmt: skip
    return rows(heads, lines)


def llep(content: dict[str, Any]) -> str:
    """Peak tokens and memory under skew."""
    first = next(iter(content["traces"].values()))["llep"]
    lines = [
        [f"{one['share']:.0%} into {one['experts']}", *_spilled(one)]
        for one in first["skewed"]
    ]  # fmt: skip
    lines += [[f"prompts of {name}, mean", *_spilled(trace["llep"]["prompts"])]
              for name, trace in content["traces"].items()]  # fmt: skip
    heads = ["tokens", ">peak / mean, experts at home", ">moved", ">peak memory, home over moved", ">experts sent"]
    return rows(heads, lines)


def _spilled(one: dict[str, float]) -> list[str]:
    return [f"{one['peak_over_mean']:.2f}", f"{one['peak_over_mean_moved']:.2f}", f"{one['memory_ratio']:.2f}",
            f"{one['moved_experts']:.1f}"]  # fmt: skip


def cost(content: dict[str, Any]) -> str:
    """The cost model on CPU ranks: its numbers, and how far it is off on steps that it was not fitted on."""
    model, machine = content["model"], content["machine"]
    words = {"max": "`max(a + b · experts, c + d · pairs)`", "sum of both": "`a + b · experts + d · pairs`"}
    lines = [
        [words.get(name, name), f"{one['median']:.0%}", f"{one['most']:.0%}", f"{one['r2']:.3f}"]
        for name, one in content["errors"].items()
        if "median" in one
    ]
    known, new = (len(content["experts_pairs_micros"][kind]) for kind in ("known", "new"))
    return (
        f"Fitted: `--cost {','.join(f'{model[name]:.0f}' for name in 'abcd')}`, on {known} measurements of "
        f"{content['ranks']} gloo ranks (float32 experts of {content['hidden_size']} × {content['width']}, "
        f"{content['experts_of_a_rank']} a rank, a thread each, {machine['cpu']}); below, {new} others:\n\n"
        + rows(["form", ">median error", ">largest error", ">R²"], lines)
    )


def quality(content: dict[str, Any]) -> str:
    """What caps per device cost, beside the peak that they lower."""
    facts, stock = content["arguments"], content["results"][0]
    lines = [
        [f"`{one['policy']}`" if one is not stock else "stock", f"{one['peak']['value']:.2f}",
         f"{one['peak']['value'] / stock['peak']['value'] - 1:+.0%}", f"{one['union']['value']:.1f}",
         f"{one['displaced_mass']['value']:.0%}", with_interval(one["kl"], 3),
         f"{one['top1_agreement']['value']:.1%}", f"{one['perplexity_ratio']['value']:.3f}"]
        for one in content["results"]
    ]  # fmt: skip
    heads = ["policy", ">peak experts of a device", ">change", ">of all", ">displaced", ">KL to stock, nats",
             ">same top-1", ">perplexity / stock"]  # fmt: skip
    return (
        f"Reference model, held-out text, {facts['devices']} devices with experts in order, {facts['batches']} batches "
        f"of {facts['batch']} sequences, {stock['tokens']:,} decoded tokens, seed {facts['seed']}:\n\n"
        + rows(heads, lines)
    )


TABLES = {
    "placement.json": {
        "placement planners": planners, "placement controls": controls, "placement hops": hops,
        "placement certificates": certificates, "placement metro": metro, "placement sharing": sharing,
        "placement llep": llep,
    },
    "placement-cost.json": {"placement cost": cost},
    "placement-quality.json": {"placement quality": quality},
}  # fmt: skip
